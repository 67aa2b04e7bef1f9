"""Checkpoints: finding, reading, quantizing, converting and writing them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "Checkpoint": "mlxtx.checkpoint.source",
    "load_model": "mlxtx.checkpoint.loading",
    "resolve": "mlxtx.checkpoint.hub",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
