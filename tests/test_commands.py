"""The command line: flags, help, and mistakes in one line that write nothing."""

import pathlib
from dataclasses import dataclass

import pytest

import deepseek_full_model as full
from docs import transcripts
from lesson import Demonstration, setting
from moe_coded import TopKRouter
from pipeline import commands
from pipeline.commands import CheckOptions, Command, build_parser

ROOT = pathlib.Path(__file__).parent.parent


@dataclass
class OfARun:
    steps: int | None = setting(None, "budget in steps")
    minutes: float | None = setting(None, "budget in minutes")
    width: int = setting(8, "how wide")


@dataclass
class OfACheckpoint:
    checkpoint: str = setting(metavar="DIR")
    prompt: str = setting("", "what to say")


@pytest.fixture
def call(monkeypatch):
    """call(*arguments) → what the work of the command that they name was given."""
    given = []
    whole = Command("", OfARun, lambda *got: given.extend(got), run_class=list)
    table = {
        "learn": whole._replace(help="goes on", run_class=dict),
        "prove": Command("proves", CheckOptions, lambda *got: given.extend(got)),
        "say": Command("says", OfACheckpoint, lambda *got: given.extend(got)),
    }
    monkeypatch.setattr(commands, "open_run", lambda arguments, kind: (vars(arguments), kind))
    monkeypatch.setattr(commands, "load_with_tokenizer", lambda *got: got)

    def run(*arguments):
        given.clear()
        commands.run_command([*arguments, "--device", "cpu"], "What it is.\n  Run: so", tuple,
                             whole, table)
        return list(given)

    return run


def test_a_run_gets_the_flags_given_and_the_directory_to_go_on_with(call):
    ((flags, kind),) = call("--steps", "3")
    assert kind is list and flags.pop("command").run_class is list
    assert flags == dict(steps=3, device="cpu", resume=None)  # others stay absent
    ((flags, kind),) = call("--out", "a", "learn", "--minutes", "2", "--resume", "b")
    assert kind is dict and flags.pop("command").help == "goes on"
    assert flags == dict(out="a", minutes=2.0, resume="b", device="cpu")


def test_other_commands_get_a_demonstration_or_a_checkpoint(call):
    (demo,) = call("prove", "--seed", "4")
    assert type(demo) is Demonstration and (demo.device, demo.seed) == ("cpu", 4)
    assert call("prove")[0].seed == 0
    loaded, options = call("say", "--checkpoint", "a", "--prompt", "b")
    assert loaded == (tuple, "a", "cpu") and options == OfACheckpoint("a", "b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "3", "--minutes", "2"], "--minutes: not allowed with argument --steps"),
        (["learn", "--minutes", "2", "--steps", "3"], "not allowed with"),
        (["--resume=a"], "unrecognized arguments"),  # the whole job always starts
        (["say", "--checkpoint", "a", "--resume", "b"], "unrecognized arguments"),
        (["say", "--checkpoint", "a", "--out", "b"], "unrecognized arguments"),
        (["say"], "required: --checkpoint"),
        (["sing"], "invalid choice: 'sing'"),
    ],
)
def test_flags_that_a_command_does_not_have_are_one_line(call, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_info:
        call(*arguments)
    error = capsys.readouterr().err
    assert exit_info.value.code == 2 and message in error and error.count("\n") == 1


def test_help_lists_the_commands_and_keeps_the_lines_of_its_text(call, capsys):
    with pytest.raises(SystemExit):
        call("--help")
    text = capsys.readouterr().out
    for part in ("What it is.\n  Run: so\n", "goes on", "proves", "says", "--out RUN", "commands"):
        assert part in text
    with pytest.raises(SystemExit):
        call("learn", "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "--resume RUN directory" in text and text.count("--steps STEPS") >= 1
    assert "how wide (default: 8)" in text


def test_flags_before_and_after_the_command_count():
    parser = build_parser("", full.WHOLE, full.COMMANDS)
    arguments = parser.parse_args(["--steps", "20", "train", "--seed", "3"])
    assert arguments.command is full.COMMANDS["train"]
    assert (arguments.steps, arguments.seed, arguments.resume) == (20, 3, None)


@pytest.mark.integration
def test_help():
    with pytest.raises(SystemExit) as exit_info:
        full.main(["--help"])
    assert exit_info.value.code == 0


@pytest.mark.integration
def test_check_proves_the_model_without_a_checkpoint(capsys):
    full.main(["check", "--device", "cpu"])
    printed = capsys.readouterr().out
    difference = transcripts.difference("deepseek_full_model.py", printed)
    assert not difference, difference
    assert printed.count("  ok\n") == 10
    for figure in ("671,026,404,352", "36,625,603,584", "11,610,067,968", "70,272", "ln W 8.318"):
        assert figure in printed


@pytest.mark.integration
def test_check_exits_with_1_where_a_size_is_wrong_and_a_bias_stays(capsys, monkeypatch):
    monkeypatch.setattr(full, "cache_elements", lambda config: 1)
    monkeypatch.setattr(TopKRouter, "update_bias", lambda router, load, gamma: None)
    with pytest.raises(SystemExit) as exit_info:
        full.main(["check", "--seed", "1", "--device", "cpu"])
    assert exit_info.value.code == 1
    printed, error = capsys.readouterr()
    assert "cpu · torch.float32 · seed 1" in printed
    assert error == "FAILED: V3: bytes of BF16 cache a token; biases move by γ against the load\n"


@pytest.mark.integration
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere.txt"], "No such file"),
        (["--data", "empty.txt"], "empty.txt: the file holds no text"),
        (["--data", "short.txt"], "the text is too short"),
        (["--steps", "0"], "the training budget must be above 0, got 0"),
        (["--batch-size", "0", "--steps", "1"], "--batch-size=0 must be at least 1"),
        (["--seed", "-1", "--steps", "1"], "--seed=-1 must be at least 0"),
        (["--gamma", "nan", "--steps", "1"], "--gamma=nan must be at least 0"),
        (["--precision", "fp8", "--steps", "1"], "invalid choice: 'fp8'"),
        (["--optimizer", "sgd", "--steps", "1"], "invalid choice: 'sgd'"),
        (["--learning-rate", "0", "--steps", "1"], "--learning-rate=0.0 must be a number above 0"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--minutes", "inf"], "the training budget must be above 0, got inf"),
        (["train", "--resume", "run", "--seed", "3"], "run holds no training run"),
        (
            ["--config", str(ROOT / "configs" / "deepseek_v3.json"), "--steps", "1"],
            "a quantised model cannot be trained",
        ),
        (["--minutes", "nan"], "the training budget must be above 0, got nan"),
        (["--out", "short.txt", "--steps", "1"], "--out short.txt is a file"),
        (["--sequence-length", "9999", "--steps", "1"], "--sequence-length=9999 exceeds"),
        (["--config", "nowhere.json", "--steps", "1"], "nowhere.json cannot be read"),
        (["train", "--resume", "nowhere"], "nowhere holds no training run"),
        (["evaluate", "--checkpoint", "nowhere"], "nowhere is not a checkpoint"),
        (["generate", "--checkpoint", "nowhere"], "nowhere is not a checkpoint"),
        (["--device", "abacus"], "device 'abacus' is not available"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line_and_write_nothing(
    arguments, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("a\nb\nc\nd\n")
    with pytest.raises(SystemExit) as exit_info:
        full.main(arguments)
    error = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert {path.name for path in tmp_path.iterdir()} == {"empty.txt", "short.txt"}
