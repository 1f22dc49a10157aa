"""Functions for the rows of a batch: they pad, join, group, draw, shuffle and decode rows."""

import torch

from lesson.checks import require


def padded(rows, fill, device=None, side="left", times=1):
    """Lists of ids → ids (B, L) with `fill` as padding, and a mask (B, L), False at the padding.

    `padded([[1], [2, 3]], 0)` is [[0, 1], [2, 3]] and [[False, True], [True, True]]. side: where
    the padding goes. times: number of copies of each row, one below the other.
    """
    longest, ids, real = max(map(len, rows)), [], []
    for row in rows:
        gap = longest - len(row)
        before, after = (gap, 0) if side == "left" else (0, gap)
        ids.append([fill] * before + list(row) + [fill] * after)
        real.append([False] * before + [True] * len(row) + [False] * after)
    both = torch.tensor(ids, device=device), torch.tensor(real, device=device)
    return tuple(each.repeat_interleave(times, dim=0) for each in both)


def stacked(tensors):
    """Joins tensors (B, L) of any B and L along B. Zeros pad the shorter rows on the left.

    Tensors (B,) are joined without padding.
    """
    if tensors[0].dim() == 2:
        longest = max(x.shape[1] for x in tensors)
        tensors = [torch.nn.functional.pad(x, (longest - x.shape[1], 0)) for x in tensors]
    return torch.cat(tuple(tensors))


def grouped(numbers, size, what="numbers", size_name="size"):
    """Numbers (B,), a tensor or a list → floats (B / size, size). All must be finite."""
    numbers = torch.as_tensor(numbers)
    numbers = numbers if numbers.is_floating_point() else numbers.float()
    require(numbers.dim() == 1, f"{what} must be (B,), got {tuple(numbers.shape)}")
    require(size >= 1 and len(numbers) % size == 0,
            f"{len(numbers)} {what} must be divisible by {size_name}={size}")
    require(numbers.isfinite().all(), f"{what} must be finite, got {numbers.tolist()}")
    return numbers.view(-1, size)


def drawn_from(rows, count, generator):
    """Draws a list of `count` rows at random, with a generator on any device; a row may repeat."""
    numbers = torch.randint(len(rows), (count,), generator=generator, device=generator.device)
    return [rows[i] for i in numbers.tolist()]


def shuffled_parts(rows, count, seed, passes=1):
    """Shuffles row numbers (B,) and splits them into up to `count` parts, none empty, in each pass.

    With `count` = 1 the rows keep their order.
    """
    parts, order = [], rows
    for number in range(passes):
        if count > 1:
            generator = torch.Generator().manual_seed((seed + number) % 2**63)
            order = rows[torch.randperm(len(rows), generator=generator).to(rows.device)]
        parts += [part for part in order.tensor_split(count) if len(part)]
    return parts


def step_generator(seed, step, purpose, device):
    """A generator that depends only on seed, step and purpose, so that a stopped run can resume.

    purpose: from 0 to 15, so that one step can have several generators.
    """
    number = (seed * 1_000_003 + step) * 16 + purpose
    return torch.Generator(device).manual_seed(number % 2**63)


def completion_mask(completions, eos_token_id):
    """(B, L) ids → (B, L) bool: True up to and including the first end-of-sequence token.

    The position decides, not the value, because padding may be the end-of-sequence token itself. If
    this token is 9, the row 1 9 3 9 gives True True False False.
    """
    is_end_BL = completions == eos_token_id
    return is_end_BL.long().cumsum(dim=1) - is_end_BL.long() == 0


def texts(rows, decode):
    """Decodes each row of `rows.completions` (B, L), only the ids where `rows.mask` is True.

    decode: a function from a list of ids to text. A drawn end-of-sequence token is included.
    """
    pairs = zip(rows.completions.cpu(), rows.mask.cpu(), strict=True)
    return [decode(ids[counted].tolist()) for ids, counted in pairs]


def picked(rows, chosen):
    """Picks rows of a named tuple of tensors (B, ...); `chosen` is an index into B."""
    return type(rows)(*(tensor[chosen] for tensor in rows))


def joined(parts):
    """Joins named tuples of tensors into one, row below row: see `stacked`."""
    return type(parts[0])(*map(stacked, zip(*parts, strict=True)))


def runs(count, size):
    """Splits the row numbers 0 … count − 1 into slices of `size`; the last may be shorter."""
    return [slice(start, start + size) for start in range(0, count, size)]


def weighed_parts(taken, counts, number, passes, seed, step):
    """Returns `shuffled_parts` of the rows where `taken` (B,) is True, and these rows' weight.

    counts: (B,), how much each row counts; None: all rows count the same. The weight is the taken
    rows' share of all counts. The order depends only on seed and step.
    """
    counts = torch.ones_like(taken, dtype=torch.long) if counts is None else counts
    rows = taken.nonzero().squeeze(1)
    weight = (counts[rows].sum() / counts.sum().clamp(min=1)).item()
    return shuffled_parts(rows, number, seed * 1_000_003 + step * 64, passes), weight


def add_loads(loads, routed):
    """Adds the loads of one pass to `loads`, {layer: (E,) how often each expert was chosen}.

    routed: a list of objects with a `layer` and a method `load()`, which returns such a tensor.
    """
    for each in routed:
        loads[each.layer] = loads.get(each.layer, 0) + each.load()


def means(history, *names):
    """{name: mean} over a list of {name: number}; the mean is 0 if the list is empty."""
    return {name: sum(h[name] for h in history) / max(1, len(history)) for name in names}


def without_padding(attention_mask, start, end):
    """Options for a block that reads tokens start … end − 1 of each row, so that it skips padding.

    attention_mask: (B, S ≥ end), 0 = padding; None: no options. No token attends to padding, no
    expert counts it, and it takes no position: the mask 0 0 1 1 1 gives the positions 0 0 0 1 2.
    """
    if attention_mask is None:
        return {}
    real = attention_mask[:, :end].bool()
    positions = (real.cumsum(dim=1) - 1).clamp(min=0)
    return dict(
        mask=real[:, None, None], positions=positions[:, start:], token_mask=real[:, start:]
    )


def real_rows(token_mask, rows):
    """One boolean for each of the rows (..., X), False at padding; all True without a mask."""
    if token_mask is None:
        return torch.ones(rows.shape[:-1], dtype=torch.bool, device=rows.device)
    return token_mask.bool().reshape(rows.shape[:-1])
