"""The base classes of all caches: they know their length and bytes, roll back, and repeat rows."""

from lesson.checks import check_rollback


class Rows:
    """Rows (..., length, width), None at first. A subclass defines `append`, which adds rows."""

    def __init__(self):
        self.rows = None

    @property
    def length(self):
        return 0 if self.rows is None else self.rows.shape[-2]

    def truncate(self, length):
        """Forgets all rows after the first `length`, such as those of rejected drafts."""
        check_rollback(length, self.length)
        self.rows = self.rows[..., :length, :] if self.length else None

    def repeat(self, times):
        """Repeats each sequence of a batch this many times, one copy below the other."""
        self.rows = self.rows.repeat_interleave(times, dim=0)

    def used_bytes(self):
        return 0 if self.rows is None else self.rows.nbytes


class Cache:
    """Stores of rows that grow together: one for latents, or two for keys and values.

    Each is an attribute and has the methods of `Rows`. Fast decoding passes preallocated stores.
    """

    def __init__(self, **stores):
        self.__dict__.update(stores)
        self.stores = tuple(stores.values())

    @property
    def length(self):
        return self.stores[0].length

    def truncate(self, length):
        """Forgets all tokens after the first `length`."""
        for store in self.stores:
            store.truncate(length)

    def repeat(self, times):
        """Repeats each sequence, so that a prompt is read once and continued in many ways."""
        for store in self.stores:
            store.repeat(times)

    def used_bytes(self):
        return sum(store.used_bytes() for store in self.stores)
