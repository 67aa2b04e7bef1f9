"""Rows of packed conversations, the tokenizer they are made with, and the compiled step."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlxtx.text.tokenizer import Tokenizer
from mlxtx.tuning.objective import loss_and_gradients
from mlxtx.tuning.packing import make_batch
from mlxtx.tuning.samples import sample
from mlxtx.tuning.scratch import initial_model
from mlxtx.tuning.settings import Training
from scripts import train_bundled
from training.bundled.data_set import training_set
from training.bundled.fixed_row_trainer import AheadTrainer, FixedRowTrainer
from training.bundled.packing import decoder_config
from training.bundled.rows import COMPUTED, lay_rows, tokens_of
from training.bundled.vocabulary import END, train_vocabulary, write_tokenizer

CONFIG = {
    **train_bundled.CONFIG,
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
}


@pytest.fixture(scope="module")
def conversations() -> list[dict]:
    return list(training_set(200, seed=9))


@pytest.fixture(scope="module")
def tokenizer(conversations, tmp_path_factory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    texts = [m["content"] for row in conversations for m in row["messages"]]
    write_tokenizer(folder, train_vocabulary(texts, 512))
    return Tokenizer.load(folder)


@pytest.mark.parametrize("text", ["  two spaces", "line\nbreak\ttab", "Ünïcödé 12345", "日本", ""])
def test_every_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_tokens_are_the_chat_templates(tokenizer, conversations):
    for row in conversations[:50]:
        messages = row["messages"]
        tokens, marks, _ = tokens_of(messages, tokenizer)
        assert tokens == tokenizer.encode_chat(messages, add_generation_prompt=False)
        prompt = tokenizer.encode_chat(messages[:-1])
        assert tokens[: len(prompt)] == prompt
        assert all(marks[len(prompt) :]) and not marks[len(prompt) - 1]


def test_only_answers_count_in_the_loss(tokenizer, conversations):
    for row in conversations[:50]:
        tokens, marks, _ = tokens_of(row["messages"], tokenizer)
        said = [t for t, mark in zip(tokens, marks, strict=True) if mark]
        answers = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        text = "".join(answer + "<|end|>" for answer in answers)
        assert tokenizer.decode(said, skip_special=False) == text


def test_rows_hold_every_sample_once(tokenizer, conversations):
    whole = [{**row, "cut": False} for row in conversations]
    rows = lay_rows(whole, tokenizer, length=128, context=256, seed=0)
    found = []
    for tokens, marks, segments in zip(rows.tokens, rows.weights > 0, rows.segments, strict=True):
        for segment in range(1, segments.max() + 1):
            inside = segments == segment
            found.append((tuple(tokens[inside]), tuple(marks[inside])))
    wanted = []
    for row in whole:
        tokens, marks, _ = tokens_of(row["messages"], tokenizer)
        if len(tokens) <= 129:
            wanted.append((tuple(tokens), tuple(marks)))
    assert sorted(found) == sorted(wanted)


def test_positions_grow_inside_a_sample_and_stay_in_the_context(tokenizer, conversations):
    rows = lay_rows(conversations, tokenizer, length=128, context=256, seed=0)
    assert rows.positions.max() < 256
    same = (rows.segments[:, 1:] == rows.segments[:, :-1]) & (rows.segments[:, 1:] > 0)
    steps = np.diff(rows.positions, axis=1)[same]
    assert (steps >= 1).all()
    assert (steps == 1).mean() > 0.98 and (steps > 1).any()


def test_a_compiled_step_is_the_plain_step(tokenizer, conversations, tmp_path):
    """The weights after one step of the compiled trainer on packed rows against the same update
    with the plain trainer's gradients of the same samples."""
    single = [row for row in conversations if len(row["messages"]) <= 3]
    rows = lay_rows(single[:40], tokenizer, length=128, context=256, seed=0)
    settings = Training(
        iters=1, batch_size=4, optimizer="sgd", learning_rate=0.5, clip=0.0, weight_decay=0.0
    )
    config = decoder_config(CONFIG, heads=0)
    model = initial_model(config, 0, deviation=0.1)
    before = {name: mx.array(value) for name, value in tree_flatten(model.parameters())}
    trainer = FixedRowTrainer(model, rows, settings, tmp_path, write=lambda folder: None)
    picked = trainer.order.step(0)
    loss, _ = trainer._train_step()
    after = dict(tree_flatten(model.parameters()))

    plain = initial_model(config, 0, deviation=0.1)
    samples = []
    for n in picked:
        for segment in range(1, rows.segments[n].max() + 1):
            inside = rows.segments[n] == segment
            assert (np.diff(rows.positions[n][inside]) == 1).all()  # single turns never jump
            samples.append(sample(rows.tokens[n][inside], rows.weights[n][inside] > 0))
    wanted, gradients = loss_and_gradients(plain, make_batch(samples), settings.objective())
    assert loss.count == wanted.count
    assert loss.total == pytest.approx(wanted.total, rel=1e-5)
    for name, gradient in gradients.items():
        step = after[name] - before[name]
        expected = -0.5 * gradient
        scale = mx.abs(expected).max().item() + 1e-9
        assert mx.abs(step - expected).max().item() < 2e-4 * scale, name


def test_a_resumed_run_has_the_same_losses(tokenizer, conversations, tmp_path):
    rows = lay_rows(conversations, tokenizer, length=128, context=256, seed=0)
    config = decoder_config(CONFIG, heads=0)

    def trainer(folder):
        settings = Training(
            iters=4, batch_size=2, optimizer="muon", learning_rate=0.02, save_every=2
        )
        model = initial_model(config, 0)
        return FixedRowTrainer(model, rows, settings, folder, write=lambda folder: None)

    whole = trainer(tmp_path / "whole")
    losses = [whole._train_step()[0].total for _ in range(4)]
    first = trainer(tmp_path / "parts")
    begun = [first._train_step()[0].total for _ in range(2)]
    first._save_state()
    second = trainer(tmp_path / "parts")
    assert second.resume()
    assert begun + [second._train_step()[0].total for _ in range(2)] == losses


def test_tokens_that_choose_an_answer_weigh_more(tokenizer):
    """Two answers that part at their second word, asked often."""
    said = ["The cache keeps keys.", "The norm keeps keys."]
    rows = [
        {"messages": [{"role": "user", "content": str(n)}, {"role": "assistant", "content": said[n % 2]}]}
        for n in range(20)
    ]  # fmt: skip
    laid = lay_rows(rows, tokenizer, length=128, context=256, seed=0, choice_weight=6.0)
    first = laid.segments[0] == 1
    weights, tokens = laid.weights[0][first], laid.tokens[0][first]
    said_tokens, said_weights = tokens[weights > 0].tolist(), weights[weights > 0].tolist()
    both = [tokenizer.encode(text + END, add_special=False) for text in said]
    assert said_tokens in both
    same = sum(a == b for a, b in zip(*both, strict=False) if a == b)
    assert same and said_weights.count(6.0) == 1
    place = said_weights.index(6.0)
    assert both[0][:place] == both[1][:place] and both[0][place] != both[1][place]


def test_all_of_a_computed_answer_counts_alike(tokenizer):
    """However often it is asked: no token of it is given by those before."""
    messages = [{"role": "user", "content": "3+4"}, {"role": "assistant", "content": "3 + 4 = 7."}]
    rows = [{"messages": messages, "computed": True}] * 10
    laid = lay_rows(rows, tokenizer, length=128, context=256, seed=0, choice_weight=6.0)
    assert set(laid.weights[laid.weights > 0].tolist()) == {COMPUTED}
    weak = lay_rows(rows, tokenizer, length=128, context=256, seed=0, choice_weight=1.5)
    assert set(weak.weights[weak.weights > 0].tolist()) == {1.5}


def test_a_cut_answer_is_still_the_only_one(tokenizer, conversations):
    """What is left of a cut answer begins no other answer of the data."""
    cut = [row for row in conversations if row["cut"] and len(row["messages"]) == 2]
    whole = {row["messages"][-1]["content"] for row in conversations}
    laid = lay_rows(conversations, tokenizer, length=128, context=256, seed=0, choice_weight=6.0)
    begun = set()
    for tokens, weights, segments in zip(laid.tokens, laid.weights, laid.segments, strict=True):
        for segment in range(1, segments.max() + 1):
            here = (segments == segment) & (weights > 0)
            begun.add(tokenizer.decode(tokens[here].tolist(), skip_special=False))
    shortened = [text for text in begun if "<|end|>" not in text]
    assert len(cut) > 20 and shortened
    for text in shortened:
        assert sum(answer.startswith(text) for answer in whole) == 1, text


def test_the_extra_head_learns_the_token_after_next(tokenizer, conversations, tmp_path):
    """One step changes the head alone, and its loss is that of ``predict_ahead`` on each sample."""
    single = [row for row in conversations if len(row["messages"]) <= 3]
    rows = lay_rows(single[:40], tokenizer, length=128, context=256, seed=0)
    settings = Training(iters=1, batch_size=4, optimizer="sgd", learning_rate=0.5)
    model = initial_model(decoder_config(CONFIG, heads=1), 0, deviation=0.1)
    before = {name: mx.array(value) for name, value in tree_flatten(model.parameters())}
    wanted, count = 0.0, 0
    trainer = AheadTrainer(model, rows, settings, tmp_path, write=lambda folder: None)
    for n in trainer.order.step(0):
        for segment in range(1, rows.segments[n].max() + 1):
            inside = rows.segments[n] == segment
            tokens = mx.array(rows.tokens[n][inside])[None]
            scored = (rows.weights[n][inside] > 0)[2:]
            logits, _ = model.predict_ahead(model.hidden(tokens[:, :-2]), tokens[:, 1:-1])
            losses = nn.losses.cross_entropy(logits, tokens[:, 2:])[0]
            wanted, count = wanted + (losses * mx.array(scored)).sum().item(), count + scored.sum()
    loss, _ = trainer._train_step()
    assert loss.count == count
    assert loss.total == pytest.approx(wanted, rel=1e-5)
    for name, value in tree_flatten(model.parameters()):
        same = bool(mx.array_equal(value, before[name]))
        assert same != name.startswith("prediction_heads"), name


def test_the_packed_checkpoint_is_the_rounded_model(tokenizer, tmp_path):
    """What is shipped loads as an ordinary checkpoint, with the weights 8 bits leave."""
    import mlxtx
    from training.bundled.packing import rounded, write_checkpoint

    config = decoder_config(CONFIG, heads=1)
    model = initial_model(config, 0, deviation=0.1)
    weights = dict(tree_flatten(model.parameters()))
    source = tmp_path / "source"
    write_tokenizer(source, train_vocabulary(["a few words to learn from"] * 50, 300))
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    write_checkpoint(source, tmp_path / "out", CONFIG, bits=8, card="# card\n")
    loaded, read = mlxtx.load_model(tmp_path / "out")
    assert read["quantization"]["bits"] == 8
    assert loaded.config == config
    tokens = mx.array([[1, 5, 9, 200]])
    model.update(tree_unflatten(list(rounded(weights, 8).items())))
    assert mx.allclose(loaded(tokens), model(tokens), atol=1e-5)
    ahead = [m.predict_ahead(m.hidden(tokens[:, :-1]), tokens[:, 1:])[0] for m in (loaded, model)]
    assert mx.allclose(*ahead, atol=1e-5)
