"""The loss and its gradients: against float64 finite differences, full logits, and unpacked."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlxtx.decoder.config import (
    EmbeddingConfig,
    LatentAttentionConfig,
    RopeConfig,
    RopeScaling,
)
from mlxtx.tuning import head_loss
from mlxtx.tuning.lora import LowRank
from mlxtx.tuning.objective import NextToken, evaluate_batch, loss_and_gradients
from mlxtx.tuning.packing import make_batch
from mlxtx.tuning.samples import sample
from mlxtx.tuning.scratch import initial_model
from mlxtx.tuning.targets import add_adapters, choose
from mlxtx.tuning.trees import named, nested
from tests.tuning import numpy_decoder
from tests.tuning.finite_differences import check_directions
from tests.tuning.tiny import VOCABULARY, block, decoder, model, samples

LENGTHS = (7, 19, 12, 30, 19, 3)


CASES = {
    "tied": decoder(),
    "untied": decoder(tied=False),
    "experts": decoder(block(experts=True), block()),
    "ahead": decoder(block(), prediction_heads=(block(), block())),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradients_against_finite_differences(name, checkpoint):
    """Every weight along a random direction: ours in float32, central differences in float64.

    Samples of one bucket without padding, for padding takes part in the balancing loss.
    """
    config = CASES[name]
    net = initial_model(config, 2, deviation=0.2)
    rows = samples((17, 9, 17))
    objective = NextToken(ahead_weight=0.3, balance_weight=0.5, checkpoint=checkpoint)
    batch = make_batch(rows, ahead=len(config.prediction_heads))
    loss, gradients = loss_and_gradients(net, batch, objective)
    weights = {n: np.array(w, np.float64) for n, w in tree_flatten(net.parameters())}

    def reference(changed):
        return numpy_decoder.loss({**weights, **changed}, config, rows, 0.3, 0.5)

    assert loss.mean + loss.extra == pytest.approx(reference({}), rel=1e-6)
    check_directions(weights, gradients, reference)


def test_a_checkpoint_computes_its_dropout_again_as_it_was(monkeypatch):
    """Against the same blocks kept whole, which no second pass can tell another mask."""
    rows = samples((17, 9, 17))
    net = model()
    net.freeze()
    add_adapters(net, dict.fromkeys(choose(net, "all"), LowRank(dropout=0.5)))
    weights = named(net.trainable_parameters())
    key = mx.random.split(mx.random.key(3), len(weights))
    drawn = {
        n: mx.random.normal(w.shape, key=k) * 0.2
        for (n, w), k in zip(weights.items(), key, strict=True)
    }
    net.update(nested(drawn))
    net.train()

    def gradients():
        mx.random.seed(11)
        return loss_and_gradients(net, make_batch(rows), NextToken(checkpoint=True))

    (loss, got), (other, _) = gradients(), gradients()
    assert other.total == loss.total
    monkeypatch.setattr(mx, "checkpoint", lambda block: block)
    kept, wanted = gradients()
    assert kept.total == pytest.approx(loss.total, rel=1e-6)
    for name, gradient in wanted.items():
        np.testing.assert_allclose(got[name], gradient, rtol=1e-4, atol=1e-6, err_msg=name)
    net.eval()
    assert abs(gradients()[0].total - loss.total) > 1e-2, "the dropout is on"


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_those_of_full_logits(monkeypatch, tied):
    monkeypatch.setattr(head_loss, "CHUNK_LOGITS", 8 * VOCABULARY)
    net = model(tied=tied)
    rows = samples((40, 40, 40))
    batch = make_batch(rows)
    weights = mx.array(np.stack([r.in_loss[1:] for r in rows]).astype(np.float32))
    tokens = mx.array(np.stack([r.tokens for r in rows]))

    def plain(net):
        losses = nn.losses.cross_entropy(net(tokens[:, :-1]), tokens[:, 1:])
        return (losses * weights).sum() / weights.sum()

    value, wanted = nn.value_and_grad(net, plain)(net)
    loss, got = loss_and_gradients(net, make_batch(rows, multiple=1), NextToken())
    assert batch.target_count == loss.count == int(weights.sum().item())
    assert loss.mean == pytest.approx(value.item(), rel=1e-6)
    for name, gradient in tree_flatten(wanted):
        np.testing.assert_allclose(got[name], gradient, rtol=2e-4, atol=2e-6, err_msg=name)


LATENT = LatentAttentionConfig(
    heads=4, kv_rank=16, nope_dim=8, rope_dim=8, value_dim=8, rope=RopeConfig(dims=8, tail=True)
)
DYNAMIC = RopeConfig(dims=8, scaling=RopeScaling(kind="dynamic", factor=2.0, original_context=16))
ATTENTIONS = {
    "plain": (block(), block()),
    "window": (block(window=5), block()),
    "alibi": (block(rope=None, alibi=(0.5, 0.25, 0.1, 0.05)), block()),
    "sinks and a cap": (block(sinks=True), block(softcap=4.0)),
    "shared keys": (block(), block(shares_cache_of=0)),
    "dynamic": (block(rope=DYNAMIC),),
    "latent": (block().__class__(attention=LATENT, feed_forward=block().feed_forward),),
    "experts": (block(experts=True),),
}


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_packed_equals_unpacked(kind):
    """Every sample on its own, without padding, against all packed into one row."""
    net = model(*ATTENTIONS[kind])
    rows = samples(LENGTHS)
    multiple = 1 if kind == "dynamic" else 8  # there the frequencies follow the row's length
    packed, gradients = loss_and_gradients(net, make_batch(rows, multiple=multiple), NextToken())
    total, count, summed = 0.0, 0, None
    counts = [packed.count]
    for row in rows:
        part, more = loss_and_gradients(net, make_batch([row], multiple=1), NextToken(), counts)
        total, count = total + part.total, count + part.count
        summed = more if summed is None else tree_map(lambda a, b: a + b, summed, more)
    assert packed.count == count == sum(r.targets for r in rows)
    assert packed.total == pytest.approx(total, rel=2e-6)
    for name, gradient in gradients.items():
        scale = np.abs(np.array(summed[name])).max() + 1e-6
        np.testing.assert_allclose(gradient / scale, summed[name] / scale, atol=3e-5, err_msg=name)


def test_packed_equals_a_block_diagonal_mask():
    """The same row through the model's own segments and positions."""
    embedding = EmbeddingConfig(positions=64)
    net = model(embedding=embedding)
    rows = samples(LENGTHS)
    batch = make_batch(rows)
    lengths = [length for count, length in batch.groups for _ in range(count)]
    segments = np.repeat(np.arange(len(lengths)), lengths)
    state = net.hidden(batch.tokens, segments=mx.array(segments)[None], positions=batch.positions())
    wanted = head_loss.head_loss(net, state, batch.targets[0], batch.scored[0])
    assert evaluate_batch(net, batch).total == pytest.approx(wanted.total, rel=2e-6)


def test_packing_has_less_padding_than_a_batch():
    rows = samples((5, 9, 60, 100))
    packed, padded = make_batch(rows), make_batch(rows, packing=False)
    assert padded.tokens.size == 4 * 104
    assert packed.tokens.size == 8 + 8 + 64 + 104
    net = model()
    assert evaluate_batch(net, packed).total == pytest.approx(
        evaluate_batch(net, padded).total, rel=2e-6
    )


def test_peak_memory_does_not_hold_all_logits(monkeypatch):
    """1,024 positions x 8,000 tokens: 32.8 MB of logits, of which a chunk is 2 MB."""
    monkeypatch.setattr(head_loss, "CHUNK_LOGITS", 64 * 8000)
    config = decoder(block(), vocabulary=8000)
    net = initial_model(config)
    net.freeze()
    net.model.layers[0].self_attn.q_proj.unfreeze()
    rng = np.random.default_rng(0)
    batch = make_batch([sample(rng.integers(0, 8000, 129)) for _ in range(8)])
    peaks = []
    for rows in (64, 1024):
        monkeypatch.setattr(head_loss, "CHUNK_LOGITS", rows * 8000)
        mx.synchronize()
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        loss_and_gradients(net, batch, NextToken())
        peaks.append((mx.get_peak_memory() - before) / 1e6)
    assert peaks[1] > 65  # logits and their gradient at once
    assert peaks[0] < 16, peaks
