"""On-device language models on Apple Silicon, in Python on MLX.

    import mlxtx
    model = mlxtx.load("path/or/hub-id")
    print(model.generate("Hello").text)

Importing this package loads nothing heavy: each public name is imported when first used.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public name -> the module that holds it.
_PUBLIC = {
    "load": "mlxtx.language_model",
    "load_model": "mlxtx.checkpoint",
    "LanguageModel": "mlxtx.language_model",
    "Completion": "mlxtx.language_model",
    "Sampling": "mlxtx.generation.sampling",
    "convert": "mlxtx.checkpoint.convert",
    "tune": "mlxtx.tuning",
    "MlxtxError": "mlxtx.errors",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mlxtx' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
