"""A model with random weights, for tests and benchmarks.

It has the shape of a Llama and a vocabulary of a few hundred pieces, and what it says means
nothing. A tiny one is written in a moment; it is always the same for the same seed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxtx.files import write_json_atomic, write_text_atomic

if TYPE_CHECKING:
    import tokenizers

_SENTENCES = (
    "The lamp on the table is warm and the window is open.",
    "A small model can say a few words, but it does not know what they mean.",
    "Rain falls on the roof; the cat sleeps under the chair.",
    "Take the first road on the left, then walk along the river to the old bridge.",
    "What do you think about it? I think that we should try once more.",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPECIAL = ("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")


def tiny_tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE over a few sentences: it can write every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES * 4, trainer)
    return tokenizer


def tiny_config(vocabulary: int, **changes: Any) -> dict[str, Any]:
    """A ``config.json`` of Llama's kind."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": 0,
        "eos_token_id": 1,
        **changes,
    }


def write_tiny_model(folder: str | Path, *, seed: int = 0, **changes: Any) -> Path:
    """Writes the checkpoint into ``folder`` (made when missing); ``changes`` go to its config."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer()
    config = tiny_config(tokenizer.get_vocab_size(), **changes)
    _write_weights(folder, tokenizer, config, seed)
    write_text_atomic(folder / "tokenizer.json", tokenizer.to_str())
    names = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "chat_template": CHAT_TEMPLATE}
    write_json_atomic(folder / "tokenizer_config.json", names)
    write_json_atomic(folder / "config.json", config)  # last: its presence says all is there
    return folder


def _write_weights(
    folder: Path, tokenizer: tokenizers.Tokenizer, config: dict[str, Any], seed: int
) -> None:
    import mlx.core as mx
    import numpy as np

    random = np.random.default_rng(seed)

    def normal(*shape: int) -> mx.array:
        return mx.array(random.normal(0, shape[-1] ** -0.5, shape).astype(np.float32))

    width, hidden = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or width // config["num_attention_heads"]
    queries, keys = (config[f"num_{kind}_heads"] * head for kind in ("attention", "key_value"))
    weights = {
        "model.embed_tokens.weight": normal(config["vocab_size"], width) * width**0.5,
        "model.norm.weight": mx.ones((width,)),
    }
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}{norm}.weight"] = mx.ones((width,))
        for name, rows, columns in (
            ("self_attn.q_proj", queries, width),
            ("self_attn.k_proj", keys, width),
            ("self_attn.v_proj", keys, width),
            ("self_attn.o_proj", width, queries),
            ("mlp.gate_proj", hidden, width),
            ("mlp.up_proj", hidden, width),
            ("mlp.down_proj", width, hidden),
        ):
            weights[f"{layer}{name}.weight"] = normal(rows, columns)
    if not config["tie_word_embeddings"]:
        rows = normal(config["vocab_size"], width) * 4.0
        weights["lm_head.weight"] = rows * mx.array(_sayable(tokenizer, rows.shape[0]))[:, None]
    dtype = getattr(mx, config["torch_dtype"])
    mx.save_safetensors(
        str(folder / "model.safetensors"),
        {name: value.astype(dtype) for name, value in weights.items()},
        {"format": "pt"},
    )


def _sayable(tokenizer: tokenizers.Tokenizer, rows: int) -> list[float]:
    """1 for pieces that are readable by themselves; the others get a logit of 0 and stay rare."""
    texts = (tokenizer.decode([token]) for token in range(rows))
    return [float(text.isascii() and text.isprintable() and bool(text)) for text in texts]
