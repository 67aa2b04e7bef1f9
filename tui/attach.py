"""Text files in a message: ``@path`` in what is typed, read with care."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mlxtx.tui.clean import clean, path_of, size

from mlxtx.errors import MlxtxError

# A larger file would not fit a context; it is named before half of it is lost.
LARGEST = 4_000_000
_AT = re.compile(r'(?<!\S)@(?:"([^"\n]+)"|(\S+))')


def mentioned(text: str) -> list[Path]:
    """The files that ``@path`` or ``@"a path"`` in ``text`` names; other words with @ stay text."""
    paths = []
    for match in _AT.finditer(text):
        name = match[1] or match[2]
        # A sentence may end right after the path.
        for candidate in (name, name.rstrip(".,;:!?)")):
            path = path_of(candidate)
            if os.path.isfile(path):  # which takes any text, however long
                paths.append(path)
                break
    return list(dict.fromkeys(paths))


def read(path: Path) -> dict[str, Any]:
    """``path`` as an attachment: name, text, bytes, and a ``note`` when bytes were no UTF-8.

    Raises MlxtxError for what is no readable text.
    """
    try:
        length = path.stat().st_size
        if length > LARGEST:
            raise MlxtxError(
                f"{path.name} has {size(length)}; a file of up to {size(LARGEST)} can be attached."
            )
        data = path.read_bytes()
    except OSError as error:
        raise MlxtxError(f"{path} can't be read: {error.strerror or error}") from None
    if b"\0" in data[:8192]:
        raise MlxtxError(f"{path.name} is no text file; only text can be attached.")
    text = data.decode("utf-8", "replace")
    bad = text.count("\ufffd") - data.count("\ufffd".encode())
    attachment: dict[str, Any] = {"name": str(path), "text": clean(text), "bytes": len(data)}
    if bad > 0:
        attachment["note"] = f"{path.name}: {bad} bytes were no UTF-8 and were replaced."
    return attachment


def completions(word: str, limit: int = 8) -> list[str]:
    """Paths that begin with ``word`` (what stands after the @), folders with a slash."""
    typed = path_of(word)
    folder, start = (typed, "") if word.endswith("/") or not word else (typed.parent, typed.name)
    try:
        found = sorted(folder.iterdir(), key=lambda p: (not p.is_dir(), p.name.lower()))
    except OSError:
        return []
    out = []
    for path in found:
        hidden = path.name.startswith(".") and not start.startswith(".")
        if hidden or not path.name.lower().startswith(start.lower()):
            continue
        shown = word[: len(word) - len(start)] + path.name + ("/" if path.is_dir() else "")
        out.append(shown)
        if len(out) == limit:
            break
    return out
