"""What each job of the engine does. Everything heavy is imported when a job needs it.

Each function gets the job and a ``Running``, and returns the ``Done`` that ends it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxtx import engine
from mlxtx.errors import MlxtxError
from mlxtx.events import Delta, Done, Event, Loaded, Stats

if TYPE_CHECKING:
    from mlxtx.engine import Running
    from mlxtx.language_model import LanguageModel

# Seconds between two reports of speed and memory while text is generated.
_STATS_SECONDS = 0.5
_CONNECT_SECONDS = 4.0


def _load(job: engine.Load, running: Running) -> Done:
    start = time.perf_counter()
    state = running.state
    # Until all of it is there, nothing answers: a model without its adapter is another one.
    state.pop("ready", None)
    options = repr(sorted(job.options.items()))
    key = (job.model, job.revision, options, _version(job.model, "*.safetensors"))
    if state.get("key") != key:
        # The old model goes first: two at once may not fit.
        _unload(engine.Unload(), running)
        state.update(_loaded(job, running), key=key, adapter=None)
    if state["adapter"] != _version(job.adapter):
        _switch_adapter(job.adapter, state)
    state["ready"] = True
    running.emit(
        Loaded(
            model=job.model,
            seconds=time.perf_counter() - start,
            bytes=_memory(),
            context=state["model"].context,
            details={
                "memory_limit": _limit(),
                "sampling": state["sampling"],
            },
        )
    )
    return Done(reason="done")


def _loaded(job: engine.Load, running: Running) -> dict[str, Any]:
    import mlxtx
    from mlxtx.checkpoint import resolve
    from mlxtx.tuning.adapters import Adapters

    report = _without_loaded(running.report)
    folder = resolve(job.model, job.revision, on_event=report)
    model = mlxtx.load(folder, on_event=report, **job.options)
    model.name = job.model  # a cache setting may be stored for it under that name
    model.kv = None  # that of the options was for the plan: every reply says its own
    return {
        "model": model,
        "adapters": Adapters(model.model, model.config),
        "sampling": own_sampling(folder),
    }


def own_sampling(folder: Path) -> dict[str, Any]:
    """How the model's makers would sample, from its ``generation_config.json``; {} if unsaid."""
    import json

    from mlxtx.settings import Sampling, checked

    try:
        values = json.loads((folder / "generation_config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(values, dict):
        return {}
    if values.get("do_sample") is False:
        return {"temperature": 0.0}
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    return checked(Sampling, {name: values[name] for name in names if name in values}, "", [])


def _switch_adapter(folder: str | None, state: dict[str, Any]) -> None:
    """Put the adapter in ``folder`` on the model, or none; the base stays where it is."""
    adapters = state["adapters"]
    # What the cache holds was computed with the other weights.
    state.pop("session", None)
    state["adapter"] = None
    adapters.use(None)
    version = _version(folder)
    if folder is not None:
        adapters.use(adapters.load(folder, name=folder))
    state["adapter"] = version


def _version(folder: str | None, files: str = "adapter*") -> tuple[str, list[int]] | None:
    """Which adapter or model, as it lies there now: a run that goes on writes over its own."""
    if folder is None:
        return None
    return folder, [file.stat().st_mtime_ns for file in sorted(Path(folder).glob(files))]


def _without_loaded(report: Callable[[Event], None]) -> Callable[[Event], None]:
    """``report`` for what ``mlxtx.load`` says, but for its ``Loaded``: ours says more."""
    return lambda event: None if isinstance(event, Loaded) else report(event)


def _unload(job: engine.Unload, running: Running) -> Done:
    if running.state:
        import mlx.core as mx

        running.state.clear()
        mx.clear_cache()
    return Done(reason="done")


def _model(running: Running) -> LanguageModel:
    if "ready" not in running.state:
        raise MlxtxError("No model is loaded. Choose one on the models screen (f3).")
    return running.state["model"]


def _generate(job: engine.Generate, running: Running) -> Done:
    model = _model(running)
    options = {**job.defaults, **running.state["sampling"], **job.options}
    if (options.get("seed") or 0) < 0:
        del options["seed"]
    kv = options.pop("kv", None)
    if "logit_bias" in options:  # pairs, since keys in JSON are texts
        options["logit_bias"] = dict(options["logit_bias"])
    asked, session = running.state.get("session", (None, None))
    if session is None or asked != kv:
        session = model.session(kv)
        running.state["session"] = kv, session
    prompt: Any = job.messages
    if job.goes_on:
        prompt, options["begun"] = _going_on(model, job.messages, options.pop("template", {}))
    meter = _Meter()
    for event in model.stream(prompt, session=session, should_stop=running.stopped, **options):
        if isinstance(event, Done):
            return event
        running.emit(event)
        if isinstance(event, Delta) and (stats := meter.token()) is not None:
            running.emit(replace(stats, cache_bytes=session.cache.nbytes, memory_bytes=_memory()))
    return Done(reason="stopped")


def _going_on(
    model: LanguageModel, messages: list[dict[str, Any]], template: dict[str, Any]
) -> tuple[list[int], int]:
    """The prompt of an answer that the last message begins, and how many of its tokens that is."""
    from mlxtx.generation.generate import ends_thinking

    prompt = model.encode(messages[:-1], **template)
    if ends_thinking(prompt, model.tokenizer):  # the template began it: it is over
        prompt += model.tokenizer.encode("</think>\n\n", add_special=False)
    begun = model.tokenizer.encode(messages[-1]["content"], add_special=False)
    return prompt + begun, len(begun)


class _Meter:
    """Counts tokens and gives the figures every ``_STATS_SECONDS``."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.first = 0.0
        self.tokens = 0

    def token(self) -> Stats | None:
        now = time.perf_counter()
        self.first = self.first or now
        self.tokens += 1
        if now - self.last < _STATS_SECONDS or now == self.first:
            return None
        self.last = now
        return Stats(
            generated_tokens=self.tokens,
            time_to_first_token=self.first - self.start,
            decode_tokens_per_second=(self.tokens - 1) / (now - self.first),
        )


def _count(job: engine.Count, running: Running) -> Done:
    tokens = _model(running).tokenizer.encode(job.text, add_special=False)
    return Done(reason="done", details={"tokens": len(tokens)})


def _search(job: engine.Search, running: Running) -> Done:
    from huggingface_hub import HfApi

    _check_reachable()
    try:
        found = HfApi().list_models(
            search=job.query or None,
            author=job.author or None,
            filter="mlx" if job.mlx_only else None,
            pipeline_tag="text-generation",
            sort=job.sort,  # type: ignore[arg-type]
            limit=job.limit,
            expand=["downloads", "likes", "lastModified", "gated", "safetensors", "tags"],
        )
        models = [_hub_model(info) for info in found]
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MlxtxError(_no_search(reason)) from error
    return Done(reason="done", details={"models": models})


def _check_reachable() -> None:
    """Without a network the client would try again for half a minute before it says so."""
    import os
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from huggingface_hub import constants

    place = urlsplit(constants.ENDPOINT)
    if getproxies() or os.environ.get("HF_HUB_OFFLINE"):
        return
    port = place.port or (443 if place.scheme == "https" else 80)
    try:
        socket.create_connection((place.hostname or "", port), _CONNECT_SECONDS).close()
    except OSError as error:
        raise MlxtxError(_no_search(error.strerror or str(error))) from None


def _no_search(reason: str) -> str:
    return f"The Hub can't be searched ({reason}). Models on this machine work without it."


# Bytes of one element by the safetensors name of its type; packed low-bit weights count as U32.
_ELEMENT_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2}


def _hub_model(info: Any) -> dict[str, Any]:
    elements = dict(getattr(info.safetensors, "parameters", None) or {})
    return {
        "id": info.id,
        "downloads": info.downloads or 0,
        "likes": info.likes or 0,
        "modified": info.last_modified.date().isoformat() if info.last_modified else "",
        "gated": bool(info.gated),
        "mlx": "mlx" in (info.tags or []),
        "bytes": sum(count * _ELEMENT_BYTES.get(kind, 1) for kind, count in elements.items()),
    }


def _download(job: engine.Download, running: Running) -> Done:
    from mlxtx.checkpoint import resolve

    path = resolve(job.repo, job.revision, on_event=running.report)
    return Done(reason="done", details={"path": str(path)})


def _plan(job: engine.Plan, running: Running) -> Done:
    from mlxtx.diagnostics import plan

    return Done(reason="done", details=dict(plan(job.model, **job.options)))


def _convert(job: engine.Convert, running: Running) -> Done:
    import mlxtx

    mlxtx.convert(job.source, job.out, on_event=running.report, **job.options)
    return Done(reason="done", details={"path": job.out})


def _train(job: engine.Train, running: Running) -> Done:
    import mlxtx

    report = _without_loaded(running.report)
    mlxtx.tune(job.model, job.data, job.out, on_event=report, **job.options)
    return Done(reason="done", details={"path": job.out})


def _preview(job: engine.Preview, running: Running) -> Done:
    from mlxtx.tuning.finetune import preview

    report = _without_loaded(running.report)
    shown = preview(job.model, job.data, on_event=report, **job.options)
    return Done(reason="done", details=dict(shown))


def _memory() -> int:
    import mlx.core as mx

    return mx.get_active_memory()


def _limit() -> int:
    from mlxtx.diagnostics.memory_plan import memory_limit

    return memory_limit()


RUN: dict[type, Callable[..., Done]] = {
    engine.Load: _load,
    engine.Unload: _unload,
    engine.Generate: _generate,
    engine.Count: _count,
    engine.Plan: _plan,
    engine.Search: _search,
    engine.Download: _download,
    engine.Convert: _convert,
    engine.Train: _train,
    engine.Preview: _preview,
}
