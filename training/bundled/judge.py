"""Is an answer right? By rules alone, so that anyone can run it again.

A fact is right when every key of its fact is in the answer, at least six in ten of the taught
answer's longer words are, nothing contradicts it (no "I do not know", no command, option or slash
command that the taught answer does not name) and the answer ended by itself. Sums, letters and
names must hold the one text that is right.
"""

from __future__ import annotations

import re
from typing import Any

from training.bundled.facts import all_items
from training.bundled.styles import STYLES
from training.bundled.unknown import MARK

_NAMES = re.compile(r"mlxtx [a-z-]+|--[a-z-]+|(?<!\w)/[a-z]+|ctrl\+\w|shift\+\w+|\besc\b|\bf\d\b")
_WORD = re.compile(r"[a-z0-9]{4,}")
RECALL = 0.6


def named(text: str) -> set[str]:
    """The commands, options, slash commands and keys that a text names."""
    return set(_NAMES.findall(text.lower()))


def has_keys(answer: str, keys: list[str]) -> bool:
    text = answer.lower()
    return all(any(option.lower() in text for option in key.split("|")) for key in keys)


def recall(answer: str, taught: str) -> float:
    """The share of the taught answer's words of four letters or more that the answer holds."""
    words = set(_WORD.findall(taught.lower()))
    return len(words & set(_WORD.findall(answer.lower()))) / len(words) if words else 1.0


def right(row: dict[str, Any], answer: str) -> bool:
    """Judges one answer to one row of the held-out set."""
    if "must" in row:
        return row["must"].lower() in answer.lower()
    if "style" in row:
        item = _items()[row["id"]]
        if not STYLES[row["style"]].mark(answer, item):
            return False
    if MARK in answer.lower() and MARK not in row["answer"].lower():
        return False
    if named(answer) - named(row["answer"]):
        return False
    return has_keys(answer, row.get("keys", [])) and recall(answer, row["answer"]) >= RECALL


def loops(tokens: list[int], size: int = 4, times: int = 3) -> bool:
    """Whether some run of ``size`` tokens occurs ``times`` times or more."""
    runs = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return any(runs.count(run) >= times for run in set(runs))


_TABLE: dict[str, Any] = {}


def _items() -> dict[str, Any]:
    if not _TABLE:
        _TABLE.update((item.id, item) for item in all_items())
    return _TABLE
