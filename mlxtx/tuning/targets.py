"""Which layers of a model get an adapter, by name or pattern."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlxtx.errors import MlxtxError
from mlxtx.tuning.lora import EMBEDDING, EXPERTS, LINEAR, LowRank, _Adapter, adapter_for

ALL = "all"  # every linear map and stack of experts inside the blocks
_BLOCKS = "model.layers."


def adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer that can take an adapter, by its path; adapters count as the layer inside."""
    found = {}
    for path, module in _walk(model):
        if isinstance(module, (*LINEAR, *EMBEDDING, *EXPERTS)):
            found[path] = module
    return dict(sorted(found.items(), key=lambda item: _order(item[0])))


def adapters_in(model: nn.Module) -> dict[str, _Adapter]:
    found = {p: m for p, m in model.named_modules() if isinstance(m, _Adapter)}
    return dict(sorted(found.items(), key=lambda item: _order(item[0])))


def _walk(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    adapters = adapters_in(model)
    for path, module in model.named_modules():
        if path in adapters:
            yield path, adapters[path].base
        elif not any(path.startswith(a + ".") for a in adapters):
            yield path, module


def _order(path: str) -> tuple:
    return tuple((int(p), "") if p.isdecimal() else (-1, p) for p in path.split("."))


def layer_number(path: str) -> int | None:
    """3 for ``model.layers.3.mlp.up_proj``; None outside the blocks."""
    if not path.startswith(_BLOCKS):
        return None
    return int(path[len(_BLOCKS) :].split(".", 1)[0])


def _matches(path: str, pattern: str) -> bool:
    """``q_proj``, ``self_attn.q_proj``, ``model.layers.3.*`` and ``*_proj`` all mean what they look like."""
    return fnmatchcase(path, pattern) or fnmatchcase(path, "*." + pattern)


def choose(model: Any, targets: Sequence[str] | str, layers: int | None = None) -> list[str]:
    """Paths of the layers that ``targets`` name, in the last ``layers`` blocks (None: all).

    Embeddings and the head lie outside the blocks and are taken when they are named. A pattern
    that matches nothing is an error that lists what there is.
    """
    found = adaptable(model)
    patterns = [targets] if isinstance(targets, str) else list(targets)
    first = 0 if not layers else max(0, len(model.config.blocks) - layers)
    chosen: set[str] = set()
    for pattern in patterns:
        if pattern == ALL:
            hits = [p for p in found if layer_number(p) is not None]
        else:
            hits = [p for p in found if _matches(p, pattern)]
        if not hits:
            names = sorted({p.rsplit(".", 1)[-1] for p in found})
            raise MlxtxError(f"no layer is called {pattern!r}; there are: {', '.join(names)}")
        chosen.update(p for p in hits if (n := layer_number(p)) is None or n >= first)
    return [p for p in found if p in chosen]


def add_adapters(model: nn.Module, layers: Mapping[str, LowRank], seed: int = 0) -> None:
    """Puts a new adapter on each of these layers; everything else stays as it is."""
    modules = adaptable(model)
    keys = mx.random.split(mx.random.key(seed), max(len(layers), 1))
    made = [
        (path, adapter_for(modules[path], how, key))
        for (path, how), key in zip(layers.items(), keys, strict=False)
    ]
    model.update_modules(tree_unflatten(made))


def remove_adapters(model: nn.Module) -> None:
    """Puts the base layers back."""
    bases = [(path, adapter.base) for path, adapter in adapters_in(model).items()]
    if bases:
        model.update_modules(tree_unflatten(bases))
