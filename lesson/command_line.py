"""The command line of a demonstration: flags, device, one-line errors, progress bars."""

import argparse
import dataclasses
import functools
import math
import pathlib
import sys
from typing import NamedTuple

import torch

from lesson.checks import Demonstration, require
from lesson.settings import add_flags, chosen_settings


class Flag(NamedTuple):
    """A number that a demonstration's command line may change."""

    name: str
    default: int | float | str
    help: str
    at_least: float = -math.inf
    endings: tuple = ()
    at_most: float = math.inf

    def check(self, value):
        low, endings, high = self.at_least, self.endings, self.at_most
        if high < math.inf:
            require(low <= value <= high, f"--{self.name}={value} must be from {low} to {high}")
        elif low > -math.inf:
            require(low <= value, f"--{self.name}={value} must be at least {low}")
        if endings:
            allowed = f"{', '.join(endings[:-1])} or {endings[-1]}"
            require(value.endswith(endings), f"--{self.name}={value} must end in {allowed}")


def flag(name, default, help, at_least=-math.inf, endings=(), at_most=math.inf):
    """Declares `--name`. Its type is that of the default; bounds and endings limit its value."""
    return Flag(name, default, help, at_least, endings, at_most)


def demonstration(docstring, *flags, settings=None, names=(), quick=None, picture=None):
    """Turns `main(demo, arguments)` into a lesson's `main(argv=None)`.

    docstring: the module's own; --help prints it. flags: added to --seed and --device, which every
    lesson has. settings: a dataclass. Its fields `names` (default: all with a help text) become
    flags, and `arguments.settings` is made from those that were given. quick: help of --quick.
    picture: default of --picture. Without `quick` or `picture`, there is no such flag.
    """
    if picture:
        endings = (".png", ".pdf", ".svg")
        flags += (flag("picture", picture, "where to draw the run", endings=endings),)

    def decorate(function):
        script = pathlib.Path(function.__code__.co_filename).name

        @functools.wraps(function)
        def main(argv=None):
            parser = demonstration_parser(docstring, flags)
            if settings:
                helped = [f.name for f in dataclasses.fields(settings) if f.metadata.get("help")]
                add_flags(parser, settings, names or helped)
            if quick:
                parser.add_argument("--quick", action="store_true", help=quick)
            arguments = parse_arguments(parser, argv)
            for each in flags:
                each.check(getattr(arguments, each.name.replace("-", "_")))
            if settings:
                arguments.settings = settings(**chosen_settings(arguments, settings))
            return function(Demonstration(script, arguments.device, arguments.seed), arguments)

        return one_line_errors(main)

    return decorate


def demonstration_parser(docstring, flags=()):
    """The parser of a lesson's flags; the docstring is its help."""
    parser = OneLineParser(
        description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random inputs")
    parser.add_argument("--device", help="cuda, mps or cpu (default: best there is)")
    for each in flags:
        parser.add_argument(
            f"--{each.name}",
            type=type(each.default),
            default=each.default,
            help=f"{each.help} (default: {each.default})",
        )
    return parser


class OneLineParser(argparse.ArgumentParser):
    """Answers a wrong command line with one line, like all other mistakes."""

    def error(self, message):
        self.exit(2, f"error: {message} (see --help)\n")


def inside_ipython():
    return "IPython" in sys.modules and hasattr(sys.modules["builtins"], "get_ipython")


def parse_arguments(parser, argv):
    """Like `parser.parse_args(argv)`, but picks the device and ignores IPython's own arguments."""
    arguments = parser.parse_args([] if argv is None and inside_ipython() else argv)
    arguments.device = pick_device(getattr(arguments, "device", None))
    return arguments


def pick_device(name=None):
    """The named device, or the best of cuda, mps and cpu. ValueError if it is not available."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    available["cpu"] = True
    if name is None:
        return next(device for device, there in available.items() if there)
    there = ", ".join(device for device, is_there in available.items() if is_there)
    require(available.get(name, False), f"device {name!r} is not available, got here: {there}")
    return name


def one_line_errors(main):
    """Makes a `main` end a user's mistake with one line on stderr and exit status 2."""

    @functools.wraps(main)
    def wrapped(argv=None):
        for stream in (sys.stdout, sys.stderr):  # a console that lacks √ or λ must not end a run
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        try:
            return main(argv)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            raise SystemExit(130) from None

    return wrapped


def progress_bar(total, label, **options):
    """A tqdm bar on stderr. If stderr goes to a file, the file gets a line every 15 seconds."""
    from tqdm import tqdm

    interval = 0.5 if sys.stderr.isatty() else 15.0
    return tqdm(total=total, desc=f"  {label}", file=sys.stderr, mininterval=interval,
                **{"leave": False, **options})


def shown_steps(total, label, history=(), figure="", start=0):
    """Yields `total` numbers from `start` on and shows a progress bar.

    history: a list of {name: number} that grows. The bar shows its newest `figure`.
    """
    with progress_bar(total, label) as bar:
        for number in range(start, start + total):
            yield number
            if history:
                bar.set_postfix_str(f"{figure} {history[-1][figure]:.2f}", refresh=False)
            bar.update()
