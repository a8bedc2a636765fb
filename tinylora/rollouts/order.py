"""Train items in a seeded order, and where a run stands in it."""

from collections.abc import Sequence

import numpy as np

from tinylora.tasks.base import Item


class DataOrder:
    """Train items in a seeded order that changes every epoch; `position` counts the items handed out, for resuming."""

    def __init__(
        self, items: Sequence[Item], seed: int, position: int = 0, skipped: frozenset[str] = frozenset()
    ) -> None:
        """skipped: ids of items that keep their places and are not handed out, so that the others come as before."""
        self.items = items
        self.skipped = skipped
        self.seed = seed
        self.position = position
        self._epoch = -1
        self._order: np.ndarray = np.zeros(0, dtype=np.int64)

    def take(self, count: int) -> list[tuple[int, Item]]:
        """The next `count` (position, item) pairs."""
        taken: list[tuple[int, Item]] = []
        while len(taken) < count:
            epoch, index = divmod(self.position, len(self.items))
            if epoch != self._epoch:
                self._epoch = epoch
                self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.items))
            item = self.items[int(self._order[index])]
            if item.id not in self.skipped:
                taken.append((self.position, item))
            self.position += 1
        return taken
