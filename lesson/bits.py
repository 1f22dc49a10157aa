"""Numbers of a few bits in bytes, tensors of several types in one row of bytes, scales above 0."""

import math

import torch
import torch.nn.functional as F


def packed_bytes(numbers, bits):
    """Numbers (..., n) of so many bits, from 0 on → bytes (..., ⌈n · bits / 8⌉), the first lowest.

    `packed_bytes([15, 0], 4)`: [0b0000_1111].
    """
    size = math.ceil(numbers.shape[-1] * bits / 8)
    return regrouped(numbers.long(), bits, 8)[..., :size].to(torch.uint8)


def unpacked_bytes(packed, bits, count):
    """The inverse of `packed_bytes`: (..., ⌈count · bits / 8⌉) → (..., count), uint8."""
    if bits == 4:  # quick: simply the low and the high half of each byte
        numbers = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    else:
        numbers = regrouped(packed.long(), 8, bits).to(torch.uint8)
    return numbers[..., :count]


def regrouped(numbers, old, new):
    """The bits of numbers of `old` bits each, read as numbers of `new` bits each, lowest first.

    `new` numbers of `old` bits are one word, and so are `old` numbers of `new` bits: eight codes of
    6 bits are 48 bits, six bytes.
    """
    places = torch.arange(max(old, new), device=numbers.device)
    padded = F.pad(numbers, (0, -numbers.shape[-1] % new)).unflatten(-1, (-1, new))
    words = (padded << (old * places[:new])).sum(dim=-1, keepdim=True)
    return ((words >> (new * places[:old])) & (2**new - 1)).flatten(-2)


def joined_bytes(*tensors):
    """Tensors (..., n) of any types → one of bytes (..., all their bytes), one after the other."""
    return torch.cat([tensor.view(torch.uint8) for tensor in tensors], dim=-1)


def parted_bytes(rows, *examples):
    """The inverse of `joined_bytes`: tensors of the types and the row lengths of the examples."""
    sizes = [example.shape[-1] * example.element_size() for example in examples]
    parts = [
        part if example.element_size() == 1 else part.contiguous()
        for part, example in zip(rows.split(sizes, dim=-1), examples, strict=True)
    ]
    return [part.view(example.dtype) for part, example in zip(parts, examples, strict=True)]


def nonzero(scale):
    """A scale that can be divided by: 1 in the place of 0, which only zeros have."""
    return torch.where(scale == 0, 1, scale)
