"""Checking an argument, and the check lines that a demonstration prints."""

import itertools
import sys
import textwrap

import torch


def require(condition, message):
    """Raises ValueError with the message if the condition is false."""
    if not condition:
        raise ValueError(message)


class Demonstration:
    """Prints a header, then one line a check; `finish` exits with status 1 if a check failed."""

    WIDTHS = (52, 26, 42)  # of the columns: what is shown, its shape, the measured figure

    def __init__(self, script, device, seed, dtype=torch.float32):
        print(f"{script} · torch {torch.__version__} · {device} · {dtype} · seed {seed}")
        torch.manual_seed(seed)
        self.device, self.seed = device, seed
        self.failures = []

    def check(self, what, shape, figure, ok):
        """One line: what is shown, the shape with its letters, the figure, ok or FAILED.

        A text wider than its column goes on below, so that the columns line up.
        """
        cells = [
            textwrap.wrap(text, width) or [""]
            for text, width in zip((what, shape, figure), self.WIDTHS, strict=True)
        ]
        verdict = ["ok" if ok else "FAILED"]
        for row in itertools.zip_longest(*cells, verdict, fillvalue=""):
            padded = [f"{text:<{width}}" for text, width in zip(row, self.WIDTHS, strict=False)]
            print(f"  {' '.join([*padded, row[-1]])}".rstrip(), flush=True)
        if not ok:
            self.failures.append(what)

    def same(self, what, shape, got, want, tolerance=1e-5):
        """A check that two tensors are equal up to rounding."""
        difference = (got - want).abs().max().item()
        self.check(what, shape, f"largest difference {difference:.1e}", difference <= tolerance)

    def note(self, text):
        """A line without a verdict."""
        print(f"  {text}", flush=True)

    def finish(self, *experiments):
        """Prints what to try next; exits with status 1 if a check failed."""
        print("Try changing:")
        for experiment in experiments:
            print(f"  {experiment}")
        if self.failures:
            print(f"FAILED: {'; '.join(self.failures)}", file=sys.stderr)
            raise SystemExit(1)
