"""RoPE settings from both generations of ``config.json``.

Older ones spell ``rope_theta``, ``rope_scaling`` and ``partial_rotary_factor`` at the top; newer
ones nest them in ``rope_parameters``, for each layer type where they differ.
"""

from __future__ import annotations

from typing import Any

from mlxtx.decoder.config import RopeConfig, RopeScaling
from mlxtx.decoder.positions import longrope_amplitude, yarn_amplitude
from mlxtx.errors import MlxtxError
from mlxtx.families.common import context
from mlxtx.families.reader import ConfigReader

_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")


def rope_parameters(
    reader: ConfigReader,
    layer_type: str | None = None,
    *,
    theta: float = 10000.0,
    theta_names: tuple[str, ...] = ("rope_theta",),
    partial: float = 1.0,
    partial_names: tuple[str, ...] = ("partial_rotary_factor",),
) -> dict[str, Any]:
    """One dictionary for either generation: rope_theta, rope_type, partial_rotary_factor and
    what the scaling needs. ``theta`` and ``partial`` are the family's defaults."""
    flat_theta = reader.get(*theta_names, default=theta)
    flat_partial = reader.get(*partial_names, default=partial)
    scaling, nested = (reader.get(n, default=None) for n in ("rope_scaling", "rope_parameters"))
    parameters: dict[str, Any] = dict(scaling or nested or {})  # some carry both generations
    if any(name in parameters for name in _LAYER_TYPES):
        parameters = dict(parameters.get(layer_type or "full_attention") or {})
    elif layer_type is not None and layer_type != "full_attention":
        parameters = {}  # where layers differ, a flat scaling is that of the full ones
    kind = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    parameters.pop("type", None)
    parameters["rope_type"] = {"su": "longrope"}.get(kind, kind)
    parameters.setdefault("rope_theta", flat_theta)
    parameters.setdefault("partial_rotary_factor", flat_partial)
    original = reader.get("original_max_position_embeddings", default=None)
    if original is not None:
        parameters["original_max_position_embeddings"] = original
    return parameters


def read_rope(
    reader: ConfigReader,
    head_dim: int,
    layer_type: str | None = None,
    *,
    fields: dict[str, Any] | None = None,
    **defaults: Any,
) -> RopeConfig:
    """The ``RopeConfig`` of a layer type; ``fields`` are more of ``RopeConfig``'s, ``defaults``
    go to ``rope_parameters``."""
    parameters = rope_parameters(reader, layer_type, **defaults)
    return make_rope(parameters, head_dim, context=context(reader), **(fields or {}))


def make_rope(
    parameters: dict[str, Any],
    head_dim: int,
    *,
    context: int,
    **fields: Any,
) -> RopeConfig:
    """A ``RopeConfig`` from one dictionary of rope parameters."""
    left = dict(parameters)
    base = left.pop("rope_theta")
    partial = left.pop("partial_rotary_factor", 1.0)
    kind = left.pop("rope_type")
    scaling = None
    dims = head_dim if kind == "proportional" else int(head_dim * partial)
    if kind != "default":
        if kind not in _SCALINGS:
            raise MlxtxError(
                f"config.json: rope_type={kind!r} is not supported (known: default,"
                f" {', '.join(_SCALINGS)})"
            )
        if kind == "proportional":
            left["partial"] = partial
        scaling = _SCALINGS[kind](left, context)
    left.pop("original_max_position_embeddings", None)
    left = {k: v for k, v in left.items() if v is not None and k not in _IGNORED}
    if left:
        names = ", ".join(f"{k}={v!r}" for k, v in sorted(left.items()))
        raise MlxtxError(f"config.json: RoPE of type {kind!r} has keys that nothing knows: {names}")
    return RopeConfig(dims=dims, base=float(base), scaling=scaling, **fields)


# Read elsewhere, or of no effect for the type that carries them.
_IGNORED = {
    "finetuned",
    "mscale",
    "mscale_all_dim",
    "llama_4_scaling_beta",
    "factor",
    "truncate",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "max_position_embeddings",
}


def _linear(left: dict, context: int) -> RopeScaling:
    return RopeScaling(kind="linear", factor=left.pop("factor"))


def _dynamic(left: dict, context: int) -> RopeScaling:
    return RopeScaling(kind="dynamic", factor=left.pop("factor"), original_context=context)


def _proportional(left: dict, context: int) -> RopeScaling:
    return RopeScaling(
        kind="proportional",
        factor=left.pop("factor", None) or 1.0,
        turning=left.pop("partial"),
    )


def _llama3(left: dict, context: int) -> RopeScaling:
    return RopeScaling(
        kind="llama3",
        factor=left.pop("factor"),
        low_frequency_factor=left.pop("low_freq_factor"),
        high_frequency_factor=left.pop("high_freq_factor"),
        original_context=left.get("original_max_position_embeddings") or context,
    )


def _yarn(left: dict, context: int) -> RopeScaling:
    original = left.get("original_max_position_embeddings") or context
    factor = left.pop("factor", None) or context / original
    amplitude = left.pop("attention_factor", None)
    mscale, all_dim = left.pop("mscale", None), left.pop("mscale_all_dim", None)
    if amplitude is None:
        amplitude = yarn_amplitude(factor)
        if mscale and all_dim:
            amplitude = yarn_amplitude(factor, mscale) / yarn_amplitude(factor, all_dim)
    truncate = left.pop("truncate", None)
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_context=original,
        beta_fast=left.pop("beta_fast", None) or 32.0,
        beta_slow=left.pop("beta_slow", None) or 1.0,
        truncate=True if truncate is None else truncate,
        attention_factor=amplitude,
    )


def _longrope(left: dict, context: int) -> RopeScaling:
    original = left.get("original_max_position_embeddings") or context
    factor = left.pop("factor", None) or context / original
    amplitude = left.pop("attention_factor", None)
    if amplitude is None:
        amplitude = longrope_amplitude(factor, original)
    return RopeScaling(
        kind="longrope",
        factor=factor,
        original_context=original,
        attention_factor=amplitude,
        short_factors=tuple(map(float, left.pop("short_factor"))),
        long_factors=tuple(map(float, left.pop("long_factor"))),
    )


_SCALINGS = {
    "linear": _linear,
    "dynamic": _dynamic,
    "proportional": _proportional,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
