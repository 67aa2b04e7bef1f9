"""Conversations as token samples, laid into rows of one fixed length.

Rows of one length let the whole training step be compiled once. Samples lie behind one another in
a row; ``segments`` keeps attention inside each sample and ``positions`` restart with it.

An answer is one of a few hundred fixed texts, so that only a few of its tokens choose it: those
where the taught answers part. They weigh more in the loss, and most single questions are cut
behind the place where the answer is the only one left: the time goes to ways of asking, and the
rest of an answer is learned well enough from the others.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxtx.text.tokenizer import Tokenizer
from mlxtx.tuning.samples import Sample, sample
from training.bundled.vocabulary import ASSISTANT, END, as_read

COMPUTED = (
    2.0  # the most a token weighs in answers that are computed or copied: all of theirs count
)


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
        body = as_read(message) + END
        # the opening goes with the body for others, so that its space joins the first word
        head = tokenizer.encode(opening if said else opening + body, add_special=False)
        rest = tokenizer.encode(body, add_special=False) if said else []
        tokens += head + rest
        marks += [False] * len(head) + [True] * len(rest)
    return tokens, marks, starts


@dataclass(frozen=True)
class FixedRows(Sequence[Sample]):
    """``count`` rows; arrays [count, length + 1]. Segment 0 is padding; a weight of 0 is not in
    the loss."""

    tokens: np.ndarray
    weights: np.ndarray
    segments: np.ndarray
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return sample(self.tokens[index], self.weights[index] > 0)


@dataclass
class Sampled:
    """A conversation as tokens: ``answers`` are the (start, end) of what the assistant says."""

    tokens: list[int]
    answers: list[tuple[int, int]]
    starts: list[int]
    cut: bool
    computed: bool


class Branches:
    """Where the answers of a data set part."""

    COMMON = 5  # times a beginning is seen: rarer ones are copied (names), not recalled

    def __init__(self, samples: Iterable[Sampled]):
        self.seen: Counter[tuple[int, ...]] = Counter()
        nexts: dict[tuple[int, ...], set[int]] = {}
        for one in samples:
            for start, end in one.answers:
                for place in range(start, end):
                    before = tuple(one.tokens[start:place])
                    self.seen[before] += 1
                    nexts.setdefault(before, set()).add(one.tokens[place])
        self.parting = {before for before, after in nexts.items() if len(after) > 1}

    def weights(self, answer: Sequence[int], choice_weight: float) -> list[float]:
        """For each token of an answer what it weighs in the loss: ``choice_weight`` where another
        one could have stood there."""
        weights = []
        for n in range(len(answer)):
            before = tuple(answer[:n])
            if self.seen[before] < self.COMMON:
                weights.append(min(choice_weight, COMPUTED))
            else:
                weights.append(choice_weight if before in self.parting else 1.0)
        return weights


def sampled(conversation: dict[str, Any], tokenizer: Tokenizer) -> Sampled:
    tokens, marks, starts = tokens_of(conversation["messages"], tokenizer)
    edges = np.flatnonzero(np.diff([False, *marks, False]))
    answers = [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]
    cut, computed = (conversation.get(name, False) for name in ("cut", "computed"))
    return Sampled(tokens, answers, starts, cut, computed)


def lay_rows(
    conversations: Iterable[dict[str, Any]],
    tokenizer: Tokenizer,
    *,
    length: int,
    context: int,
    seed: int,
    choice_weight: float = 1.0,
) -> FixedRows:
    """Lays conversations into rows of ``length`` + 1 tokens, first fit among the open rows.

    choice_weight: of the tokens that choose an answer. In one sample of several turns in five the
    positions jump between two turns, so that the model meets distances up to ``context`` in rows
    that are shorter.
    """
    rng = random.Random(seed)
    size = length + 1
    done: list[tuple] = []
    open_rows: list[tuple] = []
    samples = [sampled(conversation, tokenizer) for conversation in conversations]
    branches = Branches(samples)
    for one in samples:
        ids, weights, starts = one.tokens, [0.0] * len(one.tokens), one.starts
        for start, end in one.answers:
            if one.computed:
                weights[start:end] = [min(choice_weight, COMPUTED)] * (end - start)
            else:
                weights[start:end] = branches.weights(ids[start:end], choice_weight)
        if one.cut:
            start, end = one.answers[-1]
            last = max((place for place, weight in enumerate(weights) if weight > 1), default=end)
            ids, weights = (values[: min(end, max(last, start) + 3)] for values in (ids, weights))
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
        for column, values in zip(row, (ids, weights, [segment] * len(ids), places), strict=True):
            column.extend(values)
    done += open_rows
    kinds = (np.int32, np.float32, np.int32, np.int32)
    arrays = [np.zeros((len(done), size), kind) for kind in kinds]
    for n, row in enumerate(done):
        for array, column in zip(arrays, row, strict=True):
            array[n, : len(column)] = column
    return FixedRows(*arrays)
