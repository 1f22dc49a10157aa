"""What every lesson's demonstration uses, so that a lesson holds nothing but its idea.

`demonstration` turns a function into a lesson's `main`: flags, device, header, check lines, errors
in one line. `require` checks an argument. `setting` declares a dataclass field with its bounds and
its flag. `curves` and `bands` draw. This package knows no lesson.
"""

from lesson.checks import (
    Demonstration,
    check_attention,
    check_divides,
    check_input,
    check_sizes,
    expanded_mask,
    require,
    require_shape,
)
from lesson.command_line import (
    OneLineParser,
    demonstration,
    demonstration_parser,
    flag,
    inside_ipython,
    one_line_errors,
    parse_arguments,
    pick_device,
    progress_bar,
)
from lesson.pictures import bands, curves, draw_bands, picture
from lesson.settings import add_flags, check_settings, chosen_settings, setting

__all__ = [
    "Demonstration",
    "OneLineParser",
    "add_flags",
    "bands",
    "check_attention",
    "check_divides",
    "check_input",
    "check_settings",
    "check_sizes",
    "chosen_settings",
    "curves",
    "demonstration",
    "draw_bands",
    "demonstration_parser",
    "expanded_mask",
    "flag",
    "inside_ipython",
    "one_line_errors",
    "parse_arguments",
    "pick_device",
    "picture",
    "progress_bar",
    "require",
    "require_shape",
    "setting",
]
