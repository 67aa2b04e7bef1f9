"""Conversations as token samples, laid into rows of one fixed length.

Rows of one length let the whole training step be compiled once. Samples lie behind one another in
a row; ``segments`` keeps attention inside each sample and ``positions`` restart with it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxtx.text.tokenizer import Tokenizer
from mlxtx.tuning.samples import Sample, sample
from training.bundled.vocabulary import ASSISTANT, END


def tokens_of(messages: Sequence[dict[str, str]], tokenizer: Tokenizer):
    """Token ids and loss marks of a conversation, and where its turns start.

    Only what the assistant says counts in the loss, its end token included.
    """
    tokens: list[int] = []
    marks: list[bool] = []
    starts: list[int] = []
    for message in messages:
        starts.append(len(tokens))
        said = message["role"] == "assistant"
        opening = ASSISTANT if said else f"<|{message['role']}|> "
        body = message["content"] + END
        # the opening goes with the body for others, so that its space joins the first word
        head = tokenizer.encode(opening if said else opening + body, add_special=False)
        rest = tokenizer.encode(body, add_special=False) if said else []
        tokens += head + rest
        marks += [False] * len(head) + [True] * len(rest)
    return tokens, marks, starts


@dataclass(frozen=True)
class FixedRows(Sequence[Sample]):
    """``count`` rows; arrays [count, length + 1]. Segment 0 is padding."""

    tokens: np.ndarray
    in_loss: np.ndarray
    segments: np.ndarray
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return sample(self.tokens[index], self.in_loss[index])


def lay_rows(
    conversations: Iterable[dict[str, Any]],
    tokenizer: Tokenizer,
    *,
    length: int,
    context: int,
    seed: int,
) -> FixedRows:
    """Lays conversations into rows of ``length`` + 1 tokens, first fit among the open rows.

    In one sample of several turns in five the positions jump between two turns, so that the model
    meets distances up to ``context`` in rows that are shorter.
    """
    rng = random.Random(seed)
    size = length + 1
    done: list[tuple] = []
    open_rows: list[tuple] = []
    for conversation in conversations:
        ids, marks, starts = tokens_of(conversation["messages"], tokenizer)
        if len(ids) > size:
            continue
        places = list(range(len(ids)))
        if len(starts) > 2 and rng.random() < 0.2:
            turn = rng.choice(starts[1:])
            jump = rng.randrange(context - len(ids))
            places = [p + (jump if p >= turn else 0) for p in places]
        row = next((r for r in open_rows if len(r[0]) + len(ids) <= size), None)
        if row is None:
            row = ([], [], [], [])
            open_rows.append(row)
            if len(open_rows) > 16:
                open_rows.sort(key=lambda r: len(r[0]))
                done.append(open_rows.pop())
        segment = row[2][-1] + 1 if row[2] else 1
        marks[0] = False
        for column, values in zip(row, (ids, marks, [segment] * len(ids), places), strict=True):
            column.extend(values)
    done += open_rows
    kinds = (np.int32, bool, np.int32, np.int32)
    arrays = [np.zeros((len(done), size), kind) for kind in kinds]
    for n, row in enumerate(done):
        for array, column in zip(arrays, row, strict=True):
            array[n, : len(column)] = column
    return FixedRows(*arrays)
