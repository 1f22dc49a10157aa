"""The command line of phase 10: every command's flags come from a dataclass of options."""

import argparse
from dataclasses import fields

from lesson import OneLineParser, add_flags


def build_parser(docstring, whole, commands):
    """The parser of `whole` (options, action) and of {name: (help, options, action)}.

    `arguments.command` is the action that was asked for; `whole`'s where none was.
    """
    # Flags not given stay absent, so that a command's own flags cannot undo those before it.
    parser = OneLineParser(
        description=docstring,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    options_class, action = whole
    add_option_flags(parser, options_class)
    parser.set_defaults(command=action, resume=None)
    subparsers = parser.add_subparsers(title="commands", metavar="")
    for name, (help_text, options_class, action) in commands.items():
        command = subparsers.add_parser(
            name, help=help_text, argument_default=argparse.SUPPRESS
        )
        add_option_flags(command, options_class, resumes=True)
        command.set_defaults(command=action)
    return parser


def add_option_flags(parser, options_class, resumes=False):
    """The options' flags, and --device; a run's --out, too, and, if it `resumes`, --resume."""
    names = [field.name for field in fields(options_class)]
    budget = [name for name in ("steps", "minutes") if name in names]
    if budget:
        add_flags(parser.add_mutually_exclusive_group(), options_class, budget)
        parser.add_argument("--out", metavar="RUN",
                            help="directory of the run (default: a new one in runs/)")
        if resumes:
            parser.add_argument("--resume", metavar="RUN",
                                help="directory of the run to go on with")
    add_flags(parser, options_class, [name for name in names if name not in budget])
    parser.add_argument("--device", help="cuda, mps or cpu (default: best there is)")
