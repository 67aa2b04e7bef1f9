"""A model and its tokenizer as one thing that answers prompts."""

from __future__ import annotations

import inspect
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxtx.errors import MlxtxError
from mlxtx.events import Delta, Done, Event, Loaded
from mlxtx.generation.generate import Completion, Generation, Options
from mlxtx.generation.loop import PREFILL_CHUNK
from mlxtx.generation.session import Session, context_limit
from mlxtx.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import mlx.core as mx

    from mlxtx.decoder.model import DecoderModel

__all__ = ["ChatSession", "Completion", "LanguageModel", "Prompt", "load"]

PLANNED_CONTEXT = 2048  # tokens that must fit when nobody says how long a conversation gets

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


def load(
    path_or_repo: str | Path,
    *,
    adapter: str | Path | None = None,
    revision: str | None = None,
    dtype: str | mx.Dtype | None = None,
    context: int | None = None,
    kv: str | None = None,
    force: bool = False,
    on_event: Callable[[Event], None] | None = None,
) -> LanguageModel:
    """Loads a checkpoint folder, or a Hub repository that is downloaded first.

    adapter: a folder with a LoRA adapter to put on the model. revision: a branch, tag or commit
    of the repository. dtype: "float32", "float16" or "bfloat16" instead of the checkpoint's own.
    context, kv: the conversation that must fit in memory (2048 tokens, a plain cache); kv is also
    what caches are like unless an option says otherwise, "auto" what ``mlxtx kv-check`` stored.
    A model that does not fit is refused before its weights are read, unless ``force``.
    on_event: gets ``Progress`` while bytes arrive and ``Loaded`` at the end.
    Raises MlxtxError with one line that says what is wrong.
    """
    import mlx.core as mx

    from mlxtx.cache.make import warm_up_kernels
    from mlxtx.checkpoint import load_model, resolve
    from mlxtx.checkpoint.source import read_config
    from mlxtx.diagnostics.kv_defaults import default_kv
    from mlxtx.diagnostics.memory_plan import bound_buffer_pool, check_plan, plan_memory

    start = time.perf_counter()
    folder = resolve(path_or_repo, revision, on_event=on_event)
    read_config(folder)  # what is no model's folder at all is told first
    tokenizer = Tokenizer.load(folder)  # quick, so its errors come before the weights are read
    kv = default_kv(path_or_repo) if kv == "auto" else kv
    plan = plan_memory(folder, context=context, kv=kv, dtype=dtype, shortest=PLANNED_CONTEXT)
    check_plan(plan, force=force)
    bound_buffer_pool(plan.limit)
    model, config = load_model(folder, dtype, on_event=on_event)
    mx.clear_cache()
    if adapter is not None:
        from mlxtx.tuning import load_adapter

        load_adapter(model, adapter, config)
    loaded = LanguageModel(model, tokenizer, config, name=str(path_or_repo), kv=kv)
    loaded.folder = folder.resolve()
    warm_up_kernels(model.config.blocks, kv, _activation_dtype(model))
    loaded.prefill_chunk = plan.prefill_chunk
    if on_event:
        on_event(
            Loaded(
                model=loaded.name,
                seconds=time.perf_counter() - start,
                bytes=mx.get_active_memory(),
                context=loaded.context,
            )
        )
    return loaded


def _activation_dtype(model: DecoderModel) -> mx.Dtype:
    """The type of what flows through: that of the last norm, which is never packed."""
    import mlx.core as mx

    norm = model.model.norm
    return norm.weight.dtype if "weight" in norm else mx.float32


class LanguageModel:
    """Generates text.

    model      tokens [B, T] -> logits [B, T, V]; has ``make_cache`` (see ``mlxtx.load_model``)
    tokenizer  ``encode``, ``decode``, ``encode_chat``, ``eos_ids``
    config     the checkpoint's ``config.json``; what was made of it is ``model.config``

    A prompt is a text, which is continued; a list of messages (dicts with role and content), which
    the model's chat template turns into a text; or token ids.
    """

    def __init__(
        self,
        model: DecoderModel,
        tokenizer: Tokenizer,
        config: Mapping[str, Any] | None = None,
        *,
        name: str = "",
        kv: str | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = dict(config or {})
        self.name = name
        self.folder: Path | None = None  # which the checkpoint was read from, if from any
        self.kv = kv
        self.prefill_chunk = PREFILL_CHUNK  # smaller when memory is short

    @property
    def context(self) -> int:
        """The longest sequence in tokens."""
        return context_limit(self.model.config)

    def encode(self, prompt: Prompt, **template: Any) -> list[int]:
        """Token ids of a prompt; ``template`` goes to the chat template (enable_thinking ...)."""
        if isinstance(prompt, str):
            if not prompt:
                raise MlxtxError("the prompt is empty; give at least one character")
            return self.tokenizer.encode(prompt)
        items = list(prompt) if isinstance(prompt, Iterable) else [None]
        if items and isinstance(items[0], Mapping):
            return self.tokenizer.encode_chat(items, **template)  # type: ignore[arg-type]
        try:
            if isinstance(prompt, bytes):
                raise ValueError
            return [index(getattr(token, "item", lambda t=token: t)()) for token in items]
        except (TypeError, ValueError):
            raise MlxtxError(
                "a prompt is a text, a list of messages or a list of token ids"
            ) from None

    def generate(self, prompt: Prompt, **options: Any) -> Completion:
        """The whole answer.

        Options: max_tokens=512, temperature=0.0, top_k, top_p, min_p, repetition_penalty,
        presence_penalty, frequency_penalty, logit_bias, seed, stop, logprobs, beams,
        length_penalty, ignore_end, kv, prefill_chunk, should_stop (``Options`` of
        ``mlxtx.generation.generate`` says what each does), session (what ``session()`` gave, whose
        cache is reused) and template (a dict for the chat template).
        """
        return self._generation([prompt], **options).completions()[0]

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[Event]:
        """The answer while it is made: ``Prefill`` ..., ``Delta`` ..., ``Done(reason, stats)``.

        Takes the options of ``generate``. The deltas joined are the text of the completion.
        """
        for _, event in self._generation([prompt], **options).events():
            yield event

    def generate_batch(
        self, prompts: Sequence[Prompt], *, seed: int | Sequence[int] | None = None, **options: Any
    ) -> list[Completion]:
        """One completion a prompt, computed together; the same tokens as one by one.

        ``seed`` may be a list, one for each prompt.
        """
        if isinstance(prompts, str):
            raise MlxtxError("generate_batch takes a list of prompts; for one there is generate")
        prompts = list(prompts)
        if not prompts:
            return []
        seeds = list(seed) if isinstance(seed, Iterable) else [seed] * len(prompts)
        if len(seeds) != len(prompts):
            raise MlxtxError(f"{len(seeds)} seeds were given for {len(prompts)} prompts")
        for one in seeds:
            Options.named(seed=one)
        return self._generation(prompts, seeds=seeds, **options).completions()

    def _generation(
        self,
        prompts: Sequence[Prompt],
        *,
        session: Session | None = None,
        seeds: Sequence[int | None] | None = None,
        template: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Generation:
        if session is not None:
            self._check_session(session, options.get("kv"))
        ids = [self.encode(prompt, **(template or {})) for prompt in prompts]
        options.setdefault("prefill_chunk", self.prefill_chunk)
        options["kv"] = self._kv(options.get("kv"))
        named = Options.named(**options)
        return Generation(self.model, self.tokenizer, ids, named, session=session, seeds=seeds)

    def _check_session(self, session: Session, kv: str | None) -> None:
        from mlxtx.cache.settings import parse_kv

        if not isinstance(session, Session):
            raise MlxtxError(f"session must be what model.session() gives, not {session!r:.60}")
        if session.model is not self.model:
            raise MlxtxError("the session holds another model's cache; make one with this model")
        held = parse_kv(session.kv)
        if isinstance(kv, str) and parse_kv(self._kv(kv)) != held:
            raise MlxtxError(f"the session's cache is {held}, not {kv}; say kv to model.session()")

    def session(self, kv: str | None = None) -> Session:
        """A cache to keep between prompts; ``kv`` names how it stores keys and values."""
        kv = self._kv(kv)
        return Session(self.model, kv, lambda prompt, held: self._saved_prefix(prompt, held, kv))

    def _saved_prefix(self, prompt: Sequence[int], held: int, kv: str | None) -> Any:
        """A cache that ``mlxtx cache build`` kept of more than the first ``held`` tokens of
        ``prompt``, or None."""
        from mlxtx.cache.fingerprint import fingerprint
        from mlxtx.cache.prefix_store import PrefixStore

        store = PrefixStore()
        if not store.folder.is_dir() or not any(store.folder.iterdir()):
            return None
        mark = fingerprint(self.model)
        return store.find(prompt, self.model, fingerprint=mark, kv=kv, beyond=held)

    def _kv(self, kv: str | None) -> str | None:
        """The cache setting: what was asked for, else what the model was loaded with."""
        if kv == "auto":
            from mlxtx.diagnostics.kv_defaults import default_kv

            return default_kv(self.name)
        return self.kv if kv is None else kv

    def chat(self, system: str | None = None, **settings: Any) -> ChatSession:
        """A conversation with memory."""
        return ChatSession(self, system, **settings)


class ChatSession:
    """Messages and the cache they fill, so that each turn costs only what is new in it.

    ``messages`` may be changed between turns: what still agrees with the cache is reused.
    """

    def __init__(
        self,
        model: LanguageModel,
        system: str | None = None,
        *,
        kv: str | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.system = system
        self.template = dict(template or {})
        self.session = model.session(kv)
        self.messages: list[dict[str, Any]] = []
        self._answering: Callable[[], Generator[Event, None, None] | None] = lambda: None

    def stream(self, text: str, **options: Any) -> Iterator[Event]:
        """Adds the user's ``text`` and streams the answer; what arrived is kept, however it ends.
        An answer that was left and is still held somewhere ends here. Takes the options of
        ``LanguageModel.stream`` but ``session``; ``template`` adds to the conversation's own."""
        left = self._answering()
        if left is not None and inspect.getgeneratorstate(left) == inspect.GEN_SUSPENDED:
            left.close()
        answer = self._answer(text, options)
        self._answering = weakref.ref(answer)
        return answer

    def _answer(self, text: str, options: dict[str, Any]) -> Generator[Event, None, None]:
        question = {"role": "user", "content": text}
        self.messages.append(question)
        parts: list[str] = []
        finished = False
        try:
            prompt = [*self._system(), *self.messages]
            template = {**self.template, **(options.pop("template", None) or {})}
            events = self.model.stream(prompt, session=self.session, template=template, **options)
            for event in events:
                if isinstance(event, Delta):
                    parts.append(event.text)
                finished = finished or isinstance(event, Done)
                yield event
        finally:
            # The messages may have been changed meanwhile: the answer belongs to its question.
            at = next((n for n, m in enumerate(self.messages) if m is question), None)
            if at is not None and (parts or finished):
                self.messages.insert(at + 1, {"role": "assistant", "content": "".join(parts)})
            elif at is not None:
                del self.messages[at]

    def _system(self) -> list[dict[str, Any]]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def reset(self) -> None:
        """Forgets the conversation, not the system message."""
        self.messages.clear()
        self.session.reset()
