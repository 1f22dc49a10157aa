"""Dataclass fields whose bounds and flags are declared once, beside each field."""

import argparse
import dataclasses
import math
import types


def setting(default, help="", *, at_least=None, above=None, below=None, choices=None):
    """A dataclass field with bounds for `check_settings` and a help text for `add_flags`.

    at_least, above, below: bounds of a number, which must be finite. choices: the values allowed.
    """
    bounds = dict(help=help, at_least=at_least, above=above, below=below, choices=choices)
    return dataclasses.field(default=default, metadata=bounds)


def check_settings(settings, as_flags=False):
    """ValueError for the first field of a dataclass that breaks its bounds; None is not checked.

    as_flags: the message names `--learning-rate` where it else names `learning_rate`.
    """
    for field in dataclasses.fields(settings):
        value, bounds = getattr(settings, field.name), field.metadata
        wanted = None if value is None else broken_bound(value, bounds)
        if wanted:
            name = f"--{field.name.replace('_', '-')}" if as_flags else field.name
            raise ValueError(f"{name}={value} must be {wanted}")


def broken_bound(value, bounds):
    """What a value should be and is not, as words; None if it keeps all its bounds."""
    at_least, above, below = (bounds.get(name) for name in ("at_least", "above", "below"))
    if bounds.get("choices") and value not in bounds["choices"]:
        return f"one of {', '.join(map(str, bounds['choices']))}"
    if at_least is not None and not at_least <= value < math.inf:
        return f"at least {at_least}"
    if above is not None and not above < value < math.inf:
        return f"a number above {above}"
    if below is not None and not value < below:
        return f"below {below}"
    return None


def add_flags(parser, settings_class, names):
    """A flag for each named field of a dataclass: its type, its choices, its default in the help.

    Flags that are not given stay absent (`argparse.SUPPRESS`): see `chosen_settings`.
    """
    fields = {field.name: field for field in dataclasses.fields(settings_class)}
    for name in names:
        field = fields[name]
        kind, choices = field.type, field.metadata.get("choices")
        if isinstance(kind, types.UnionType):  # int | None
            kind = next(part for part in kind.__args__ if part is not types.NoneType)
        text = field.metadata.get("help", "")
        text = f"{text} (default: {field.default})" if text else f"default: {field.default}"
        flag = f"--{name.replace('_', '-')}"
        options = dict(dest=name, default=argparse.SUPPRESS, help=text)
        if kind is bool:
            parser.add_argument(flag, action="store_true", **options)
        else:
            parser.add_argument(flag, type=kind, choices=choices, **options)


def chosen_settings(arguments, settings_class):
    """{field: value} of the flags that were given."""
    return {
        field.name: getattr(arguments, field.name)
        for field in dataclasses.fields(settings_class)
        if hasattr(arguments, field.name)
    }
