"""The text part of a multimodal checkpoint, as if it were a checkpoint of its own.

Models that also see or hear are published as wrappers: ``config.json`` holds the language model's
configuration under ``text_config``, and its tensors stand beside those of the other parts, under
longer names. Behind ``text_part`` there is only the language model, an ordinary text checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mlxtx.errors import MlxtxError
from mlxtx.families import families, family_for

# Their beginnings of names and the text model's, the first that fits; all else is of other parts.
# In order: transformers 4 and MLX, MLX for Idefics, transformers 5, Idefics (and SmolVLM), all.
PREFIXES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.", "model."),
    ("model.language_model.", "model."),
    ("model.text_model.", "model."),
    ("lm_head.", "lm_head."),
)
# What the wrapper says for the whole model. tie_word_embeddings is one more, see ``_tied``.
SHARED = """
    bos_token_id dtype eos_token_id pad_token_id quantization quantization_config torch_dtype
    transformers_version
    """
# What some files say of other parts in the wrong place; transformers' text classes don't read it.
MISPLACED = "is_composition perceiver_config pixel_shuffle_factor qk_layer_norms use_resampler"
# Attention in both directions over the whole prompt, pictures or not: more than its text family.
TWO_WAY = ("paligemma",)
# Sizes that sparse files leave out, as in the configuration classes of transformers 5.23. What
# isn't here the families know themselves.
SIZES = """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads max_position_embeddings num_local_experts
    """
DEFAULTS: dict[str, tuple[int | None, ...]] = {
    "cohere2": (256000, 8192, 22528, 40, 64, None, 8192),
    "gemma": (256000, 3072, 24576, 28, 16),
    "gemma2": (256000, 2304, 9216, 26, 8),
    "gemma3_text": (262208, 2304, 9216, 26, 8),
    "gemma4_text": (262144, 2304, 9216, 30, 8, 4, 131072),
    "granite": (32000, 4096, 11008, 32, 32),
    "llama": (32000, 4096, 11008, 32, 32),
    "llama4_text": (202048, 5120, 8192, 48, 40, 8, 131072, 16),
    "ministral3": (131072, 4096, 14336, 34, 32, 8, 262144),
    "mistral": (32000, 4096, 14336, 32, 32),
    "qwen2": (151936, 4096, 22016, 32, 32),
    "qwen3": (151936, 4096, 22016, 32, 32),
}
# The text classes of transformers: Gemma3ForCausalLM for gemma3_text.
CLASSES = "Cohere2 Gemma Gemma2 Gemma3 Gemma4 Granite Llama Llama4 Ministral3 Mistral Qwen2 Qwen3"


def text_part(
    config: Mapping[str, Any], tensors: Iterable[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The text model's ``config.json``, and its tensors: name -> the name in the files.

    Of a text checkpoint that is all there is, unchanged. Raises MlxtxError for a wrapper whose text
    model is of an unknown family.
    """
    text = _text_config(config)
    if text is None:
        return dict(config), {name: name for name in tensors}
    stored: dict[str, str] = {}
    for name in tensors:
        short = text_name(name)
        if short in stored:
            raise MlxtxError(f"the checkpoint holds {short} twice: {stored[short]} and {name}")
        if short is not None:
            stored[short] = name
    return _unwrapped(config, text, stored), stored


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The configuration inside a wrapper's; None where ``config`` is no wrapper's."""
    text, outer = config.get("text_config"), config.get("model_type")
    if not isinstance(text, Mapping) or not isinstance(text.get("model_type"), str):
        return None
    if not isinstance(outer, str) or outer in TWO_WAY or outer in families():
        return None
    try:
        family_for(text)
    except MlxtxError as error:
        raise MlxtxError(f"of {outer!r:.80} only the text part could run, but {error}") from None
    return text


def text_name(name: str) -> str | None:
    """The name that a wrapper's tensor has in the text model; None where it is of another part."""
    for theirs, ours in PREFIXES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return None


def _unwrapped(
    config: Mapping[str, Any], text: Mapping[str, Any], tensors: Iterable[str]
) -> dict[str, Any]:
    kind = text["model_type"]
    sizes = zip(SIZES.split(), DEFAULTS.get(kind, ()), strict=False)
    whole: dict[str, Any] = {
        **{name: size for name, size in sizes if size is not None},
        **{name: value for name, value in text.items() if name not in MISPLACED.split()},
        **{name: config[name] for name in SHARED.split() if config.get(name) is not None},
    }
    known = {one.lower(): [f"{one}ForCausalLM"] for one in CLASSES.split()}
    whole["architectures"] = known.get(kind.removesuffix("_text"), text.get("architectures"))
    tied = _tied(config, text, tensors)
    if tied is not None:
        whole["tie_word_embeddings"] = tied
    for name in ("quantization", "quantization_config"):
        if isinstance(whole.get(name), Mapping):
            whole[name] = {_module(path): entry for path, entry in whole[name].items()}
    return whole


def _tied(
    config: Mapping[str, Any], text: Mapping[str, Any], tensors: Iterable[str]
) -> bool | None:
    """Whether the head is the embeddings, None where only the family says.

    transformers asks the wrapper, whose class has a default of its own, and LLaVA's asks the text
    model too. Where neither answers, the files do: a head that they don't hold is tied. One that
    they hold is compared with the embeddings where either says that it is tied.
    """
    outer, inner = (part.get("tie_word_embeddings") for part in (config, text))
    headless = not any(name.startswith("lm_head.") for name in tensors)
    if True in (outer, inner) or (outer is None and headless):
        return True
    return False if False in (outer, inner) else None


def _module(path: str) -> str:
    """A path in a table of quantizations, which may be a setting's name too."""
    renamed = text_name(path + ".")
    return path if renamed is None else renamed.removesuffix(".")
