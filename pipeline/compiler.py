"""Python's own compiler as a judge: prompts that end at a line's end, and what completions earn.

Nothing is ever executed: a completion goes through `ast.parse` and no further, so what only later
stages of the compiler refuse, a `return` outside a function, say, passes.
"""

import ast
import hashlib
import random
import warnings
from collections import Counter

from pipeline.corpus import SEPARATOR, encode

# What does nothing by itself. An import brings in names and leaves them unused.
IDLE = (
    ast.Pass, ast.Import, ast.ImportFrom, ast.Global, ast.Nonlocal, ast.Break, ast.Continue,
)
# What counts by the statements in it.
COMPOUND = (
    ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.If, ast.For, ast.AsyncFor, ast.While,
    ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match,
)
ACTS = (ast.Call, ast.Await, ast.Yield, ast.YieldFrom)


def parsed(text):
    """The syntax tree of a text, or None if it is no Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in strings, say
            return ast.parse(text)
    # A syntax error; a null byte or lone surrogate; brackets too deep for the parser.
    except (SyntaxError, ValueError, RecursionError, MemoryError, SystemError):
        return None


def verdict(prompt, completion):
    """ "valid", "trivial" or "invalid": what `completion` is as the rest of the text `prompt`.

    Valid: prompt and completion together are Python, and a statement begins behind the prompt that
    does something: an assignment, `return` with a value, `raise`, `assert`, `del`, a call, `await`
    or `yield`. Trivial: Python, but all that is added are comments, blank lines, strings and other
    bare values, `pass`, `...`, `break`, `continue`, `return`, imports, `global`, or definitions
    and branches with nothing else in them (calls in their heads do not count).
    """
    tree = parsed(prompt + completion)
    if tree is None:
        return "invalid"
    lines = prompt.replace("\r\n", "\n").replace("\r", "\n").count("\n")
    added = (n for n in ast.walk(tree) if isinstance(n, ast.stmt) and n.lineno > lines)
    return "valid" if any(map(does_something, added)) else "trivial"


def does_something(statement):
    if isinstance(statement, IDLE + COMPOUND):
        return False
    if isinstance(statement, ast.Return):
        return statement.value is not None
    if isinstance(statement, ast.AnnAssign):
        return statement.value is not None
    if isinstance(statement, ast.Expr):
        return any(isinstance(node, ACTS) for node in ast.walk(statement))
    return True


def whole_lines(text):
    """A text up to its last line's end; one that ended by itself (a separator behind it) whole."""
    if text.endswith(SEPARATOR):
        return text.removesuffix(SEPARATOR)
    return text[: text.rfind("\n") + 1]


def valid_beginning(prompt, completion):
    """The longest valid part of a completion that is some of its first lines, "" if none is."""
    lines = completion.splitlines(keepends=True)
    parts = ("".join(lines[:count]) for count in range(len(lines), 0, -1))
    return next((part for part in parts if verdict(prompt, part) == "valid"), "")


class CompilerReward:
    """1 for a valid completion, `first_step` for one that only begins with a valid line or more.

    A weak model hardly ever writes a valid completion, and so would never learn from 0 and 1 what
    is better: it cuts a bracket or a block open in its last line. Its first line is a step that it
    can find. What is reported is the share of valid completions alone.

    Each text is paid once in a run, of a completion that only begins well its beginning; `paid`
    remembers. Without that memory one short line, good after any prompt, would be worth as much the
    thousandth time as the first, and the policy would say nothing else.
    """

    def __init__(self, paid=(), memory=True, first_step=0.3):
        self.paid, self.memory, self.first_step = set(paid), memory, first_step

    def __call__(self, prompt, completions):
        return [self._one(prompt, completion) for completion in completions]

    def _one(self, prompt, completion):
        beginning = valid_beginning(prompt, completion)
        whole = beginning == completion
        if not beginning or self.memory and self._paid(beginning, whole):
            return 0.0
        return 1.0 if whole else self.first_step

    def _paid(self, text, whole):
        """Whether it was; from now on it is. By its words: blank lines do not make it new."""
        words = text.split() if whole else ["begins", *text.split()]
        name = hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]
        was = name in self.paid
        self.paid.add(name)
        return was


def line_end_prompts(tokenizer, documents, shortest=12, longest=32):
    """Prompts from Python texts, as token ids with the separator in front.

    A prompt begins with a statement at the margin, goes to the end of a line and is Python by
    itself; it has `shortest` to `longest` tokens, and they do not overlap. In the texts' order.
    """
    prompts = []
    for document in documents:
        text = document.text.replace("\r\n", "\n").replace("\r", "\n")
        if parsed(text) is None:  # a piece of a file, cut anywhere
            text = between_margins(text)
        tree, lines = parsed(text), text.split("\n")
        lines = [line + "\n" for line in lines[:-1]]
        free = 0  # the first line that no prompt has yet
        for statement in [] if tree is None else tree.body:
            decorators = getattr(statement, "decorator_list", [])
            first = min(node.lineno for node in [statement, *decorators]) - 1
            if first < free:
                continue
            found = None
            for end in range(first + 1, len(lines) + 1):
                prompt = "".join(lines[first:end])
                ids = encode(tokenizer, prompt)
                if len(ids) >= longest:
                    break
                if len(ids) >= shortest - 1 and parsed(prompt) is not None:
                    found, free = ids, end
            if found is not None:
                prompts.append([tokenizer.token_to_id(SEPARATOR), *found])
    return prompts


def between_margins(text):
    """A text from its first line that begins at the margin up to the last such line."""
    lines = text.splitlines(keepends=True)
    starts = [i for i, line in enumerate(lines) if line[0] not in " \t\r\n#)]}"]
    return "".join(lines[starts[0] : starts[-1]]) if starts else ""


def sample_of(items, count, seed=0):
    """At most `count` of the items, drawn with a seed."""
    return random.Random(seed).sample(items, min(count, len(items)))


def shares(prompts, completions):
    """{"valid", "trivial", "invalid", "distinct", "distinct_valid"}: shares of the completions.

    distinct: different texts / texts; distinct_valid: the same among the valid ones.
    """
    verdicts = [verdict(p, c) for p, c in zip(prompts, completions, strict=True)]
    counts = Counter(verdicts)
    valid = [c for c, v in zip(completions, verdicts, strict=True) if v == "valid"]
    return {
        **{kind: counts[kind] / len(completions) for kind in ("valid", "trivial", "invalid")},
        "distinct": len(set(completions)) / len(completions),
        "distinct_valid": len(set(valid)) / max(1, len(valid)),
    }
