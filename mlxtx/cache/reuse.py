"""Going on from what a cache already holds: the longest common prefix of two prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mlxtx.cache.model_cache import Mark, ModelCache

MARKS = 16


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    shorter = min(len(a), len(b))
    for index in range(shorter):
        if a[index] != b[index]:
            return index
    return shorter


class ReusedCache:
    """The cache of one conversation, and the tokens it holds.

        kept = reused.begin(prompt)          # rows of prompt[:kept] are there already
        model(prompt[kept:], reused.cache)   # feed the rest, then every generated token
        reused.fed(prompt[kept:])            # ... and tell what was fed

    ``begin`` goes back to where the new prompt parts from what is held, an edit in the middle
    included. Layers with a window can only go back a little, or to a mark; ``fed`` sets one each
    time, so that a conversation can go back to the end of any of its last turns.
    """

    def __init__(self, make_cache: Callable[[], ModelCache]):
        self._make_cache = make_cache
        self.cache = make_cache()
        self.tokens: list[int] = []
        self._marks: list[Mark] = []

    def adopt(self, cache: ModelCache, tokens: Sequence[int]) -> None:
        """Goes on with a cache that holds ``tokens`` already, one read from disk for instance."""
        self.cache, self.tokens, self._marks = cache, list(tokens), []
        self._mark()

    def usable(self, prompt: Sequence[int]) -> int:
        """How many tokens of ``prompt`` would not have to be fed again."""
        return self._way_back(prompt)[0]

    def begin(self, prompt: Sequence[int]) -> int:
        """Makes the cache hold the beginning of ``prompt``; how many of its tokens that is. At
        least one token is left to feed, for its logits."""
        kept, mark = self._way_back(prompt)
        self._marks = [m for m in self._marks if m.offset <= kept]
        if mark is not None:
            self.cache.return_to(mark)
        elif kept:
            self.cache.rollback(self.cache.offset - kept)
        else:
            self.reset()
        del self.tokens[kept:]
        return kept

    def fed(self, tokens: Sequence[int]) -> None:
        """Tells which tokens the cache took since ``begin`` or the last call."""
        self.tokens.extend(tokens)
        if len(self.tokens) != self.cache.offset:
            raise ValueError(f"the cache holds {self.cache.offset} tokens, not {len(self.tokens)}")
        self._mark()

    def reset(self) -> None:
        """Empty again."""
        self.cache, self.tokens, self._marks = self._make_cache(), [], []

    def _mark(self) -> None:
        if not self._marks or self._marks[-1].offset != self.cache.offset:
            self._marks = [*self._marks[-MARKS + 1 :], self.cache.mark()]

    def _way_back(self, prompt: Sequence[int]) -> tuple[int, Mark | None]:
        """The most tokens that can be kept, and the mark to return to, if it takes one."""
        kept = min(common_prefix(self.tokens, prompt), len(prompt) - 1)
        # The cache may hold tokens that nobody told of (a turn that was cut short): they go too.
        if kept <= 0 or self.cache.offset < len(self.tokens):
            return 0, None
        if self.cache.can_rollback(self.cache.offset - kept):
            return kept, None
        marks = [mark for mark in self._marks if 0 < mark.offset <= kept]
        return (marks[-1].offset, marks[-1]) if marks else (0, None)
