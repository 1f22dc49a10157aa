"""Rows for a batch: padded where of unequal length, read so, joined, grouped, shuffled."""

import torch

from lesson.checks import require


def padded(rows, fill, device=None, side="left"):
    """Lists of ids → ids (B, L), `fill` on one side of the shorter rows; (B, L) bool: no padding.

    `padded([[1], [2, 3]], 0)`: [[0, 1], [2, 3]] and [[False, True], [True, True]].
    """
    longest, ids, real = max(map(len, rows)), [], []
    for row in rows:
        gap = longest - len(row)
        before, after = (gap, 0) if side == "left" else (0, gap)
        ids.append([fill] * before + list(row) + [fill] * after)
        real.append([False] * before + [True] * len(row) + [False] * after)
    return torch.tensor(ids, device=device), torch.tensor(real, device=device)


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
