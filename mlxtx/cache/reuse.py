"""Going on from what a cache already holds: the longest common prefix of two prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

from mlxtx.cache.model_cache import Mark, ModelCache

MARKS = 16
MARK_BYTES = 256 << 20  # of all marks; the newest may have more, for it is the likeliest
# A prompt, and how many of its tokens are held already, to a saved cache of more of them.
Find = Callable[[Sequence[int], int], tuple[ModelCache, list[int]] | None]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    shorter = min(len(a), len(b))
    for index in range(shorter):
        if a[index] != b[index]:
            return index
    return shorter


class ReusedCache:
    """The cache of one conversation, and the tokens it was fed.

        kept = reused.start(prompt)         # rows of prompt[:kept] are there already
        model(prompt[kept:], reused.cache)  # the rest, and then each token that is chosen:
        reused.tokens.append(token)

    ``start`` goes back to where the new prompt parts from what is held, an edit in the middle
    included. Layers with a window can go back only a little, or to a mark; ``start`` sets one at
    the end of the turn before, so that a conversation can go back to the end of its last turns.
    """

    def __init__(self, make_cache: Callable[[], ModelCache], find: Find | None = None):
        """``find`` gives a saved cache, and its tokens, for a prompt that goes on from less than
        half of what is held: any two chats share the first tokens of their template."""
        self._make_cache = make_cache
        self._find = find
        self.reset()

    def reset(self) -> None:
        """Empty again."""
        self.cache = self._make_cache()
        self.tokens: list[int] = []
        self._marks: list[Mark] = []

    def start(self, prompt: Sequence[int]) -> int:
        """Makes the cache hold the beginning of ``prompt``; how many of its tokens that is. At
        least one token is left to feed, for its logits."""
        if self.cache.offset and (not self._marks or self._marks[-1].offset < self.cache.offset):
            self._marks = _affordable([*self._marks[-MARKS + 1 :], self.cache.mark()])
        kept, mark = self._way_back(prompt)
        if not kept:
            self.reset()
        found = self._find(prompt, kept) if self._find and 2 * kept <= self.cache.offset else None
        if found is not None:
            self.cache, kept, self._marks = found[0], len(found[1]), []
        elif mark is not None:
            self.cache.return_to(mark)
        elif kept:
            self.cache.rollback(self.cache.offset - kept)
        self._marks = [m for m in self._marks if m.offset <= kept]
        self.tokens = list(prompt)
        return kept

    def _way_back(self, prompt: Sequence[int]) -> tuple[int, Mark | None]:
        """The most tokens that can be kept, and the mark to return to, if it takes one."""
        # The newest token may not have been fed, and tokens may have been fed that nobody told of.
        held = min(self.cache.offset, len(self.tokens))
        kept = min(common_prefix(self.tokens, prompt), held, len(prompt) - 1)
        if kept > 0 and self.cache.can_rollback(self.cache.offset - kept):
            return kept, None
        marks = [mark for mark in self._marks if 0 < mark.offset <= kept]
        return (marks[-1].offset, marks[-1]) if marks else (0, None)


def _affordable(marks: Sequence[Mark]) -> list[Mark]:
    """The newest marks, as many as may be kept: a wide window makes each of them large."""
    sizes = accumulate(mark.nbytes for mark in reversed(marks))
    count = sum(size <= MARK_BYTES for size in sizes)
    return list(marks[-max(1, count) :])
