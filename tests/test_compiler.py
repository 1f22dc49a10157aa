"""Python's compiler as a judge: verdicts, prompts, what is paid."""

import pytest

from pipeline import compiler, corpus

PROMPT = "def f(x):\n    y = x\n"


@pytest.mark.parametrize(
    ("completion", "wanted"),
    [
        ("    return y + 1\n", "valid"),
        ("    y += 1\n", "valid"),
        ("    print(y)\n", "valid"),
        ("    raise ValueError\n", "valid"),
        ("    yield y\n", "valid"),
        ("    yield from y\n", "valid"),
        ("\nasync def g():\n    await f(3)\n", "valid"),
        ("    assert y\n", "valid"),
        ("    del y\n", "valid"),
        ("    try:\n        y = 2\n    finally:\n        pass\n", "valid"),
        ("    [print(y)]\n", "valid"),
        ("    z: int = 3\n", "valid"),
        ("\nlimit = 3\n", "valid"),
        ("\ndef g():\n    return 1\n", "valid"),
        ("    if y:\n        y = 2\n", "valid"),
        ("", "trivial"),
        ("\n\n", "trivial"),
        ("    # y = 3\n", "trivial"),
        ("    pass\n", "trivial"),
        ("    ...\n", "trivial"),
        ('    """y = 3"""\n', "trivial"),
        ("    y\n", "trivial"),
        ("    3\n", "trivial"),
        ("    return\n", "trivial"),
        ("    z: int\n", "trivial"),
        ("    import os\n", "trivial"),
        ("\nfrom os import path\n", "trivial"),
        ("    global z\n", "trivial"),
        ("\nclass A:\n    pass\n", "trivial"),
        ("\ndef g():\n    '''Nothing.'''\n", "trivial"),
        ("    while y:\n        break\n", "trivial"),
        ("    for y in range(3):\n        continue\n", "trivial"),
        ("    with open(y):\n        pass\n", "trivial"),
        ("    try:\n        pass\n    finally:\n        pass\n", "trivial"),
        ("    try:\n        pass\n    except* OSError:\n        pass\n", "trivial"),
        ("    match y:\n        case 3:\n            pass\n", "trivial"),
        ("    def g():\n        nonlocal y\n", "trivial"),
        ("\nasync def g():\n    async for y in f(3):\n        pass\n", "trivial"),
        ("\nasync def g():\n    async with f(3):\n        pass\n", "trivial"),
        ("  return y\n", "invalid"),
        ("    return y +\n", "invalid"),
        ("    if y:\n", "invalid"),
        ("    print('\n", "invalid"),
        ("    y = '\0'\n", "invalid"),
        ("    y = " + 300 * "(" + 300 * ")" + "\n", "invalid"),
        ("    y = '\ud800'\n", "invalid"),
        ("    y = " + 100_000 * "-" + "1\n", "invalid"),
    ],
)
def test_verdicts(completion, wanted):
    assert compiler.verdict(PROMPT, completion) == wanted


def test_what_the_prompt_does_is_not_the_completions_merit():
    assert compiler.verdict("import os\nprint(os)\n", "# done\n") == "trivial"
    assert compiler.verdict("x = (1 +\n", "2)\n") == "trivial"  # begun in the prompt
    assert compiler.verdict("x = 1\r\ny = 2\rz = 3\n", "# done\n") == "trivial"
    assert compiler.verdict("x = 1\n\f\n", "y = 2\n") == "valid"


def test_completions_are_never_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reward = compiler.CompilerReward()
    assert reward("import pathlib\n", ["pathlib.Path('made').touch()\n"]) == [1.0]
    assert not list(tmp_path.iterdir())


def test_a_text_is_paid_once():
    reward = compiler.CompilerReward()
    assert reward(PROMPT, ["    return 1\n", "    return 1\n", "    return 2\n"]) == [1, 0, 1]
    assert reward(PROMPT, ["\n    return   1\n\n", "    return 3\n", "    pass\n"]) == [0, 1, 0]
    assert reward("x = 1\n", ["return 1\n", "x = 3\n"]) == [0, 1]
    resumed = compiler.CompilerReward(reward.paid)
    assert resumed(PROMPT, ["    return 2\n", "    return 4\n"]) == [0, 1]
    assert compiler.CompilerReward(memory=False)(PROMPT, 2 * ["    return 1\n"]) == [1, 1]


@pytest.mark.filterwarnings("error")
def test_the_compilers_warnings_about_a_completion_are_not_shown():
    assert compiler.verdict(PROMPT, "    return '\\d'\n") == "valid"


def test_a_completion_that_begins_well_earns_a_first_step_once():
    reward = compiler.CompilerReward(first_step=0.25)
    begun = ["    y = 1\n    if y:\n", "    y = 1\n    for (\n", "    pass\n    if (\n"]
    assert reward(PROMPT, begun) == [0.25, 0, 0]  # one beginning, once; `pass` does nothing
    assert reward(PROMPT, ["    y = 1\n"]) == [1]  # whole, it is another text
    assert reward(PROMPT, ["    y = 2\n    y = 3\n    )\n", "    y = 2\n    (\n"]) == [0.25, 0.25]
    resumed = compiler.CompilerReward(reward.paid, first_step=0.25)
    assert resumed(PROMPT, ["    y = 1\n    while\n", "    y = 4\n    while\n"]) == [0, 0.25]
    assert compiler.CompilerReward(memory=False)(PROMPT, begun[:2]) == [0.3, 0.3]
    assert compiler.valid_beginning(PROMPT, "    y = 2\n    y = 3\n    )\n") == (
        "    y = 2\n    y = 3\n"
    )
    assert compiler.valid_beginning(PROMPT, "    )\n    y = 3\n") == ""


def test_completions_are_cut_to_whole_lines_unless_they_ended():
    assert compiler.whole_lines("a = 1\nb = ") == "a = 1\n"
    assert compiler.whole_lines("a = 1") == ""
    assert compiler.whole_lines("a = 1\nb = 2" + corpus.SEPARATOR) == "a = 1\nb = 2"


def test_shares_by_hand():
    texts = ["    return 1\n", "    return 1\n", "    pass\n", "  x\n"]
    assert compiler.shares(4 * [PROMPT], texts) == {
        "valid": 0.5, "trivial": 0.25, "invalid": 0.25, "distinct": 0.75, "distinct_valid": 0.5,
    }
    assert compiler.shares([PROMPT], ["    pass\n"])["distinct_valid"] == 0
    assert compiler.shares([PROMPT], ["    return 1\n"])["distinct_valid"] == 1
    with pytest.raises(ValueError):
        compiler.shares([PROMPT, PROMPT], ["    pass\n"])


def test_prompts_are_python_and_end_at_a_line_end():
    documents = corpus.load_corpus().test[:6]
    tokenizer = corpus.train_tokenizer(documents, 600)
    documents = [*documents, corpus.Document("broken.py", "def f(:\n" * 50)]
    prompts = compiler.line_end_prompts(tokenizer, documents, 16, 40)
    assert len(prompts) > 10
    separator = tokenizer.token_to_id(corpus.SEPARATOR)
    whole, place = "".join(d.text for d in documents), 0
    for prompt in prompts:
        assert prompt[0] == separator and separator not in prompt[1:]
        assert 16 <= len(prompt) <= 40
        text = tokenizer.decode(prompt)
        assert text.endswith("\n") and compiler.parsed(text) is not None
        place = whole.index(text, place) + len(text)  # in order, not overlapping


def test_samples_follow_the_seed_and_repeat_nothing():
    one, again, other = (compiler.sample_of(range(99), 9, seed) for seed in (0, 0, 1))
    assert one == again != other and compiler.sample_of(range(99), 9) == one
    assert len(set(one)) == 9 and sorted(compiler.sample_of(range(5), 9)) == [*range(5)]


CUT = "    y = 3\n)\n# done\n"  # the end of a function, as a piece of a file may begin


@pytest.mark.parametrize(
    ("text", "shortest", "longest", "wanted"),
    [
        # separator and "a = 1\n": 7 tokens; longer prompts are taken where they fit
        ("a = 1\nb = 2\nc = 3\n", 7, 7, ["a = 1\n", "b = 2\n", "c = 3\n"]),
        ("a = 1\nb = 2\nc = 3\n", 8, 14, ["a = 1\nb = 2\n"]),
        ("a = 1\nb = 2\nc = 3\n", 1, 13, ["a = 1\nb = 2\n", "c = 3\n"]),
        ("a = 1\nb = 2\n", 8, 12, []),
        ("a = 1\nb = 2", 1, 99, ["a = 1\n"]),  # the last line has no end
        ("a = 1\r\nb = 2\r", 1, 99, ["a = 1\nb = 2\n"]),
        ("a = (\n1)\nb\n", 1, 9, ["b\n"]),  # the first lines alone are not Python
        ("@f\n@g\ndef h():\n    pass\n", 1, 99, ["@f\n@g\ndef h():\n    pass\n"]),
        ("# one\na\n# two\nb\n", 1, 5, ["a\n", "b\n"]),  # no comment in front
        ("if a:\n    b\n    c\n", 1, 13, ["if a:\n    b\n"]),  # ends within the statement
        (CUT + "a = 1\nb = 2\ndef f(", 1, 99, ["a = 1\nb = 2\n"]),
        (CUT, 1, 99, []),
        (CUT + "a = 1\n", 1, 99, []),  # a piece: its last statement may go on
    ],
)
def test_prompts_by_hand(text, shortest, longest, wanted):
    tokenizer = corpus.train_tokenizer([corpus.Document("a", "a")], 257)  # single bytes
    prompts = compiler.line_end_prompts(
        tokenizer, [corpus.Document("a.py", text)], shortest, longest
    )
    assert prompts == [[0, *corpus.encode(tokenizer, each)] for each in wanted]


def test_prompts_have_12_to_32_tokens_unless_told():
    tokenizer = corpus.train_tokenizer([corpus.Document("a", "a")], 257)
    documents = [corpus.Document("a.py", f"{name}\n") for name in map("a".__mul__, range(1, 50))]
    lengths = [len(prompt) for prompt in compiler.line_end_prompts(tokenizer, documents)]
    assert lengths == [*range(12, 33)]


def test_prompts_come_from_pieces_of_files_too():
    text = "".join(f"def f_{i}(x):\n    return x + {i}\n" for i in range(60))
    tokenizer = corpus.train_tokenizer([corpus.Document("a.py", text)], 300)
    piece = corpus.Document("a.py#1", text[text.index("    return x + 3") : text.rindex("    ")])
    assert compiler.parsed(piece.text) is None
    prompts = compiler.line_end_prompts(tokenizer, [piece], 12, 32)
    assert len(prompts) > 20 and all(tokenizer.decode(p) in piece.text for p in prompts)
    assert compiler.line_end_prompts(tokenizer, [corpus.Document("x", "a b c\n" * 99)]) == []
