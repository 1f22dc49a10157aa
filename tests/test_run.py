"""A run: budget, schedule, loop, metrics; stopped, resumed, refused, recovered."""

import math
import signal
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import deepseek_full_model as full
import pipeline.run
from deepseek_full_model import RunOptions, TrainingRun
from pipeline import checkpoint
from pipeline.commands import build_parser
from pipeline.run import (
    Budget,
    Run,
    State,
    expectation,
    fastest_precision,
    learning_rate,
    matrix_rates,
    new_directory,
    open_run,
    read_metrics,
    read_record,
    show_progress,
    training_record,
)
from pipeline.training import SMALL_CONFIG


def run_for(tmp_path, budget, state=None, losses=None, stop_at=None, saves=None, save_every=60.0,
            stop_by=signal.SIGINT):
    """The `State` after a run of steps that cost nothing; `saves` gets the steps of its saves."""

    class Counting(Run):
        def step(self, number, used):
            if number == stop_at:
                signal.raise_signal(stop_by)  # in the middle of a step
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
    saves, directory = [], tmp_path / "runs" / "new"
    state = run_for(directory, dict(steps=7), saves=saves)
    assert (state.step, state.tokens, saves) == (7, 70, [7])
    lines = read_metrics(directory / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 8))
    assert lines[3]["loss"] == 0.25 and lines[3]["tokens"] == 40
    progress = capsys.readouterr().err
    assert "training 100% |" in progress and "step 7, loss 0.143, " in progress
    assert progress.endswith("0:00 left\n")  # the last line stays


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
    run_for(tmp_path, dict(steps=9), state=State(step=2, tokens=20, seconds=1.0))
    assert seen[1:] == [(3, 6)]  # a resumed run starts anew


def test_a_run_is_saved_on_its_way(tmp_path):
    saves = []
    run_for(tmp_path, dict(steps=3), saves=saves, save_every=0.0)
    assert saves == [1, 2, 3, 3]


def test_only_steps_count_as_time_and_saves_come_at_their_interval(tmp_path, monkeypatch):
    now, saves, rates = [100.0], [], []
    clock = types.SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(pipeline.run, "time", clock)
    monkeypatch.setattr(pipeline.run, "show_progress", lambda *shown: rates.append(shown[-1]))

    class Slow(Run):
        def step(self, number, used):
            now[0] += 30
            return {"loss": 1.0, "tokens": 10}

        def save(self):
            now[0] += 5
            saves.append(self.state.step)

    run = Slow(tmp_path, types.SimpleNamespace(steps=8, minutes=None), "cpu")
    run.state = State(step=1, seconds=3.0, tokens=70)
    run.go()
    assert run.state == State(step=8, seconds=3 + 7 * 30, tokens=70 + 7 * 10)
    assert saves == [4, 7, 8]  # after more than a minute, and at the end
    assert rates[:3] == [10 / 30] * 3  # of this session alone
    seconds = [line["seconds"] for line in read_metrics(run.metrics)]
    assert seconds == [33, 63, 93, 123, 153, 183, 213]


def test_progress_shows_the_share_and_the_time_left():
    shown, updates = [], []
    bar = types.SimpleNamespace(
        n=0, set_postfix_str=lambda text, refresh: shown.append((bar.n, text, refresh)),
        update=updates.append,
    )
    show_progress(bar, 0.6, State(step=3, seconds=200.0), 1.25, 2000.0)
    show_progress(bar, 1.1, State(step=9, seconds=65.0), 1.0, 100.0)
    assert shown == [
        (60, "step 3, loss 1.250, 2,000 tokens/s, 2:13 left", False),
        (100, "step 9, loss 1.000, 100 tokens/s, 0:00 left", True),
    ]
    assert updates == [0, 0]  # the bar decides whether it is time to draw


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


def test_a_termination_signal_ends_a_run_like_ctrl_c(tmp_path):
    before, saves = signal.getsignal(signal.SIGTERM), []
    run_for(tmp_path, dict(steps=9), stop_at=5, saves=saves, stop_by=signal.SIGTERM)
    assert saves == [6] and signal.getsignal(signal.SIGTERM) is before


def test_a_run_goes_on_in_another_thread_too(tmp_path):
    with ThreadPoolExecutor(1) as other:  # only the main thread gets signals
        assert other.submit(run_for, tmp_path, dict(steps=2)).result().step == 2


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
    # By hand: a tenth at first, half-way up, the top, half-way down the cosine, the floor.
    by_hand = {0.0: 0.1, 0.02: 0.5, 0.04: 1.0, 0.52: 0.525, 1.0: 0.05, 1.3: 0.05}
    for used, rate in by_hand.items():
        assert learning_rate(used, 2.0) == pytest.approx(2 * rate)
    assert Budget(steps=8).used(State(step=2, seconds=99.0)) == 0.25
    assert Budget(minutes=2).used(State(step=99, seconds=30.0)) == 0.25


def test_the_shortest_time_of_a_product_counts(monkeypatch):
    now, seconds = [0.0], {torch.float32: [5, 2, 3], torch.bfloat16: [4, 1, 9]}

    class Matrix:
        def __init__(self, *shape, dtype, device):
            assert (shape, device) == ((8, 8), "abacus")
            self.dtype = dtype

        def __matmul__(self, other):
            now[0] += seconds[self.dtype].pop(0)

    monkeypatch.setattr(torch, "ones", Matrix)
    clock = types.SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(pipeline.run, "time", clock)
    operations = 2 * 8**3  # a product and a sum for each of 8 · 8 · 8 pairs
    assert matrix_rates("abacus", size=8, repeats=3) == {
        "float32": operations / 2, "bfloat16": operations / 1
    }


def test_bfloat16_must_be_clearly_faster(monkeypatch):
    for rate, name in ((3.0, "float32"), (3.2, "bfloat16")):
        rates = {"float32": 2.0, "bfloat16": rate}
        monkeypatch.setattr(pipeline.run, "matrix_rates", lambda device, rates=rates: rates)
        assert fastest_precision("cpu") == name
    for has, name in ((False, "float32"), (True, "bfloat16")):
        monkeypatch.setattr(  # an emulated BF16 is slow
            torch.cuda, "is_bf16_supported", lambda including_emulation, has=has:
            has or including_emulation,
        )
        assert fastest_precision("cuda") == name


def test_a_run_gets_the_directory_asked_for_or_the_next_free_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("default", "default-2", "default-3"):
        assert new_directory(None) == Path("runs", name)
        Path("runs", name).mkdir(parents=True)
    assert new_directory(None, "aligned") == Path("runs", "aligned")
    Path("mine").mkdir()  # a directory without a run may be used
    assert new_directory("mine") == Path("mine")


class Opened(Run):
    """What `open_run` opens."""

    options_class, default_minutes = RunOptions, 7

    def __init__(self, directory, options, device, resume=False):
        super().__init__(directory, options, device)
        self.resumed = resume


def opened(*flags):
    parser = build_parser("", full.WHOLE, full.COMMANDS)
    return open_run(parser.parse_args(["train", "--device", "cpu", *map(str, flags)]), Opened)


def test_flags_make_the_options_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = opened("--data", "text.py", "--seed", 3)
    assert (run.directory, run.device, run.resumed) == (Path("runs/default"), "cpu", False)
    assert run.options == RunOptions(data=[str(tmp_path / "text.py")], seed=3, minutes=7)
    assert opened("--steps", 5).options == RunOptions(steps=5)  # steps or minutes, not both
    assert opened("--minutes", 2, "--out", "x").options == RunOptions(minutes=2)


def test_a_resumed_run_has_its_own_options_but_may_get_a_new_budget(tmp_path):
    options = dict(vars(RunOptions(seed=3, steps=9)))
    record = dict(options=options, state=dict(step=4, seconds=1.0, tokens=9), corpus="")
    (tmp_path / "checkpoint").mkdir()
    checkpoint.write_json(tmp_path / "checkpoint" / "run.json", record)
    run = opened("--resume", tmp_path)
    assert run.resumed and run.directory == tmp_path and run.options == RunOptions(**options)
    assert opened("--resume", tmp_path, "--minutes", 2).options == RunOptions(seed=3, minutes=2)
    with pytest.raises(ValueError, match=r"leave out \['batch_size', 'seed'\]"):
        opened("--resume", tmp_path, "--seed", 3, "--batch-size", 2, "--steps", 9)


def test_a_checkpoint_says_what_training_it_comes_from(trained, tmp_path):
    assert training_record(trained / "checkpoint")["options"]["steps"] == 2
    assert training_record(tmp_path) == {}


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


def test_the_options_of_a_run_and_their_limits():
    assert vars(RunOptions()) == dict(
        config=str(SMALL_CONFIG), data=None, steps=None, minutes=None, seed=0, batch_size=8,
        sequence_length=256, learning_rate=4e-3, precision="auto", optimizer="muon",
        beta2=0.99, mtp_weight=0.3, mtp_from=0.7, gamma=0.005,
    )
    smallest = dict(seed=0, batch_size=1, sequence_length=3, mtp_weight=0, mtp_from=0, gamma=0)
    RunOptions(**smallest, learning_rate=1e-9)
    for name, value in {**{name: least - 0.1 for name, least in smallest.items()},
                        "learning_rate": 0, "mtp_from": 1}.items():
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')}={value} must be"):
            RunOptions(**{name: value})


def test_weights_and_batches_of_a_run_are_on_its_device(small_run, tmp_path):
    run = TrainingRun(tmp_path, RunOptions(**small_run[1], steps=1), "meta")
    assert {each.device.type for each in (*run.model.parameters(), *run.batch(0))} == {"meta"}
    assert TrainingRun.default_minutes == 4.6


@pytest.mark.integration
def test_a_run_of_the_smallest_and_of_the_longest_batches(small_run, tmp_path, capsys):
    _, options = small_run
    for steps, rows, length in ((7, 1, 3), (2, 2, 64)):  # 64: the whole context
        sizes = {**options, "batch_size": rows, "sequence_length": length}
        run = TrainingRun(tmp_path / str(length), RunOptions(**sizes, steps=steps), "cpu")
        run.go()
        tokens, printed = steps * rows * length, capsys.readouterr().out
        assert run.state.tokens == tokens
        assert f"trained {steps} steps, {tokens:,} tokens in" in printed
        assert ("expect about" in printed) == (steps == 7)  # soon, but not at once
        assert f"corpus {run.corpus.fingerprint}: " in printed


def test_weights_batches_and_vocabulary_of_a_run_follow_from_seed_and_text(small_run, tmp_path):
    folder, options = small_run
    config = checkpoint.read_json(folder / "config.json")
    checkpoint.write_json(tmp_path / "config.json", {**config, "vocab_size": 100_000})
    options = {**options, "config": str(tmp_path / "config.json"), "steps": 1}
    one, again, other = (
        TrainingRun(tmp_path, RunOptions(**options, seed=seed), "cpu") for seed in (1, 1, 2)
    )
    weights = [run.model.embed_tokens.weight for run in (one, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert torch.equal(one.batch(5)[0], again.batch(5)[0])
    assert not torch.equal(one.batch(5)[0], other.batch(5)[0])
    assert len(weights[0]) == one.model.config.vocab_size == one.tokenizer.get_vocab_size() < 9999


@pytest.mark.integration
def test_resuming_on_changed_text_is_refused(small_run, tmp_path, capsys):
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
    assert "the text has changed since" in capsys.readouterr().err


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
