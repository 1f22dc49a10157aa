"""The command line of phase 10: a table of commands, whose flags come from dataclasses."""

import argparse
import collections.abc
from dataclasses import fields
from typing import NamedTuple

from lesson import OneLineParser, add_flags, chosen_settings, parse_arguments
from pipeline.released import load_with_tokenizer
from pipeline.run import open_run


class Command(NamedTuple):
    """`options`: the dataclass of its flags.

    `work(run)` of a `run_class`, which --resume goes on with; without a `run_class`,
    `work(loaded, options)` of a --checkpoint.
    """

    help: str
    options: type
    work: collections.abc.Callable
    run_class: type | None = None


def build_parser(docstring, whole, commands):
    """The parser of {name: `Command`}, and of the command `whole` where no name is given.

    The arguments say which was asked for: `arguments.command`.
    """
    # Flags not given stay absent, so that a command's own flags cannot undo those before it.
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
    """Does what the command line asks for."""
    arguments = parse_arguments(build_parser(docstring, whole, commands), argv)
    command = arguments.command
    if command.run_class is not None:
        command.work(open_run(arguments, command.run_class))
        return
    options = command.options(**chosen_settings(arguments, command.options))
    loaded = load_with_tokenizer(model_class, options.checkpoint, arguments.device)
    command.work(loaded, options)
