"""The training set, named by a seed, and the held-out questions."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from training.bundled import frames, games, unknown
from training.bundled.conversations import KINDS, NAME_HELD, Message, ask, conversation, deck
from training.bundled.facts import Item, all_items, words_of
from training.bundled.grammar import cased
from training.bundled.styles import STYLES


def training_set(
    count: int, seed: int, cut: float = 0.8, shares: Mapping[str, float] | None = None
) -> Iterator[dict[str, Any]]:
    """``count`` conversations of ``seed``; no question of the held-out set is among them.
    ``shares`` take the place of those in KINDS."""
    kinds = {**KINDS, **(shares or {})}
    rng = random.Random(seed)
    facts = deck(rng)
    forbidden = {_plain(row["messages"][-1]["content"]) for row in held_out(seed=0)}
    made = 0
    while made < count:
        row = conversation(rng, facts, cut, kinds)
        if all(_plain(m["content"]) not in forbidden for m in row["messages"] if m["role"] == "user"):  # fmt: skip
            made += 1
            yield row


def _plain(question: str) -> str:
    return "".join(c for c in question.lower() if c.isalnum() or c == " ").strip()


def _row(group: str, item_id: str, messages: list[Message], **judge: Any) -> dict[str, Any]:
    return {"group": group, "id": item_id, "messages": messages, **judge}


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def held_out(seed: int = 0) -> list[dict[str, Any]]:
    """The test: facts in new wordings, and the other skills with new things. ``answer`` is the
    taught one, ``keys`` and ``must`` are for the judge."""
    rng = random.Random(f"held-out {seed}")
    items = all_items()
    rows = []
    for item in items:
        for question, novelty in item.held:
            rows.append(
                _row(
                    f"facts/{novelty}",
                    item.id,
                    [_user(cased(question, rng))],
                    answer=item.say,
                    keys=list(item.keys),
                )
            )
    for _ in range(80):
        question = cased(unknown.draw_unknown(rng, held=True), rng)
        rows.append(_row("unknown", "unknown", [_user(question)], answer=unknown.ANSWER, keys=[unknown.MARK]))  # fmt: skip
    games_held = {
        "arithmetic": games.draw_sum,
        "arithmetic/new": partial(games.draw_sum, new_pair=True),
        "letters": games.draw_letters,
    }
    for group, draw in games_held.items():
        for _ in range(60):
            question, answer, must = draw(rng, held=True)
            rows.append(_row(group, group, [_user(question)], answer=answer, must=must))
    rows += _held_styles(rng, items) + _held_turns(rng, items)
    return rows


def _held_styles(rng: random.Random, items: list[Item]) -> list[dict[str, Any]]:
    rows = []
    taught = [item for item in items if item.kind in ("concept", "task")]
    for name, style in STYLES.items():
        for prompt in style.held:
            for item in rng.sample(taught, 6):
                messages = [{"role": "system", "content": prompt}, _user(cased(item.held[0][0], rng))]  # fmt: skip
                rows.append(
                    _row("style", item.id, messages, answer=style.answer(item), keys=[], style=name)
                )
    return rows


def _held_turns(rng: random.Random, items: list[Item]) -> list[dict[str, Any]]:
    rows = []
    taught = [item for item in items if item.kind == "concept" and item.why]
    for _ in range(15):
        first, second = rng.sample(taught, 2)
        start = [_user(ask(first, rng)), {"role": "assistant", "content": first.say}]
        follow = rng.choice(frames.FOLLOW_HELD).format(x=second.names[0])
        rows.append(_row("turns", second.id, [*start, _user(cased(follow, rng))], answer=second.say, keys=list(second.keys)))  # fmt: skip
        question = cased(rng.choice(frames.FOLLOW_WHY_HELD), rng)
        rows.append(_row("turns", first.id + ".why", [*start, _user(question)], answer=first.why, keys=[]))  # fmt: skip
        question = cased(rng.choice(frames.FOLLOW_SHORT_HELD), rng)
        rows.append(_row("turns", first.id + ".short", [*start, _user(question)], answer=first.short, keys=[], must=first.short))  # fmt: skip
        question = cased(rng.choice(frames.RECALL_HELD), rng)
        rows.append(_row("turns", first.id + ".recall", [*start, _user(question)], answer=f"You asked about {first.topic}.", must=first.topic))  # fmt: skip
    for name in words_of("held_names"):
        told = [_user(f"My name is {name}."), {"role": "assistant", "content": f"Nice to meet you, {name}."}]  # fmt: skip
        question = cased(rng.choice(NAME_HELD), rng)
        rows.append(_row("turns", "name", [*told, _user(question)], answer=f"Your name is {name}.", must=name))  # fmt: skip
    return rows


def write_jsonl(rows: Iterator[dict[str, Any]] | list[dict[str, Any]], path: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
