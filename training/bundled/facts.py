"""The facts tables read into one list of items: ways to ask, the answer, and how to judge it."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from training.bundled import contexts, frames
from training.bundled.grammar import every

FOLDER = Path(__file__).parent / "facts"


@dataclass(frozen=True)
class Way:
    """A way to ask: whole frames, or a mention of the thing with a request that points at it, or
    the bare words as in a search box. ``fills`` go into the braces."""

    frames: tuple[str, ...]
    fills: tuple[dict[str, str], ...]
    mentions: tuple[str, ...] = ()
    requests: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Item:
    """One fact. ``asks`` are for training, ``held`` for the test with whether the wording uses
    trained names in a new frame ("frame") or only new words ("words")."""

    id: str
    kind: str
    say: str
    keys: tuple[str, ...]
    short: str = ""
    why: str = ""
    topic: str = ""  # how to name it in "You asked about ..."
    names: tuple[str, ...] = ()
    asks: tuple[Way, ...] = field(default=())
    held: tuple[tuple[str, str], ...] = ()  # (question, "frame" or "words")


def _table(name: str) -> list[dict]:
    return tomllib.loads((FOLDER / f"{name}.toml").read_text())[name.removesuffix("s")]


def _way(lists: str, fills: list[dict[str, str]]) -> Way:
    """The way to ask that goes by this name in ``frames`` and ``contexts``."""
    mentions, requests, bare = _COMPOSED[lists]
    return Way(tuple(getattr(frames, lists)), tuple(fills), tuple(mentions), tuple(requests), tuple(bare))  # fmt: skip


_ABOUT = [text.replace("{x}", "mlxtx {x}") for text in contexts.MENTIONS]
_COMPOSED: dict[str, tuple[list[str], list[str], list[str]]] = {
    "WHAT": (contexts.MENTIONS, contexts.WHAT_REQUESTS, contexts.BARE),
    "WHY": (contexts.MENTIONS, contexts.WHY_REQUESTS, ["why {x}", "{x} why", "{x} benefits", "{x} purpose", "use of {x}"]),
    "HOW": (contexts.WISHES, contexts.HOW_REQUESTS, ["{g}", "how {g}", "howto {g}", "{g} how", "{g} command", "{g} pls"]),
    "COMMAND": (_ABOUT, contexts.WHAT_REQUESTS + contexts.WHY_REQUESTS, ["mlxtx {x}", "mlxtx {x} help", "whats mlxtx {x}", "{x} command"]),
    "PRESS": (contexts.MENTIONS, contexts.WHAT_REQUESTS, ["{x}", "{x} key", "{x} pls", "whats {x}"]),
    "PAIR": (contexts.PAIR_MENTIONS, contexts.PAIR_REQUESTS, ["{a} {b}", "{a} vs {b}", "{a} or {b}", "{a} vs. {b} pls", "diff {a} {b}", "{a} != {b}"]),
}  # fmt: skip


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
                asks=(_way("WHAT", fills),),
                held=_held(frames.WHAT_HELD, fills, 3, n), **common,
            )
        )  # fmt: skip
        if "why" in row:
            items.append(
                Item(
                    id=row["id"] + ".why", kind="why", say=row["why"], keys=(),
                    asks=(_way("WHY", fills),),
                    held=_held(frames.WHY_HELD, fills, 1, n), **common,
                )
            )  # fmt: skip
    return items


def _tasks() -> list[Item]:
    items = []
    more = words_file("wishes")["wishes"]
    for table in ("tasks", "keys"):
        for n, row in enumerate(_table(table)):
            goals = _options(row["goals"])
            wishes = [{"g": goal} for goal in goals]
            asks = [_way("HOW", [*wishes, *({"g": goal} for goal in _options(more[row["id"]]))])]
            held = _held(frames.HOW_HELD, wishes, 2, n)
            held += tuple(
                (frames.HOW_HELD[(n + 3) % len(frames.HOW_HELD)].format(g=goal), "words")
                for goal in row["held"]
            )
            if "about" in row:
                about = [{"x": name} for name in row["about"]]
                asks.append(_way("PRESS", about))
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
            asks=(_way("COMMAND", [{"x": row["name"]}]),),
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
                asks=(_way("PAIR", fills),),
                held=_held(frames.PAIR_HELD, fills, 2, n),
            )
        )  # fmt: skip
    return items


def _talk() -> list[Item]:
    more = words_file("wishes")["asks"]
    return [
        Item(
            id="talk." + row["id"], kind="talk", say=row["say"], keys=tuple(row["keys"]),
            asks=(Way(tuple(_options(row["ask"] + more[row["id"]])), ({},)),),
            held=tuple((question, "words") for question in row["held"]),
        )
        for row in _table("talk")
    ]  # fmt: skip


@cache
def all_items() -> list[Item]:
    return _concepts() + _tasks() + _commands() + _pairs() + _talk()


@cache
def words_of(name: str) -> list[str]:
    """A list of words from ``facts/words.toml``."""
    return words_file("words")[name].split()


@cache
def words_file(name: str) -> dict:
    return tomllib.loads((FOLDER / f"{name}.toml").read_text())
