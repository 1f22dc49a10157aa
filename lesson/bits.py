"""Packs numbers of a few bits into bytes, and tensors of several types into one row of bytes."""

import math

import torch
import torch.nn.functional as F


def packed_bytes(numbers, bits):
    """Numbers (..., n) from 0 to 2^bits − 1 → bytes (..., ⌈n · bits / 8⌉).

    The first number takes the lowest bits: `packed_bytes([15, 0], 4)` is [0b0000_1111].
    """
    size = math.ceil(numbers.shape[-1] * bits / 8)
    return regrouped(numbers.long(), bits, 8)[..., :size].to(torch.uint8)


def unpacked_bytes(packed, bits, count):
    """The inverse of `packed_bytes`: (..., ⌈count · bits / 8⌉) → (..., count), uint8."""
    if bits == 4:  # a faster way: the low and the high half of each byte
        numbers = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    else:
        numbers = regrouped(packed.long(), 8, bits).to(torch.uint8)
    return numbers[..., :count]


def regrouped(numbers, old, new):
    """Regroups the bits of numbers of `old` bits each into numbers of `new` bits, lowest first.

    `new` numbers of `old` bits have as many bits as `old` numbers of `new` bits. They form one
    word: eight numbers of 6 bits, for example, are 48 bits or six bytes.
    """
    places = torch.arange(max(old, new), device=numbers.device)
    padded = F.pad(numbers, (0, -numbers.shape[-1] % new)).unflatten(-1, (-1, new))
    words = (padded << (old * places[:new])).sum(dim=-1, keepdim=True)
    return ((words >> (new * places[:old])) & (2**new - 1)).flatten(-2)


def joined_bytes(*tensors):
    """Tensors (..., n) of any types → one tensor of their bytes, joined in the last dimension."""
    return torch.cat([tensor.view(torch.uint8) for tensor in tensors], dim=-1)


def parted_bytes(rows, *examples):
    """The inverse of `joined_bytes`: tensors with the types and row lengths of the examples."""
    sizes = [example.shape[-1] * example.element_size() for example in examples]
    parts = [
        part if example.element_size() == 1 else part.contiguous()
        for part, example in zip(rows.split(sizes, dim=-1), examples, strict=True)
    ]
    return [part.view(example.dtype) for part, example in zip(parts, examples, strict=True)]


def nonzero(scale):
    """Replaces a scale of 0 by 1, so that we can divide by it. Only zeros have a scale of 0."""
    return torch.where(scale == 0, 1, scale)
