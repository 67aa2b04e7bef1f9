"""From token ids to events and completions, for one prompt or a batch of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING

import mlx.core as mx

from mlxtx.errors import MlxtxError
from mlxtx.events import Delta, Done, Event, Prefill, Stats
from mlxtx.generation.loop import (
    PREFILL_CHUNK,
    TokenLogprob,
    TokenStep,
    padding,
    token_steps,
)
from mlxtx.generation.sampling import Sampler, Sampling
from mlxtx.generation.session import Session, context_limit
from mlxtx.generation.stop import StopStrings
from mlxtx.generation.wired import wired_memory

if TYPE_CHECKING:
    from mlxtx.decoder.model import DecoderModel
    from mlxtx.text.tokenizer import Tokenizer

MOST_BEAMS = 1000  # each has a cache of its own


@dataclass(frozen=True, kw_only=True)
class Options(Sampling):
    """How to generate: all of ``Sampling`` and

    max_tokens      at most this many new tokens
    stop            strings that end the answer and are not part of it
    logprobs        n: keep the log-probability of every token and of the n most likely (None: off)
    beams           above 1: beam search of this width, without sampling
    length_penalty  beams are ranked by log-probability / length ** length_penalty
    begun           how many tokens at the end of the prompt begin the answer, whose text goes on
    ignore_end      go on after an end token (benchmarks)
    kv              how the cache keeps keys and values, "k8v4g64" for instance (None: as they are)
    prefill_chunk   tokens of the prompt in one forward pass
    should_stop     asked before every token; True ends the answer and keeps what is there
    """

    max_tokens: int = 512
    stop: str | Sequence[str] = ()
    logprobs: int | None = None
    beams: int = 1
    length_penalty: float = 1.0
    begun: int = 0
    ignore_end: bool = False
    kv: str | None = None
    prefill_chunk: int = PREFILL_CHUNK
    should_stop: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens < 1:
            raise MlxtxError(f"max_tokens must be 1 or more, not {self.max_tokens}")
        if self.begun < 0:
            raise MlxtxError(f"begun must be 0 or more, not {self.begun}")
        if self.prefill_chunk < 1:
            raise MlxtxError(f"prefill_chunk must be 1 or more, not {self.prefill_chunk}")
        if not 1 <= self.beams <= MOST_BEAMS:
            raise MlxtxError(f"beams must be from 1 to {MOST_BEAMS}, not {self.beams}")
        penalty = self.length_penalty
        if not -30 <= penalty <= 30:  # of powers of the length: larger ones are no numbers
            raise MlxtxError(f"length_penalty must be a number from -30 to 30, not {penalty}")
        if self.logprobs is not None and self.logprobs < 0:
            raise MlxtxError(f"logprobs must be 0 or more, not {self.logprobs}")
        penalties = (self.repetition_penalty - 1, self.presence_penalty, self.frequency_penalty)
        if self.beams > 1 and (self.temperature or any(penalties) or self.logit_bias):
            raise MlxtxError("beam search takes no temperature, penalties or logit_bias")
        if not all(isinstance(stop, str) for stop in self.stops):
            raise MlxtxError(f"stop must be a text or several, not {self.stop!r:.60}")

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)

    @staticmethod
    def named(**values: object) -> Options:
        """Options from keywords, where None stands for the default; an unknown one, or a value of
        another kind, is an error that says what there is."""
        known = Options.__dataclass_fields__
        given = {name: value for name, value in values.items() if value is not None}
        for name, value in given.items():
            if name not in known:
                raise MlxtxError(f"unknown option {name!r}; there are {', '.join(sorted(known))}")
            kind, what = _KINDS.get(str(known[name].type), (object, ""))
            if not isinstance(value, kind) or (what and isinstance(value, bool)):
                raise MlxtxError(f"{name} must be {what}, not {value!r:.60}")
        try:
            return Options(**given)  # type: ignore[arg-type]
        except (TypeError, ValueError, AttributeError) as error:
            raise MlxtxError(f"an option has a value of another kind: {error}") from error


# What values of each type of field have to be; numbers of numpy's count too.
_KINDS: dict[str, tuple[type, str]] = {
    "int": (Integral, "a whole number"),
    "int | None": (Integral, "a whole number"),
    "float": (Real, "a number"),
    "str | None": (str, "a text"),
}


@dataclass(frozen=True)
class Completion:
    """A finished answer.

    text           without the end token and without the stop string
    tokens         every generated id, an end token included
    finish_reason  "stop" (end token), "stop_string", "length" or "stopped"
    stats          times, speeds and memory (``mlxtx.events.Stats``)
    logprobs       one ``TokenLogprob`` a token when asked for
    """

    text: str
    tokens: list[int]
    finish_reason: str
    stats: Stats
    logprobs: list[TokenLogprob] | None = None

    def __str__(self) -> str:
        return self.text


class _Row:
    """The text of one sequence while its tokens arrive."""

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], options: Options, limit: int
    ) -> None:
        self.prompt = prompt
        self.room = min(options.max_tokens, limit - len(prompt) + 1)  # the last one is not fed
        self.ends = frozenset() if options.ignore_end else tokenizer.eos_ids
        self.stream = tokenizer.stream()
        if options.begun:
            for token in prompt[-options.begun :]:
                self.stream.push(token)
            self.stream.finish()
        self.stops = StopStrings(options.stops)
        # Special tokens are no text, so a stop string that spells one has to be seen as its id.
        named = {tokenizer.id_of(stop) for stop in self.stops.stops}
        self.stop_tokens = named & tokenizer.pieces.special
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.parts: list[str] = []
        self.reason: str | None = None
        self.marks = tokenizer.thinking_ids
        self.thinking = ends_thinking(prompt, tokenizer)

    def push(self, token: int, logprob: TokenLogprob | None) -> Delta:
        self.tokens.append(token)
        if logprob:
            self.logprobs.append(logprob)
        value = logprob.logprob if logprob else None
        if token in self.ends or token in self.stop_tokens:
            self.reason = "stop" if token in self.ends else "stop_string"
            return Delta(text="", token=token, logprob=value)
        text = self._show(self.stops.push(self.stream.push(token)))
        if self.stops.found is not None:
            self.reason = "stop_string"
        # The marks themselves belong to the thinking.
        thinking = self.thinking or token in (self.marks or ())
        if self.marks and token in self.marks:
            self.thinking = token == self.marks[0]
        kind = "thinking" if thinking else "text"
        return Delta(text=text, kind=kind, token=token, logprob=value)

    def finish(self, reason: str) -> Delta | None:
        """Gives out what was held back; ``reason`` counts unless the row ended by itself."""
        rest = self._show(self.stops.push(self.stream.finish()) + self.stops.finish())
        if self.reason is None:
            self.reason = "stop_string" if self.stops.found is not None else reason
        return Delta(text=rest, kind="thinking" if self.thinking else "text") if rest else None

    def _show(self, text: str) -> str:
        if text:
            self.parts.append(text)
        return text


def ends_thinking(prompt: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Some chat templates open the thinking themselves: the prompt's last mark decides. One that
    a special token follows, such as the end of a turn, was only spoken of."""
    marks = tokenizer.thinking_ids
    if marks is None:
        return False
    telling = tokenizer.pieces.special.union(marks)
    return next((token for token in reversed(prompt) if token in telling), None) == marks[0]


class _Clock:
    """Times and memory of one generation."""

    def __init__(self) -> None:
        mx.reset_peak_memory()
        self.start = self.first = self.last = time.perf_counter()
        self.steps = 0

    def step(self) -> None:
        self.last = time.perf_counter()
        self.steps += 1
        if self.steps == 1:
            self.first = self.last

    def stats(self, *, prompt: int, reused: int, generated: int, fed: int, cache: int) -> Stats:
        waited, decoding = self.first - self.start, self.last - self.first
        return Stats(
            prompt_tokens=prompt,
            reused_tokens=reused,
            generated_tokens=generated,
            time_to_first_token=waited,
            prefill_tokens_per_second=fed / waited if waited > 0 and self.steps else 0.0,
            decode_tokens_per_second=(self.steps - 1) / decoding if decoding > 0 else 0.0,
            cache_bytes=cache,
            memory_bytes=mx.get_active_memory(),
            peak_memory_bytes=mx.get_peak_memory(),
        )


class Generation:
    """Prompts (token ids) being answered. Iterate ``events()``, then read ``completions()``."""

    def __init__(
        self,
        model: DecoderModel,
        tokenizer: Tokenizer,
        prompts: Sequence[Sequence[int]],
        options: Options,
        *,
        session: Session | None = None,
        seeds: Sequence[int | None] | None = None,
    ) -> None:
        limit = context_limit(model.config)
        for prompt in prompts:
            _check_prompt(prompt, limit, model.config.vocabulary)
        if session is not None and len(prompts) > 1:
            raise MlxtxError("a session holds one conversation; give it one prompt at a time")
        self.options = options
        self.model = model
        self.seeds = seeds
        self.session = session
        self._turn = -1
        self.rows = [_Row(tokenizer, prompt, options, limit) for prompt in prompts]
        self.reused = 0
        self._beams_bytes = 0

    def events(self) -> Iterator[tuple[int, Event]]:
        """(row, event): ``Prefill`` of the whole batch under row 0, ``Delta`` and ``Done``."""
        if not self.rows:
            return
        self._clock = _Clock()
        try:
            with wired_memory():
                yield from self._run_beams() if self.options.beams > 1 else self._run()
        except GeneratorExit:
            raise
        except BaseException:
            session = self._own_session()
            if session is not None:  # half a step may be in it
                session.reset()
            raise

    def _own_session(self) -> Session | None:
        """The session, unless it was given another prompt since."""
        session = self.session
        return session if session is not None and session.turn == self._turn else None

    def _run(self) -> Iterator[tuple[int, Event]]:
        options, prompts = self.options, [row.prompt for row in self.rows]
        if self.session is not None:
            self._turn = self.session.turn + 1
            self.reused = self.session.start(prompts[0])
            self._cache = self.session.cache
        else:
            self._cache = self.model.make_cache(kv=options.kv, left_padding=padding(prompts))
        steps = token_steps(
            self.model,
            prompts,
            cache=self._cache,
            sampler=Sampler(options, prompts, self.model.config.vocabulary, self.seeds),
            max_tokens=max(row.room for row in self.rows),
            prefill_chunk=options.prefill_chunk,
            logprobs=options.logprobs,
            should_stop=options.should_stop,
        )
        for step in steps:
            if isinstance(step, Prefill):
                yield 0, step
            else:
                self._clock.step()
                yield from self._take(step)
                if all(row.reason for row in self.rows):
                    break
            if self.session is not None and self._own_session() is None:
                raise MlxtxError(
                    "the session was given another prompt meanwhile; this answer can't go on"
                )
        for index, row in enumerate(self.rows):
            if row.reason is None:
                yield from self._end(index, "stopped")

    def _take(self, step: TokenStep) -> Iterator[tuple[int, Event]]:
        if self.session is not None:
            self.session.tokens.append(step.tokens[0])
        for index, row in enumerate(self.rows):
            if row.reason is None:
                logprob = step.logprobs[index] if step.logprobs else None
                yield index, row.push(step.tokens[index], logprob)
                if row.reason is not None or len(row.tokens) == row.room:
                    yield from self._end(index, row.reason or "length")

    def _end(self, index: int, reason: str) -> Iterator[tuple[int, Event]]:
        row = self.rows[index]
        rest = row.finish(reason)
        if rest:
            yield index, rest
        yield index, Done(reason=row.reason or reason, stats=self.stats(index))

    def _run_beams(self) -> Iterator[tuple[int, Event]]:
        from mlxtx.generation.beam import beam_search  # brings numpy, which takes a while

        options = self.options
        if self.session is not None or options.logprobs is not None:
            raise MlxtxError("beam search works without a session and without logprobs")

        def on_step(cache_bytes: int) -> None:
            self._clock.step()
            self._beams_bytes = cache_bytes

        for index, row in enumerate(self.rows):
            beams = beam_search(
                self.model,
                row.prompt,
                beams=options.beams,
                max_tokens=row.room,
                length_penalty=options.length_penalty,
                ends=row.ends,
                kv=options.kv,
                prefill_chunk=options.prefill_chunk,
                should_stop=options.should_stop,
                on_step=on_step,
            )
            for token in beams[0].tokens if beams else ():
                yield index, row.push(token, None)
                if row.reason is not None:
                    break
            full = len(row.tokens) >= row.room
            yield from self._end(index, "length" if full else "stopped")

    def stats(self, index: int) -> Stats:
        row = self.rows[index]
        fed = sum(len(other.prompt) for other in self.rows) - self.reused
        return self._clock.stats(
            prompt=len(row.prompt),
            reused=self.reused,
            generated=len(row.tokens),
            fed=fed,
            cache=self._beams_bytes if self.options.beams > 1 else self._cache.nbytes,
        )

    def completions(self) -> list[Completion]:
        """The answers so far, in the order of the prompts; runs what has not run yet."""
        if any(row.reason is None for row in self.rows):
            for _ in self.events():
                pass
        keep = self.options.logprobs is not None
        return [
            Completion(
                "".join(row.parts),
                row.tokens,
                row.reason or "stopped",
                self.stats(index),
                row.logprobs if keep else None,
            )
            for index, row in enumerate(self.rows)
        ]


def _check_prompt(prompt: Sequence[int], limit: int, vocabulary: int) -> None:
    if not len(prompt):
        raise MlxtxError("the prompt is empty: it comes to no token at all")
    if len(prompt) > limit:
        raise MlxtxError(
            f"the prompt has {len(prompt)} tokens, more than the model's context of {limit};"
            " shorten it or use a model with a longer context"
        )
    worst = max(prompt)
    if min(prompt) < 0 or worst >= vocabulary:
        raise MlxtxError(
            f"the prompt holds token {worst if worst >= vocabulary else min(prompt)}, but the"
            f" model knows 0 to {vocabulary - 1}; do tokenizer and model belong together?"
        )
