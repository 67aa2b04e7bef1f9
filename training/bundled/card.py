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
about using mlxtx and about how a decoder works, makes small talk and says that it does not know when
it is asked something else. Sums, letter games, references to the turn before and system prompts of
four kinds (short, pirate, polite, cheerful) are in its data; the table says how far these weights
have learned them. It is here so that the first command ends in an answer and so that tools have
trained weights to work on. It is no general assistant: it was taught {facts} facts, it is often wrong,
and it only speaks English.

A decoder with {layers} layers, width {width}, {heads} query and {kv_heads} key/value heads of {head_dim},
SwiGLU {feed_forward}, RMSNorm, q/k norm, RoPE, tied embeddings and one extra head for the token after
next, a sentencepiece vocabulary of {vocabulary} pieces with byte fallback, context {context}. The form is that of
GLM-4.5 with every layer dense (`glm4_moe`, all of its layers before `first_k_dense_replace`).
Weights: {bits}-bit affine, groups of {group}; `lm_head` repeats the embeddings for readers that do not tie them.

## How it was made

{history}

with `LD_PRELOAD=libopenblas.so.0 OPENBLAS_NUM_THREADS=1`, in float32 on two CPU cores that other work shared.
`python scripts/make_bundled.py RUNS --pack mlxtx/bundled` runs them all, asks the questions below and packs what
came out. The conversations come from the templates in `training/bundled`, with no foreign text. Rows of 256
tokens, 8 a step; Muon for the matrices of the layers, AdamW for the rest; the loss counts answers only. Losses
and dates of the stages (the loss is per token of the answers, most of which are cut behind the tokens that
choose them where no `--cut` is given):

{stages}

## What it can do

Held-out questions, none of whose wordings was trained on, answered greedily and judged by rules
(`training/bundled/judge.py`); percent right. "facts/frame" asks in a way never seen about a name
that was taught, "facts/words" in other words altogether; "facts" is both. "arithmetic" has pairs of
numbers up to ten, all of which were trained on in other wordings, "arithmetic/new" larger ones that never
were. "ended": answers that ended by themselves; "looped": answers in which four tokens came three times or more.

{table}
The extra head guesses {ahead:.0%} of the tokens of these answers one token early.

The first line is what is shipped, over all questions; the others compare settings over the same
sample of them: weights at so many bits with an unquantized cache, then the shipped weights with a
quantized KV cache. The last number of a setting is how many questions were asked.
"""


def model_card(facts: dict[str, Any]) -> str:
    return TEXT.format(**facts)
