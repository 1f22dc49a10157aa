"""Tools that all lessons share, so that a lesson contains only its idea.

`demonstration` turns a function into a lesson's `main`, with flags, a device, a header, check lines
and one-line errors. `require` checks an argument. `setting` declares a dataclass field with its
bounds and its flag. `curves`, `panels` and `bands` draw. This package imports no lesson.
"""

from lesson.checks import (
    Demonstration,
    check_attention,
    check_attention_mask,
    check_divides,
    check_dropout,
    check_forward,
    check_heads,
    check_input,
    check_positions,
    check_prompts,
    check_rollback,
    check_sizes,
    check_token_ids,
    expanded_mask,
    int_mm_is_exact,
    require,
    require_shape,
    require_shapes,
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
    shown_steps,
)
from lesson.pictures import bands, curves, draw_bands, panels, picture
from lesson.settings import add_flags, check_settings, chosen_settings, setting

__all__ = [
    "Demonstration",
    "OneLineParser",
    "add_flags",
    "bands",
    "check_attention",
    "check_attention_mask",
    "check_divides",
    "check_dropout",
    "check_forward",
    "check_heads",
    "check_input",
    "check_positions",
    "check_prompts",
    "check_rollback",
    "check_settings",
    "check_sizes",
    "check_token_ids",
    "chosen_settings",
    "curves",
    "demonstration",
    "demonstration_parser",
    "draw_bands",
    "expanded_mask",
    "flag",
    "inside_ipython",
    "int_mm_is_exact",
    "one_line_errors",
    "panels",
    "parse_arguments",
    "pick_device",
    "picture",
    "progress_bar",
    "require",
    "require_shape",
    "require_shapes",
    "setting",
    "shown_steps",
]
