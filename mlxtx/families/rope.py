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
    parameters = reader.get("rope_scaling", default=None) or nested or {}
    if not isinstance(parameters, dict):
        raise MlxtxError(f"config.json: RoPE needs names and values, not {parameters!r:.60}")
    parameters = dict(parameters)
    original = reader.get("original_max_position_embeddings", default=None)
    if layer_type is not None and any(name.endswith("_attention") for name in parameters):
        # transformers asks for truncate beside the layer types, for the context only within them.
        own, original = parameters.get(layer_type) or {}, None
        parameters = {**own, "truncate": parameters.get("truncate", True)}
    elif layer_type is not None and layer_type != "full_attention":
        parameters = {}  # where layers differ, a flat scaling is that of the full ones
    kind = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    parameters.pop("type", None)
    parameters["rope_type"] = {"su": "longrope"}.get(kind, kind)
    parameters.setdefault("rope_theta", flat_theta)
    parameters.setdefault("partial_rotary_factor", 1.0 if flat_partial is None else flat_partial)
    if partial is None and parameters["rope_type"] == "default":
        parameters["partial_rotary_factor"] = 1.0
    if original is not None:
        parameters["original_max_position_embeddings"] = original
    return parameters


def make_rope(parameters: dict[str, Any], head_dim: int, context: int, **fields: Any) -> RopeConfig:
    """A ``RopeConfig`` from one dictionary of rope parameters; ``fields`` are more of its own."""
    left = dict(parameters)
    base, kind = left.pop("rope_theta"), left.pop("rope_type")
    partial = left.pop("partial_rotary_factor", 1.0)
    scaling = None
    if kind != "default":
        if kind not in SCALINGS:
            known = ", ".join(("default", *SCALINGS))
            raise MlxtxError(f"config.json: rope_type={kind!r} is not supported (known: {known})")
        scaling = make_scaling(kind, left, partial, context)
    rest = {k: v for k, v in left.items() if v is not None and k not in KNOWN.split()}
    unknown = [f"{k}={v!r}" for k, v in sorted(rest.items())]
    if unknown:
        raise MlxtxError(
            f"config.json: RoPE of type {kind!r} has keys that nothing knows: {', '.join(unknown)}"
        )
    dims = head_dim if kind == "proportional" else int(head_dim * partial)
    base = float(base) if type(base) is int else base
    return RopeConfig(dims=dims, base=base, scaling=scaling, **fields)


# Each type of scaling and the keys it needs: theirs -> ours.
SCALINGS: dict[str, dict[str, str]] = {
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "proportional": {},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_frequency_factor",
        "high_freq_factor": "high_frequency_factor",
    },
    "yarn": {},
    "longrope": {"short_factor": "short_factors", "long_factor": "long_factors"},
}
# Keys that are read here or elsewhere, or have no effect for the type that carries them.
# Neither transformers nor mlx-lm reads attn_factor, which one published yarn carries.
KNOWN = """
    attention_factor attn_factor beta_fast beta_slow factor finetuned high_freq_factor
    llama_4_scaling_beta long_factor low_freq_factor max_position_embeddings mrope_section mscale
    mscale_all_dim original_max_position_embeddings short_factor truncate
    """


def make_scaling(kind: Any, left: dict[str, Any], partial: float, context: int) -> RopeScaling:
    """The scaling of one type; what it needs is taken out of ``left``."""
    original = left.get("original_max_position_embeddings") or context
    fields: dict[str, Any] = {"kind": kind, "original_context": original}
    for theirs, ours in SCALINGS[kind].items():
        if left.get(theirs) is None:
            raise MlxtxError(f"config.json: RoPE of type {kind!r} needs {theirs!r}")
        value = left.pop(theirs)
        fields[ours] = tuple(map(float, value)) if isinstance(value, list) else value
    if kind == "dynamic":
        fields["original_context"] = context
    if kind == "proportional":
        fields |= {"factor": left.get("factor") or 1.0, "turning": partial}
    if kind in ("yarn", "longrope"):
        fields["factor"] = factor = left.get("factor") or context / original
        fields["attention_factor"] = left.get("attention_factor")
        if fields["attention_factor"] is None:
            fields["attention_factor"] = _amplitude(kind, factor, original, left)
    if kind == "yarn":
        fields |= {name: left[name] for name in ("beta_fast", "beta_slow") if left.get(name)}
        fields["truncate"] = bool(left.get("truncate", True))
    return RopeScaling(**fields)


def _amplitude(kind: str, factor: float, original: int, left: dict[str, Any]) -> float:
    mscale, all_dim = left.get("mscale"), left.get("mscale_all_dim")
    if kind == "longrope":
        return longrope_amplitude(factor, original)
    if mscale and all_dim:
        return yarn_amplitude(factor, mscale) / yarn_amplitude(factor, all_dim)
    return yarn_amplitude(factor)
