"""Keeping a model's memory in place while it generates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

_before: list[int] = []  # for each block that is open, the limit before the first of them


@contextmanager
def wired_memory() -> Iterator[None]:
    """On Metal, buffers up to the recommended working set stay resident within the block.

    Without it macOS may page out parts of a large model between two tokens. The limit is put back
    at the end of the last open block, for answers may be streamed side by side, when nothing runs
    any more. Elsewhere this does nothing.
    """
    if not mx.metal.is_available():
        yield
        return
    working_set = int(mx.device_info()["max_recommended_working_set_size"])
    before = mx.set_wired_limit(working_set)
    _before.append(_before[0] if _before else before)
    try:
        yield
    finally:
        mx.synchronize()
        before = _before.pop()
        if not _before:
            mx.set_wired_limit(before)
