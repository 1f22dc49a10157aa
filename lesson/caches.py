"""What every cache can say and do, whatever it keeps: its length, its bytes, going back, copies."""

from lesson.checks import check_rollback


class Rows:
    """Rows (..., length, width), None at first. A subclass says how `append` makes them grow."""

    def __init__(self):
        self.rows = None

    @property
    def length(self):
        return 0 if self.rows is None else self.rows.shape[-2]

    def truncate(self, length):
        """Forgets all rows after the first `length`: rolls back a guess that proved wrong."""
        check_rollback(length, self.length)
        self.rows = self.rows[..., :length, :] if self.length else None

    def repeat(self, times):
        """Each sequence of a batch so often, one below the other."""
        self.rows = self.rows.repeat_interleave(times, dim=0)

    def used_bytes(self):
        return 0 if self.rows is None else self.rows.nbytes


class Cache:
    """Stores of rows that grow together, each an attribute: one of a latent, two of K and V.

    A store is `Rows` or has what it has; decoding at speed passes one with room set aside.
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
        """Each sequence so often: a prompt is read once, and continued in many ways."""
        for store in self.stores:
            store.repeat(times)

    def used_bytes(self):
        return sum(store.used_bytes() for store in self.stores)
