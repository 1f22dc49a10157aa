"""Python's own compiler judges completions. Here are its verdicts, the rewards and the prompts.

No completion is ever executed. It only goes through `ast.parse`. This does not see an error that
only a later stage of the compiler finds, such as a `return` outside a function.
"""

import ast
import hashlib
import random
import warnings
from collections import Counter

from pipeline.corpus import SEPARATOR, encode

# Statements that do nothing by themselves. An import only brings in names.
IDLE = (
    ast.Pass, ast.Import, ast.ImportFrom, ast.Global, ast.Nonlocal, ast.Break, ast.Continue,
)
# Statements that are judged by the statements in them.
COMPOUND = (
    ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.If, ast.For, ast.AsyncFor, ast.While,
    ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match,
)
ACTS = (ast.Call, ast.Await, ast.Yield, ast.YieldFrom)


def parsed(text):
    """The syntax tree of a text, or None if it is not Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in strings, say
            return ast.parse(text)
    # A syntax error; a null byte or lone surrogate; brackets too deep for the parser.
    except (SyntaxError, ValueError, RecursionError, MemoryError, SystemError):
        return None


def verdict(prompt, completion):
    """Judges `completion` after `prompt`: "valid", "trivial" or "invalid".

    Valid: together they are Python, and a statement that does something begins after
    the prompt: an assignment, `return` with a value, `raise`, `assert`, `del`, a call, `await`
    or `yield`. Trivial: it is Python, but adds only comments, blank lines, strings and other
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
    """A text up to its last line's end; one that ended by itself (with a separator) stays whole."""
    if text.endswith(SEPARATOR):
        return text.removesuffix(SEPARATOR)
    return text[: text.rfind("\n") + 1]


def valid_beginning(prompt, completion):
    """The longest valid part that consists of a completion's first lines; "" if there is none."""
    lines = completion.splitlines(keepends=True)
    parts = ("".join(lines[:count]) for count in range(len(lines), 0, -1))
    return next((part for part in parts if verdict(prompt, part) == "valid"), "")


class CompilerReward:
    """1 for a valid completion, `first_step` if only its first line or lines are valid, else 0.

    A weak model hardly ever writes a valid completion: its last line often leaves a bracket or a
    block open. So rewards of only 0 and 1 would teach it little. It writes a valid first line more
    often, and can learn from that. The report counts only valid completions.

    Each text is paid once in a run; for `first_step`, the text is the valid beginning. `paid`
    remembers the texts. Without this memory, a short line that is valid after any prompt earns
    a reward every time, and the policy writes nothing else.
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
        """Whether the text was paid before; marks it as paid. White space makes no difference."""
        words = text.split() if whole else ["begins", *text.split()]
        name = hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]
        was = name in self.paid
        self.paid.add(name)
        return was


def line_end_prompts(tokenizer, documents, shortest=12, longest=32):
    """Prompts from Python texts, as token ids with the separator in front.

    A prompt begins with an unindented statement, ends at the end of a line and is Python by
    itself. It has `shortest` to `longest` tokens. Prompts do not overlap and keep the texts' order.
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
    """A text from its first unindented line of code up to, but without, the last one."""
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
