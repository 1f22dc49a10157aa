"""Rows for a batch: padded where of unequal length, read so, joined, grouped, shuffled."""

import torch

from lesson.checks import require


def padded(rows, fill, device=None, side="left", times=1):
    """Lists of ids → ids (B, L), `fill` on one side of the shorter rows; (B, L) bool: no padding.

    `padded([[1], [2, 3]], 0)`: [[0, 1], [2, 3]] and [[False, True], [True, True]]. times: how often
    each row comes, one below the other.
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
    """Tensors (B, L) of several B and L below each other; zeros stand left of the shorter rows.

    Tensors (B,) are joined as they are.
    """
    if tensors[0].dim() == 2:
        longest = max(x.shape[1] for x in tensors)
        tensors = [torch.nn.functional.pad(x, (longest - x.shape[1], 0)) for x in tensors]
    return torch.cat(tuple(tensors))


def grouped(numbers, size, what="numbers", size_name="size"):
    """Finite numbers (B,), a tensor or a list, as floats (B / size, size); else ValueError."""
    numbers = torch.as_tensor(numbers)
    numbers = numbers if numbers.is_floating_point() else numbers.float()
    require(numbers.dim() == 1, f"{what} must be (B,), got {tuple(numbers.shape)}")
    require(size >= 1 and len(numbers) % size == 0,
            f"{len(numbers)} {what} must be divisible by {size_name}={size}")
    require(numbers.isfinite().all(), f"{what} must be finite, got {numbers.tolist()}")
    return numbers.view(-1, size)


def drawn_from(rows, count, generator):
    """A list of so many of the rows at random, on any device; one may come twice."""
    numbers = torch.randint(len(rows), (count,), generator=generator, device=generator.device)
    return [rows[i] for i in numbers.tolist()]


def shuffled_parts(rows, count, seed, passes=1):
    """Row numbers (B,) in random order, in at most `count` parts, none empty; again for each pass.

    A single part stays in its order.
    """
    parts, order = [], rows
    for number in range(passes):
        if count > 1:
            generator = torch.Generator().manual_seed((seed + number) % 2**63)
            order = rows[torch.randperm(len(rows), generator=generator).to(rows.device)]
        parts += [part for part in order.tensor_split(count) if len(part)]
    return parts


def step_generator(seed, step, purpose, device):
    """Random numbers that depend on these numbers alone: so a run can be taken up again.

    purpose: from 0 to 15.
    """
    number = (seed * 1_000_003 + step) * 16 + purpose
    return torch.Generator(device).manual_seed(number % 2**63)


def completion_mask(completions, eos_token_id):
    """(B, L) ids → (B, L) bool: True up to and including the first end-of-sequence token.

    By position, not by value: padding may be the end-of-sequence token itself. With 9 as the end,
    1 9 3 9 gives True True False False.
    """
    is_end_BL = completions == eos_token_id
    return is_end_BL.long().cumsum(dim=1) - is_end_BL.long() == 0


def texts(rows, decode):
    """`rows.completions` (B, L) as `decode` writes each: a list of ids, where `rows.mask` is True.

    An end-of-sequence token that was drawn is among them.
    """
    pairs = zip(rows.completions.cpu(), rows.mask.cpu(), strict=True)
    return [decode(ids[counted].tolist()) for ids, counted in pairs]


def picked(rows, chosen):
    """A named tuple of tensors (B, ...) → the same of some rows; `chosen` indexes (B,)."""
    return type(rows)(*(tensor[chosen] for tensor in rows))


def joined(parts):
    """Named tuples of tensors → one, their rows below each other: see `stacked`."""
    return type(parts[0])(*map(stacked, zip(*parts, strict=True)))


def runs(count, size):
    """Row numbers 0 … count − 1 as slices of `size`, the last one shorter."""
    return [slice(start, start + size) for start in range(0, count, size)]


def weighed_parts(taken, counts, number, passes, seed, step):
    """(`shuffled_parts` of the rows where `taken` (B,) is True, their share of all `counts`).

    counts: (B,), how much a row counts; None: all rows the same. The order depends on seed and
    step alone.
    """
    counts = torch.ones_like(taken, dtype=torch.long) if counts is None else counts
    rows = taken.nonzero().squeeze(1)
    weight = (counts[rows].sum() / counts.sum().clamp(min=1)).item()
    return shuffled_parts(rows, number, seed * 1_000_003 + step * 64, passes), weight


def add_loads(loads, routed):
    """Adds to {layer: (E,) how often each expert was chosen} what one pass has routed.

    routed: a list of what has a `layer` and says by `load()` how often its experts were chosen.
    """
    for each in routed:
        loads[each.layer] = loads.get(each.layer, 0) + each.load()


def means(history, *names):
    """{name: its mean} of a list of {name: number}; 0 if the list is empty."""
    return {name: sum(h[name] for h in history) / max(1, len(history)) for name in names}


def without_padding(attention_mask, start, end):
    """Options with which a block that reads tokens start … end − 1 of each row leaves padding out.

    attention_mask: (B, S ≥ end), 0 = padding; None: no options. Padding is not attended to, not
    counted by experts, and takes no position: 0 0 1 1 1 gives the positions 0 0 0 1 2.
    """
    if attention_mask is None:
        return {}
    real = attention_mask[:, :end].bool()
    positions = (real.cumsum(dim=1) - 1).clamp(min=0)
    return dict(
        mask=real[:, None, None], positions=positions[:, start:], token_mask=real[:, start:]
    )


def real_rows(token_mask, rows):
    """Boolean, one for each of the rows (..., X): False where the mask says that it is padding."""
    if token_mask is None:
        return torch.ones(rows.shape[:-1], dtype=torch.bool, device=rows.device)
    return token_mask.bool().reshape(rows.shape[:-1])
