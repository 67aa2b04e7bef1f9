"""The model card, filled with what was measured."""

from __future__ import annotations

from typing import Any

TEXT = """---
license: mit
language: en
library_name: mlx
pipeline_tag: text-generation
---

# The small guide that comes with mlxtx

A chat model of {parameters:,} parameters, made by this project from nothing. It answers questions
about using mlxtx and about how a decoder works, makes small talk, does small sums and letter
games, says that it does not know when it is asked something else, and follows a system prompt of
four kinds (short, pirate, polite, cheerful). It is here so that the first command ends in an
answer and so that tools have trained weights to work on. It is no general assistant: it knows
about {facts} facts, it is often wrong, and it only speaks English.

A decoder in Qwen3's form: {layers} layers, width {width}, {heads} query and {kv_heads} key/value
heads of {head_dim}, SwiGLU {feed_forward}, RMSNorm, q/k norm, RoPE, tied embeddings, a sentencepiece
vocabulary of {vocabulary} pieces with byte fallback, context {context}. Weights: {bits}-bit affine,
groups of {group}.

## How it was made

    LD_PRELOAD=libopenblas.so.0 python scripts/train_bundled.py --out RUN
    python scripts/train_bundled.py --out RUN --evaluate --pack mlxtx/bundled

Seed {seed}; {conversations:,} conversations from the templates in `training/bundled`, no foreign text;
{steps:,} steps of {batch} rows of 256 tokens ({tokens:,} tokens in all), {optimizer}, learning rate
{rate}; loss on the answers only; float32 on two CPU cores. Training loss at the end: {loss:.3f};
finished {date}.

## What it can do

Held-out questions, none of whose wordings was trained on, answered greedily and judged by rules
(`training/bundled/judge.py`); percent right. "facts/frame" asks in a way never seen about a name
that was taught, "facts/words" in other words altogether; "facts" is both. "ended": answers that
ended by themselves; "looped": answers in which four tokens came three times or more.

{table}
The first line with a number of bits is about weights, with an unquantized cache; "kv" lines are
the shipped weights with that cache.
"""


def model_card(facts: dict[str, Any]) -> str:
    return TEXT.format(**facts)
