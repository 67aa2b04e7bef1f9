"""Records to samples: tokens, and the marks of those that the loss counts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxtx.errors import MlxtxError
from mlxtx.tuning.data import BadLine, Record, Records
from mlxtx.tuning.samples import Sample, sample

if TYPE_CHECKING:
    from mlxtx.text.tokenizer import Tokenizer

LOSS_ON = ("all", "assistant", "last")


@dataclass
class Encoded:
    """Samples, and what happened on the way. ``cut`` counts samples cut to the longest length."""

    samples: list[Sample] = field(default_factory=list)
    bad: list[BadLine] = field(default_factory=list)
    cut: int = 0


@dataclass(frozen=True)
class Encoder:
    """Turns records into samples.

    loss_on: "all" tokens, every "assistant" turn, or only the "last" one (of a prompt with its
    completion the last two mean the completion). max_length: in tokens; longer samples are cut,
    or are bad lines with ``too_long="drop"``, or stop everything with "error".
    """

    tokenizer: Tokenizer
    loss_on: str = "assistant"
    max_length: int = 2048
    too_long: str = "cut"

    def __post_init__(self) -> None:
        if self.loss_on not in LOSS_ON:
            raise MlxtxError(f"unknown loss_on {self.loss_on!r}: use {', '.join(LOSS_ON)}")
        if self.too_long not in ("cut", "drop", "error"):
            raise MlxtxError(f"unknown too_long {self.too_long!r}: use cut, drop or error")
        if self.max_length < 2:
            raise MlxtxError(f"max_length must be at least 2, not {self.max_length}")

    def encode(self, records: Records) -> Encoded:
        encoded = Encoded(bad=list(records.bad))
        for record, (file, line) in zip(records.good, records.places, strict=True):
            try:
                tokens, marks = self.one(record)
            except MlxtxError as error:
                encoded.bad.append(BadLine(file, line, str(error)))
                continue
            if len(tokens) > self.max_length:
                reason = f"{len(tokens)} tokens are more than max_length {self.max_length}"
                if self.too_long == "error":
                    raise MlxtxError(f"{file}:{line}: {reason}")
                if self.too_long == "drop":
                    encoded.bad.append(BadLine(file, line, reason))
                    continue
                tokens, marks = tokens[: self.max_length], marks[: self.max_length]
                encoded.cut += 1
            made = sample(tokens, marks)
            if made.targets:
                encoded.samples.append(made)
            else:
                reason = "no token counts in the loss" + (
                    f" within max_length {self.max_length}"
                    if len(tokens) >= self.max_length
                    else ""
                )
                encoded.bad.append(BadLine(file, line, reason))
        return encoded

    def one(self, record: Record) -> tuple[list[int], list[bool]]:
        if "messages" in record:
            return self._chat(record["messages"], record.get("tools"))
        if "prompt" in record:
            return self._completion(record["prompt"], record["completion"])
        tokens = self._ended(self.tokenizer.encode(record["text"]))
        return tokens, [True] * len(tokens)

    def _ended(self, tokens: list[int]) -> list[int]:
        """With the end token that a text is to stop at."""
        ends = self.tokenizer.eos_ids
        if not ends or (tokens and tokens[-1] in ends):
            return tokens
        named = self.tokenizer.named.get("eos_token")
        end = self.tokenizer.id_of(named) if named else None
        return [*tokens, min(ends) if end is None else end]

    def _completion(self, prompt: str, completion: str) -> tuple[list[int], list[bool]]:
        """With a chat template these are a question and its answer, else two parts of a text."""
        if self.tokenizer.chat_template is not None:
            turns = [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": completion},
            ]
            return self._chat(turns, None)
        first = self.tokenizer.encode(prompt)
        rest = self._ended(self.tokenizer.encode(completion, add_special=False))
        marked = self.loss_on == "all"
        return first + rest, [marked] * len(first) + [True] * len(rest)

    def _chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Any
    ) -> tuple[list[int], list[bool]]:
        """The whole chat by the model's template. A turn of the assistant counts from where the
        prompt for it ends to where the chat up to and with it ends."""
        whole = self._render(messages, tools, False)
        tokens = self.tokenizer.encode_chat(messages, tools=tools, add_generation_prompt=False)
        if self.loss_on == "all":
            return tokens, [True] * len(tokens)
        turns = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
        if self.loss_on == "last":
            turns = turns[-1:]
        marks = np.zeros(len(tokens), bool)
        for turn in turns:
            start = self._places(messages[:turn], tools, True, whole, tokens)
            end = self._places(messages[: turn + 1], tools, False, whole, tokens)
            marks[start:end] = True
        if turns and turns[-1] == len(messages) - 1:
            # Whatever a template writes behind the last answer ends it.
            marks[self._places(messages[: turns[-1]], tools, True, whole, tokens) :] = True
        return tokens, marks.tolist()

    def _render(self, messages: Sequence[Mapping[str, Any]], tools: Any, prompt: bool) -> str:
        return self.tokenizer.render_chat(messages, tools=tools, add_generation_prompt=prompt)

    def _places(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Any,
        prompt: bool,
        whole: str,
        tokens: list[int],
    ) -> int:
        """How many tokens of the whole chat the chat up to here has. Templates may change earlier
        turns as a chat goes on (they drop old thoughts), so the common start is what counts."""
        if not messages:
            return 0
        text = self._render(messages, tools, prompt)
        if not whole.startswith(text):
            text = text[: _common(text, whole)]
        part = self.tokenizer.encode(text, add_special=self.tokenizer.chat_template is None)
        return _common(part, tokens)


def _common(a: Sequence, b: Sequence) -> int:
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count


def pieces(tokenizer: Tokenizer, one: Sample) -> list[tuple[str, bool]]:
    """The text of a sample in stretches that count in the loss, or do not."""
    marks = one.in_loss.copy()
    marks[:1] = False  # the first token is never predicted
    edges = [0, *(np.flatnonzero(marks[1:] != marks[:-1]) + 1).tolist(), len(marks)]
    return [
        (tokenizer.decode(one.tokens[a:b].tolist(), skip_special=False), bool(marks[a]))
        for a, b in itertools.pairwise(edges)
        if b > a
    ]
