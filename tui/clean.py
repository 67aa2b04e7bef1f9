"""Text from models, files and the network, made safe for a terminal."""

from __future__ import annotations

import re

# Shown, not obeyed: each control character becomes its picture (ESC is ␛). C1 controls and bidi
# overrides, which have none, become the replacement character. Tabs and line ends stay.
_TABLE = (
    {code: 0x2400 + code for code in range(32) if code not in (9, 10)}
    | {0x7F: 0x2421}
    | dict.fromkeys(range(128, 160), 65533)
    | dict.fromkeys((*range(8234, 8239), *range(8294, 8298)), 65533)
    | {0x2028: 0x0A, 0x2029: 0x0A}
)
# Half of a surrogate pair can't be written to a terminal or a database.
_SURROGATES = re.compile("[\ud800-\udfff]")


def clean(text: str) -> str:
    """``text`` without anything that could drive a terminal; line ends are ``\\n``."""
    if text.isascii() and text.isprintable():
        return text
    text = text.replace("\r\n", "\n").replace("\r", "\n").translate(_TABLE)
    return _SURROGATES.sub("�", text)


def one_line(text: str, width: int = 200) -> str:
    """``text`` cleaned, on one line, cut with an ellipsis at ``width`` characters."""
    text = " ".join(clean(text).split())
    return text if len(text) <= width else text[: width - 1] + "…"


def size(count: float) -> str:
    """Bytes for people, decimal as disks and the Hub count them: 1.2 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    digits = 0 if unit == "B" or count >= 99.5 else 1
    return f"{count:.{digits}f} {unit}"


def duration(seconds: float) -> str:
    """Seconds for people: 0.4 s, 12 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s" if total % 60 else f"{total // 60} min"
    return f"{total // 3600} h {total % 3600 // 60} min"
