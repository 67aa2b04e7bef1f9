"""The token loop: a prompt into the cache, then one token after another, for a batch of rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlxtx.errors import MlxtxError
from mlxtx.events import Prefill
from mlxtx.generation.sampling import Sampler

if TYPE_CHECKING:
    from mlxtx.cache import ModelCache
    from mlxtx.decoder.model import DecoderModel

PREFILL_CHUNK = 1024  # tokens of a prompt in one forward pass
_CLEAR_EVERY = 256  # tokens between two returns of unused buffers to the system


@dataclass(frozen=True)
class TokenLogprob:
    """The model's own log-probability of a token, before penalties and filters, and the best others."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokenStep:
    """One new token for every row of the batch."""

    tokens: list[int]
    logprobs: list[TokenLogprob] | None = None


@dataclass(frozen=True)
class _Pending:
    """A step that was issued and not yet read."""

    tokens: mx.array  # [B]
    broken: mx.array  # [] bool
    logprob: mx.array | None  # [B]
    top: tuple[mx.array, mx.array] | None  # ids and values [B, n]

    def issue(self) -> None:
        arrays = [self.tokens, self.broken, self.logprob, *(self.top or ())]
        mx.async_eval(*[array for array in arrays if array is not None])

    def read(self) -> TokenStep:
        tokens: Any = self.tokens.tolist()
        check_finite(self.broken)
        if self.logprob is None:
            return TokenStep(tokens)
        values: Any = self.logprob.tolist()
        ids: Any = [[] for _ in tokens] if self.top is None else self.top[0].tolist()
        numbers: Any = ids if self.top is None else self.top[1].tolist()
        logprobs = [
            TokenLogprob(token, value, tuple(zip(top, scores, strict=True)))
            for token, value, top, scores in zip(tokens, values, ids, numbers, strict=True)
        ]
        return TokenStep(tokens, logprobs)


def broken(logits: mx.array) -> mx.array:
    """[] bool: some logit is NaN or +infinity. (-infinity is a way to rule a token out.)"""
    return mx.any(mx.isnan(logits) | mx.isposinf(logits))


def check_finite(is_broken: mx.array) -> None:
    if is_broken.item():
        raise MlxtxError(
            "the model's logits are not numbers (NaN or infinity): its weights are damaged or"
            " overflow in this type; load it again with dtype float32"
        )


def token_steps(
    model: DecoderModel,
    prompts: Sequence[Sequence[int]],
    *,
    cache: ModelCache,
    sampler: Sampler,
    max_tokens: int,
    prefill_chunk: int = PREFILL_CHUNK,
    logprobs: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Prefill | TokenStep]:
    """Feeds what ``cache`` does not hold yet of ``prompts``, then yields up to ``max_tokens`` steps.

    Rows of different lengths are padded on the left. While a step is read, the next one already
    runs, so the device never waits for Python; what follows an end token is the caller's to drop.
    ``logprobs`` n adds the log-probability of each token and the n best. ``should_stop`` is asked
    before every forward pass. A text that outgrows the cache (``DecoderModel.outgrows``) is fed
    anew.
    """
    texts = [list(prompt) for prompt in prompts]

    def choose(logits: mx.array) -> _Pending:  # [B, V]
        logits = logits.astype(mx.float32)
        tokens = sampler(logits)
        if logprobs is None:
            pending = _Pending(tokens, broken(logits), None, None)
        else:
            scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            chosen = mx.take_along_axis(scores, tokens[:, None], axis=-1)[:, 0]
            pending = _Pending(tokens, broken(logits), chosen, _best(scores, logprobs))
        pending.issue()
        return pending

    def after(pending: _Pending) -> mx.array | None:
        def whole() -> list[list[int]]:
            return [[*t, token] for t, token in zip(texts, pending.read().tokens, strict=True)]

        feeding = {"chunk": prefill_chunk, "should_stop": should_stop}
        return feed_newest(model, pending.tokens, cache, whole, **feeding)

    logits: mx.array | None = None
    for piece in prefill(model, prompts, cache, chunk=prefill_chunk, should_stop=should_stop):
        if isinstance(piece, Prefill):
            yield piece
        else:
            logits = piece
    if logits is None or max_tokens < 1:
        return
    pending = choose(logits)
    for count in range(1, max_tokens + 1):
        if should_stop():
            return
        logits = after(pending) if count < max_tokens else None
        following = None if logits is None else choose(logits)
        step = pending.read()
        for text, token in zip(texts, step.tokens, strict=True):
            text.append(token)
        yield step
        if following is None:
            return
        pending = following
        if count % _CLEAR_EVERY == 0:
            mx.clear_cache()


def feed_newest(
    model: DecoderModel,
    newest: mx.array,
    cache: ModelCache,
    texts: Callable[[], Sequence[Sequence[int]]],
    **feeding: Any,
) -> mx.array | None:
    """Logits [B, V] behind the ``newest`` tokens [B], which end ``texts()``. Texts that outgrow the
    cache are fed anew; ``feeding`` is for ``fill`` then, and None comes of stopping it."""
    if not model.outgrows(cache):
        return model(newest[:, None], cache, last=1)[:, -1]
    cache.clear()
    return fill(model, texts(), cache, **feeding)


def prefill(
    model: DecoderModel,
    prompts: Sequence[Sequence[int]],
    cache: ModelCache,
    *,
    chunk: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Prefill | mx.array]:
    """Feeds the prompts, of which ``cache`` may hold the beginning, in chunks; the last item is the
    logits [B, V] behind the last token.

    Every chunk is evaluated before the next is built, which bounds the memory. Ends without
    logits when stopped.
    """
    tokens = padded(prompts)
    done, total = cache.offset, tokens.shape[1]
    start = time.perf_counter()
    yield Prefill(done=done, total=total)
    while total - done > chunk:
        if should_stop():
            return
        model.hidden(tokens[:, done : done + chunk], cache, length=total, last=1)
        mx.eval(cache.state())
        mx.clear_cache()
        done += chunk
        yield Prefill(done=done, total=total, seconds=time.perf_counter() - start)
    if should_stop():
        return
    logits = model(tokens[:, done:], cache, length=total, last=1)[:, -1]
    mx.eval(logits)
    yield Prefill(done=total, total=total, seconds=time.perf_counter() - start)
    yield logits


def fill(
    model: DecoderModel,
    prompts: Sequence[Sequence[int]],
    cache: ModelCache,
    *,
    chunk: int = PREFILL_CHUNK,
    should_stop: Callable[[], bool] = lambda: False,
) -> mx.array | None:
    """``prefill`` without its progress: the logits [B, V]; None, and an empty cache, when stopped."""
    *_, last = prefill(model, prompts, cache, chunk=chunk, should_stop=should_stop)
    if isinstance(last, mx.array):
        return last
    cache.clear()
    return None


def padded(prompts: Sequence[Sequence[int]]) -> mx.array:
    """Token ids [B, T] with zeros on the left of shorter rows."""
    longest = max(len(prompt) for prompt in prompts)
    return mx.array([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])


def padding(prompts: Sequence[Sequence[int]]) -> list[int] | None:
    """How many zeros ``padded`` puts before each row; None when there are none."""
    longest = max(len(prompt) for prompt in prompts)
    counts = [longest - len(prompt) for prompt in prompts]
    return counts if any(counts) else None


def _best(scores: mx.array, count: int) -> tuple[mx.array, mx.array] | None:
    """Ids and values [B, n] of the highest scores, best first."""
    if count < 1:
        return None
    ids = mx.argsort(-scores, axis=-1)[:, :count]
    return ids, mx.take_along_axis(scores, ids, axis=-1)
