"""The model that answers when none is named."""

from __future__ import annotations

from pathlib import Path

from mlxtx.checkpoint.bundled import bundled_folder


def default_model() -> tuple[Path, str]:
    """The folder of the model in the package, and a line for the user that says what it is."""
    return bundled_folder(), (
        "this is mlxtx's small built-in guide; for more than questions about mlxtx, give --model"
        " a folder or a Hub id such as mlx-community/Qwen3-4B-4bit"
    )
