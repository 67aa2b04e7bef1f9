"""Fine-tuning and training on the device: samples in, adapters or a model out."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "Adapters": "mlxtx.tuning.adapters",
    "load_adapter": "mlxtx.tuning.adapters",
    "preview": "mlxtx.tuning.finetune",
    "train_from_scratch": "mlxtx.tuning.scratch",
    "tune": "mlxtx.tuning.finetune",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
