"""The run loop: budget, learning-rate schedule, progress bar, metrics file, periodic saving."""

import contextlib
import json
import math
import os
import pathlib
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass

from tqdm import tqdm


@dataclass(frozen=True)
class Budget:
    """How long to train: `steps`, or `minutes` of training time; exactly one is given."""

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self):
        if (self.steps is None) == (self.minutes is None):
            raise ValueError(
                f"want steps or minutes, got steps={self.steps}, minutes={self.minutes}"
            )
        amount = self.steps if self.minutes is None else self.minutes
        if not 0 < amount < math.inf:
            raise ValueError(f"the training budget must be above 0, got {amount}")

    def used(self, state):
        """Share of the budget that is spent, 0 at the start; 1 and more: stop."""
        if self.steps is not None:
            return state.step / self.steps
        return state.seconds / (60 * self.minutes)


@dataclass
class State:
    """Where a run stands. `seconds` counts training steps only, not saving or evaluating."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0


def learning_rate(used, peak, warmup=0.04, floor=0.05):
    """Linear warm-up over the first `warmup` of the budget, then a cosine to `floor` · peak."""
    if used < warmup:
        return peak * max(used, 0.1 * warmup) / warmup
    falling = (min(used, 1.0) - warmup) / (1 - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * falling)))


class Metrics:
    """`metrics.jsonl`: one JSON object a line. Lines past `state.step` belong to a lost attempt."""

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
    """All lines of a metrics file; an empty list if there is none."""
    path = pathlib.Path(path)
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # a line cut off by a crash
            figures = json.loads(line)
            if isinstance(figures, dict) and isinstance(figures.get("step"), int):
                lines.append(figures)
    return lines


@contextlib.contextmanager
def stop_requests():
    """Yields an event that Ctrl-C or a termination signal sets: steps and saves are never cut."""
    stop, handlers = threading.Event(), {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, lambda *_: stop.set())
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_steps(step_function, state, budget, metrics_path, save, save_every=60.0, label="training"):
    """Calls step_function(step, used) → figures until the budget is spent; False if stopped before.

    figures: a dict with at least `loss` and `tokens`; it goes to the metrics file with the state.
    `save()` is called every `save_every` seconds and at the end. Ctrl-C ends the loop after the
    step that is under way, so that a resumed run repeats and skips nothing.
    """
    metrics = Metrics(metrics_path, state)
    began = last_saved = time.perf_counter()
    tokens_before = state.tokens
    bar = tqdm(
        total=100, file=sys.stderr, mininterval=0.5 if sys.stderr.isatty() else 15.0,
        bar_format=label + " {percentage:3.0f}% |{bar:20}|{postfix}",
    )  # fmt: skip
    with bar, stop_requests() as stop:
        while budget.used(state) < 1 and not stop.is_set():
            start = time.perf_counter()
            figures = step_function(state.step, budget.used(state))
            if not math.isfinite(figures["loss"]):
                raise ValueError(f"the loss is {figures['loss']} at step {state.step}: it diverged")
            state.step += 1
            state.tokens += figures.pop("tokens")
            state.seconds += time.perf_counter() - start
            metrics.write({**asdict(state), **figures})
            rate = (state.tokens - tokens_before) / (time.perf_counter() - began)
            show_progress(bar, budget.used(state), state, figures["loss"], rate)
            if time.perf_counter() - last_saved > save_every:
                save()
                last_saved = time.perf_counter()
        save()
    return budget.used(state) >= 1


def show_progress(bar, used, state, loss, rate):
    left = int(state.seconds / used * max(0.0, 1 - used))
    bar.n = min(100, round(100 * used))
    bar.set_postfix_str(
        f"step {state.step}, loss {loss:.3f}, {rate:,.0f} tokens/s, "
        f"{left // 60}:{left % 60:02d} left",
        refresh=bar.n == 100,
    )
    bar.update(0)
