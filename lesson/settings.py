"""Dataclass fields whose bounds and flags are declared once, beside each field."""

import argparse
import dataclasses
import math
import types


def setting(
    default=dataclasses.MISSING, help="", *, at_least=None, above=None, below=None, at_most=None,
    choices=None, flag=None, metavar=None,
):
    """A dataclass field with bounds for `check_settings` and a help text for `add_flags`.

    at_least, above, below, at_most: bounds of a number, which must be finite. choices: the allowed
    values. flag, metavar: names of the flag and of its value, where they differ from the field's.
    """
    declared = dict(
        help=help, at_least=at_least, above=above, below=below, at_most=at_most, choices=choices,
        flag=flag, metavar=metavar,
    )
    return dataclasses.field(default=default, metadata=declared)


def check_settings(settings, as_flags=False, types=False, whose=""):
    """ValueError for the first field of a dataclass that breaks its bounds; None is not checked.

    as_flags: the message says `--learning-rate` instead of `learning_rate`. types: also checks the
    type of each value, for values from a file. whose: words that the message puts before the name,
    such as `"YaRN "`.
    """
    for field in dataclasses.fields(settings):
        value, bounds = getattr(settings, field.name), field.metadata
        if types:
            wanted, value = broken_type(value, field), repr(value)
        else:
            wanted = None if value is None else broken_bound(value, bounds)
        if wanted:
            name = flag_name(field) if as_flags else field.name
            raise ValueError(f"{whose}{name}={value} must be {wanted}")


def broken_bound(value, bounds):
    """Says in words which bound a value breaks; None if it keeps all bounds."""
    names = ("at_least", "above", "below", "at_most")
    at_least, above, below, at_most = map(bounds.get, names)
    if bounds.get("choices") and value not in bounds["choices"]:
        return f"one of {', '.join(map(str, bounds['choices']))}"
    if at_least is not None and not at_least <= value < math.inf:
        return f"at least {at_least}"
    if above is not None and not above < value < math.inf:
        return f"a number above {above}"
    if below is not None and not value < below:
        return f"below {below}"
    if at_most is not None and not value <= at_most:
        return f"at most {at_most}"
    return None


def broken_type(value, field):
    """Like `broken_bound`, but also checks the type. A number without bounds may be anything."""
    kind, bounds = plain_type(field), field.metadata
    if value is None and isinstance(field.type, types.UnionType):  # int | None
        return None
    if kind is bool:
        return None if type(value) is bool else "true or false"
    if kind is dict:
        return None if isinstance(value, dict) else "an object"
    at_least, above = bounds.get("at_least"), bounds.get("above")
    if kind not in (int, float) or at_least is None and above is None:
        return None
    right = type(value) is int or kind is float and type(value) is float
    if right and broken_bound(value, bounds) is None:
        return None
    number = "an integer" if kind is int else "a number"
    return f"{number} above {above}" if at_least is None else f"{number} of at least {at_least}"


def plain_type(field):
    """The type of a field without None: int for `int | None`."""
    if not isinstance(field.type, types.UnionType):
        return field.type
    return next(part for part in field.type.__args__ if part is not types.NoneType)


def flag_name(field):
    return field.metadata.get("flag") or f"--{field.name.replace('_', '-')}"


def add_flags(parser, settings_class, names):
    """Adds a flag for each named field of a dataclass, with its type, its choices and its help.

    A list takes one or more values; a boolean flag reverses its default. The help also names the
    default, unless the text already does. A flag that is not given is absent from the arguments
    (`argparse.SUPPRESS`): see `chosen_settings`.
    """
    fields = {field.name: field for field in dataclasses.fields(settings_class)}
    for name in names:
        field, bounds = fields[name], fields[name].metadata
        kind, text = plain_type(field), bounds.get("help", "")
        unsaid = field.default not in (None, dataclasses.MISSING, "") and "default" not in text
        if unsaid and kind is not bool:
            text = f"{text} (default: {field.default})" if text else f"default: {field.default}"
        options = dict(dest=name, default=argparse.SUPPRESS, help=text)
        if kind is bool:
            action = "store_false" if field.default else "store_true"
            parser.add_argument(flag_name(field), action=action, **options)
            continue
        options |= dict(choices=bounds.get("choices"), metavar=bounds.get("metavar"))
        if kind is list:
            options |= dict(nargs="+")
        else:
            options |= dict(type=kind)
        options |= dict(required=field.default is dataclasses.MISSING)
        parser.add_argument(flag_name(field), **options)


def chosen_settings(arguments, settings_class):
    """{field: value} of the flags that were given."""
    return {
        field.name: getattr(arguments, field.name)
        for field in dataclasses.fields(settings_class)
        if hasattr(arguments, field.name)
    }
