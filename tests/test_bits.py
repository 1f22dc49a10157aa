"""Bits in bytes, rows of bytes, scales that can be divided by."""

import math

import pytest
import torch

from lesson.bits import (
    joined_bytes,
    nonzero,
    packed_bytes,
    parted_bytes,
    regrouped,
    unpacked_bytes,
)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 8, 13])
def test_packed_numbers_come_back_and_waste_no_bit(bits, count):
    numbers = torch.randint(2**bits, (3, 2, count))
    packed = packed_bytes(numbers, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 2, math.ceil(count * bits / 8))
    assert torch.equal(unpacked_bytes(packed, bits, count).long(), numbers)
    whole = 8 * count
    assert regrouped(numbers.repeat(1, 1, 8), bits, 8).shape == (3, 2, whole * bits // 8)


def test_packed_by_hand():
    assert packed_bytes(torch.tensor([15, 0]), 4).tolist() == [0b0000_1111]
    assert packed_bytes(torch.tensor([1, 2, 3]), 3).tolist() == [0b11_010_001, 0b0]
    assert unpacked_bytes(torch.tensor([0b0010_0001, 0b0011]), 4, 3).tolist() == [1, 2, 3]
    for bits in (3, 4):  # where the numbers are
        packed = packed_bytes(torch.ones(3, device="meta"), bits)
        assert packed.is_meta and unpacked_bytes(packed, bits, 3).is_meta


def test_tensors_of_several_types_share_a_row_of_bytes():
    codes, scales = torch.ones(2, 3, 5, dtype=torch.int8), torch.randn(2, 3, 2).bfloat16()
    rows = joined_bytes(codes, scales)
    assert rows.shape == (2, 3, 5 + 4) and rows.dtype == torch.uint8
    for part, wanted in zip(parted_bytes(rows[:, 1:], codes, scales), (codes, scales), strict=True):
        assert part.dtype == wanted.dtype and torch.equal(part, wanted[:, 1:])


def test_only_a_scale_of_zero_becomes_one():
    assert nonzero(torch.tensor([0.0, 1e-30, 3.0])).tolist() == pytest.approx([1, 1e-30, 3])
