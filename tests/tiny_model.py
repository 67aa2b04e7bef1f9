"""The tiny random model, written once for a whole test run."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from mlxtx.language_model import LanguageModel
from mlxtx.text.tokenizer import Tokenizer
from mlxtx.tiny_model import write_tiny_model


@cache
def _folder(key: tuple[tuple[str, Any], ...]) -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory(prefix="tiny-model-")
    write_tiny_model(folder.name, **dict(key))
    return folder


def tiny_folder(**changes: Any) -> Path:
    """A checkpoint folder (do not write into it); ``changes`` go to ``config.json``."""
    return Path(_folder(tuple(sorted(changes.items()))).name)


@cache
def _model(key: tuple[tuple[str, Any], ...]) -> LanguageModel:
    import mlx.core as mx

    from mlxtx.decoder.model import DecoderModel
    from mlxtx.families import family_for

    folder = tiny_folder(**dict(key))
    config = json.loads((folder / "config.json").read_text())
    model = DecoderModel(family_for(config).decoder_config(config))
    model.load_weights(list(mx.load(str(folder / "model.safetensors")).items()))
    return LanguageModel(model, Tokenizer.load(folder), config, name="tiny")


def tiny_language_model(**changes: Any) -> LanguageModel:
    """The loaded model, shared between tests: treat it as read-only."""
    return _model(tuple(sorted(changes.items())))
