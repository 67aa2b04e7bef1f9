"""Texts with alternatives: "(a|b) c" stands for "a c" or "b c"; groups may be nested."""

from __future__ import annotations

import random


def choose(text: str, rng: random.Random) -> str:
    """One of the texts that ``text`` stands for."""
    while ")" in text:
        end = text.index(")")
        start = text.rindex("(", 0, end)
        text = text[:start] + rng.choice(text[start + 1 : end].split("|")) + text[end + 1 :]
    return text


def every(text: str) -> list[str]:
    """All the texts that ``text`` stands for."""
    if ")" not in text:
        return [text]
    end = text.index(")")
    start = text.rindex("(", 0, end)
    options = text[start + 1 : end].split("|")
    return [full for one in options for full in every(text[:start] + one + text[end + 1 :])]


def typo(text: str, rng: random.Random) -> str:
    """``text`` with one slip of the finger: two letters swapped, one doubled or one left out."""
    places = [i for i in range(1, len(text) - 1) if text[i].isalpha() and text[i + 1].isalpha()]
    if not places:
        return text
    at = rng.choice(places)
    kind = rng.randrange(3)
    if kind == 0:
        return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    if kind == 1:
        return text[:at] + text[at] + text[at:]
    return text[:at] + text[at + 1 :]


def cased(question: str, rng: random.Random) -> str:
    """A question as people type it: lower case, a sentence, or all capitals; with or without "?"."""
    style = rng.random()
    if style < 0.5:
        question = question[0].upper() + question[1:]
    elif style < 0.75:
        question = question.lower()
    elif style < 0.77:
        question = question.upper()
    if question[-1].isalnum() or question[-1] in "\"'":
        question += rng.choice(["?", "?", "", "", ".", " ?"])
    return question
