"""The model that answers when none is named."""

from __future__ import annotations

import tempfile
from pathlib import Path

from mlxtx.checkpoint.bundled import FOLDER as BUNDLED
from mlxtx.errors import MlxtxError


def default_model() -> tuple[Path, str]:
    """Its folder, and a line for the user that says what it is.

    The model that comes with the package; in its absence a tiny one with random weights, written
    to the user's cache folder, so that every command can be tried without a download.
    """
    if (BUNDLED / "config.json").is_file():
        return BUNDLED, (
            "this is mlxtx's small built-in guide; for more than questions about mlxtx, give --model"
            " a folder or a Hub id such as mlx-community/Qwen3-4B-4bit"
        )
    import platformdirs

    from mlxtx.tiny_model import write_tiny_model

    folder = Path(platformdirs.user_cache_dir("mlxtx")) / "tiny-random-model-1"
    if not (folder / "config.json").is_file():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError:
            folder = Path(tempfile.mkdtemp(prefix="mlxtx-")) / folder.name
        try:
            write_tiny_model(folder)
        except (OSError, RuntimeError) as error:
            raise MlxtxError(f"cannot write {folder}: {error}") from error
    return folder, (
        "no model was named, so a tiny one with random weights answers: its words mean nothing"
        " (--model takes a folder or a Hub id)"
    )
