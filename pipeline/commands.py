"""The command line of phase 10: a table of commands. Their flags come from dataclasses."""

import argparse
import collections.abc
from dataclasses import dataclass, fields
from typing import NamedTuple

from lesson import (
    Demonstration,
    OneLineParser,
    add_flags,
    chosen_settings,
    parse_arguments,
    setting,
)
from pipeline import generating, quantizing, scoring
from pipeline.released import load_with_tokenizer
from pipeline.run import open_run


class Command(NamedTuple):
    """A command: its flags are the fields of the dataclass `options`, and `work` does the work.

    With a `run_class`, the call is `work(run)`: the run is a new one or that of --resume. With
    `CheckOptions`, it is `work(demo)`. Otherwise, it is `work(loaded, options)`, where `loaded`
    comes from --checkpoint.
    """

    help: str
    options: type
    work: collections.abc.Callable
    run_class: type | None = None


@dataclass
class CheckOptions:
    """The flags of a demonstration."""

    seed: int = setting(0, "seed of the random inputs")


OF_A_CHECKPOINT = {
    "evaluate": Command(
        "score a checkpoint in bits per byte", scoring.EvaluateOptions, scoring.evaluate
    ),
    "generate": Command("continue a prompt", generating.GenerateOptions, generating.generate),
    "quantize": Command(
        "write a smaller model in INT8, INT4 or FP8", quantizing.QuantizeOptions,
        quantizing.quantize
    ),
}


def build_parser(docstring, whole, commands):
    """The parser for the commands {name: `Command`}. Without a name, the command is `whole`.

    The parsed `arguments.command` is the chosen `Command`.
    """
    # A flag that is not given stays absent. If a command set its default here, it would replace a
    # flag that was given before the command's name.
    parser = OneLineParser(
        description=docstring,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    add_command_flags(parser, whole)
    parser.set_defaults(command=whole, resume=None)
    subparsers = parser.add_subparsers(title="commands", metavar="")
    for name, command in commands.items():
        own = subparsers.add_parser(
            name, help=command.help, argument_default=argparse.SUPPRESS
        )
        add_command_flags(own, command)
        if command.run_class is not None:
            own.add_argument("--resume", metavar="RUN", help="directory of the run to go on with")
        own.set_defaults(command=command)
    return parser


def add_command_flags(parser, command):
    names = [field.name for field in fields(command.options)]
    if command.run_class is not None:
        budget = parser.add_mutually_exclusive_group()
        add_flags(budget, command.options, ["steps", "minutes"])
        names = [name for name in names if name not in ("steps", "minutes")]
        parser.add_argument("--out", metavar="RUN",
                            help="directory of the run (default: a new one in runs/)")
    add_flags(parser, command.options, names)
    parser.add_argument("--device", help="cuda, mps or cpu (default: best there is)")


def run_command(argv, docstring, model_class, whole, commands):
    """Runs the command that the command line names."""
    arguments = parse_arguments(build_parser(docstring, whole, commands), argv)
    command = arguments.command
    if command.run_class is not None:
        command.work(open_run(arguments, command.run_class))
        return
    options = command.options(**chosen_settings(arguments, command.options))
    if command.options is CheckOptions:
        command.work(Demonstration("deepseek_full_model.py", arguments.device, options.seed))
        return
    loaded = load_with_tokenizer(model_class, options.checkpoint, arguments.device)
    command.work(loaded, options)
