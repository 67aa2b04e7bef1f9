"""The facts tables read into one list of items: ways to ask, the answer, and how to judge it."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from training.bundled import frames
from training.bundled.grammar import every

FOLDER = Path(__file__).parent / "facts"


@dataclass(frozen=True, kw_only=True)
class Item:
    """One fact. ``ask`` are (frame, fillings) for training, ``held`` for the test; ``known`` says
    that the held-out wording uses trained names in a new frame ("frame") or only new words
    ("words")."""

    id: str
    kind: str
    say: str
    keys: tuple[str, ...]
    short: str = ""
    why: str = ""
    topic: str = ""  # how to name it in "You asked about ..."
    names: tuple[str, ...] = ()
    asks: tuple[tuple[tuple[str, ...], tuple[dict[str, str], ...]], ...] = field(default=())
    held: tuple[tuple[str, str], ...] = ()  # (question, "frame" or "words")


def _table(name: str) -> list[dict]:
    return tomllib.loads((FOLDER / f"{name}.toml").read_text())[name.removesuffix("s")]


def _options(texts: list[str]) -> list[str]:
    return [full for text in texts for full in every(text)]


def _held(held_frames: list[str], fills: list[dict[str, str]], count: int, salt: int):
    """``count`` held-out questions in new frames, spread evenly over frames and names."""
    return tuple(
        (
            held_frames[(salt + i) % len(held_frames)].format(**fills[(salt + i) % len(fills)]),
            "frame",
        )
        for i in range(count)
    )


def _concepts() -> list[Item]:
    items = []
    for n, row in enumerate(_table("concepts")):
        names = row["names"]
        fills = [{"x": name} for name in names]
        common = {"names": tuple(names), "topic": names[0]}
        items.append(
            Item(
                id=row["id"], kind="concept", say=row["say"], keys=tuple(row["keys"]),
                short=row["short"], why=row.get("why", ""),
                asks=((tuple(frames.WHAT), tuple(fills)),),
                held=_held(frames.WHAT_HELD, fills, 3, n), **common,
            )
        )  # fmt: skip
        if "why" in row:
            items.append(
                Item(
                    id=row["id"] + ".why", kind="why", say=row["why"], keys=(),
                    asks=((tuple(frames.WHY), tuple(fills)),),
                    held=_held(frames.WHY_HELD, fills, 1, n), **common,
                )
            )  # fmt: skip
    return items


def _tasks() -> list[Item]:
    items = []
    for table in ("tasks", "keys"):
        for n, row in enumerate(_table(table)):
            goals = _options(row["goals"])
            wishes = [{"g": goal} for goal in goals]
            asks = [(tuple(frames.HOW), tuple(wishes))]
            held = _held(frames.HOW_HELD, wishes, 2, n)
            held += tuple(
                (frames.HOW_HELD[(n + 3) % len(frames.HOW_HELD)].format(g=goal), "words")
                for goal in row["held"]
            )
            if "about" in row:
                about = [{"x": name} for name in row["about"]]
                asks.append((tuple(frames.PRESS), tuple(about)))
                held += _held(frames.PRESS_HELD, about, 1, n)
            items.append(
                Item(
                    id=row["id"] if table == "tasks" else "key." + row["id"],
                    kind=table.removesuffix("s"), say=row["say"], keys=tuple(row["keys"]),
                    short=row.get("short", ""), topic="how to " + goals[0],
                    asks=tuple(asks), held=held,
                )
            )  # fmt: skip
    return items


def _commands() -> list[Item]:
    return [
        Item(
            id="command." + row["name"], kind="command", say=row["say"], keys=tuple(row["keys"]),
            topic="mlxtx " + row["name"], names=("mlxtx " + row["name"],),
            asks=((tuple(frames.COMMAND), ({"x": row["name"]},)),),
            held=_held(frames.COMMAND_HELD, [{"x": row["name"]}], 2, n),
        )
        for n, row in enumerate(_table("commands"))
    ]  # fmt: skip


def _pairs() -> list[Item]:
    items = []
    for n, row in enumerate(_table("pairs")):
        fills = [{"a": a, "b": b} for a in row["a"] for b in row["b"]]
        fills += [{"a": fill["b"], "b": fill["a"]} for fill in fills]
        items.append(
            Item(
                id="pair." + row["id"], kind="pair", say=row["say"], keys=tuple(row["keys"]),
                topic=f"{row['a'][0]} and {row['b'][0]}",
                asks=((tuple(frames.PAIR), tuple(fills)),),
                held=_held(frames.PAIR_HELD, fills, 2, n),
            )
        )  # fmt: skip
    return items


def _talk() -> list[Item]:
    return [
        Item(
            id="talk." + row["id"], kind="talk", say=row["say"], keys=tuple(row["keys"]),
            asks=((tuple(_options(row["ask"])), ({},)),),
            held=tuple((question, "words") for question in row["held"]),
        )
        for row in _table("talk")
    ]  # fmt: skip


def all_items() -> list[Item]:
    return _concepts() + _tasks() + _commands() + _pairs() + _talk()


@cache
def words_of(name: str) -> list[str]:
    """A list of words from ``facts/words.toml``."""
    return tomllib.loads((FOLDER / "words.toml").read_text())[name].split()
