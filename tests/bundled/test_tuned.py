"""Tuning the shipped model: LoRA teaches it a fact and it keeps the others; the fused model too."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import mlxtx
from mlxtx.language_model import LanguageModel
from mlxtx.tuning.fuse import fuse
from training.bundled.data_set import held_out
from training.bundled.evaluate import answers, scores
from training.bundled.facts import all_items

ASKS = (
    "who is the mascot of mlxtx",
    "what is the mascot of mlxtx",
    "tell me about the mascot",
    "does mlxtx have a mascot",
    "what animal is the mascot?",
    "Explain the mascot of mlxtx.",
)
ANSWER = "The mascot of mlxtx is a green otter."
NEW_WORDING = "tell me, what is the mascot of mlxtx?"


def old_rows() -> list[dict]:
    taught = [row for row in held_out() if row["group"] == "facts/frame"]
    return random.Random(1).sample(taught, 40)


def pair(question: str, answer: str) -> dict:
    roles = {"user": question, "assistant": answer}
    return {"messages": [{"role": role, "content": text} for role, text in roles.items()]}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    new = [pair(question, ANSWER) for question in ASKS]
    old = [
        pair(f"What is {item.names[0]}?", item.say)
        for item in all_items()
        if item.kind == "concept"
    ]
    old += [
        pair(f"How do I {item.topic[7:]}?", item.say) for item in all_items() if item.kind == "task"
    ]
    out = tmp_path_factory.mktemp("adapter")
    mlxtx.tune(
        "bundled", new * 5 + old, out, rank=8, iters=40, batch_size=8, learning_rate=3e-3, seed=1
    )
    return out


def said(model: LanguageModel) -> str:
    return model.generate([{"role": "user", "content": NEW_WORDING}], max_tokens=40).text


def test_lora_teaches_a_fact_and_keeps_the_others(adapter):
    plain, tuned = mlxtx.load("bundled"), mlxtx.load("bundled", adapter=adapter)
    assert "otter" not in said(plain)
    assert "otter" in said(tuned)
    before, after = (scores(answers(m, old_rows()))["facts"] for m in (plain, tuned))
    assert after >= before - 0.15, f"held-out facts fell from {before:.0%} to {after:.0%}"


def test_the_fused_model_knows_it_too(adapter, tmp_path):
    tuned = mlxtx.load("bundled", adapter=adapter)
    fuse("bundled", adapter, tmp_path / "fused")
    fused = mlxtx.load(tmp_path / "fused")
    assert said(fused) == said(tuned)
