"""The shipped model: its files, what it answers, and what settings and tuning do to it.

The full table is made by ``scripts/train_bundled.py --evaluate``; here a sample of the held-out
questions is asked again, so that a broken decoder, cache or loader shows in the answers.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys

import mlx.core as mx
import pytest

import mlxtx
from mlxtx.checkpoint.bundled import FOLDER
from mlxtx.language_model import LanguageModel
from mlxtx.tuning.model_files import save_like
from training.bundled.data_set import held_out
from training.bundled.evaluate import answers, guessed_ahead, scores
from training.bundled.judge import right
from training.bundled.stages import STAGES

SAMPLE = 64
FACTS_FLOOR = 0.8  # of new frames; the card has the whole table
UNKNOWN_FLOOR = 0.6
SUMS_FLOOR = 0.85  # of numbers up to ten
AHEAD_FLOOR = 0.75  # of the tokens of its answers, one token early
MOST_BYTES = 4_000_000


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return mlxtx.load("bundled")


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    taught = [row for row in held_out() if row["group"] in ("facts/frame", "unknown")]
    return random.Random(0).sample(taught, SAMPLE)


@pytest.fixture(scope="module")
def judged(model, rows):
    return answers(model, rows)


def test_it_is_small_and_ordinary():
    names = {path.name for path in FOLDER.iterdir() if not path.name.startswith((".", "__"))}
    assert names == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    assert sum((FOLDER / name).stat().st_size for name in names) < MOST_BYTES
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["quantization"]["bits"] == 8


def test_the_card_holds_the_measured_table_and_the_commands_that_made_it():
    card = (FOLDER / "README.md").read_text()
    assert "| 8 bits, all" in card
    commands = [line.strip() for line in card.splitlines() if "train_bundled.py --out" in line]
    made = "python scripts/train_bundled.py --out"
    assert commands == [f"{made} {name} {options}" for name, options in STAGES.items()]


def test_held_out_facts_are_answered(judged):
    facts = scores(judged)["facts"]
    assert facts > FACTS_FLOOR, f"{facts:.1%} of held-out facts are right"


def test_unknown_questions_are_refused(judged):
    assert scores(judged)["unknown"] > UNKNOWN_FLOOR


def test_small_sums_are_right(model):
    rows = [row for row in held_out() if row["group"] == "arithmetic"]
    assert scores(answers(model, rows))["arithmetic"] > SUMS_FLOOR


def test_answers_end_and_do_not_loop(judged):
    assert scores(judged)["ended"] > 0.97
    assert scores(judged)["looped"] == 0


@pytest.mark.parametrize(
    ("kv", "same_part", "most_lost"), [("k8v8g64", 0.95, 0.03), ("k4v4g64", 0.6, 0.1)]
)
def test_a_quantized_cache_answers_nearly_the_same(model, rows, judged, kv, same_part, most_lost):
    again = answers(model, rows, kv=kv)
    same = sum(a.text == b.text for a, b in zip(again, judged, strict=True))
    assert same >= same_part * len(rows)
    lost = scores(judged)["facts"] - scores(again)["facts"]
    assert lost <= most_lost


def test_the_extra_head_guesses_the_token_after_next(model, judged):
    assert len(model.model.config.prediction_heads) == 1
    assert guessed_ahead(model, judged[:24]) > AHEAD_FLOOR


def test_a_saved_copy_is_the_same_model(model, judged, tmp_path):
    """Under the family's names, with the extra head, whatever the weights are kept as."""
    save_like(model, tmp_path)
    copy = mlxtx.load(tmp_path)
    for answer in judged[:4]:
        assert copy.generate(answer.row["messages"], max_tokens=96).text == answer.text
    tokens = mx.array([judged[0].tokens])
    ahead = [
        m.model.predict_ahead(m.model.hidden(tokens[:, :-1]), tokens[:, 1:])[0]
        for m in (model, copy)
    ]
    assert mx.allclose(*ahead, atol=1e-4)


def test_a_copy_is_of_the_files_that_were_loaded(tmp_path, monkeypatch):
    """Though the name that they were loaded by means something else by now."""
    shutil.copytree(FOLDER, tmp_path / "one" / "guide")
    (tmp_path / "two" / "guide").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "one")
    model = mlxtx.load("guide")
    monkeypatch.chdir(tmp_path / "two")
    save_like(model, tmp_path / "copy")
    copied = (tmp_path / "copy" / "tokenizer.model").read_bytes()
    assert copied == (FOLDER / "tokenizer.model").read_bytes()


def test_one_by_one_is_as_in_a_batch(model, rows, judged):
    for row, answer in list(zip(rows, judged, strict=True))[:6]:
        assert model.generate(row["messages"], max_tokens=96).text == answer.text


def test_a_second_turn_reuses_the_cache_of_the_first(model):
    chat = model.chat()
    list(chat.stream("What is RoPE?"))
    done = list(chat.stream("What is LoRA?"))[-1]
    assert done.stats.reused_tokens > 10
    fresh = model.generate([*chat.messages[:-1]], max_tokens=96)
    assert chat.messages[-1]["content"] == fresh.text


def test_a_system_prompt_sets_the_style(model):
    messages = [
        {"role": "system", "content": "Talk like a pirate."},
        {"role": "user", "content": "What is attention?"},
    ]
    assert model.generate(messages, max_tokens=96).text.startswith("Arr!")


def test_weights_are_unpacked_on_a_cpu(model):
    if mx.default_device() == mx.Device(mx.gpu):
        pytest.skip("on a GPU the weights stay quantized")
    assert model.model.layers[0].mlp.up_proj.weight.dtype == mx.float32


def test_it_answers_from_a_fresh_process(tmp_path):
    """The name alone is enough, from any folder, without a network."""
    code = (
        "import mlxtx; model = mlxtx.load('bundled');"
        "print(model.generate([{'role': 'user', 'content': 'What is RoPE?'}], max_tokens=60).text)"
    )
    clean = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=clean, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rope = next(row for row in held_out() if row["id"] == "rope")
    assert right(rope, done.stdout), done.stdout


def test_a_reused_prefix_answers_the_same(model):
    prompt = model.encode([{"role": "user", "content": "What does mlxtx plan do?"}])
    whole = model.generate(prompt, max_tokens=40).tokens
    session = model.session()
    model.generate(prompt[:-2], max_tokens=1, session=session)
    again = model.generate(prompt, max_tokens=40, session=session)
    assert again.tokens == whole
    assert again.stats.reused_tokens >= len(prompt) - 3
