"""Loss, perplexity and accuracy of a model on text, chats and multiple choices."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlxtx.errors import MlxtxError
from mlxtx.events import Event, Progress
from mlxtx.tuning.data import read_data, read_jsonl
from mlxtx.tuning.encode import Encoder
from mlxtx.tuning.head_loss import chunk_rows
from mlxtx.tuning.objective import evaluate_batch
from mlxtx.tuning.packing import make_batch, packed_arguments
from mlxtx.tuning.samples import Sample, sample

if TYPE_CHECKING:
    from mlxtx.language_model import LanguageModel


@dataclass(frozen=True)
class Evaluation:
    """loss: mean over ``tokens`` targets, in nats. accuracy: part of them that were the likeliest."""

    loss: float
    accuracy: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


@dataclass(frozen=True)
class ChoiceEvaluation:
    """Part of the questions whose right choice was the likeliest, by the sum of its tokens' log
    probabilities and by their mean."""

    accuracy: float
    accuracy_by_mean: float
    questions: int


def evaluate_samples(
    model: Any,
    samples: Sequence[Sample],
    *,
    batch_size: int = 4,
    on_event: Callable[[Event], None] | None = None,
) -> Evaluation:
    """Loss of the next token over samples."""
    if batch_size < 1:
        raise MlxtxError(f"batch_size must be at least 1, not {batch_size}")
    total, count, correct = 0.0, 0, 0
    training = model.training
    model.eval()
    for start in range(0, len(samples), batch_size):
        rows = [samples[i] for i in range(start, min(start + batch_size, len(samples)))]
        part = evaluate_batch(model, make_batch(rows), count_correct=True)
        total, count, correct = total + part.total, count + part.count, correct + part.correct
        if on_event:
            done = start + len(rows)
            on_event(Progress(stage="evaluate", done=done, total=len(samples), unit="samples"))
    model.train(training)
    if not count:
        raise MlxtxError("no token counts in the loss, so there is nothing to evaluate")
    return Evaluation(total / count, correct / count, count)


def held_out(
    language_model: LanguageModel, data: Any, *, max_length: int = 2048, loss_on: str = "assistant"
) -> list[Sample]:
    """Samples to evaluate on: the validation split where there is one, else all records. A text
    file is cut into pieces of ``max_length`` tokens."""
    encoder = Encoder(language_model.tokenizer, loss_on, min(max_length, language_model.context))
    if isinstance(data, str | Path) and Path(data).suffix.lower() in (".txt", ".md"):
        return _text(language_model, Path(data), encoder.max_length)
    found = read_data(data)
    records = found.validation if found.validation.good else found.train
    samples = encoder.encode(records).samples
    if not samples:
        raise MlxtxError(f"no record of {data} can be used")
    return samples


def _text(language_model: LanguageModel, path: Path, max_length: int) -> list[Sample]:
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise MlxtxError(f"can't read {path}: {error}") from None
    tokens = language_model.tokenizer.encode(text)
    if len(tokens) < 2:
        raise MlxtxError(f"{path} is empty")
    step = max_length - 1
    return [sample(tokens[at : at + max_length]) for at in range(0, len(tokens) - 1, step)]


# Multiple choices


def read_choices(path: str | Path) -> list[Mapping[str, Any]]:
    """Questions of a JSONL file: ``question`` (or ``prompt``), ``choices`` and ``answer``, the
    number of the right one from 0 or its letter."""
    path, questions = Path(path), []
    try:
        for number, record in read_jsonl(path):
            try:
                questions.append(_question(record))
            except ValueError as error:
                raise MlxtxError(f"{path.name}:{number}: {error}") from None
    except OSError as error:
        raise MlxtxError(f"can't read {path}: {error.strerror}") from None
    if not questions:
        raise MlxtxError(f"{path} holds no questions")
    return questions


def _question(record: Any) -> Mapping[str, Any]:
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, Mapping) or not isinstance(record.get("choices"), list):
        raise ValueError("a question needs 'question', 'choices' (a list) and 'answer'")
    prompt = record.get("question", record.get("prompt"))
    answer, choices = record.get("answer"), [str(c) for c in record["choices"]]
    if isinstance(answer, str) and len(answer) == 1 and answer.isalpha():
        answer = ord(answer.upper()) - ord("A")
    if not isinstance(prompt, str) or not isinstance(answer, int):
        raise ValueError("a question needs 'question', 'choices' (a list) and 'answer'")
    if not all(choices):
        raise ValueError("a choice is empty, so there is nothing to find likely")
    if not 0 <= answer < len(choices):
        raise ValueError(f"the answer is none of the {len(choices)} choices")
    return {"question": prompt, "choices": choices, "answer": answer}


def evaluate_choices(
    language_model: LanguageModel,
    questions: Sequence[Mapping[str, Any]],
    *,
    chat: bool = False,
    on_event: Callable[[Event], None] | None = None,
) -> ChoiceEvaluation:
    """Which choice the model finds likeliest behind each question. The choices of one question
    are computed together. chat: the question is asked through the chat template."""
    by_sum = by_mean = 0
    tokenizer = language_model.tokenizer
    for number, question in enumerate(questions, 1):
        prompt, gap = question["question"], "" if chat else " "
        if chat:
            first = tokenizer.encode_chat([{"role": "user", "content": prompt}])
        else:
            first = tokenizer.encode(prompt)
        if not first:
            raise MlxtxError(f"question {number} comes to no token that a choice could follow")
        rows = []
        for choice in question["choices"]:
            rest = tokenizer.encode(gap + choice, add_special=False)
            rows.append(sample(first + rest, [False] * len(first) + [True] * len(rest)))
        if (longest := max(map(len, rows))) > language_model.context:
            raise MlxtxError(
                f"question {number} comes to {longest} tokens with a choice, more than the model's"
                f" context of {language_model.context}"
            )
        scores = log_probabilities(language_model.model, rows)
        by_sum += int(np.argmax([s.sum() for s in scores]) == question["answer"])
        by_mean += int(np.argmax([s.mean() for s in scores]) == question["answer"])
        if on_event:
            on_event(
                Progress(stage="evaluate", done=number, total=len(questions), unit="questions")
            )
    count = len(questions)
    return ChoiceEvaluation(by_sum / count, by_mean / count, count)


def log_probabilities(model: Any, rows: Sequence[Sample]) -> list[np.ndarray]:
    """For each sample the log probability of every token in its loss."""
    # Each target carries the number of its sample, so that packing's order does not matter.
    numbered = [Sample(np.full(len(r), n, np.int32), r.in_loss) for n, r in enumerate(rows)]
    batch, owners = make_batch(rows), make_batch(numbered)
    state = model.hidden(batch.tokens, **packed_arguments(model.config.blocks, batch))
    state, targets = state.flatten(0, 1), batch.targets[0].flatten()
    found = np.zeros(batch.tokens.size)
    size = chunk_rows(model.config.vocabulary)
    for start in range(0, len(batch.scored[0]), size):
        places = batch.scored[0][start : start + size]
        logits = model.head(state[mx.array(places)]).astype(mx.float32)
        picked = mx.take_along_axis(logits, targets[mx.array(places)][:, None], axis=-1)[:, 0]
        found[places] = np.array(picked - mx.logsumexp(logits, axis=-1))
    owner = np.array(owners.targets[0]).ravel()
    scored = batch.scored[0]
    return [found[scored[owner[scored] == n]] for n in range(len(rows))]
