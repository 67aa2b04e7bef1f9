"""Token ids to text while they arrive."""

from __future__ import annotations

from collections.abc import Callable, Container

from mlxtx.text.pieces import Step, run


class StreamingDetokenizer:
    """Gives text as soon as it is certain, never half a character.

    ``push(id)`` returns the new text (often empty in the middle of a character) and ``finish()``
    the rest; all of it joined equals ``Tokenizer.decode`` of the same ids. The cost of a token
    does not depend on how many came before.
    """

    def __init__(
        self, piece_of: Callable[[int], str | None], steps: list[Step], skip: Container[int] = ()
    ) -> None:
        self._piece_of = piece_of
        self._steps = steps
        self._skip = skip

    def push(self, token: int) -> str:
        piece = None if token in self._skip else self._piece_of(token)
        return "" if piece is None else run(self._steps, piece)

    def finish(self) -> str:
        return run(self._steps, None)
