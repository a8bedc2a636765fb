"""Train items in a seeded order, and where a run stands in it."""

from collections.abc import Sequence

import numpy as np

from tinylora.tasks.base import Item


class DataOrder:
    """Train items in a seeded order that changes every epoch; `position` counts the items handed out, for resuming."""

    def __init__(self, items: Sequence[Item], seed: int, position: int = 0) -> None:
        self.items = items
        self.seed = seed
        self.position = position
        self._epoch = -1
        self._order: np.ndarray = np.zeros(0, dtype=np.int64)

    def take(self, count: int) -> list[tuple[int, Item]]:
        """The next `count` (position, item) pairs."""
        taken = []
        for _ in range(count):
            epoch, index = divmod(self.position, len(self.items))
            if epoch != self._epoch:
                self._epoch = epoch
                self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.items))
            taken.append((self.position, self.items[int(self._order[index])]))
            self.position += 1
        return taken
