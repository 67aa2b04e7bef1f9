"""RoPE settings from both generations of ``config.json``.

Older ones spell ``rope_theta``, ``rope_scaling`` and ``partial_rotary_factor`` at the top; newer
ones nest them in ``rope_parameters``, for each layer type where they differ.
"""

from __future__ import annotations

from typing import Any

from mlxtx.decoder.config import RopeConfig, RopeScaling
from mlxtx.decoder.positions import longrope_amplitude, yarn_amplitude
from mlxtx.errors import MlxtxError
from mlxtx.families.reader import ConfigReader

_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")


def rope_parameters(
    reader: ConfigReader,
    layer_type: str | None = None,
    *,
    theta: float = 10000.0,
    theta_names: tuple[str, ...] = ("rope_theta",),
    partial: float | None = None,
    partial_names: tuple[str, ...] = ("partial_rotary_factor",),
    otherwise: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One dictionary for either generation: rope_theta, rope_type, partial_rotary_factor and
    what the scaling needs. ``theta`` and ``partial`` are the family's defaults, ``otherwise`` its
    parameters where the config gives none at all. A family without ``partial`` turns all channels
    where nothing is scaled, whatever the config says: transformers doesn't read the key there."""
    flat_theta = reader.get(*theta_names, default=theta)
    flat_partial = reader.get(*partial_names, default=partial)
    nested = reader.get("rope_parameters", default=otherwise)  # some carry both generations
    parameters: dict[str, Any] = dict(reader.get("rope_scaling", default=None) or nested or {})
    if any(name in parameters for name in _LAYER_TYPES):
        parameters = dict(parameters.get(layer_type or "full_attention") or {})
    elif layer_type is not None and layer_type != "full_attention":
        parameters = {}  # where layers differ, a flat scaling is that of the full ones
    kind = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    parameters.pop("type", None)
    parameters["rope_type"] = {"su": "longrope"}.get(kind, kind)
    parameters.setdefault("rope_theta", flat_theta)
    parameters.setdefault("partial_rotary_factor", flat_partial or 1.0)
    if partial is None and parameters["rope_type"] == "default":
        parameters["partial_rotary_factor"] = 1.0
    original = reader.get("original_max_position_embeddings", default=None)
    if original is not None:
        parameters["original_max_position_embeddings"] = original
    return parameters


def make_rope(parameters: dict[str, Any], head_dim: int, context: int, **fields: Any) -> RopeConfig:
    """A ``RopeConfig`` from one dictionary of rope parameters; ``fields`` are more of its own."""
    left = dict(parameters)
    base, kind = left.pop("rope_theta"), left.pop("rope_type")
    partial = left.pop("partial_rotary_factor", 1.0)
    dims = int(head_dim * partial)
    scaling = None
    if kind == "proportional":
        dims, left["turning"] = head_dim, partial
    if kind != "default":
        if kind not in _SCALINGS:
            raise MlxtxError(
                f"config.json: rope_type={kind!r} is not supported (known: default,"
                f" {', '.join(_SCALINGS)})"
            )
        original = left.get("original_max_position_embeddings") or context
        scaling = _SCALINGS[kind](left, original, context)
    for name in _ELSEWHERE.split():
        left.pop(name, None)
    if unknown := [f"{k}={v!r}" for k, v in sorted(left.items()) if v is not None]:
        raise MlxtxError(
            f"config.json: RoPE of type {kind!r} has keys that nothing knows: {', '.join(unknown)}"
        )
    return RopeConfig(dims=dims, base=float(base), scaling=scaling, **fields)


# Read elsewhere, or of no effect for the type that carries them.
_ELSEWHERE = """
    attention_factor beta_fast beta_slow factor finetuned llama_4_scaling_beta
    max_position_embeddings mscale mscale_all_dim original_max_position_embeddings truncate
    """


def _linear(left: dict, original: int, context: int) -> RopeScaling:
    return RopeScaling(kind="linear", factor=left.pop("factor"))


def _dynamic(left: dict, original: int, context: int) -> RopeScaling:
    return RopeScaling(kind="dynamic", factor=left.pop("factor"), original_context=context)


def _proportional(left: dict, original: int, context: int) -> RopeScaling:
    factor = left.pop("factor", None) or 1.0
    return RopeScaling(kind="proportional", factor=factor, turning=left.pop("turning"))


def _llama3(left: dict, original: int, context: int) -> RopeScaling:
    return RopeScaling(
        kind="llama3",
        factor=left.pop("factor"),
        low_frequency_factor=left.pop("low_freq_factor"),
        high_frequency_factor=left.pop("high_freq_factor"),
        original_context=original,
    )


def _yarn(left: dict, original: int, context: int) -> RopeScaling:
    factor = left.get("factor") or context / original
    amplitude, truncate = left.get("attention_factor"), left.get("truncate")
    mscale, all_dim = left.get("mscale"), left.get("mscale_all_dim")
    if amplitude is None:
        amplitude = yarn_amplitude(factor)
        if mscale and all_dim:
            amplitude = yarn_amplitude(factor, mscale) / yarn_amplitude(factor, all_dim)
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_context=original,
        beta_fast=left.get("beta_fast") or 32.0,
        beta_slow=left.get("beta_slow") or 1.0,
        truncate=True if truncate is None else truncate,
        attention_factor=amplitude,
    )


def _longrope(left: dict, original: int, context: int) -> RopeScaling:
    factor = left.get("factor") or context / original
    amplitude = left.get("attention_factor")
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
