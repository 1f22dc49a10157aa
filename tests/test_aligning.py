"""Alignment: prompts, resuming, what it reports and refuses."""

import pathlib
import signal
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

import deepseek_full_model as full
from deepseek_full_model import AlignmentRun
from grpo_coded import Settings
from pipeline import aligning, checkpoint, compiler, corpus, training
from pipeline.aligning import AlignOptions, NoPrompts, align_after_training, show_completions
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


def test_prompts_to_learn_from_are_training_text(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained.parent)
    options = AlignOptions(trained.name, steps=1, **ALIGN)
    run = AlignmentRun(tmp_path / "run", options, "cpu")
    parts = {name: "".join(d.text for d in run.corpus.part(name)) for name in ("train", "test")}
    assert all(run.decode(prompt) in parts["train"] for prompt in run.prompts)
    assert all(run.decode(prompt) in parts["test"] for prompt in run.held_out)
    assert pathlib.Path(run.options.source).is_absolute()
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


# Options, and what they become
def test_the_trainer_gets_every_option_that_it_knows():
    options = AlignOptions(
        variant="dapo", prompts=3, group_size=5, max_new_tokens=9, minibatches=4,
        learning_rate=0.5, kl_coef=0.25, precision="bfloat16", seed=6,
    )
    settings = asdict(options.settings())
    known = {name: value for name, value in asdict(options).items() if name in settings}
    assert len(known) == 9 and known.items() <= settings.items()
    assert all(value != getattr(Settings(), name) for name, value in known.items())
    for new_tokens, buffer in ((9, 2), (24, 6), (3, 1), (1, 1)):  # a quarter, at least one
        options.max_new_tokens = new_tokens
        assert options.settings().overlong_buffer == buffer


def test_the_defaults_are_those_of_the_documented_alignment():
    o = AlignOptions()
    assert (o.variant, o.prompts, o.group_size, o.max_new_tokens) == ("grpo", 16, 16, 24)
    assert (o.once, o.seed, o.precision) == (True, 0, "auto")


def test_auto_becomes_the_faster_precision_and_a_choice_stays(monkeypatch):
    monkeypatch.setattr(aligning, "fastest_precision", lambda device: f"the best of {device}")
    for given, wanted in (("auto", "the best of cpu"), ("float32", "float32")):
        options = AlignOptions(precision=given)
        options.settle("cpu")
        assert options.precision == wanted


# Prompts
@pytest.mark.parametrize(
    ("context", "bounds"), [(64, (12, 32)), (30, (12, 20)), (16, (6, 6)), (12, (2, 2))]
)
def test_prompts_leave_room_for_the_completions(monkeypatch, context, bounds):
    asked = []

    def prompts_of(tokenizer, part, *given):
        asked.append((part, *given))
        return [[1, 2], [part]]

    monkeypatch.setattr(compiler, "line_end_prompts", prompts_of)
    parts = SimpleNamespace(train=3, test=4)
    run = SimpleNamespace(options=AlignOptions(max_new_tokens=10), corpus=parts, tokenizer=None)
    prompts, held_out = AlignmentRun.find_prompts(run, context)
    assert asked == [(3, *bounds), (4, *bounds)]
    assert prompts == [[1, 2], [3]] and held_out == [[4]]
    with pytest.raises(ValueError, match="leaves no room for a prompt in the context of 11"):
        AlignmentRun.find_prompts(run, 11)
    parts.test = 3  # all of its prompts are learnt from
    with pytest.raises(NoPrompts, match="2 prompts to learn from and 0 held out"):
        AlignmentRun.find_prompts(run, context)


@pytest.mark.parametrize(
    ("trained", "data", "read", "noted"),
    [
        (dict(corpus="old", options=dict(data=["a.py"])), None, ["a.py"], True),
        (dict(corpus="new", options=dict(data=["a.py"])), None, ["a.py"], False),
        (dict(corpus="old", options=dict(data=["a.py"])), ["b.py"], ["b.py"], False),
        ({}, None, None, False),
    ],
)
def test_the_text_is_that_of_the_training_and_a_change_is_noted(
    monkeypatch, capsys, trained, data, read, noted
):
    asked = []
    monkeypatch.setattr(
        corpus, "load_corpus", lambda d: asked.append(d) or SimpleNamespace(fingerprint="new")
    )
    run = SimpleNamespace(training=trained, options=AlignOptions(data=data))
    assert AlignmentRun.load_corpus(run).fingerprint == "new" and asked == [read]
    assert ("the text has changed since training" in capsys.readouterr().err) == noted


# A run
@pytest.fixture
def run_of_a_step(trained, tmp_path):
    return AlignmentRun(tmp_path / "run", AlignOptions(str(trained), steps=1, once=False, **ALIGN),
                        "cpu")


def test_held_out_completions_depend_on_the_policy_alone(run_of_a_step):
    run = run_of_a_step
    run.held_out = run.held_out[:3]
    one = run.sample(run.model)
    torch.manual_seed(7)
    assert run.sample(run.model) == one and [len(texts) for texts in one] == [3, 3]
    assert one[0] == [run.decode(prompt) for prompt in run.held_out]


def test_a_reward_may_be_paid_again_and_the_rate_falls_to_a_tenth(run_of_a_step):
    run, rates = run_of_a_step, []
    assert run.reward.memory is False
    run.trainer.step = lambda rate: rates.append(rate) or dict(completions=8, length=2.25, step=0)
    for number, used in ((0, 0.04), (4, 1.0)):
        figures = run.step(number, used)
        assert figures == dict(completions=8, length=2.25, tokens=18, step=number + 1)
    assert rates == pytest.approx([1e-3, 1e-4])


# The last step of the main job
@pytest.mark.parametrize(
    ("budget", "wanted"),
    [
        (dict(steps=21, minutes=None), dict(steps=3, minutes=None)),
        (dict(steps=None, minutes=training.DEFAULT_MINUTES * 2),
         dict(steps=None, minutes=aligning.DEFAULT_MINUTES * 2)),
    ],
)
@pytest.mark.parametrize(("context", "new_tokens"), [(64, 24), (20, 10)])
def test_alignment_after_training_takes_over_its_options(
    monkeypatch, tmp_path, capsys, budget, wanted, context, new_tokens
):
    calls = []
    monkeypatch.setattr(aligning, "align", lambda run, scores: calls.append((run, scores)))
    run = SimpleNamespace(
        directory=tmp_path, checkpoint=tmp_path / "checkpoint", device="cpu",
        model=SimpleNamespace(max_positions=context),
        options=SimpleNamespace(data=["a.py"], seed=5, precision="bfloat16", **budget),
    )
    align_after_training(run, "scores", lambda *given: given)
    (directory, options, device), scores = calls[0]
    assert (directory, device, scores) == (tmp_path / "aligned", "cpu", "scores")
    assert options == AlignOptions(
        str(tmp_path / "checkpoint"), ["a.py"], seed=5, precision="bfloat16",
        max_new_tokens=new_tokens, **{name: pytest.approx(value) for name, value in wanted.items()},
    )

    def nothing_to_learn_from(*given):
        raise NoPrompts("nothing")

    align_after_training(run, "scores", nothing_to_learn_from)
    assert len(calls) == 1 and capsys.readouterr().out == "not aligned: nothing\n"


@pytest.mark.parametrize("known", [None, dict(bits_per_byte=4.0, mtp_acceptance=0.25)])
def test_the_report_compares_the_policy_with_its_reference(monkeypatch, tmp_path, capsys, known):
    scores = dict(reference=dict(bits_per_byte=2.0, mtp_acceptance=None),
                  policy=dict(bits_per_byte=3.0, mtp_acceptance=0.5))
    samples = dict(reference=(["a = 1\n"] * 2, ["", "b = 2\n"]),
                   policy=(["a = 1\n"] * 2, ["c = 3\n", "d = 4\n"]))
    monkeypatch.setattr(aligning, "score", lambda model, tokenizer, documents: scores[model])
    done = []
    run = SimpleNamespace(
        describe=lambda: done.append("described"), go=lambda: done.append("gone"),
        sample=lambda model: done.append(model) or samples[model],
        trainer=SimpleNamespace(policy="policy", reference="reference"), tokenizer=None,
        corpus=SimpleNamespace(test=None), held_out=[1, 2], directory=tmp_path,
        checkpoint=tmp_path / "checkpoint", metrics=tmp_path / "metrics.jsonl",
        state=SimpleNamespace(step=3, seconds=4.0),
    )
    aligning.align(run, known)
    assert done == ["described", "reference", "gone", "policy"]
    results, printed = checkpoint.read_json(tmp_path / "results.json"), capsys.readouterr().out
    assert [results[when]["valid"] for when in ("before", "after")] == [0.5, 1.0]
    assert (results["steps"], results["seconds"]) == (3, 4.0)
    assert [results[when]["test"] for when in ("before", "after")] == [
        known or scores["reference"], scores["policy"]
    ]
    change = "4.0000 → 3.0000 (-25.00%)" if known else "2.0000 → 3.0000 (+50.00%)"
    assert "of 2 held-out prompts" in printed and change in printed and "valid" in printed
    assert " 50.0% → 100.0%" in printed
    assert ("MTP acceptance" in printed) == (known is not None)
    if known:
        assert "25.0% → 50.0%" in printed


def test_the_report_shows_what_was_learnt_and_what_is_cheapest_and_commonest(capsys):
    prompts = [f"a = 0\nb = 0\nc = 0\nd = {i}\n" for i in range(9)]
    before = ["", "e = (\n", "f = 1\n", *[""] * 6]
    after = ["x = 22\n", "x = 22\n", "y = 3\n", "z = 1\n", "z = 1\n", "long = 4\n", "u = 5\n",
             "x = 22\n", "w = (\n"]
    show_completions((prompts, before), (prompts, after))
    printed = capsys.readouterr().out
    learnt = [f"  │ b = 0\n  │ c = 0\n  │ d = {i}\n  before: {was}\n  ▌ {old}\n  after: valid\n"
              f"  ▌ {new}\n\n" for i, was, old, new in (
                  (0, "trivial", "(no whole line)", "x = 22"), (1, "invalid", "e = (", "x = 22"),
                  (3, "trivial", "(no whole line)", "z = 1"),
                  (4, "trivial", "(no whole line)", "z = 1"))]
    assert printed == "".join(learnt) + (
        "the shortest valid completions: 'u = 5', 'y = 3', 'z = 1', 'x = 22'\n"
        "the most common: 'x = 22' (3 of 8), 'z = 1' (2 of 8), 'y = 3' (1 of 8)\n"
    )
    show_completions((prompts, before), (prompts, [""] * 9))
    assert capsys.readouterr().out == "no completion is valid\n"
