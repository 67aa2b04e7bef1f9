"""A small model from nothing: first weights, and training all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx

from mlxtx.decoder.config import DecoderConfig
from mlxtx.decoder.model import DecoderModel
from mlxtx.events import Event
from mlxtx.tuning.config_file import to_dict, write_toml
from mlxtx.tuning.samples import Sample
from mlxtx.tuning.settings import Training
from mlxtx.tuning.state import save_arrays
from mlxtx.tuning.trainer import Result, Trainer
from mlxtx.tuning.trees import named, nested

_INTO_RESIDUAL = ("o_proj.weight", "down_proj.weight")


def initial_model(config: DecoderConfig, seed: int = 0, deviation: float = 0.02) -> DecoderModel:
    """A decoder with normal random matrices of ``deviation``; those that write into the residual
    stream are smaller by the square root of twice the layers (Radford et al. 2019, section 2.3)."""
    model = DecoderModel(config)
    key = mx.random.key(seed)
    deeper = 1 / math.sqrt(2 * len(config.blocks))
    weights = {}
    for name, weight in named(model.parameters()).items():
        if weight.ndim >= 2:
            key, own = mx.random.split(key)
            scale = deviation * (deeper if name.endswith(_INTO_RESIDUAL) else 1.0)
            weight = mx.random.normal(weight.shape, key=own) * scale
        weights[name] = weight
    model.update(nested(weights))
    mx.eval(model.parameters())
    return model


def train_from_scratch(
    config: DecoderConfig,
    samples: Sequence[Sample],
    out: str | Path,
    settings: Training,
    *,
    validation: Sequence[Sample] = (),
    resume: bool = False,
    write: Callable[[DecoderModel, Path], None] | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> tuple[DecoderModel, Result]:
    """Trains a new decoder on token samples (``Rows`` for a long text).

    ``out`` gets ``decoder.toml`` and ``model.safetensors`` with our own tensor names, or what
    ``write(model, folder)`` puts there.
    """
    model = initial_model(config, settings.seed)
    write = write or write_decoder
    trainer = Trainer(
        model,
        samples,
        settings,
        out,
        write=lambda folder: write(model, folder),
        validation=validation,
        facts={"method": "scratch", "decoder": to_dict(config)},
        on_event=on_event,
        every_step=True,
    )
    if resume:
        trainer.resume()
    return model, trainer.run()


def write_decoder(model: DecoderModel, folder: Path) -> None:
    """``decoder.toml`` and ``model.safetensors``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_toml(model.config, folder / "decoder.toml")
    save_arrays(folder / "model.safetensors", named(model.parameters()), {})
