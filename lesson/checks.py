"""Checks of arguments and of the processor, and the check lines that a demonstration prints."""

import functools
import itertools
import sys
import textwrap

import torch


def require(condition, message):
    """Raises ValueError with this message if the condition is false."""
    if not condition:
        raise ValueError(message)


def check_sizes(**sizes):
    """Every named size must be at least 1; None is not checked."""
    for name, size in sizes.items():
        require(size is None or size >= 1, f"{name}={size} must be at least 1")


def check_divides(**sizes):
    """Of two named numbers, the second must divide the first."""
    (name, number), (divisor_name, divisor) = sizes.items()
    divides = divisor >= 1 and number % divisor == 0
    require(divides, f"{name}={number} must be divisible by {divisor_name}={divisor}")


def check_input(x, width, batch="..."):
    """x must be (..., T, width), or, with `batch` "B", exactly (B, T, width)."""
    fits = x.dim() >= 2 if batch == "..." else x.dim() == 3
    want = f"({batch}, T, {width})"
    require(fits and x.shape[-1] == width, f"input must be {want}, got {tuple(x.shape)}")


def check_attention(query, key, value):
    """Shapes must be: query (..., T, K), key (..., S, K), value (..., S, V)."""
    least = min(query.dim(), key.dim(), value.dim())
    require(least >= 2, "query, key and value must each be (..., length, width)")
    width, key_width, keys, values = query.shape[-1], key.shape[-1], key.shape[-2], value.shape[-2]
    require(width == key_width, f"query width {width} must equal key width {key_width}")
    require(keys == values, f"got {keys} keys for {values} values, want equal numbers")


def expanded_mask(mask, shape):
    """Expands a boolean mask to a view of shape (..., T, S); None stays None."""
    if mask is None:
        return None
    boolean = mask.dtype == torch.bool
    require(boolean, f"mask must be boolean (True = may attend), got {mask.dtype}")
    ends = zip(reversed(mask.shape), reversed(shape), strict=False)
    fits = mask.dim() <= len(shape) and all(size in (1, wanted) for size, wanted in ends)
    require(fits, f"mask must be broadcastable to {tuple(shape)}, got {tuple(mask.shape)}")
    return mask.expand(shape)


def require_shape(tensor, what, **least):
    """ValueError unless a tensor has one dimension for each keyword, each at least that long.

    For ids of shape (5,), `require_shape(ids, "the ids must be integers", B=1, T=2)` says: "the ids
    must be integers (B, T) with B ≥ 1 and T ≥ 2, got (5,)".
    """
    got = tuple(tensor.shape) if torch.is_tensor(tensor) else type(tensor).__name__
    sizes = got if torch.is_tensor(tensor) else ()
    fits = len(sizes) == len(least) and all(map(int.__ge__, sizes, least.values()))
    wanted = " and ".join(f"{letter} ≥ {size}" for letter, size in least.items())
    require(fits, f"{what} ({', '.join(least)}) with {wanted}, got {got}")


@functools.cache
def int_mm_is_exact():
    """True if `torch._int_mm` is exact: without VNNI, its 16-bit sums silently overflow."""
    largest = torch.full((16, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(largest, largest.T) == 64 * 127**2).all())


def check_token_ids(ids, vocabulary, past=0, new=0, longest=None):
    """ids must be integers (B, T ≥ 1) from 0 to `vocabulary` − 1.

    past: number of tokens before them. new: number of tokens to generate after them. longest: limit
    of all these tokens together; None: no limit.
    """
    T = ids.shape[1] if ids.dim() == 2 else 0
    require(T > 0, f"input_ids must be (B, T) with T ≥ 1, got {tuple(ids.shape)}")
    require(not ids.is_floating_point(), f"input_ids must be integers, got {ids.dtype}")
    what = f"prompt of {T} and {new} new" if new else f"{past + T}"
    fits = longest is None or past + T + new <= longest
    require(fits, f"{what} tokens exceed the context of {longest}")
    if ids.numel() and not ids.is_meta:
        low, high = (bound.item() for bound in ids.aminmax())
        wrong = low if low < 0 else high
        within = 0 <= wrong < vocabulary
        require(within, f"token id {wrong} is not within the vocabulary of {vocabulary}")


def check_attention_mask(attention_mask, shape):
    """The mask must have this shape."""
    got = tuple(attention_mask.shape)
    require(got == shape, f"attention_mask must be {shape}, got {got}")


def check_prompts(ids, new, attention_mask, pad_token_id, vocabulary, longest=None):
    """ids (B, T) must be prompts with room for `new` more tokens: see `check_token_ids`.

    attention_mask: (B, T), 0 = padding, which must be on the left, or None.
    """
    require(new >= 0, f"max_new_tokens={new} must be at least 0")
    check_token_ids(ids, vocabulary, new=new, longest=longest)
    known = 0 <= pad_token_id < vocabulary
    require(known, f"pad_token_id={pad_token_id} is not within the vocabulary")
    if attention_mask is not None:
        check_attention_mask(attention_mask, tuple(ids.shape))
        left = bool(attention_mask[:, -1].all())
        require(left, "prompts must be padded on the left: the last token is padding")


def require_shapes(shape, **tensors):
    """ValueError for the first tensor that does not have this shape; None is not checked."""
    wanted = tuple(shape)
    for name, tensor in tensors.items():
        got = wanted if tensor is None else tuple(tensor.shape)
        require(got == wanted, f"{name} must be {wanted}, got {got}")


def check_dropout(dropout):
    """The share of weights to drop must be at least 0 and below 1."""
    require(0.0 <= dropout < 1.0, f"dropout={dropout} must be at least 0 and below 1")


def check_heads(d_model, num_heads, num_kv_heads, dropout):
    """The heads must divide the model width, and the key/value heads must divide the heads."""
    check_divides(d_model=d_model, num_heads=num_heads)
    check_divides(num_heads=num_heads, num_kv_heads=num_kv_heads)
    check_dropout(dropout)


def check_positions(positions, B, T):
    """positions of B texts of T tokens must be (T,), the same for all, or (B, T)."""
    fits = positions.shape in ((T,), (B, T))
    require(fits, f"positions must be ({T},) or ({B}, {T}), got {tuple(positions.shape)}")


def check_rollback(length, stored):
    """A cache of `stored` rows can be truncated to any length from 0 to `stored`."""
    fits = 0 <= length <= stored
    require(fits, f"cannot truncate a cache of length {stored} to {length}")


def check_forward(x, width, heads, mask, cache, path, paths):
    """Checks the arguments of an attention's `forward` before its cache changes.

    x must be (B, T, width) and `path` one of `paths`. `mask` must be None, or boolean and
    broadcastable to (B, heads, T, S), where S counts the cached keys, if any, and the new ones.
    """
    check_input(x, width, batch="B")
    require(path in paths, f"path={path!r} must be one of {', '.join(paths)}")
    B, T, _ = x.shape
    expanded_mask(mask, (B, heads, T, T if cache is None else cache.length + T))


def check_choice(choices, **named):
    """Every named value must be one of `choices`."""
    for name, value in named.items():
        require(value in choices, f"{name}={value!r} must be one of {tuple(choices)}")


def check_up_to(most, of, **numbers):
    """Every named number must be from 1 to `most`. The message shows `of` in its place."""
    for name, number in numbers.items():
        require(1 <= number <= most, f"{name}={number} must be from 1 to {of}")


def check_ranges(**bounded):
    """`check_ranges(clip=(0, clip, 1))` raises ValueError unless 0 ≤ clip ≤ 1. None is not checked.

    If the upper bound is infinity, infinity itself is refused.
    """
    for name, (low, value, high) in bounded.items():
        open_end = high == float("inf")
        fits = value is None or low <= value <= high and not (open_end and value == high)
        wanted = f"a number of at least {low}" if open_end else f"from {low} to {high}"
        require(fits, f"{name}={value} must be {wanted}")


def check_rows(letters, rows=None, **tensors):
    """All tensors must have the same shape and not be empty. `letters` names it: "(B, L)".

    rows: {name: tensor (B,)}, one number for each row. None is not checked.
    """
    name, first = next(iter(tensors.items()))
    fits = first.dim() == letters.count(",") + 1 and first.numel()
    require(fits, f"{name} must be {letters}, got {tuple(first.shape)}")
    require_shapes(first.shape, **tensors)
    require_shapes(first.shape[:1], **(rows or {}))


class Demonstration:
    """Prints a header, then one line a check; `finish` exits with status 1 if a check failed."""

    WIDTHS = (52, 26, 42)  # of the columns: what is shown, its shape, the measured figure

    def __init__(self, script, device, seed, dtype=torch.float32):
        print(f"{script} · torch {torch.__version__} · {device} · {dtype} · seed {seed}")
        torch.manual_seed(seed)
        self.device, self.seed = device, seed
        self.failures = []

    def check(self, what, shape, figure, ok):
        """Prints one line: what is shown, the shape with its letters, the figure, ok or FAILED.

        A text wider than its column continues below, so that the columns line up.
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
        """Checks that two tensors are equal up to rounding."""
        difference = (got - want).abs().max().item()
        self.check(what, shape, f"largest difference {difference:.1e}", difference <= tolerance)

    def note(self, text):
        """Prints a line without a verdict."""
        print(f"  {text}", flush=True)

    def finish(self, *experiments):
        """Prints what to try next; exits with status 1 if a check failed."""
        print("Try changing:")
        for experiment in experiments:
            print(f"  {experiment}")
        if self.failures:
            print(f"FAILED: {'; '.join(self.failures)}", file=sys.stderr)
            raise SystemExit(1)


def check_even(**sizes):
    """Every named size must be even and at least 0, because its numbers are rotated in pairs."""
    for name, size in sizes.items():
        require(size >= 0 and size % 2 == 0, f"{name}={size} must be even: it rotates pairs")


def boolean_mask(mask, shape):
    """Checks a mask like `expanded_mask`, but only adds leading dimensions of 1 to it."""
    expanded = expanded_mask(mask, shape)
    return None if mask is None else mask[(None,) * (expanded.dim() - mask.dim())]


def check_groups(experts, active, groups, best_groups, best_of_group):
    """The experts must form equal groups, and `best_groups` of these must hold `active` experts.

    With several groups, a group's score uses its `best_of_group` best experts: it must have them.
    """
    check_divides(n_routed_experts=experts, n_group=groups)
    check_up_to(groups, f"n_group={groups}", topk_group=best_groups)
    size = experts // groups
    choice = f"the {best_groups * size} experts that can be chosen"
    check_up_to(best_groups * size, choice, num_experts_per_tok=active)
    few = f"n_group={groups} leaves {size} expert a group, want {best_of_group} or more"
    require(groups == 1 or size >= best_of_group, few)


def check_tokens(x, width, token_mask, dispatch, dispatches):
    """x must be (..., width), token_mask (...) or None, and dispatch one of `dispatches`."""
    check_choice(dispatches, dispatch=dispatch)
    check_input(x, width)
    require_shapes(x.shape[:-1], token_mask=token_mask)


def check_count(*words, **numbers):
    """Every named number must be an integer above 0, None, or one of `words`."""
    for name, number in numbers.items():
        fits = number is None or number in words or (type(number) is int and number >= 1)
        *most, last = ["a number above 0", "None", *map(repr, words)]
        require(fits, f"{name}={number!r} must be {', '.join(most)} or {last}")


def entry_of(table, **named):
    """Looks up an entry by its name; an entry that was given itself is returned as it is.

    `entry_of({"a": 1.5}, size="a")` is 1.5, and so is `entry_of({"a": 1.5}, size=1.5)`. For "b" the
    ValueError says: "size='b' must be one of a".
    """
    (what, given), kind = *named.items(), type(next(iter(table.values())))
    found = table.get(str(given), given)
    require(isinstance(found, kind), f"{what}={given!r} must be one of {', '.join(table)}")
    return found


def check_no_more(**sizes):
    """Of two named numbers, the first must not be larger than the second."""
    (name, number), (limit_name, limit) = sizes.items()
    require(number <= limit, f"{name}={number} exceed the {limit} {limit_name}")
