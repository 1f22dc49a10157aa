"""Alignment: prompts, resuming, what it reports and refuses."""

import signal

import pytest
import torch

import deepseek_full_model as full
from deepseek_full_model import AlignmentRun
from pipeline import checkpoint, compiler, corpus
from pipeline.aligning import AlignOptions, NoPrompts
from pipeline.run import read_metrics


@pytest.fixture
def any_line_is_valid(monkeypatch):
    """A judge whose reward an untrained model finds, in half of its texts."""
    monkeypatch.setattr(compiler, "whole_lines", lambda text: text)
    monkeypatch.setattr(
        compiler, "verdict", lambda prompt, text: "valid" if len(text) % 2 else "invalid"
    )


ALIGN = dict(prompts=2, group_size=4, max_new_tokens=12, learning_rate=1e-3)
SMALL = ["--prompts", "2", "--group-size", "4", "--max-new-tokens", "12", "--learning-rate", "1e-3"]


@pytest.mark.integration
def test_a_stopped_alignment_resumes_with_the_same_figures(
    trained, tmp_path, monkeypatch, any_line_is_valid, capsys
):
    def options():
        return AlignOptions(str(trained), **ALIGN, steps=5)

    whole = AlignmentRun(tmp_path / "whole", options(), "cpu")
    whole.go()
    stopped = AlignmentRun(tmp_path / "stopped", options(), "cpu")
    step = stopped.trainer.step

    def interrupted(rate):
        if stopped.state.step == 2:
            signal.raise_signal(signal.SIGINT)
        return step(rate)

    stopped.trainer.step = interrupted
    with pytest.raises(SystemExit) as exit_info:
        stopped.go()
    assert exit_info.value.code == 130 and stopped.state.step == 3
    assert f"align --resume {tmp_path / 'stopped'}" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path / "stopped")
    full.main(["align", "--resume", str(tmp_path / "stopped"), "--device", "cpu"])

    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "stopped"))
    for line in one + two:
        line.pop("seconds")
    assert len(one) == 5 and one == two
    assert any(line["reward"] > 0 for line in one) and one[-1]["kl"] > 0
    ours = dict(checkpoint.read_tensors(checkpoint.tensor_files(whole.checkpoint)))
    for name, tensor in checkpoint.read_tensors(checkpoint.tensor_files(stopped.checkpoint)):
        assert torch.equal(tensor, ours[name]), name
    paid = [checkpoint.read_json(run.checkpoint / "align.json")["paid"] for run in (whole, stopped)]
    assert paid[0] == paid[1] != []


@pytest.mark.integration
def test_align_from_the_command_line(trained, tmp_path, capsys, monkeypatch, any_line_is_valid):
    monkeypatch.chdir(tmp_path)
    command = ["align", "--checkpoint", "trained", *SMALL, "--steps", "2", "--out", "aligned"]
    full.main(command)
    printed = capsys.readouterr().out
    for promised in ("valid  ", "distinct", "bits per byte, test part", "MTP acceptance",
                     "the shortest valid completions", "temperature 1, 12 tokens"):
        assert promised in printed
    results = checkpoint.read_json(tmp_path / "aligned" / "results.json")
    assert results["steps"] == 2 and results["before"]["test"] != results["after"]["test"]
    full.main(["evaluate", "--checkpoint", "aligned"])
    rate = results["after"]["test"]["bits_per_byte"]
    assert f"this model   {rate:.4f}" in capsys.readouterr().out
    before = dict(checkpoint.read_tensors(checkpoint.tensor_files(trained / "checkpoint")))
    after = dict(checkpoint.read_tensors(checkpoint.tensor_files(tmp_path / "aligned/checkpoint")))
    same = {name for name in before if torch.equal(before[name], after[name])}
    layer = "model.layers.2."  # the MTP module is left as it was, its copies are the main model's
    copies = {f"{layer}embed_tokens.weight", f"{layer}shared_head.head.weight"}
    assert {name for name in before if name.startswith(layer)} - copies <= same
    assert not {name for name in same if name.startswith("model.layers.0.self_attn")}


@pytest.mark.integration
def test_mistakes_of_align_are_one_line_and_write_nothing(
    trained, tmp_path, capsys, monkeypatch, any_line_is_valid
):
    monkeypatch.chdir(tmp_path)
    command = ["align", "--checkpoint", "trained", *SMALL, "--steps", "2", "--out", "aligned"]
    full.main(command)
    capsys.readouterr()
    before = set(tmp_path.rglob("*"))
    full.main(["align", "--resume", "aligned"])
    assert "already aligned for the whole budget (2 steps)" in capsys.readouterr().out
    for arguments, message in (
        (command, "--out aligned already holds a run"),
        (["align"], "want --checkpoint DIR or --resume RUN"),
        (["align", "--resume", "trained"], "trained holds no alignment"),
        (["align", "--resume", "aligned", "--seed", "3"], "leave out ['seed']"),
        (["align", "--checkpoint", "trained", "--steps", "0"], "budget must be above 0, got 0"),
        (["align", "--checkpoint", "trained", "--group-size", "0"], "group_size=0 must be"),
        (["align", "--checkpoint", "trained", "--max-new-tokens", "64"], "max_new_tokens=64"),
        (["align", "--checkpoint", "nowhere"], "nowhere is not a checkpoint"),
        (["train", "--resume", "aligned"], "aligned is an alignment"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            full.main(arguments)
        error = capsys.readouterr().err
        assert exit_info.value.code == 2 and message in error, error
        assert error.startswith("error: ") and error.count("\n") == 1
    assert set(tmp_path.rglob("*")) == before  # nothing was left behind


@pytest.mark.integration
def test_an_alignment_without_any_reward_resumes_but_not_on_another_reference(
    trained, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compiler, "verdict", lambda prompt, text: "invalid")
    options = AlignOptions(str(trained), **ALIGN, steps=2, kl_coef=0.0)
    AlignmentRun(tmp_path / "run", options, "cpu").go()
    full.main(["align", "--resume", "run", "--steps", "3"])
    printed = capsys.readouterr().out
    assert "after 3 steps" in printed and "no completion is valid" in printed
    full.main(["train", "--resume", "trained", "--steps", "3"])
    with pytest.raises(SystemExit):
        full.main(["align", "--resume", "run", "--steps", "4"])
    assert "the reference of run, is not what it was" in capsys.readouterr().err


@pytest.mark.integration
def test_alignment_needs_python_and_weights_that_learn(trained, tmp_path):
    prose = tmp_path / "prose.txt"
    prose.write_text("".join(f"This is line {i} of a text.\n" for i in range(2000)))
    options = AlignOptions(str(trained), [str(prose)], steps=1, **ALIGN)
    with pytest.raises(NoPrompts, match="0 prompts to learn from and 0 held out are Python"):
        AlignmentRun(tmp_path / "run", options, "cpu")
    full.main(["quantize", "--checkpoint", str(trained), "--scheme", "int8", "--out",
               str(tmp_path / "int8")])
    with pytest.raises(ValueError, match="int8 is quantised: it cannot be trained"):
        AlignmentRun(tmp_path / "run", AlignOptions(str(tmp_path / "int8"), steps=1), "cpu")
    assert not (tmp_path / "run").exists()


def test_prompts_to_learn_from_are_training_text(trained, tmp_path):
    options = AlignOptions(str(trained), steps=1, **ALIGN)
    run = AlignmentRun(tmp_path / "run", options, "cpu")
    parts = {name: "".join(d.text for d in run.corpus.part(name)) for name in ("train", "test")}
    assert all(run.decode(prompt) in parts["train"] for prompt in run.prompts)
    assert all(run.decode(prompt) in parts["test"] for prompt in run.held_out)
    end = run.separator
    assert run.decode([end, *corpus.encode(run.tokenizer, "a = 1\nb")]) == "a = 1\n"
    assert run.decode([*corpus.encode(run.tokenizer, "a = 1\nb"), end]) == "a = 1\nb"
    assert run.decode([end]) == ""


def test_held_out_prompts_were_never_learnt_from(trained, tmp_path):
    text = tmp_path / "repeats.py"  # 40 functions stand in all parts
    numbers = (i if i % 3 == 0 else i % 40 for i in range(1500))
    text.write_text("".join(f"def f_{i}(x):\n    return x + {i}\n" for i in numbers))
    options = AlignOptions(str(trained), [str(text)], steps=1, **ALIGN)
    run = AlignmentRun(tmp_path / "run", options, "cpu")
    assert len(run.held_out) > 5
    assert not {*map(tuple, run.prompts)} & {*map(tuple, run.held_out)}
