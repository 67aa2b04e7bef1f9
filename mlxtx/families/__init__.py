"""Families: ``config.json`` and tensor names of each ``model_type``, as data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from mlxtx.errors import MlxtxError
from mlxtx.families.family import Family

# Each module holds FAMILIES, a tuple of Family.
_MODULES = ("llama", "layer_norm", "gemma", "gpt", "alibi", "deepseek", "mixture", "gpt_oss")


def _each() -> Iterator[Family]:
    for name in _MODULES:  # imported when it comes to them
        yield from import_module(f"mlxtx.families.{name}").FAMILIES


def families() -> dict[str, Family]:
    """Every family by its ``model_type``."""
    return {family.model_type: family for family in _each()}


def family_for(config: Mapping[str, Any]) -> Family:
    """The family of a ``config.json``; an unknown one is an error that names the nearest."""
    model_type = config.get("model_type")
    for family in _each():
        if family.model_type == model_type:
            return family
    if model_type is None:
        raise MlxtxError("config.json has no model_type, so the model's family can't be told")
    near = get_close_matches(str(model_type), families(), n=3, cutoff=0.4)
    hint = f"; the nearest supported: {', '.join(near)}" if near else ""
    hint += "; code that comes with a model is never run" if "auto_map" in config else ""
    raise MlxtxError(
        f"model_type {model_type!r:.80} is not supported{hint} (mlxtx families lists them all)"
    )


__all__ = ["Family", "families", "family_for"]
