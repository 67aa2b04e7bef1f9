"""The caches of all layers of one batch, and how far it has been fed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlxtx.cache.layer import RowsCache
from mlxtx.cache.settings import PLAIN, KVSettings
from mlxtx.errors import MlxtxError


@dataclass(frozen=True)
class Mark:
    """A point in a cache's life: how many tokens it held, and what its rings held."""

    offset: int
    rings: dict[int, RowsCache]

    @property
    def nbytes(self) -> int:
        """What the mark may come to hold: its rings are shared only until the cache goes on."""
        return sum(ring.nbytes for ring in self.rings.values())


class ModelCache:
    """A sequence of layer caches. ``offset`` counts the tokens of a row, padding included.

    ``layers[i]`` may be the very object of an earlier layer whose keys and values layer i shares.
    """

    def __init__(
        self,
        layers: Sequence[RowsCache],
        *,
        settings: KVSettings = PLAIN,
        left_padding: Sequence[int] | None = None,
    ):
        self.layers = list(layers)
        self.settings = settings
        self.left_padding = None if left_padding is None else tuple(left_padding)
        self.offset = 0

    def set_left_padding(self, left_padding: Sequence[int]) -> None:
        """Padding of each row, told before the first token or together with it."""
        padding = tuple(left_padding)
        if padding == (self.left_padding or (0,) * len(padding)):
            return
        if self.offset:
            raise ValueError("left_padding can't change once the cache holds tokens")
        before = max(self.left_padding or (0,))
        self.left_padding = padding
        for layer in self.distinct():
            layer.set_padding(max(padding) - before)

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[RowsCache]:
        return iter(self.layers)

    def distinct(self) -> list[RowsCache]:
        """Every layer cache once."""
        return list({id(layer): layer for layer in self.layers}.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, what is reserved and not yet filled included."""
        return sum(layer.nbytes for layer in self.distinct())

    def state(self) -> list[mx.array]:
        """The arrays to evaluate so that nothing of the cache stays lazy."""
        return [array for layer in self.distinct() for array in layer.state()]

    def can_rollback(self, count: int) -> bool:
        """Whether the newest ``count`` tokens can be taken back: windows keep only so many rows."""
        return 0 <= count <= self.offset and all(
            layer.can_rollback(count) for layer in self.distinct()
        )

    def rollback(self, count: int) -> None:
        """Forgets the newest ``count`` tokens. Raises MlxtxError, with nothing changed, if rows
        that would be seen again are gone."""
        if not 0 <= count <= self.offset:
            raise ValueError(f"can't roll back {count} of {self.offset} tokens")
        if not self.can_rollback(count):
            rewind = min(layer.layout.rewind for layer in self.distinct())
            raise MlxtxError(
                f"this cache can take back {rewind} tokens, not {count}, because a window has "
                "overwritten older rows: start from an empty cache, or make it with more rewind"
            )
        for layer in self.distinct():
            layer.rollback(count)
        self.offset -= count

    def clear(self) -> None:
        """Empty again, as it was made."""
        for layer in self.distinct():
            layer.clear()
        self.offset = 0

    def mark(self) -> Mark:
        """A point to come back to with ``return_to``. Layers with a window keep a copy of their
        few rows; all others only go back."""
        rings = {
            number: layer.copy()
            for number, layer in enumerate(self.distinct())
            if layer.layout.reach is not None
        }
        return Mark(self.offset, rings)

    def return_to(self, mark: Mark) -> None:
        """Goes back to a mark that was set on the way here: not behind a later ``rollback`` past
        it."""
        for number, layer in enumerate(self.distinct()):
            if number in mark.rings:
                layer.restore(mark.rings[number])
            else:
                layer.rollback(self.offset - mark.offset)
        self.offset = mark.offset

    def copy(self) -> ModelCache:
        """A cache that goes on from here on its own; rows are shared until one of them changes."""
        copies = {id(layer): layer.copy() for layer in self.distinct()}
        other = ModelCache(
            [copies[id(layer)] for layer in self.layers],
            settings=self.settings,
            left_padding=self.left_padding,
        )
        other.offset = self.offset
        return other
