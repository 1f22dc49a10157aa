"""A run of any kind of training: budget, schedule, loop, metrics, saving, stopping, resuming."""

import contextlib
import json
import math
import os
import pathlib
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, fields

import torch

from lesson import chosen_settings, progress_bar, require
from pipeline import checkpoint


# %% Budget, learning rate and precision
@dataclass(frozen=True)
class Budget:
    """How long to train: either a number of `steps`, or `minutes` of training time."""

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self):
        require(
            (self.steps is None) != (self.minutes is None),
            f"want steps or minutes, got steps={self.steps}, minutes={self.minutes}",
        )
        amount = self.steps if self.minutes is None else self.minutes
        require(0 < amount < math.inf, f"the training budget must be above 0, got {amount}")

    def used(self, state):
        """The share of the budget that is spent: 0 at the start. At 1 or more, the run stops."""
        if self.steps is not None:
            return state.step / self.steps
        return state.seconds / (60 * self.minutes)

    def seconds_in_all(self, state, seconds_a_step):
        """Seconds of the whole run if each step from now on takes `seconds_a_step`."""
        if self.minutes is not None:
            return 60 * self.minutes
        return state.seconds + (self.steps - state.step) * seconds_a_step


@dataclass
class State:
    """The progress of a run. `seconds` counts training steps only, not saving or evaluating."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0


def learning_rate(used, peak, warmup=0.04, floor=0.05):
    """Rises linearly over the first `warmup` of the budget. A cosine then falls to floor · peak."""
    if used < warmup:
        return peak * max(used, 0.1 * warmup) / warmup
    falling = (min(used, 1.0) - warmup) / (1 - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * falling)))


PRECISIONS = ("auto", "float32", "bfloat16")


def matrix_rates(device, size=512, repeats=5):
    """{"float32": …, "bfloat16": …}: operations a second in matrix products of each precision."""
    seconds = {}
    for _ in range(repeats):  # the first products are slow, so the shortest time counts
        for name in ("float32", "bfloat16"):
            matrix = torch.ones(size, size, dtype=getattr(torch, name), device=device)
            start = time.perf_counter()
            matrix @ matrix
            seconds[name] = min(time.perf_counter() - start, seconds.get(name, math.inf))
    return {name: 2 * size**3 / least for name, least in seconds.items()}


def fastest_precision(device):
    """The name of the faster precision of matrix products: "bfloat16" or "float32".

    On a CPU, both are measured, and "bfloat16" must take less than 2/3 of the time. On CUDA, it is
    "bfloat16" if the hardware has it.
    """
    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device != "cpu":
        return "float32"
    rates = matrix_rates(device)
    return "bfloat16" if rates["bfloat16"] > 1.5 * rates["float32"] else "float32"


# %% The metrics file
class Metrics:
    """Writes `metrics.jsonl`, one JSON object a line. Drops old lines after `state.step`."""

    def __init__(self, path, state):
        self.path = pathlib.Path(path)
        kept = [line for line in read_metrics(path) if line["step"] <= state.step]
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, self.path)

    def write(self, figures):
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")


def read_metrics(path):
    """All lines of a metrics file, or an empty list if there is no file."""
    path = pathlib.Path(path)
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # a crash may cut off a line
            figures = json.loads(line)
            if isinstance(figures, dict) and isinstance(figures.get("step"), int):
                lines.append(figures)
    return lines


# %% The run
class Run:
    """Takes steps until the budget is spent. A run can be saved, stopped and resumed.

    A subclass has `model`, `optimizers`, `tokenizer`, `corpus`, `step`, and sets the names below.
    Its options are a dataclass with at least `data`, `steps` and `minutes`.
    """

    options_class = None
    record = "run.json"  # the file beside the weights that says how to go on
    kind, command = "training run", "train"  # messages say "no training run", "train --resume"
    doing, done = "training", "trained"
    default_minutes, default_directory = None, "default"
    save_every = 60.0  # seconds
    look_ahead = None  # the number of steps, after the first, until the run prints a forecast

    def __init__(self, directory, options, device):
        self.directory, self.options, self.device = pathlib.Path(directory), options, device
        self.checkpoint = self.directory / "checkpoint"
        self.metrics = self.directory / "metrics.jsonl"
        self.budget, self.state = Budget(options.steps, options.minutes), State()

    def step(self, number, used):
        """Takes a step. Returns its figures for the metrics, with at least `loss` and `tokens`."""
        raise NotImplementedError

    def go(self):
        """Runs until the budget is spent. Ctrl-C saves, says how to go on, and exits with 130."""
        self.directory.mkdir(parents=True, exist_ok=True)
        steps = self.state.step
        if self.budget.used(self.state) >= 1:
            print(f"already {self.done} for the whole budget ({steps} steps): give a larger one "
                  "by --steps or --minutes")
            return
        self._steps()
        if self.budget.used(self.state) < 1:
            print(f"stopped at step {self.state.step}; go on with: python deepseek_full_model.py "
                  f"{self.command} --resume {self.directory}", file=sys.stderr)
            raise SystemExit(130)

    def _steps(self):
        """The loop. Ctrl-C ends it after the current step: resuming repeats and skips no step."""
        state, budget, metrics = self.state, self.budget, Metrics(self.metrics, self.state)
        began = last_saved = time.perf_counter()
        steps_before, tokens_before, warm = state.step, state.tokens, None
        bar = progress_bar(
            100, self.doing, leave=True,
            bar_format=self.doing + " {percentage:3.0f}% |{bar:20}|{postfix}",
        )
        with bar, stop_requests() as stop:
            while budget.used(state) < 1 and not stop.is_set():
                start = time.perf_counter()
                figures = self.step(state.step, budget.used(state))
                loss = figures["loss"]
                require(math.isfinite(loss), f"the loss is {loss} at step {state.step}: training "
                        "has diverged")
                state.step += 1
                state.tokens += figures.pop("tokens")
                state.seconds += time.perf_counter() - start
                metrics.write({**asdict(state), **figures})
                rate = (state.tokens - tokens_before) / (time.perf_counter() - began)
                warm = warm or State(**asdict(state))  # the first step is slow: leave it out
                if state.step - steps_before - 1 == self.look_ahead:
                    bar.write(expectation(budget, warm, state))
                show_progress(bar, budget.used(state), state, loss, rate)
                if time.perf_counter() - last_saved > self.save_every:
                    self.save()
                    last_saved = time.perf_counter()
            self.save()

    # Saving
    def save(self):
        """Saves the whole checkpoint. If a save is interrupted, the last one stays complete."""
        with checkpoint.replaced_directory(self.checkpoint) as fresh:
            self.model.save_pretrained(fresh)
            self.tokenizer.save(str(fresh / "tokenizer.json"))
            (fresh / "optimizer").mkdir()
            checkpoint.write_tensors(
                fresh / "optimizer" / checkpoint.WEIGHTS,
                checkpoint.optimizer_tensors(self.model, self.optimizers),
            )
            for name, content in self.records().items():
                checkpoint.write_json(fresh / name, content)

    def records(self):
        """{file name: content} of the files beside model, tokenizer and optimizers."""
        return {
            self.record: {
                "options": asdict(self.options),
                "state": asdict(self.state),
                "corpus": self.corpus.fingerprint,
            }
        }

    # Resuming
    def read_record(self):
        """Returns the checkpoint's record and restores its state. ValueError for another text."""
        stored = read_record(self.checkpoint / self.record, self.options_class)
        now, then = self.corpus.fingerprint, stored["corpus"]
        require(now == then, f"the text has changed since {self.directory} was started: its hash "
                f"is {now}, was {then}")
        self.state = State(**stored["state"])
        return stored

    def restore_optimizers(self):
        files = checkpoint.tensor_files(self.checkpoint / "optimizer")
        checkpoint.restore_optimizers(self.model, self.optimizers, checkpoint.read_tensors(files))


def read_record(path, options_class=None):
    """Reads a record. Options, state and corpus hash must be there, and fit `options_class`."""
    stored = checkpoint.read_json(path)
    try:
        options = stored["options"]
        options["data"], State(**stored["state"]), stored["corpus"]
        if options_class is not None:
            stored["options"] = options = {**getattr(options_class, "earlier", {}), **options}
            options_class(**options)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return stored


def training_record(directory):
    """The record of the training that a checkpoint comes from, or {} if there is none."""
    path = pathlib.Path(directory) / Run.record
    return read_record(path) if path.is_file() else {}


@contextlib.contextmanager
def stop_requests():
    """Yields an event. Ctrl-C or a termination signal sets it, and cuts no step or save short."""
    stop, handlers = threading.Event(), {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, lambda *_: stop.set())
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def expectation(budget, warm, state):
    """Says the speed since the state `warm`, and forecasts the whole run at this speed."""
    seconds, tokens = state.seconds - warm.seconds, state.tokens - warm.tokens
    whole = budget.seconds_in_all(state, seconds / (state.step - warm.step))
    expected = state.tokens + (whole - state.seconds) * tokens / seconds
    return (f"{tokens / seconds:,.0f} tokens/s at first: expect about {expected:,.0f} tokens in "
            f"{int(whole) // 60}:{int(whole) % 60:02d} minutes")


def show_progress(bar, used, state, loss, rate):
    left = int(state.seconds / used * max(0.0, 1 - used))
    bar.n = min(100, round(100 * used))
    bar.set_postfix_str(
        f"step {state.step}, loss {loss:.3f}, {rate:,.0f} tokens/s, "
        f"{left // 60}:{left % 60:02d} left",
        refresh=bar.n == 100,
    )
    bar.update(0)


# %% From the command line to a run
def open_run(arguments, run_class):
    """Makes the run that the command line describes, or resumes it."""
    options_class = run_class.options_class
    chosen = chosen_settings(arguments, options_class)
    if "data" in chosen:  # absolute, so that any directory can resume it
        chosen["data"] = [str(pathlib.Path(path).resolve()) for path in chosen["data"]]
    if arguments.resume is None:
        options = options_class(**chosen)
        if options.steps is None and options.minutes is None:
            options.minutes = run_class.default_minutes
        directory = new_directory(getattr(arguments, "out", None), run_class.default_directory)
        return run_class(directory, options, arguments.device)
    directory = pathlib.Path(arguments.resume)
    checkpoint.recover_directory(directory / "checkpoint")
    record = directory / "checkpoint" / run_class.record
    require(record.is_file(), f"{directory} holds no {run_class.kind}: it has no checkpoint/"
            f"{run_class.record}")
    fixed = [(field.metadata.get("flag") or field.name).lstrip("-")
             for field in fields(options_class)
             if field.name in chosen and field.name not in ("steps", "minutes")]
    fixed = sorted(fixed) + (["out"] if hasattr(arguments, "out") else [])
    require(not fixed, f"--resume goes on with the run's own options: leave out {fixed}")
    options = options_class(**read_record(record, options_class)["options"])
    if chosen:  # a new budget
        options.steps, options.minutes = chosen.get("steps"), chosen.get("minutes")
    return run_class(directory, options, arguments.device, resume=True)


def new_directory(asked, default="default"):
    """A directory that holds no run yet: the one that was asked for, or the next free default."""
    if asked is not None:
        require(not pathlib.Path(asked).is_file(), f"--out {asked} is a file, want a directory")
        checkpoint.recover_directory(pathlib.Path(asked) / "checkpoint")
        require(not (pathlib.Path(asked) / "checkpoint").exists(),
                f"--out {asked} already holds a run: resume it or choose another")
        return pathlib.Path(asked)
    number = 1
    while True:
        directory = pathlib.Path("runs") / (default if number == 1 else f"{default}-{number}")
        if not directory.exists():
            return directory
        number += 1
