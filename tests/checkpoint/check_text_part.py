"""Compares the text part of multimodal models with transformers, and packed ones with mlx-lm. Not a
test, for neither is needed here:

python tests/checkpoint/check_text_part.py --peer-python /path/to/python/with/transformers/and/mlx-lm

Every wrapper is made by transformers with random weights, and its own logits of a text are what
mlxtx's must be: as it is saved, under both generations of names, and converted, where transformers
has to load the result as a text model. Errors are in standard deviations of the logits.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "image_size": 28,
    "patch_size": 14,
}
PIXTRAL = {**VISION, "head_dim": 16, "model_type": "pixtral"}
CLIP = {**VISION, "model_type": "clip_vision_model"}
SIGLIP = {**VISION, "model_type": "siglip_vision_model"}
LLAMA4_VISION = {
    **VISION, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
    "pixel_shuffle_ratio": 0.5,
}  # fmt: skip
GEMMA4_VISION = {
    **VISION, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 16,
    "position_embedding_size": 64,
}  # fmt: skip
GEMMA3_ROPE = {"rope_type": "linear", "factor": 8.0}
# Wrapper, what its text_config says beside SMALL, what its vision_config says, and the wrapper's own.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        "gemma3",
        {"model_type": "gemma3_text", "num_hidden_layers": 7, "head_dim": 32, "sliding_window": 8,
         "rope_scaling": GEMMA3_ROPE},
        SIGLIP, {"mm_tokens_per_image": 4},
    ),
    "gemma4": (
        "gemma4",
        {"model_type": "gemma4_text", "num_hidden_layers": 7, "head_dim": 32, "sliding_window": 8,
         "global_head_dim": 64, "hidden_size_per_layer_input": 32, "num_kv_shared_layers": 1,
         "vocab_size_per_layer_input": 128, "final_logit_softcapping": 30.0},
        GEMMA4_VISION, {"audio_config": None},
    ),
    "llama4": (
        "llama4",
        {"model_type": "llama4_text", "head_dim": 32, "attention_chunk_size": 8,
         "intermediate_size_mlp": 96, "num_local_experts": 4, "interleave_moe_layer_step": 2},
        LLAMA4_VISION, {},
    ),
    "mistral3": (
        "mistral3", {"model_type": "mistral", "head_dim": 32, "sliding_window": None}, PIXTRAL, {}
    ),
    "mistral3 with ministral3": ("mistral3", {"model_type": "ministral3", "head_dim": 32}, PIXTRAL,
                                 {"tie_word_embeddings": False}),
    "llava with llama": ("llava", {"model_type": "llama"}, CLIP, {}),
    "llava with tied qwen2": (
        "llava", {"model_type": "qwen2", "tie_word_embeddings": True}, CLIP, {}
    ),
    "aya_vision": ("aya_vision", {"model_type": "cohere2", "sliding_window": 8}, SIGLIP, {}),
    "smolvlm": ("smolvlm", {"model_type": "llama"}, VISION, {"scale_factor": 2}),
    "internvl with tied qwen2": ("internvl", {"model_type": "qwen2"}, {**VISION, "image_size": [28, 28],
                      "patch_size": [14, 14]}, {}),
}  # fmt: skip
OLD, NEW = "language_model.model.", "model.language_model."
TEXT = (OLD, "language_model.lm_head.", NEW, "model.text_model.", "lm_head.")


def respelled(name: str, new: bool) -> str:
    """A name of the text part in either generation; others stay."""
    for part in (OLD, NEW, "model.text_model."):
        if name.startswith(part):
            return (NEW if new else OLD) + name.removeprefix(part)
    bare = name.removeprefix("language_model.")
    return ("" if new else "language_model.") + bare if bare.startswith("lm_head.") else name


def make(root: Path) -> None:
    """Under transformers: each wrapper, its two generations of names, and its logits."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForImageTextToText

    tokens = torch.randint(1, 120, (1, 40), generator=torch.Generator().manual_seed(0))
    np.save(root / "tokens.npy", tokens.numpy())
    for number, (wrapper, text, vision, own) in enumerate(CASES.values()):
        torch.manual_seed(number)
        config = AutoConfig.for_model(
            wrapper, text_config={**SMALL, **text}, vision_config=vision, **own
        )
        kind = {"attn_implementation": "eager", "dtype": torch.float32}
        model = AutoModelForImageTextToText.from_config(config, **kind).eval()
        for name, values in model.named_parameters():
            norm = "norm" in name and values.ndim == 1
            values.data.normal_(1.0 if norm else 0.0, 0.1 if norm else values.shape[-1] ** -0.5)
        folder = root / str(number)
        model.save_pretrained(folder / "saved")
        # What is read again has the logits that count: of what the files and the config say.
        model = AutoModelForImageTextToText.from_pretrained(folder / "saved", **kind).eval()
        # Where the text model scales its logits, the wrappers of transformers 5 forget to.
        scale = getattr(config.text_config, "logit_scale", 1.0)
        with torch.no_grad():
            np.save(folder / "logits.npy", scale * model(tokens).logits.numpy())
        stored = load_file(folder / "saved" / "model.safetensors")
        for generation, new in (("old", False), ("new", True)):
            (folder / generation).mkdir()
            config_json = (folder / "saved" / "config.json").read_bytes()
            (folder / generation / "config.json").write_bytes(config_json)
            renamed = {respelled(name, new): values for name, values in stored.items()}
            save_file(renamed, folder / generation / "model.safetensors", {"format": "pt"})


def for_mlx_lm(source: Path, target: Path, asked: dict[str, Any]) -> None:
    """The same config with what mlx-lm expects to be said, as files of transformers 4 have it."""
    config = json.loads(source.read_text())
    text = {**config["text_config"], **asked}
    text.pop("per_layer_config", None)
    config["text_config"] = text
    config["vocab_size"] = text["vocab_size"]
    text["tie_word_embeddings"] = config["tie_word_embeddings"]
    if config["model_type"] in ("gemma3", "llama4"):
        rope = text.pop("rope_parameters")
        full = rope.get("full_attention", rope)
        text |= {"rope_theta": full["rope_theta"], "rope_scaling": None}
        if full["rope_type"] != "default":
            text["rope_scaling"] = {k: v for k, v in full.items() if k != "rope_theta"}
    target.parent.mkdir()
    target.write_text(json.dumps(config))


def pack(root: Path) -> None:
    """Under mlx-lm: the wrappers that it knows, packed, and their logits."""
    from importlib.util import find_spec

    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    tokens = mx.array(np.load(root / "tokens.npy"))
    for number, (wrapper, asked, *_) in enumerate(CASES.values()):
        if find_spec(f"mlx_lm.models.{wrapper}") is None:
            continue
        folder = root / str(number)
        for_mlx_lm(folder / "old" / "config.json", folder / "flat" / "config.json", asked)
        shutil.copyfile(*(folder / kind / "model.safetensors" for kind in ("old", "flat")))
        model, config = load_model(folder / "flat", lazy=True)

        def mixed(path: str, module: Any, *_: Any) -> Any:
            if not hasattr(module, "to_quantized"):
                return False
            return {"group_size": 32, "bits": 8} if "down_proj" in path else True

        model, config = quantize_model(model, config, 32, 4, quant_predicate=mixed)
        (folder / "packed").mkdir()
        save_model(folder / "packed", model)
        save_config(config, folder / "packed" / "config.json")
        np.save(folder / "packed.npy", np.array(model(tokens).astype(mx.float32)))


def reload(root: Path) -> None:
    """Under transformers: what mlxtx converted, as an ordinary text model."""
    import torch
    from transformers import AutoModelForCausalLM

    tokens = torch.from_numpy(np.load(root / "tokens.npy"))
    for number in range(len(CASES)):
        folder = root / str(number)
        model, info = AutoModelForCausalLM.from_pretrained(
            folder / "converted", attn_implementation="eager", output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        with torch.no_grad():
            np.save(folder / "converted.npy", model.eval()(tokens).logits.numpy())
        said = json.loads((folder / "converted" / "config.json").read_text())["architectures"]
        assert said == [type(model).__name__], (said, type(model))


def off(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / expected.std())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer-python")
    parser.add_argument("--step", choices=("make", "pack", "reload"))
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.step:
        {"make": make, "pack": pack, "reload": reload}[options.step](options.folder)
        return
    from mlxtx import convert, load_model

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)

        def peer(step: str) -> None:
            command = [options.peer_python, __file__, "--step", step, "--folder", name]
            subprocess.run(command, check=True)

        peer("make")
        peer("pack")
        tokens = mx.array(np.load(root / "tokens.npy"))
        errors: dict[str, dict[str, float]] = {}
        for number, case in enumerate(CASES):
            folder, found = root / str(number), errors.setdefault(case, {})
            expected = np.load(folder / "logits.npy")
            for kind in ("saved", "old", "new"):
                model, _ = load_model(folder / kind)
                found[kind] = off(np.array(model(tokens)), expected)
            if (folder / "packed").is_dir():
                model, _ = load_model(folder / "packed", unpack=False)
                found["packed"] = off(np.array(model(tokens)), np.load(folder / "packed.npy"))
            convert(folder / "old", folder / "converted", dequantize=True)
        peer("reload")
        for number, (case, found) in enumerate(errors.items()):
            folder = root / str(number)
            found["reloaded"] = off(
                np.load(folder / "converted.npy"), np.load(folder / "logits.npy")
            )
            print(case, {kind: f"{error:.0e}" for kind, error in found.items()})
    worst = max(error for found in errors.values() for error in found.values())
    print(f"worst: {worst:.1e} (3e-04 is allowed)")
    sys.exit(worst > 3e-4)


if __name__ == "__main__":
    main()
