"""The base classes of caches: length, bytes, rollback and repeated rows, by hand."""

import pytest
import torch

from lesson.caches import Cache, Rows


class Appended(Rows):
    def append(self, rows):
        self.rows = rows if self.rows is None else torch.cat([self.rows, rows], dim=-2)


def filled(heads=1):
    rows = Appended()
    rows.append(torch.arange(2 * heads * 3 * 4.0).view(2, heads, 3, 4))
    return rows


def test_an_empty_cache_has_no_length_and_no_bytes():
    rows = Appended()
    assert (rows.length, rows.used_bytes()) == (0, 0)
    rows.truncate(0)
    assert rows.rows is None
    with pytest.raises(ValueError, match="length 0 to 1"):
        rows.truncate(1)


def test_rows_are_counted_forgotten_and_repeated():
    rows = filled()
    given = rows.rows
    assert rows.length == 3 and rows.used_bytes() == 2 * 3 * 4 * 4
    with pytest.raises(ValueError, match="length 3 to 4"):
        rows.truncate(4)
    rows.truncate(3)
    assert torch.equal(rows.rows, given)
    rows.truncate(1)
    assert torch.equal(rows.rows, given[:, :, :1])
    rows.repeat(2)
    assert torch.equal(rows.rows, given[[0, 0, 1, 1], :, :1])
    rows.truncate(0)
    assert rows.length == rows.used_bytes() == 0
    rows.append(torch.ones(4, 1, 3, 4))
    assert rows.length == 3


def test_stores_of_a_cache_grow_and_shrink_together():
    cache = Cache(keys=filled(), values=filled(heads=2))
    assert cache.length == 3 and cache.used_bytes() == (1 + 2) * 2 * 3 * 4 * 4
    assert cache.stores == (cache.keys, cache.values)
    cache.repeat(3)
    cache.truncate(2)
    for store, heads in ((cache.keys, 1), (cache.values, 2)):
        assert store.rows.shape == (6, heads, 2, 4)
    with pytest.raises(ValueError, match="length 2 to 3"):
        cache.truncate(3)
