"""The held-out questions asked of a model, and the table of what each setting costs."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxtx.language_model import LanguageModel
from training.bundled.judge import loops, right

GROUPS = ("facts", "facts/frame", "facts/words", "turns", "unknown", "arithmetic", "arithmetic/new", "letters", "style")  # fmt: skip
MAX_TOKENS = 96


@dataclass(frozen=True)
class Answer:
    row: dict[str, Any]
    text: str
    tokens: tuple[int, ...]
    right: bool
    ended: bool
    looped: bool


def read_rows(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def answers(
    model: LanguageModel,
    rows: Sequence[dict[str, Any]],
    *,
    kv: str | None = None,
    batch: int = 32,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[Answer]:
    """Greedy answers to ``rows``, judged. An answer has ended when it wrote its end token."""
    order = sorted(range(len(rows)), key=lambda i: sum(len(m["content"]) for m in rows[i]["messages"]))  # fmt: skip
    found: dict[int, Answer] = {}
    for start in range(0, len(order), batch):
        picked = order[start : start + batch]
        replies = model.generate_batch(
            [rows[i]["messages"] for i in picked], max_tokens=MAX_TOKENS, kv=kv
        )
        for i, reply in zip(picked, replies, strict=True):
            ended = reply.finish_reason == "stop"
            found[i] = Answer(
                rows[i], reply.text, tuple(reply.tokens), ended and right(rows[i], reply.text),
                ended, loops(reply.tokens),
            )  # fmt: skip
        on_batch(start + len(picked))
    return [found[i] for i in range(len(rows))]


def scores(judged: Sequence[Answer]) -> dict[str, float]:
    """The share of right answers for each group, and of answers that ended and that looped."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for answer in judged:
        group = answer.row["group"]
        groups[group].append(answer.right)
        if group.startswith("facts/"):
            groups["facts"].append(answer.right)
    table = {group: sum(groups[group]) / len(groups[group]) for group in GROUPS if group in groups}
    table["ended"] = sum(a.ended for a in judged) / len(judged)
    table["looped"] = sum(a.looped for a in judged) / len(judged)
    return table


def guessed_ahead(model: LanguageModel, judged: Sequence[Answer]) -> float:
    """The share of the tokens of these answers that the extra head guessed before the decoder
    did: from the state one token back and the token in between."""
    hits = count = 0
    for answer in judged:
        prompt = model.encode(answer.row["messages"])
        tokens = mx.array([[*prompt, *answer.tokens]])
        states = model.model.hidden(tokens[:, :-2])
        guesses = model.model.predict_ahead(states, tokens[:, 1:-1])[0].argmax(axis=-1)
        right = (guesses == tokens[:, 2:])[0, len(prompt) - 1 :]
        hits, count = hits + right.sum().item(), count + right.size
    return hits / max(count, 1)


def markdown(columns: dict[str, dict[str, float]]) -> str:
    """A table: a row a setting, a column a group, in percent."""
    names = [*GROUPS, "ended", "looped"]
    lines = ["| setting | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for setting, table in columns.items():
        cells = [f"{100 * table[name]:.1f}" if name in table else "-" for name in names]
        lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
