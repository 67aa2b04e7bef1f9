"""Builds the parity fixtures: tiny checkpoints and what transformers (float32, eager) says of them.

    python tests/parity/make_fixtures.py                    # every case, into tests/parity/fixtures
    python tests/parity/make_fixtures.py --only llama,phi3  # some of them
    python tests/parity/make_fixtures.py --out other --seed 3 --heads 6 --window 9   # other sizes
    python tests/parity/make_fixtures.py --checkpoints folder --only llama  # whole checkpoints

Needs torch and transformers, which the suite itself does not. For each case the model's class says
which tensors a checkpoint of the family has; the recipe fills them; transformers loads that
checkpoint (nothing missing, nothing unexpected), and everything recorded comes from that model.
Saved again and loaded again it must say the same, and so it must with the config of published
checkpoints.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import torch
from cases import CASES, Case, Sizes
from legacy import legacy_config
from recipe import FIXTURES, Fixture, Tensor, write_safetensors
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
)
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel
from transformers.utils import logging as transformers_logging

LONG, SHORT, NEW, BEAMS = 48, 7, 16, 3

NORM = re.compile(r"(norm|ln_|layernorm|layer_norm)", re.IGNORECASE)
FINAL_NORM = re.compile(
    r"^([a-z_]+\.){0,2}(norm|norm_f|ln_f|final_layer_norm|final_layernorm)\.weight$"
)
EMBEDDING = re.compile(r"(embed|wte|wpe|lm_head|embd)")
CORRECTION = re.compile(r"(e_score_correction_bias|expert_bias|correction_bias)$")
FIXED = re.compile(r"(act_fn\.(eps|beta)|rotary_emb|inv_freq)$")


# --------------------------------------------------------------------- the recipe of a checkpoint


def recipe_for(model: Any, case: Case) -> list[Tensor]:
    """One recipe line for each tensor that transformers would save for this model."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = read_safetensors(Path(folder) / "model.safetensors")
    lines = []
    for name, values in saved.items():
        if case.packed_experts and re.search(r"experts\.(gate_up|down)_proj$", name):
            lines += packed_expert_lines(name, values.shape)
        else:
            lines.append(recipe_line(name, values, case))
    return lines


def ahead_lines(lines: list[Tensor], layers: int, sizes: Sizes) -> list[Tensor]:
    """An extra prediction head: a layer more, with norms, a projection, and copies of the
    embeddings and the head that no one reads."""
    last, extra = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    block = [
        dataclasses.replace(line, name=line.name.replace(last, extra))
        for line in lines
        if line.name.startswith(last)
    ]
    for name in ("enorm", "hnorm", "shared_head.norm"):
        block.append(Tensor(f"{extra}{name}.weight", (sizes.hidden,), 1.0, 0.2))
    shape = (sizes.hidden, 2 * sizes.hidden)
    block.append(Tensor(f"{extra}eh_proj.weight", shape, std=round(1.3 / shape[1] ** 0.5, 4)))
    for name in ("embed_tokens", "shared_head.head"):
        block.append(Tensor(f"{extra}{name}.weight", (sizes.vocab, sizes.hidden), std=0.4))
    return block


def recipe_line(name: str, values: np.ndarray, case: Case) -> Tensor:
    """Random values that keep activations near unit variance, around what the class starts from."""
    shape = tuple(values.shape)
    if FIXED.search(name):
        return Tensor(name, shape, mean=uniform_value(name, values))
    if CORRECTION.search(name):
        return Tensor(name, shape, std=0.2)
    if name.endswith("sinks"):
        return Tensor(name, shape, std=1.0)
    if len(shape) <= 1 or (NORM.search(name) and name.endswith("weight")):
        mean = float(values.flat[0]) if np.all(values == values.flat[0]) else 0.0
        if FINAL_NORM.search(name):  # signs at random, or a tied embedding repeats the last token
            zero_centred = mean == 0.0
            return Tensor(name, shape, mean=-1.0 if zero_centred else 0.0, std=1.0)
        return Tensor(name, shape, mean, 0.2)
    if EMBEDDING.search(name):
        quiet = case.model_type.startswith(("gemma", "granite"))
        return Tensor(name, shape, std=0.12 if quiet else 0.4)
    fan_in = shape[-1] if len(shape) == 2 else min(shape[1:])
    return Tensor(name, shape, std=round(1.3 / fan_in**0.5, 4))


def uniform_value(name: str, values: np.ndarray) -> float:
    if not np.all(values == values.flat[0]):
        raise ValueError(f"{name}: a computed buffer that no recipe can write")
    return float(values.flat[0])


def packed_expert_lines(name: str, shape: tuple[int, ...]) -> list[Tensor]:
    """mxfp4: [E, in, out] becomes blocks [E, out, in/32, 16] and scales [E, out, in/32], bytes."""
    experts, inner, outer = shape
    blocks, scales = (experts, outer, inner // 32, 16), (experts, outer, inner // 32)
    return [
        Tensor(f"{name}_blocks", blocks, bytes_between=(0, 256)),
        Tensor(f"{name}_scales", scales, bytes_between=(121, 124)),  # 2**-6 to 2**-4
    ]


MXFP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def unpack_experts(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Plain [E, in, out] weights from mxfp4 blocks: low half-byte first, scale 2**(byte - 127)."""
    plain = {}
    for name, values in weights.items():
        if name.endswith("_blocks"):
            scales = weights[name.replace("_blocks", "_scales")]
            pairs = np.stack([MXFP4[values & 15], MXFP4[values >> 4]], axis=-1)
            numbers = pairs.reshape(*values.shape[:-1], 32) * np.exp2(scales - 127.0)[..., None]
            rows = numbers.reshape(*values.shape[:2], -1).astype(np.float32)
            plain[name.removesuffix("_blocks")] = np.ascontiguousarray(rows.swapaxes(1, 2))
        elif not name.endswith("_scales"):
            plain[name] = values
    return plain


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(path)


# --------------------------------------------------------------------- transformers' answers


def load(folder: Path) -> Any:
    """The model of a folder in float32 with plain attention; every tensor must have its place."""
    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "num_mtp_layers", 0):  # left to MtpModel, which knows published sizes only
        pattern = rf"model\.layers\.{config.num_hidden_layers}.*"
        MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._keys_to_ignore_on_load_unexpected = [pattern]
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        attn_implementation="eager",
        dtype=torch.float32,
        output_loading_info=True,
        local_files_only=True,
    )
    wrong = {
        key: sorted(report[key])
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if report.get(key)
    }
    if wrong:
        raise ValueError(f"{folder.name}: {wrong}")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.eval()


@torch.no_grad()
def whole(model: Any, tokens: np.ndarray) -> np.ndarray:
    ids = torch.tensor(tokens[None].astype(np.int64))
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return out.logits[0].float().numpy()


@torch.no_grad()
def step_by_step(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits of each token, fed one at a time through transformers' cache."""
    ids = torch.tensor(tokens[None].astype(np.int64))
    cache, rows = None, []
    for i in range(ids.shape[1]):
        out = model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        rows.append(out.logits[0, -1].float().numpy())
    return np.stack(rows)


@torch.no_grad()
def ahead(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits of the extra prediction head: from the state at each token and the next token."""
    ids = torch.tensor(tokens[None].astype(np.int64))
    head = MtpModel.from_pretrained(model).float().eval()
    head.set_attn_implementation("eager")
    states = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[-1]
    positions = torch.arange(1, ids.shape[1])[None]
    cache = MtpCache(config=head.config)
    states = head.forward_layer(0, states[:, :-1], positions, cache, input_ids=ids[:, 1:])
    return head._project_to_logits(states)[0].float().numpy()


@torch.no_grad()
def greedy(model: Any, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of transformers' own `generate` and how far ahead of the second each was."""
    out = generate(model, tokens, output_logits=True)
    logits = torch.cat(out.logits).float()
    best = torch.topk(logits, 2).values
    new = new_tokens(out, tokens)
    if not np.array_equal(new, logits.argmax(-1).numpy()):
        raise ValueError("generate changed the logits on the way to a token")
    return new, (best[:, 0] - best[:, 1]).numpy()


@torch.no_grad()
def beam(model: Any, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best answer of transformers' beam search, and the scores of all of them, best first."""
    out = generate(model, tokens, num_beams=BEAMS, num_return_sequences=BEAMS, output_scores=True)
    return new_tokens(out, tokens), out.sequences_scores.numpy()


def generate(model: Any, tokens: np.ndarray, **options: Any) -> Any:
    """transformers' own `generate`, without an end, without sampling."""
    ids = torch.tensor(tokens[None].astype(np.int64))
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=NEW,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        **options,
    )
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))


def new_tokens(out: Any, tokens: np.ndarray) -> np.ndarray:
    return out.sequences[0, len(tokens) :].numpy().astype(np.int32)


def answers(model: Any, case: Case, sizes: Sizes) -> dict[str, np.ndarray]:
    bits = np.random.Philox(key=zlib.crc32(case.name.encode()) + 1 + (sizes.seed << 32))
    draws = (3 + np.asarray(bits.random_raw(LONG + SHORT)) % (sizes.vocab - 3)).astype(np.int32)
    arrays = {}
    for tag, tokens in (("long", draws[:LONG]), ("short", draws[LONG:])):
        arrays[f"tokens_{tag}"] = tokens
        arrays[f"logits_{tag}"] = whole(model, tokens)
        arrays[f"greedy_{tag}"], arrays[f"margin_{tag}"] = greedy(model, tokens)
    if case.ahead:
        arrays["logits_ahead"] = ahead(model, arrays["tokens_long"])
    if case.steps:
        arrays["logits_steps"] = step_by_step(model, arrays["tokens_long"])
        arrays["beam_short"], arrays["beam_scores"] = beam(model, arrays["tokens_short"])
    if not all(np.isfinite(values).all() for values in arrays.values()):
        raise ValueError("logits that are not finite")
    return arrays


# --------------------------------------------------------------------- one case


def plain_checkpoint(fixture: Fixture, folder: Path, legacy: bool = False) -> Path:
    """The fixture's checkpoint as transformers can run it on a CPU (mxfp4 experts unpacked)."""
    fixture.write_checkpoint(folder, legacy)
    if any(tensor.name.endswith("_blocks") for tensor in fixture.tensors):
        config = dict(fixture.legacy_config if legacy else fixture.config)
        config.pop("quantization_config", None)
        (folder / "config.json").write_text(json.dumps(config))
        write_safetensors(folder / "model.safetensors", unpack_experts(fixture.weights(legacy)))
    return folder


def build(case: Case, sizes: Sizes) -> tuple[Fixture, list[str]]:
    """The fixture of one case, and remarks about what did not check out."""
    config = AutoConfig.for_model(case.model_type, **case.settings(sizes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    tensors = recipe_for(model, case)
    if case.ahead:
        tensors += ahead_lines(tensors, config.num_hidden_layers, sizes)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = json.loads((Path(folder) / "config.json").read_text())
    legacy = legacy_config(saved)
    if case.packed_experts:
        saved["quantization_config"] = dict(legacy["quantization_config"])
    else:
        legacy.pop("quantization_config", None)
    fixture = Fixture(
        case.name, case.model_type, saved, legacy, case.hub_renames, tuple(tensors), sizes.seed, {}
    )
    remarks = []
    with tempfile.TemporaryDirectory() as folder:
        model = load(plain_checkpoint(fixture, Path(folder) / "first"))
        fixture = dataclasses.replace(fixture, arrays=answers(model, case, sizes))
        model.save_pretrained(Path(folder) / "again")
        remarks += compare("saved again", Path(folder) / "again", fixture)
        remarks += compare("legacy", plain_checkpoint(fixture, Path(folder) / "old", True), fixture)
    return fixture, remarks


def compare(what: str, folder: Path, fixture: Fixture) -> list[str]:
    try:
        model = load(folder)
        error = max(
            float(np.abs(whole(model, fixture.arrays[f"tokens_{tag}"]) - expected).max())
            for tag in ("long", "short")
            for expected in [fixture.arrays[f"logits_{tag}"]]
        )
    except Exception as problem:
        return [f"{what}: {type(problem).__name__}: {str(problem)[:200]}"]
    return [f"{what}: differs by {error:.2g}"] if error > 1e-5 else []


# Keys without which no model can be told; everything else has a default.
SIZE_KEYS = """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads n_embd n_layer n_head n_positions d_model n_heads n_layers max_seq_len
    num_layers num_heads ffn_dim max_position_embeddings attention_types rotary_dim
    moe_intermediate_size num_experts num_local_experts n_routed_experts moe_num_experts
    num_experts_per_tok moe_k shared_expert_intermediate_size q_lora_rank kv_lora_rank
    qk_nope_head_dim qk_rope_head_dim v_head_dim n_group topk_group word_embed_proj_dim
    """


def defaults() -> dict[str, dict[str, Any]]:
    """For every model type the sizes alone, and the whole config that transformers makes of them."""
    told = {}
    for case in CASES.values():
        settings = case.settings(Sizes())
        given = {key: settings[key] for key in SIZE_KEYS.split() if key in settings}
        with tempfile.TemporaryDirectory() as folder:
            AutoConfig.for_model(case.model_type, **given).save_pretrained(folder)
            full = json.loads((Path(folder) / "config.json").read_text())
        told.setdefault(case.model_type, {"given": given, "full": full})
    return told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", help="case names, separated by commas")
    parser.add_argument("--out", type=Path, default=FIXTURES)
    parser.add_argument("--checkpoints", type=Path, help="also write whole checkpoints here")
    for field in dataclasses.fields(Sizes):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    arguments = parser.parse_args()
    sizes = Sizes(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(Sizes)})
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)  # tiny matrices: more threads only fight
    arguments.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    if not arguments.only:
        (arguments.out / "defaults.json").write_text(json.dumps(defaults(), indent=1))
    for name in arguments.only.split(",") if arguments.only else CASES:
        start = time.perf_counter()
        try:
            fixture, remarks = build(CASES[name], sizes)
        except Exception as problem:
            failed += 1
            print(f"FAIL {name:26s} {type(problem).__name__}: {str(problem)[:600]}", flush=True)
            if os.environ.get("DEBUG"):
                raise
            continue
        fixture.save(arguments.out / f"{name}.npz")
        if arguments.checkpoints:
            fixture.write_checkpoint(arguments.checkpoints / name)
            fixture.write_checkpoint(arguments.checkpoints / f"{name}-legacy", legacy=True)
        arrays = fixture.arrays
        print(
            f"ok   {name:26s} spread {arrays['logits_long'].std():5.2f}"
            f" distinct {len(set(arrays['greedy_long'].tolist())):2d}"
            f" margin {min(arrays['margin_long'].min(), arrays['margin_short'].min()):.2g}"
            f" {time.perf_counter() - start:.1f} s  {'; '.join(remarks)}",
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
