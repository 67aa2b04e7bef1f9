"""The model that is part of the package."""

from __future__ import annotations

from pathlib import Path

from mlxtx.errors import MlxtxError

NAME = "bundled"
FOLDER = Path(__file__).resolve().parent.parent / "bundled"


def bundled_folder() -> Path:
    """Where the built-in guide lies: an ordinary checkpoint folder."""
    if not (FOLDER / "config.json").is_file():
        raise MlxtxError("this installation has no bundled model; name another with --model")
    return FOLDER
