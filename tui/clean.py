"""Text from models, files and the network, made safe for a terminal."""

from __future__ import annotations

import os
from pathlib import Path

from mlxtx.text.inert import inert


def clean(text: str) -> str:
    """``text`` without anything that could drive a terminal; line ends are ``\\n``."""
    if text.isascii() and text.isprintable():
        return text
    for ending in ("\r\n", "\r", "\u2028", "\u2029"):
        text = text.replace(ending, "\n")
    return inert(text)


def one_line(text: str, width: int = 200) -> str:
    """``text`` cleaned, on one line, cut with an ellipsis at ``width`` characters."""
    text = " ".join(clean(text).split())
    return text if len(text) <= width else text[: width - 1] + "…"


def path_of(text: str) -> Path:
    """The path that a person typed; ``~name`` stays as it is where nobody has that name."""
    return Path(os.path.expanduser(text))


def size(count: float) -> str:
    """Bytes for people, decimal as disks and the Hub count them: 1.2 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    digits = 0 if unit == "B" or count >= 99.5 else 1
    return f"{count:.{digits}f} {unit}"


def duration(seconds: float) -> str:
    """Seconds for people: 38 ms, 0.4 s, 12 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 0.1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s" if total % 60 else f"{total // 60} min"
    return f"{total // 3600} h {total % 3600 // 60} min"
