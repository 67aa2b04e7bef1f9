"""Text from a model, made harmless for a terminal."""

from __future__ import annotations

# Escape sequences begin with ESC (C0) or a C1 control; carriage return, backspace and bell
# overwrite or ring; the bidirectional embeddings and overrides reorder what a reader sees.
_TABLE: dict[int, str] = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: "␡",
    **{code: f"\\x{code:02x}" for code in range(0x80, 0xA0)},
    **{code: f"\\u{code:04x}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))},
    # A lone surrogate cannot be written to any UTF-8 stream.
    **dict.fromkeys(range(55296, 57344), "�"),
}


def inert(text: str) -> str:
    """``text`` with every control character but newline and tab replaced by a visible sign.

    Each character is handled alone, so text may be given in pieces: the result is the same.
    """
    return text.translate(_TABLE)
