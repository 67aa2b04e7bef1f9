"""``mlxtx.tune``: fine-tunes a model on a folder of examples."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlxtx.cache.fingerprint import weights_mark
from mlxtx.errors import MlxtxError, MlxtxWarning
from mlxtx.events import Event
from mlxtx.tuning.adapters import (
    adapter_of,
    base_mark,
    put_on,
    read_adapter,
    save_adapter,
)
from mlxtx.tuning.data import BadLine, Data, Records, read_data, split
from mlxtx.tuning.encode import Encoded, Encoder, pieces
from mlxtx.tuning.lora import LowRank
from mlxtx.tuning.memory import MemoryPlan, check_memory, plan_memory
from mlxtx.tuning.samples import Sample
from mlxtx.tuning.settings import Training
from mlxtx.tuning.targets import ALL, add_adapters, choose
from mlxtx.tuning.trainer import Result, Trainer
from mlxtx.tuning.trees import frozen

if TYPE_CHECKING:
    from mlxtx.language_model import LanguageModel

METHODS = ("lora", "rslora", "dora", "qlora", "full")
_DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
_FULL_RATE = 1e-5
_OF_ADAPTER = ("rank", "alpha", "scale", "dropout", "targets", "layers", "adapter_dtype")
_TRAINING = {f.name for f in fields(Training)}


@dataclass(frozen=True, kw_only=True)
class Method:
    """What is trained. scale: of the adapter's product; None takes alpha / rank, or
    alpha / sqrt(rank) with rslora (Kalajdzievski 2023). alpha None is twice the rank.
    layers: only the last so many blocks. whole: other weights to train as they are
    (embeddings, head), by name or pattern. adapter: a folder to start from."""

    method: str = "lora"
    rank: int = 8
    alpha: float | None = None
    scale: float | None = None
    dropout: float = 0.0
    targets: str | Sequence[str] = ALL
    layers: int | None = None
    whole: Sequence[str] = ()
    adapter_dtype: str = "float32"
    adapter: str | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise MlxtxError(f"unknown method {self.method!r}: use {', '.join(METHODS)}")
        if self.rank < 1:
            raise MlxtxError(f"rank must be at least 1, not {self.rank}")
        if not 0 <= self.dropout < 1:
            raise MlxtxError(f"dropout must be from 0 up to 1, not {self.dropout}")
        if self.adapter_dtype not in _DTYPES:
            raise MlxtxError(f"unknown adapter_dtype {self.adapter_dtype!r}")
        for name in ("alpha", "scale"):
            if not math.isfinite(getattr(self, name) or 0.0):
                raise MlxtxError(f"{name} must be a number, not {getattr(self, name)}")
        if self.layers is not None and self.layers < 1:
            raise MlxtxError(f"layers must be at least 1, not {self.layers}")
        if self.method == "full" and self.adapter is not None:
            raise MlxtxError("full trains a model without adapters: fuse the adapter into it first")

    def low_rank(self) -> LowRank:
        alpha = 2.0 * self.rank if self.alpha is None else self.alpha
        root = math.sqrt(self.rank) if self.method == "rslora" else self.rank
        return LowRank(
            self.rank,
            alpha / root if self.scale is None else self.scale,
            self.dropout,
            self.method == "dora",
            _DTYPES[self.adapter_dtype],
        )


def prepare(
    model: Any, how: Method, seed: int = 0, family_config: Mapping[str, Any] | None = None
) -> None:
    """Freezes the model and makes trainable what ``how`` says."""
    model.freeze()
    if how.method == "full":
        _unfreeze(model, choose_whole(model, how))
    elif how.adapter is not None:
        adapter = read_adapter(how.adapter, model, family_config)
        whole = put_on(model, adapter)
        _unfreeze(model, [name.rpartition(".")[0] for name in whole])
    else:
        layers = choose(model, how.targets, how.layers)
        add_adapters(model, dict.fromkeys(layers, how.low_rank()), seed)
    if how.method != "full" and how.whole:
        _unfreeze(model, how.whole)
    model.train()


def choose_whole(model: Any, how: Method) -> list[str]:
    if how.layers is None:
        return ["*"]
    count = len(model.config.blocks)
    blocks = [f"model.layers.{n}.*" for n in range(max(0, count - how.layers), count)]
    return [*blocks, *how.whole]


def _unfreeze(model: Any, patterns: Sequence[str]) -> None:
    from fnmatch import fnmatchcase

    for pattern in patterns:
        hits = 0
        for path, module in model.named_modules():
            if not path or not (fnmatchcase(path, pattern) or fnmatchcase(path, f"*.{pattern}")):
                continue
            own = [k for k, v in module.items() if isinstance(v, mx.array)]
            if not own:
                continue
            if "scales" in module:
                raise MlxtxError(
                    f"{path} is packed in {module.bits} bits and can't be trained as it is: "
                    "use lora, or convert the model with --dequantize first"
                )
            module.unfreeze(recurse=False, keys=own)
            hits += 1
        if not hits:
            raise MlxtxError(f"no layer is called {pattern!r}")


@dataclass
class Job:
    """Everything that is known before the first step."""

    language_model: LanguageModel
    how: Method
    settings: Training
    train: Encoded
    validation: Encoded
    memory: MemoryPlan
    sample_prompts: Sequence[str] = ()

    @property
    def bad(self) -> list[BadLine]:
        return self.train.bad + self.validation.bad


def make_job(
    model: Any, data: Any, *, force: bool = False, on_event: Any = None, **options: Any
) -> Job:
    """Loads the model and the data and plans the run, without a step."""
    encoding = {k: options.pop(k) for k in ("loss_on", "max_length", "too_long") if k in options}
    part = options.pop("validation_part", 0.0)
    prompts = list(options.pop("sample_prompts", ()))
    if prompt := options.pop("sample_prompt", None):
        prompts.append(prompt)
    if options.get("method") == "full":
        options.setdefault("learning_rate", _FULL_RATE)
    options.setdefault("iters", 100)
    given = {f.name: options.pop(f.name) for f in fields(Method) if f.name in options}
    how = Method(**given)
    unknown = set(options) - _TRAINING
    if unknown:
        raise MlxtxError(f"tune has no option {', '.join(sorted(unknown))}")
    settings = Training(**options)
    _warn_of_no_effect(given, part, settings)
    records = None if _are_samples(data) else _records(data, part)
    language_model = _load(model, force, on_event)
    encoding["max_length"] = min(encoding.get("max_length", 2048), language_model.context)
    if records is None:
        train, validation = Encoded(list(data)), Encoded()
    else:
        encoder = Encoder(language_model.tokenizer, **encoding)
        train, validation = encoder.encode(records.train), encoder.encode(records.validation)
    if not train.samples:
        worst = "; ".join(map(str, train.bad[:3]))
        raise MlxtxError(f"no record can be used: {worst}")
    net = language_model.model
    prepare(net, how, settings.seed, language_model.config)
    memory = plan_memory(
        net,
        [len(s) for s in train.samples],
        optimizer=settings.optimizer,
        checkpoint=settings.checkpoint,
        batch_size=settings.batch_size,
        master=settings.master,
    )
    return Job(language_model, how, settings, train, validation, memory, prompts)


def _warn_of_no_effect(given: Mapping[str, Any], part: float, settings: Training) -> None:
    if given.get("adapter") is not None:
        idle = [name for name in given if name in _OF_ADAPTER]
        idle += ["method"] if given.get("method") in ("dora", "rslora") else []
        if idle:
            warnings.warn(
                f"without effect: {', '.join(idle)}, for the adapter to start from has its own",
                MlxtxWarning,
                stacklevel=3,
            )
    if part and not settings.validate_every:
        warnings.warn(
            "validation_part keeps records back that nothing looks at without validate_every",
            MlxtxWarning,
            stacklevel=3,
        )


def _are_samples(data: Any) -> bool:
    return isinstance(data, Sequence) and len(data) > 0 and isinstance(data[0], Sample)


def _records(data: Any, part: float) -> Data:
    if isinstance(data, str | Path):
        return read_data(data, validation_part=part)
    records = Records()
    for number, record in enumerate(data, 1):
        records.add("record", number, record)
    if not records.good:
        raise MlxtxError("; ".join(map(str, records.bad[:3])) or "there are no records")
    return split(Data(records, Records()), part)


def _load(model: Any, force: bool, on_event: Any) -> LanguageModel:
    if not isinstance(model, str | Path):
        return model
    from mlxtx.language_model import load

    return load(model, force=force, on_event=on_event)


def tune(
    model: str | Path | LanguageModel,
    data: str | Path | Sequence[Mapping[str, Any]] | Sequence[Sample],
    out: str | Path,
    *,
    resume: bool = False,
    force: bool = False,
    on_event: Callable[[Event], None] | None = None,
    **options: Any,
) -> Result:
    """Fine-tunes a model and writes the adapter (or, with method "full", the model) to ``out``.

    model: a folder, a Hub id, or a ``LanguageModel``, which keeps the adapter on. data: a file, a
    folder, a Hub dataset repository, a list of records or of ``Sample``. Options: method="lora",
    rank=8, alpha, scale, dropout, targets="all", layers, whole, adapter_dtype, adapter (``Method``);
    iters=100, batch_size=4, learning_rate, optimizer="adamw", schedule, warmup, accumulate,
    clip, checkpoint, packing, seed=0, save_every, validate_every ... (``Training``);
    loss_on="assistant", max_length=2048, too_long="cut" (``Encoder``); validation_part=0.0;
    sample_prompt (or a list, sample_prompts), answered every sample_every steps.
    ``resume`` goes on from the state in ``out``; ``force`` tries what does not fit in memory. Raises MlxtxError with one line that says what
    is wrong; nothing in ``out`` is lost by it.
    """
    job = make_job(model, data, force=force, on_event=on_event, **options)
    check_memory(job.memory, force=force)
    return run_job(job, out, resume=resume, on_event=on_event)


def run_job(
    job: Job,
    out: str | Path,
    *,
    resume: bool = False,
    on_event: Callable[[Event], None] | None = None,
) -> Result:
    net, how = job.language_model.model, job.how
    out = Path(out)
    source = job.language_model.folder or Path(job.language_model.name).resolve()
    if how.method == "full" and out.resolve() == source:
        raise MlxtxError(f"{out} is where the model lies: choose another folder")
    facts = {
        "base": base_mark(net),
        "base weights": weights_mark(frozen(net)),
        **{f.name: getattr(how, f.name) for f in fields(Method)},
        "targets": [how.targets] if isinstance(how.targets, str) else list(how.targets),
        "whole": list(how.whole),
    }
    trainer = Trainer(
        net,
        job.train.samples,
        job.settings,
        out,
        write=lambda folder: write_result(job, folder),
        validation=job.validation.samples,
        facts=facts,
        sampler=(lambda: sample_texts(job)) if job.sample_prompts else None,
        on_event=on_event,
        every_step=True,
    )
    if not resume and trainer.states.steps():
        raise MlxtxError(
            f"{out} holds a run already: resume it (--resume) or choose another folder"
        )
    trainer.resume()
    result = trainer.run()
    net.eval()
    return result


def sample_texts(job: Job, max_tokens: int = 64) -> list[dict[str, str]]:
    """What the model answers to the job's prompts now."""
    model = job.language_model
    model.model.eval()
    asked = model.tokenizer.chat_template is not None
    said = []
    for prompt in job.sample_prompts:
        given: Any = [{"role": "user", "content": prompt}] if asked else prompt
        said.append({"prompt": prompt, "text": model.generate(given, max_tokens=max_tokens).text})
    model.model.train()
    return said


def write_result(job: Job, folder: Path) -> None:
    if job.how.method == "full":
        from mlxtx.tuning.model_files import save_like

        save_like(job.language_model, folder)
        return
    from mlxtx.tuning.layouts import in_layout

    net, config = job.language_model.model, job.language_model.config
    facts = {"method": job.how.method, "model": job.language_model.name}
    adapter = in_layout(adapter_of(net, facts), net, config, "mlx")
    save_adapter(adapter, folder, len(net.config.blocks))


def export_peft(job: Job, folder: str | Path) -> None:
    """Writes the adapter that is on the job's model for PEFT."""
    from mlxtx.tuning.peft import write_peft

    model = job.language_model
    write_peft(adapter_of(model.model), folder, model.model, model.config, base_model=model.name)


def preview(
    model: Any, data: Any, *, samples: int = 3, on_event: Any = None, **options: Any
) -> dict[str, Any]:
    """The dry run as data: samples with their masks, lengths, bad lines, the memory plan, and the
    time of one step (measured: one step is computed, and nothing is changed or written)."""
    import time

    from mlxtx.tuning.objective import loss_and_gradients
    from mlxtx.tuning.packing import make_batch

    job = make_job(model, data, on_event=on_event, **options)
    lengths = sorted(len(s) for s in job.train.samples)
    tokenizer = job.language_model.tokenizer
    shown = [pieces(tokenizer, s) for s in job.train.samples[:samples]]
    seconds = loss = None
    if job.memory.fits:
        net = job.language_model.model
        ahead = len(net.config.prediction_heads) if job.settings.ahead_weight else 0
        batch = make_batch(
            job.train.samples[: job.settings.batch_size],
            packing=job.settings.packing,
            ahead=ahead,
        )
        started = time.perf_counter()
        first, _ = loss_and_gradients(net, batch, job.settings.objective())
        seconds = (time.perf_counter() - started) * job.settings.accumulate
        loss = first.mean
    return {
        "samples": shown,
        "count": len(lengths),
        "validation_count": len(job.validation.samples),
        "tokens": sum(lengths),
        "tokens_in_loss": sum(s.targets for s in job.train.samples),
        "lengths": {
            "shortest": lengths[0],
            "median": lengths[len(lengths) // 2],
            "longest": lengths[-1],
        },
        "cut": job.train.cut,
        "bad_lines": [str(line) for line in job.bad],
        "memory": {
            name: getattr(job.memory, name)
            for name in ("weights", "trained", "activations", "logits", "total", "available")
        },
        "fits": job.memory.fits,
        "seconds_per_step": seconds,
        "loss": loss,
        "trained_parameters": _trained(job),
    }


def _trained(job: Job) -> int:
    from mlxtx.tuning.trees import named

    return sum(a.size for a in named(job.language_model.model.trainable_parameters()).values())
