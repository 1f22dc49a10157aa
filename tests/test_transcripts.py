"""The transcripts: what is hidden, what is compared, and the command that writes them."""

import pathlib
import types

import pytest

from docs import transcripts
from docs.transcripts import PHASES, ROOT, difference, mask, masked_figures, path_of
from lesson import Demonstration

HEADER = "mla_coded.py · torch 2.13.0+cpu · cpu · torch.float32 · seed 0"


def check_line(figure="(2, 5, 16) → (2, 5, 8)", shape="(B, T, D)", verdict="ok"):
    return f"  {'loops = all at once, capacity 0.5':<52} {shape:<26} {figure:<42} {verdict}"


PRINTED = "\n".join([
    HEADER,
    check_line(),
    check_line("12 dropped, error 0.1353"),
    check_line("largest difference 1.2e-07"),
    "  the last note, loss 2.5",
    "Try changing:",
    "  --gamma 0.2: does it settle?",
]) + "\n"


# %% What the mask keeps
@pytest.mark.parametrize("line", [
    check_line(),
    check_line(verdict="FAILED"),
    check_line("1,966,080 numbers"),
    check_line("token 9 changes rows from [8, 7] on"),
    check_line("(MHA: 576)", shape="bytes per token"),
    "  mask of 2 queries over 4 keys: [1, 1, 1, 0]",
    "  256 numbers in 3 steps of 128 sums",
])
def test_shapes_counts_verdicts_and_words_stay(line):
    assert mask(line) == line
    assert mask(line, trained="").split() == line.split()  # from the first line on


def test_the_words_of_a_check_stay(capsys):
    demo = Demonstration("x.py", "cpu", 0)
    demo.check("x" * 47 + " 0.25", "0.25", "0.25", True)
    words = Demonstration.WIDTHS[0]
    line = capsys.readouterr().out.splitlines()[1]
    assert mask(line) == line[: 2 + words] + line[2 + words :].replace("0.25", "0.2#")


def test_the_header_keeps_script_type_and_seed():
    assert mask(HEADER) == "mla_coded.py · torch # · # · torch.float32 · seed 0"


def test_nothing_is_hidden_from_try_changing_on():
    text = "Try changing:\n  --gamma 0.2 for 20 seconds"
    assert mask(text, trained="gamma") == text
    assert mask("  0.25\n" + text) == "  0.2#\n" + text


# %% What it hides
@pytest.mark.parametrize(("text", "hidden"), [
    ("done in 12.3 s", "done in # s"),
    ("in 4:36 minutes", "in # minutes"),
    ("took 35 ms", "took # ms"),
    ("3,883 tokens/s at first", "# tokens/s at first"),
    ("1,200 tokens a second", "# tokens a second"),
    ("201 GFLOP/s on 2 threads", "# GFLOP/s on # threads"),
    ("largest difference 1.2e-07", "largest difference #"),
    ("off 4e-08, off 0e+00", "off #, off #"),
])
@pytest.mark.parametrize("loose", [False, True])
def test_times_rates_and_rounding_errors_are_hidden(text, hidden, loose):
    assert masked_figures(text, loose) == hidden


@pytest.mark.parametrize(("text", "strict", "loose"), [
    ("0.135", "0.13#", "#.###"),
    ("-0.13525", "-0.13###", "#.#####"),
    ("+2.5%", "+2.#%", "#.#%"),
    ("12.34 GFLOP", "12.3# GFLOP", "#.## GFLOP"),
    ("12 of 20 accepted", "12 of 20 accepted", "# of # accepted"),
    ("12+34=54 → 12+34=None (right: 64)", "12+34=54 → 12+34=None (right: 64)",
     "12+34=# → 12+34=# (right: 64)"),
    ("at   10 steps", "at   10 steps", "at  10 steps"),
])
def test_training_hides_more(text, strict, loose):
    assert (masked_figures(text, False), masked_figures(text, True)) == (strict, loose)


def test_figures_are_those_of_training_from_the_line_with_the_word_on():
    text = "  before 0.135\n  the busiest 0.135\n  after 0.135"
    assert mask(text, "busiest") == "  before 0.13#\n  the busiest #.###\n  after #.###"
    assert mask(text) == text.replace("0.135", "0.13#")


# %% What makes the comparison fail
@pytest.fixture
def stored(tmp_path, monkeypatch):
    """Phase 4's transcript is `PRINTED`."""
    monkeypatch.setattr(transcripts, "FOLDER", tmp_path)
    path = tmp_path / "mla.txt"
    path.write_text(f"$ python mla_coded.py\n{PRINTED}", encoding="utf-8")
    return path


def test_another_machine_makes_no_difference(stored):
    now = PRINTED.replace("2.13.0+cpu", "2.14.1").replace("1.2e-07", "0.0e+00")
    now = now.replace("0.1353", "0.1349").replace("loss 2.5", "loss 2.6")
    assert now != PRINTED and difference("mla_coded.py", now) == ""


CHANGES = {
    "a failed check": (" ok", " FAILED"),
    "a shape": ("(2, 5, 8)", "(2, 5, 9)"),
    "the letters of a shape": ("(B, T, D)", "(B, T, V)"),
    "a count": ("12 dropped", "13 dropped"),
    "a figure": ("0.1353", "0.2353"),
    "a word": ("loops", "a loop"),
    "a missing line": ("  the last note, loss 2.5\n", ""),
    "a new line": ("Try changing:", "  one more note\nTry changing:"),
    "an experiment": ("--gamma 0.2", "--gamma 0.3"),
    "the type": ("torch.float32", "torch.float64"),
    "no number": ("0.1353", "nan"),
    "nothing at all": (PRINTED, ""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_a_difference(stored, change):
    old, new = CHANGES[change]
    assert old in PRINTED
    message = difference("mla_coded.py", PRINTED.replace(old, new, 1))
    assert message.endswith("python docs/transcripts.py mla_coded.py")


def test_the_difference_shows_both_lines(stored):
    message = difference("mla_coded.py", PRINTED.replace("12 dropped", "13 dropped"))
    removed, added = message.splitlines()[3:-1]  # after the two names and the place
    assert removed.startswith("- ") and "12 dropped, error 0.13##" in removed
    assert added.startswith("+ ") and "13 dropped, error 0.13##" in added


def test_the_difference_is_short(stored):
    message = difference("mla_coded.py", "other text\n" * 100)
    assert len(message.splitlines()) == 22 and "more lines" in message


def test_a_missing_transcript_is_a_difference(stored):
    stored.unlink()
    assert "python docs/transcripts.py mla_coded.py" in difference("mla_coded.py", PRINTED)


def test_what_an_accelerator_printed_is_not_compared(stored):
    for device in ("cuda", "cuda:1", "mps"):
        assert difference("mla_coded.py", HEADER.replace("· cpu ·", f"· {device} ·")) == ""
    assert difference("mla_coded.py", HEADER)


@pytest.fixture
def run_script():
    """In place of a run: phase 4's transcript without its first check."""
    _, header, _, *others = path_of("mla_coded.py").read_text(encoding="utf-8").splitlines(True)
    process = types.SimpleNamespace(returncode=0, stdout=header + "".join(others), stderr="")
    return lambda *command: process


def test_a_script_that_does_not_print_its_transcript_fails(check_script):
    with pytest.raises(AssertionError, match="renew it: python docs/transcripts.py mla_coded.py"):
        check_script("mla_coded.py", ["--context", 0], "--context=0")


# %% The stored ones
def test_every_phase_has_a_transcript_and_there_are_no_others():
    assert PHASES.keys() == {path.name for path in ROOT.glob("*.py")}
    names = {path.name for path in transcripts.FOLDER.iterdir()}
    assert names == {path_of(script).name for script in PHASES}


@pytest.mark.parametrize("script", [name for name, phase in PHASES.items() if phase.trained])
def test_a_line_says_where_training_begins(script):
    word, text = PHASES[script].trained, path_of(script).read_text(encoding="utf-8")
    assert word in text, f"docs/transcripts.py: no line of {script} has the word {word!r} any more"
    assert mask(text, word) != mask(text)


# %% The command
@pytest.fixture
def runs(tmp_path, monkeypatch):
    """The commands that were run, with a finished process in place of each; a folder to write."""
    runs = types.SimpleNamespace(commands=[], folder=tmp_path / "written", returncode=0)

    def run(*command, folder):
        assert list(pathlib.Path(folder).iterdir()) == []
        runs.commands.append(command)
        return types.SimpleNamespace(returncode=runs.returncode, stdout=PRINTED, stderr="a mistake")

    monkeypatch.setattr(transcripts, "FOLDER", runs.folder)
    monkeypatch.setattr(transcripts, "run", run)
    return runs


def test_the_command_writes_the_named_transcript(runs):
    transcripts.main(["grpo_coded.py"])
    assert runs.commands == [("grpo_coded.py", "--quick", "--device", "cpu")]
    (path,) = runs.folder.iterdir()
    assert path.name == "grpo.txt"
    assert path.read_text(encoding="utf-8") == f"$ python grpo_coded.py --quick\n{PRINTED}"
    assert difference("grpo_coded.py", PRINTED) == ""


def test_the_command_writes_all_transcripts(runs):
    transcripts.main([])
    assert [script for script, *_ in runs.commands] == list(PHASES)
    names = {path.name for path in runs.folder.iterdir()}
    assert {"self_attention.txt", "full_model.txt"} < names and len(names) == len(PHASES)


def test_a_script_that_fails_leaves_its_transcript(runs):
    transcripts.main(["mla_coded.py"])
    runs.returncode = 1
    before = path_of("mla_coded.py").read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match="mla_coded.py failed with status 1.*\na mistake"):
        transcripts.main(["mla_coded.py", "moe_coded.py"])
    assert path_of("mla_coded.py").read_text(encoding="utf-8") == before
    assert len(runs.commands) == 2


def test_an_unknown_script_is_refused(runs, capsys):
    with pytest.raises(SystemExit):
        transcripts.main(["mla_coded.py", "mla.py"])
    assert "mla.py: must be among self_attention_coded.py" in capsys.readouterr().err
    assert runs.commands == []
