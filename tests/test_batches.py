"""Rows for a batch, and two checks of what stands in them."""

import math
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from lesson.batches import (
    add_loads,
    completion_mask,
    drawn_from,
    grouped,
    joined,
    means,
    padded,
    picked,
    real_rows,
    runs,
    shuffled_parts,
    stacked,
    step_generator,
    texts,
    weighed_parts,
    without_padding,
)
from lesson.checks import check_no_more, check_ranges, check_rows


def test_rows_are_padded_on_either_side():
    ids, real = padded([[1], [2, 3]], 0)
    assert ids.tolist() == [[0, 1], [2, 3]] and real.tolist() == [[False, True], [True, True]]
    ids, real = padded([[7], [7, 3]], 7, side="right")  # padding is known by its place alone
    assert ids.tolist() == [[7, 7], [7, 3]] and real.tolist() == [[True, False], [True, True]]


def test_padded_rows_may_come_several_times():
    ids, real = padded([[1], [2, 3]], 0, times=2)
    assert ids.tolist() == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert real.tolist() == [[False, True]] * 2 + [[True, True]] * 2


def test_rows_and_their_masks_are_made_on_the_device_named():
    assert all(tensor.is_meta for tensor in padded([[1], [2, 3]], 0, "meta"))
    assert real_rows(None, torch.ones(6, 3, device="meta")).is_meta


def test_rows_up_to_their_end_are_read_without_the_rest():
    ids = torch.tensor([[1, 9, 3, 9], [1, 2, 3, 4]])
    mask = completion_mask(ids, 9)
    assert mask.tolist() == [[True, True, False, False], [True] * 4]
    assert texts(SimpleNamespace(completions=ids, mask=mask), str) == ["[1, 9]", "[1, 2, 3, 4]"]


class Pair(NamedTuple):
    ids: torch.Tensor
    numbers: torch.Tensor


def test_named_tuples_of_rows_are_picked_and_joined():
    one = Pair(torch.tensor([[1], [2]]), torch.tensor([1.0, 2.0]))
    assert [x.tolist() for x in picked(one, torch.tensor([1]))] == [[[2]], [2.0]]
    assert type(picked(one, slice(1))) is Pair and len(picked(one, slice(0)).ids) == 0
    other = Pair(torch.tensor([[3, 4]]), torch.tensor([3.0]))
    both = joined([one, other])
    assert type(both) is Pair and both.numbers.tolist() == [1, 2, 3]
    assert both.ids.tolist() == [[0, 1], [0, 2], [3, 4]]
    assert joined([other]).ids.tolist() == [[3, 4]]


def test_runs_are_slices_of_a_size():
    assert runs(5, 2) == [slice(0, 2), slice(2, 4), slice(4, 6)] and runs(0, 2) == []


def test_parts_of_the_rows_taken_weigh_as_much_as_they_count():
    taken, counts = torch.tensor([True, False, True, False]), torch.tensor([1, 2, 3, 4])
    for weights, share in ((counts, 4 / 10), (None, 2 / 4), (counts * 0, 0)):
        parts, weight = weighed_parts(taken, weights, 2, 1, seed=0, step=0)
        assert sorted(torch.cat(parts).tolist()) == [0, 2] and weight == pytest.approx(share)
    assert weighed_parts(taken & False, counts, 2, 1, seed=0, step=0) == ([], 0)
    every = torch.ones(20, dtype=torch.bool)
    orders = [torch.cat(weighed_parts(every, None, 2, 1, *at)[0]).tolist()
              for at in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert orders[0] == orders[1] and len(set(map(tuple, orders))) == 3


def test_loads_are_added_layer_by_layer():
    class Routed(NamedTuple):
        layer: str
        chosen: torch.Tensor

        def load(self):
            return self.chosen

    loads = {}
    for name, chosen in (("a", [1, 0]), ("b", [2, 2]), ("a", [0, 5])):
        add_loads(loads, [Routed(name, torch.tensor(chosen))])
    assert {name: load.tolist() for name, load in loads.items()} == {"a": [1, 5], "b": [2, 2]}


def test_means_of_figures():
    history = [{"a": 1.0, "b": None, "c": 2}, {"a": 2.0, "b": None, "c": 4}]
    assert means(history, "a", "c") == {"a": 1.5, "c": 3} and means([], "a") == {"a": 0}


def test_a_number_that_exceeds_another_is_named():
    check_no_more(parts=3, rows=3)
    with pytest.raises(ValueError, match="^parts=4 exceed the 3 rows$"):
        check_no_more(parts=4, rows=3)


def test_stacked_rows_of_unequal_length_get_zeros_on_the_left():
    parts = [torch.tensor([[1]]), torch.tensor([[2, 3]]), torch.empty(0, 2, dtype=torch.long)]
    assert stacked(parts).tolist() == [[0, 1], [2, 3]]
    assert stacked(parts[:1]).tolist() == [[1]]
    assert stacked([torch.tensor([True]), torch.tensor([False])]).tolist() == [True, False]
    assert stacked([torch.tensor([[True]]), torch.tensor([[True, True]])]).tolist() == [
        [False, True], [True, True]
    ]


def test_groups_are_rows_of_floats():
    assert grouped([1, 2, 3, 4], 2).tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert grouped([1, 2], 1).tolist() == [[1.0], [2.0]]
    assert grouped(torch.ones(4, dtype=torch.float64), 4).dtype == torch.float64
    with pytest.raises(ValueError, match="4 prizes must be divisible by number=3"):
        grouped(torch.ones(4), 3, "prizes", "number")
    with pytest.raises(ValueError, match="4 numbers must be divisible by size=0"):
        grouped(torch.ones(4), 0)
    with pytest.raises(ValueError, match=r"numbers must be \(B,\), got \(2, 2\)"):
        grouped(torch.ones(2, 2), 2)
    with pytest.raises(ValueError, match="numbers must be finite, got .*nan"):
        grouped([1.0, float("nan")], 2)


def test_rows_are_drawn_with_replacement_and_each_as_often():
    drawn = drawn_from(["a", "b"], 500, torch.Generator().manual_seed(0))
    assert set(drawn) == {"a", "b"} and 200 < drawn.count("a") < 300
    one, other = (drawn_from(range(99), 9, torch.Generator().manual_seed(s)) for s in (1, 2))
    assert one != other


def test_parts_hold_every_row_once_and_none_is_empty():
    rows = torch.tensor([2, 3, 5, 7, 11])
    parts = shuffled_parts(rows, 3, seed=0)
    assert [len(part) for part in parts] == [2, 2, 1]
    assert sorted(torch.cat(parts).tolist()) == rows.tolist() != torch.cat(parts).tolist()
    assert len(shuffled_parts(rows[:2], 3, seed=0)) == 2 and shuffled_parts(rows[:0], 3, 0) == []
    assert torch.equal(shuffled_parts(rows, 1, seed=0)[0], rows)
    two_passes = shuffled_parts(rows, 3, 0, passes=2)
    assert torch.equal(torch.cat(two_passes[:3]), torch.cat(parts)) and len(two_passes) == 6
    assert torch.equal(torch.cat(two_passes[3:]), torch.cat(shuffled_parts(rows, 3, 1)))
    again, other = (torch.cat(shuffled_parts(rows, 3, seed)) for seed in (0, 1))
    assert torch.equal(torch.cat(parts), again) and not torch.equal(again, other)


def test_a_steps_random_numbers_depend_on_seed_step_and_purpose():
    def drawn(*numbers):
        return torch.rand(3, generator=step_generator(*numbers, "cpu")).tolist()

    assert drawn(1, 2, 3) == drawn(1, 2, 3)
    assert len({tuple(drawn(*n)) for n in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))}) == 4
    assert drawn(2**70, 0, 0)  # a seed of any size


def test_ranges_are_checked():
    check_ranges(clip=(0, 0, 1), other=(0, 1, 1), unset=(0, None, 1), open=(0, 9, math.inf))
    for bounds, message in (
        ((0, 1.5, 1), "clip=1.5 must be from 0 to 1"),
        ((0, -1, math.inf), "clip=-1 must be a number of at least 0"),
        ((0, math.inf, math.inf), "clip=inf must be a number of at least 0"),
        ((0, math.nan, 1), "clip=nan must be from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            check_ranges(clip=bounds)


def test_rows_of_a_table_are_checked():
    table, column = torch.ones(2, 3), torch.ones(2)
    check_rows("(B, L)", dict(rewards=column), logp=table, mask=table, unset=None)
    with pytest.raises(ValueError, match=r"logp must be \(B, L\), got \(2,\)"):
        check_rows("(B, L)", logp=column)
    with pytest.raises(ValueError, match=r"logp must be \(B, L\), got \(0, 3\)"):
        check_rows("(B, L)", logp=table[:0])
    with pytest.raises(ValueError, match=r"mask must be \(2, 3\), got \(2, 2\)"):
        check_rows("(B, L)", logp=table, mask=table[:, 1:])
    with pytest.raises(ValueError, match=r"rewards must be \(2,\), got \(2, 3\)"):
        check_rows("(B, L)", dict(rewards=table), logp=table)


def test_padding_takes_no_position_and_is_not_seen():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = without_padding(mask, 3, 5)
    assert options["positions"].tolist() == [[1, 2], [3, 4]]
    assert options["token_mask"].tolist() == [[True, True], [True, True]]
    assert options["mask"].shape == (2, 1, 1, 5) and options["mask"][:, 0, 0].equal(mask.bool())
    early = without_padding(mask, 0, 3)  # of fewer tokens than the mask has
    assert early["positions"].tolist() == [[0, 0, 0], [0, 1, 2]]
    assert early["token_mask"].equal(mask[:, :3].bool()) and early["mask"].shape == (2, 1, 1, 3)
    assert without_padding(mask, 0, 5)["positions"][0].tolist() == [0, 0, 0, 1, 2]
    assert without_padding(None, 3, 5) == {}


def test_rows_are_real_unless_the_mask_says_padding():
    rows = torch.ones(6, 3)
    every = real_rows(None, rows)
    assert every.tolist() == [True] * 6 and every.dtype == torch.bool
    assert real_rows(torch.tensor([[0, 1, 1], [1, 0, 1]]), rows).tolist() == [
        False, True, True, True, False, True
    ]
