"""From logits to tokens: penalties, bias, temperature, top-k, top-p, min-p, seeds.

The order is that of transformers: the bias comes first, then what the history changes (repetition,
presence and frequency penalties), the temperature next, and the filters act on what is left, top-k
before top-p before min-p. Everything stays lazy on the device.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from mlxtx.errors import MlxtxError

COLDEST = 1e-30  # below it logits would overflow; the likeliest token is certain long before


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. The defaults are greedy decoding.

    temperature         0 takes the most likely token; 1 samples from the model's distribution
    top_k               only the k most likely tokens (0: all)
    top_p               only the fewest tokens whose probability together reaches p (1: all)
    min_p               only tokens at least min_p times as likely as the most likely (0: all)
    repetition_penalty  divides positive and multiplies negative logits of tokens that occur in
                        the prompt or the answer (1: off; Keskar et al. 2019)
    presence_penalty    is subtracted from the logit of each token the answer already holds
    frequency_penalty   is subtracted once for each time that token occurs in the answer
    logit_bias          token id -> number added to its logit
    seed                the same seed gives the same tokens; None takes a new one each time
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        _require(0 <= self.temperature < math.inf, "temperature", self.temperature, "0 or more")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 or more")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1")
        repetition = self.repetition_penalty
        _require(0 < repetition < math.inf, "repetition_penalty", repetition, "above 0")
        for name in ("presence_penalty", "frequency_penalty"):
            _require(math.isfinite(getattr(self, name)), name, getattr(self, name), "a number")
        bias_of = {int(token): float(bias) for token, bias in self.logit_bias.items()}
        object.__setattr__(self, "logit_bias", bias_of)  # JSON has texts for keys
        for token, bias in bias_of.items():  # minus infinity forbids a token
            _require(bias < math.inf, f"the logit_bias of {token}", bias, "a number")
        seed = self.seed
        _require(seed is None or 0 <= seed < 2**64, "seed", seed, "from 0 to 2**64 - 1")


def _require(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise MlxtxError(f"{name} must be {wanted}, not {value}")


class Sampler:
    """Chooses the next token of every row of one batch, and remembers what each row holds.

    ``prompts`` are the token ids of each row. ``seeds`` gives each row its own seed; with one
    seed for all, a row draws the same tokens in a batch as alone.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompts: Sequence[Sequence[int]],
        vocabulary: int,
        seeds: Sequence[int | None] | None = None,
    ) -> None:
        self.sampling = sampling
        rows = len(prompts)
        self.seen: mx.array | None = None  # [B, V], tokens of the prompt and the answer
        self.counts: mx.array | None = None  # [B, V], tokens of the answer alone
        if sampling.repetition_penalty != 1:
            self.seen = mx.stack([_occurrences(prompt, vocabulary) for prompt in prompts])
        if sampling.presence_penalty or sampling.frequency_penalty:
            self.counts = mx.zeros((rows, vocabulary), mx.int32)
        self.bias = _bias(sampling.logit_bias, vocabulary)
        seeds = [sampling.seed] * rows if seeds is None else seeds
        self.keys = [mx.random.key(_fresh_seed() if seed is None else seed) for seed in seeds]

    def __call__(self, logits: mx.array) -> mx.array:
        """Tokens [B] for float32 ``logits`` [B, V]."""
        logits = self.adjust(logits)
        if self.sampling.temperature == 0:
            tokens = mx.argmax(logits, axis=-1)
        else:
            # argmax(log p + Gumbel noise) is a draw from p.
            kept = keep_likely(logits / max(self.sampling.temperature, COLDEST), self.sampling)
            tokens = mx.argmax(kept + self._noise(logits.shape[-1]), axis=-1)
        self._remember(tokens)
        return tokens

    def adjust(self, logits: mx.array) -> mx.array:
        """Logits [B, V] after bias and penalties."""
        sampling = self.sampling
        if self.bias is not None:
            logits = logits + self.bias
        if self.seen is not None:
            penalty = sampling.repetition_penalty
            penalized = mx.where(logits > 0, logits / penalty, logits * penalty)
            logits = mx.where(self.seen, penalized, logits)
        if self.counts is not None:
            logits = logits - sampling.frequency_penalty * self.counts
            logits = logits - sampling.presence_penalty * (self.counts > 0)
        return logits

    def _noise(self, vocabulary: int) -> mx.array:  # [B, V]
        noise = []
        for row, key in enumerate(self.keys):
            self.keys[row], now = mx.random.split(key)
            noise.append(mx.random.gumbel((vocabulary,), key=now))
        return mx.stack(noise)

    def _remember(self, tokens: mx.array) -> None:
        column = tokens[:, None]
        if self.seen is not None:
            self.seen = mx.put_along_axis(self.seen, column, mx.array(True), axis=-1)
        if self.counts is not None:
            before = mx.take_along_axis(self.counts, column, axis=-1)
            self.counts = mx.put_along_axis(self.counts, column, before + 1, axis=-1)


def keep_likely(logits: mx.array, sampling: Sampling) -> mx.array:
    """Logits [B, V] with -inf for what top-k, top-p and min-p rule out.

    Tokens as likely as the last one kept are kept too.
    """
    never = mx.array(-float("inf"))
    vocabulary = logits.shape[-1]
    if 0 < sampling.top_k < vocabulary:
        least = mx.topk(logits, sampling.top_k, axis=-1).min(axis=-1, keepdims=True)
        logits = mx.where(logits >= least, logits, never)
    if sampling.top_p < 1:
        probabilities = mx.softmax(logits, axis=-1)
        ordered = -mx.sort(-probabilities, axis=-1)
        before = mx.cumsum(ordered, axis=-1) - ordered
        least = mx.where(before < sampling.top_p, ordered, 2.0).min(axis=-1, keepdims=True)
        logits = mx.where(probabilities >= least, logits, never)
    if sampling.min_p > 0:
        best = logits.max(axis=-1, keepdims=True)
        logits = mx.where(mx.exp(logits - best) >= sampling.min_p, logits, never)
    return logits


def _occurrences(prompt: Sequence[int], vocabulary: int) -> mx.array:
    seen = mx.zeros((vocabulary,), mx.bool_)
    seen[mx.array(list(prompt))] = True
    return seen


def _bias(bias: Mapping[int, float], vocabulary: int) -> mx.array | None:
    if not bias:
        return None
    for token in bias:
        _require(0 <= token < vocabulary, "a logit_bias token", token, f"below {vocabulary}")
    values = mx.zeros((vocabulary,))
    values[mx.array(list(bias))] = mx.array([float(value) for value in bias.values()])
    return values


def _fresh_seed() -> int:
    return int.from_bytes(os.urandom(4), "little")
