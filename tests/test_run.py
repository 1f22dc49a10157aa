"""A run: budget, schedule, loop, metrics; stopped, resumed, refused, recovered."""

import math
import signal
import types

import pytest
import torch

import deepseek_full_model as full
import pipeline.run
from deepseek_full_model import RunOptions, TrainingRun
from pipeline import checkpoint
from pipeline.run import Budget, Run, State, expectation, learning_rate, read_metrics, read_record


def run_for(tmp_path, budget, state=None, losses=None, stop_at=None, saves=None, save_every=60.0):
    """The `State` after a run of steps that cost nothing; `saves` gets the steps of its saves."""

    class Counting(Run):
        def step(self, number, used):
            if number == stop_at:
                signal.raise_signal(signal.SIGINT)  # Ctrl-C in the middle of a step
            return {"loss": losses[number] if losses else 1.0 / (number + 1), "tokens": 10}

        def save(self):
            if saves is not None:
                saves.append(self.state.step)

    run = Counting(tmp_path, types.SimpleNamespace(**{"steps": None, "minutes": None, **budget}),
                   "cpu")
    run.state, run.save_every = state or run.state, save_every
    if stop_at is None:
        run.go()
    else:
        with pytest.raises(SystemExit) as exit_info:
            run.go()
        assert exit_info.value.code == 130
    return run.state


def test_loop_spends_its_budget_and_writes_every_step(tmp_path, capsys):
    saves = []
    state = run_for(tmp_path, dict(steps=7), saves=saves)
    assert (state.step, state.tokens, saves) == (7, 70, [7])
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 8))
    assert lines[3]["loss"] == 0.25 and lines[3]["tokens"] == 40
    progress = capsys.readouterr().err
    assert "step 7" in progress and "tokens/s" in progress and "left" in progress


def test_what_to_expect_from_the_pace():
    warm, state = State(step=1, seconds=10.0, tokens=100), State(step=5, seconds=30.0, tokens=500)
    # 20 tokens and 0.2 steps a second
    in_steps = expectation(Budget(steps=25), warm, state)
    assert in_steps == "20 tokens/s at first: expect about 2,500 tokens in 2:10 minutes"
    in_minutes = expectation(Budget(minutes=2), warm, state)
    assert in_minutes == "20 tokens/s at first: expect about 2,300 tokens in 2:00 minutes"


def test_a_run_says_what_to_expect_after_some_steps_and_only_once(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(pipeline.run, "expectation", lambda budget, warm, state: seen.append(
        (warm.step, state.step)) or "expected")
    monkeypatch.setattr(Run, "look_ahead", 3)
    run_for(tmp_path, dict(steps=9))
    assert seen == [(1, 4)] and "expected\n" in capsys.readouterr().out  # the first is left out
    run_for(tmp_path, dict(steps=3))  # too short to say
    assert len(seen) == 1


def test_a_run_is_saved_on_its_way(tmp_path):
    saves = []
    run_for(tmp_path, dict(steps=3), saves=saves, save_every=0.0)
    assert saves == [1, 2, 3, 3]


def test_minutes_budget_stops(tmp_path):
    state = run_for(tmp_path, dict(minutes=1e-5))
    assert state.step >= 1


def test_interrupted_loop_saves_and_a_resumed_one_drops_lost_lines(tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    saves = []
    run_for(tmp_path, dict(steps=9), stop_at=5, saves=saves)
    assert saves == [6]  # the step under way is finished first
    with pytest.raises(KeyboardInterrupt):  # afterwards Ctrl-C means what it always does
        signal.raise_signal(signal.SIGINT)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo\n[1]\n{"a": 1}\n')  # cut off, or not ours
    run_for(tmp_path, dict(steps=9), state=State(step=3, tokens=30, seconds=1.0))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 10))


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    with pytest.raises(ValueError, match="the loss is nan at step 1"):
        run_for(tmp_path, dict(steps=3), losses=[1.0, math.nan, 1.0])


def test_budget_and_schedule():
    wrong_budgets = ({}, {"steps": 1, "minutes": 1}, {"steps": 0}, {"minutes": -1})
    for wrong in (*wrong_budgets, {"minutes": math.inf}, {"minutes": math.nan}):
        with pytest.raises(ValueError, match=r"want steps or minutes|must be above 0"):
            Budget(**wrong)
    rates = [learning_rate(i / 100, 1.0) for i in range(101)]
    assert 0 < rates[0] < 0.2 and max(rates) == pytest.approx(1.0, abs=0.01)
    assert rates[100] == pytest.approx(0.05)
    peak = rates.index(max(rates))
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(
        rates[peak:], reverse=True
    )


@pytest.mark.integration
def test_a_stopped_run_resumes_with_the_same_figures(small_run, tmp_path, monkeypatch, capsys):
    _, options = small_run
    whole = TrainingRun(tmp_path / "whole", RunOptions(**options, steps=8), "cpu")
    whole.go()

    stopped = TrainingRun(tmp_path / "stopped", RunOptions(**options, steps=8), "cpu")
    update = stopped.optimizers[0].step

    def interrupted():
        update()
        if stopped.state.step == 4:
            signal.raise_signal(signal.SIGINT)  # Ctrl-C between weights and routing bias

    stopped.optimizers[0].step = interrupted
    with pytest.raises(SystemExit) as exit_info:
        stopped.go()
    assert exit_info.value.code == 130 and stopped.state.step == 5
    assert f"train --resume {tmp_path / 'stopped'}" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path / "stopped")  # from another directory
    full.main(["train", "--resume", str(tmp_path / "stopped"), "--device", "cpu"])

    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "stopped"))
    for line in one + two:
        line.pop("seconds")
    assert len(one) == 8 and one == two
    ours = dict(checkpoint.read_tensors(checkpoint.tensor_files(whole.checkpoint)))
    for name, tensor in checkpoint.read_tensors(checkpoint.tensor_files(stopped.checkpoint)):
        assert torch.equal(tensor, ours[name]), name


@pytest.mark.integration
def test_resuming_on_changed_text_is_refused(small_run, tmp_path):
    folder, options = small_run
    text = tmp_path / "text.py"
    text.write_text("".join(f"a = {i}\n" for i in range(4000)))
    run = TrainingRun(
        tmp_path / "run", RunOptions(**{**options, "data": [str(text)]}, steps=2), "cpu"
    )
    run.save()
    text.write_text("".join(f"b = {i}\n" for i in range(4000)))
    with pytest.raises(SystemExit) as exit_info:
        full.main(["train", "--resume", str(tmp_path / "run")])
    assert exit_info.value.code == 2


@pytest.mark.integration
def test_resuming_keeps_the_runs_options_and_says_when_it_is_done(small_run, tmp_path, capsys):
    _, options = small_run
    run = TrainingRun(tmp_path / "run", RunOptions(**options, steps=2), "cpu")
    run.go()
    resume = ["train", "--resume", str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        full.main([*resume, "--seed", "3", "--out", "x"])
    assert "leave out ['seed', 'out']" in capsys.readouterr().err
    full.main(resume)
    assert "already trained for the whole budget (2 steps)" in capsys.readouterr().out
    full.main([*resume, "--steps", "4"])
    assert "trained 4 steps" in capsys.readouterr().out


@pytest.mark.integration
def test_a_damaged_run_is_named_and_a_killed_save_is_recovered(small_run, tmp_path, capsys):
    _, options = small_run
    run = TrainingRun(tmp_path / "run", RunOptions(**options, steps=2), "cpu")
    run.go()
    run.checkpoint.rename(tmp_path / "run" / "checkpoint.old")  # killed between the two renames
    with pytest.raises(SystemExit):
        full.main(["--out", str(tmp_path / "run"), "--steps", "1"])
    assert "already holds a run" in capsys.readouterr().err and run.checkpoint.is_dir()
    for content in ({}, {"options": {"speed": 1}, "state": {}, "corpus": ""}, {"options": []}):
        checkpoint.write_json(run.checkpoint / "run.json", content)
        for command in (["train", "--resume"], ["evaluate", "--checkpoint"]):
            with pytest.raises(SystemExit) as exit_info:
                full.main([*command, str(tmp_path / "run")])
            assert exit_info.value.code == 2
            assert "run.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("name,now,then", [("mtp_from", 0.7, 0.0), ("beta2", 0.99, 0.95)])
def test_a_run_stored_before_a_setting_existed_goes_on_as_it_began(trained, name, now, then):
    path = trained / "checkpoint" / "run.json"
    stored = checkpoint.read_json(path)
    assert stored["options"].pop(name) == now
    checkpoint.write_json(path, stored)
    options = TrainingRun.options_class(**read_record(path, RunOptions)["options"])
    assert getattr(options, name) == then
