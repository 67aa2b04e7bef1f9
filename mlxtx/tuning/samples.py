"""A training sample as numbers, and the order in which samples are seen."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlxtx.errors import MlxtxError


@dataclass(frozen=True)
class Sample:
    """``tokens`` [T] int32; ``in_loss`` [T] says which tokens the model is asked to predict.

    The first token is never predicted, whatever ``in_loss`` says of it.
    """

    tokens: np.ndarray
    in_loss: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def targets(self) -> int:
        """How many tokens count in the loss."""
        return int(self.in_loss[1:].sum())


def sample(tokens: Sequence[int] | np.ndarray, in_loss: Sequence[bool] | None = None) -> Sample:
    array = np.asarray(tokens, dtype=np.int32)
    mask = np.ones(len(array), bool) if in_loss is None else np.asarray(in_loss, dtype=bool)
    if array.ndim != 1 or mask.shape != array.shape:
        raise MlxtxError(f"a sample needs one row of tokens and of marks, not {array.shape}")
    return Sample(array, mask)


class Rows(Sequence[Sample]):
    """A long text in rows of ``length`` + 1 tokens that share one token with the next, so that
    each token but the first is predicted once. A rest shorter than a row is left out.

    ``tokens`` may be a memory-mapped array: a row is read when it is asked for.
    """

    def __init__(self, tokens: np.ndarray, length: int):
        if len(tokens) <= length:
            raise MlxtxError(f"{len(tokens)} tokens are too few for rows of {length + 1}")
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self.length
        return sample(self.tokens[start : start + self.length + 1])


def fingerprint(samples: Sequence[Sample]) -> str:
    """The same for the same tokens and marks, so that a run resumes on its own data only."""
    digest = hashlib.sha256()
    if isinstance(samples, Rows):
        digest.update(f"{samples.length} {samples.tokens.dtype}".encode())
        digest.update(np.ascontiguousarray(samples.tokens).data)
    else:
        for one in samples:
            digest.update(len(one).to_bytes(8, "little"))
            digest.update(one.tokens.tobytes() + one.in_loss.tobytes())
    return digest.hexdigest()[:16]


class Order:
    """Which samples a step takes: a new permutation every epoch, from the seed alone.

    Nothing has to be saved but the number of the step.
    """

    def __init__(self, count: int, per_step: int, seed: int, shuffle: bool = True):
        if count == 0:
            raise MlxtxError("there are no samples to train on")
        self.count, self.per_step, self.seed, self.shuffle = count, per_step, seed, shuffle
        self._epoch, self._permutation = -1, np.arange(count)

    def _at(self, position: int) -> int:
        epoch, index = divmod(position, self.count)
        if self.shuffle and epoch != self._epoch:
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(self.count)
            self._epoch = epoch
        return int(self._permutation[index])

    def step(self, number: int) -> list[int]:
        """The samples of step ``number`` (from 0)."""
        first = number * self.per_step
        return [self._at(first + n) for n in range(self.per_step)]
