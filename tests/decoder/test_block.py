"""The block's forms, experts and latent attention against plain numpy in float64."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlxtx.cache import Step, Uncached
from mlxtx.decoder.block import Block
from mlxtx.decoder.config import (
    AttentionConfig,
    BlockConfig,
    ConfigError,
    DecoderConfig,
    ExpertsConfig,
    FeedForwardConfig,
    HeadNormConfig,
    LatentAttentionConfig,
    NormConfig,
    RopeConfig,
    RouterConfig,
)
from mlxtx.decoder.experts import Experts
from mlxtx.decoder.feed_forward import FeedForward
from mlxtx.decoder.model import DecoderModel
from mlxtx.decoder.norm import HeadNorm, Norm

WIDTH = 16
ATTENTION = AttentionConfig(heads=4, kv_heads=2, head_dim=8, rope=RopeConfig(dims=8))
MLP = FeedForwardConfig(width=24)
LATENT = LatentAttentionConfig(
    heads=3,
    kv_rank=12,
    nope_dim=8,
    rope_dim=4,
    value_dim=10,
    q_rank=14,
    rope=RopeConfig(dims=4, interleaved=True, tail=True),
)


def randomized(module, seed: int = 0):
    """The module with every parameter drawn anew, so that no norm is 1 and no bias 0."""
    rng = np.random.default_rng(seed)
    module.update(
        tree_map(lambda p: mx.array(rng.normal(size=p.shape) * 0.3 + 0.1), module.parameters())
    )
    return module


def numpy_of(x: mx.array) -> np.ndarray:
    return np.array(x).astype(np.float64)


@pytest.mark.parametrize(("kind", "bias"), [("rms", False), ("layer", False), ("layer", True)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms(kind, offset, bias):
    norm = randomized(Norm(WIDTH, NormConfig(kind=kind, eps=1e-3, offset=offset, bias=bias)))
    x = np.random.default_rng(1).normal(size=(2, 3, WIDTH))
    want = x - x.mean(-1, keepdims=True) if kind == "layer" else x
    want = want / np.sqrt((want**2).mean(-1, keepdims=True) + 1e-3)
    want = want * (numpy_of(norm.weight) + offset)
    want = want + numpy_of(norm.bias) if bias else want
    np.testing.assert_allclose(np.array(norm(mx.array(x))), want, atol=2e-6)


@pytest.mark.parametrize("over", ["head", "each_head", "width"])
def test_head_norms(over):
    norm = randomized(HeadNorm(4, 8, HeadNormConfig(norm=NormConfig(eps=1e-6), over=over)))
    x = np.random.default_rng(2).normal(size=(2, 4, 3, 8))  # [B, H, T, D]
    axes = (1, 3) if over == "width" else (3,)
    want = x / np.sqrt((x**2).mean(axes, keepdims=True) + 1e-6)
    weight = numpy_of(norm.weight).reshape((1, 1, 1, 8) if over == "head" else (1, 4, 1, 8))
    np.testing.assert_allclose(np.array(norm(mx.array(x))), want * weight, atol=2e-6)


def parts(config: BlockConfig):
    block = randomized(Block(WIDTH, config))
    x = mx.random.normal((2, 5, WIDTH), key=mx.random.key(3))
    step = Step(5)
    return block, x, lambda h: block.self_attn(h, Uncached(), step), step


NORM = NormConfig(eps=1e-6)
FORMS = {
    "pre": (
        {},
        lambda b, x, a: (h := x + a(b.input_layernorm(x))) + b.mlp(b.post_attention_layernorm(h)),
    ),
    "sandwich": (
        {"attention_output_norm": NORM, "feed_forward_output_norm": NORM},
        lambda b, x, a: (
            (h := x + b.attention_output_layernorm(a(b.input_layernorm(x))))
            + b.feed_forward_output_layernorm(b.mlp(b.post_attention_layernorm(h)))
        ),
    ),
    "output": (
        {
            "attention_norm": None,
            "feed_forward_norm": None,
            "attention_output_norm": NORM,
            "feed_forward_output_norm": NORM,
        },
        lambda b, x, a: (
            (h := x + b.attention_output_layernorm(a(x)))
            + b.feed_forward_output_layernorm(b.mlp(h))
        ),
    ),
    "post": (
        {"norm_after_add": True},
        lambda b, x, a: b.post_attention_layernorm((h := b.input_layernorm(x + a(x))) + b.mlp(h)),
    ),
    "parallel": (
        {"form": "parallel", "feed_forward_norm": None},
        lambda b, x, a: x + a(h := b.input_layernorm(x)) + b.mlp(h),
    ),
    "parallel, two norms": (
        {"form": "parallel"},
        lambda b, x, a: x + a(b.input_layernorm(x)) + b.mlp(b.post_attention_layernorm(x)),
    ),
    "scaled residual": (
        {"residual_multiplier": 0.5},
        lambda b, x, a: (
            (h := x + 0.5 * a(b.input_layernorm(x))) + 0.5 * b.mlp(b.post_attention_layernorm(h))
        ),
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(name):
    fields, formula = FORMS[name]
    block, x, attend, step = parts(BlockConfig(attention=ATTENTION, feed_forward=MLP, **fields))
    want = formula(block, x, attend)
    np.testing.assert_allclose(np.array(block(x, Uncached(), step)), np.array(want), atol=1e-5)


def test_attention_is_softmax_attention():
    config = replace(ATTENTION, rope=None, window=3)
    block, x, attend, _ = parts(BlockConfig(attention=config, feed_forward=MLP))
    weights = {k: numpy_of(v) for k, v in tree_flatten(block.self_attn.parameters())}
    h = numpy_of(x)

    def heads(name: str, count: int) -> np.ndarray:
        return (h @ weights[f"{name}.weight"].T).reshape(2, 5, count, 8).transpose(0, 2, 1, 3)

    q, k, v = heads("q_proj", 4), heads("k_proj", 2), heads("v_proj", 2)
    k, v = k.repeat(2, axis=1), v.repeat(2, axis=1)
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(8)
    i, j = np.mgrid[:5, :5]
    scores = np.where((j <= i) & (i - j < 3), scores, -np.inf)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    out = scores / scores.sum(-1, keepdims=True) @ v
    want = out.transpose(0, 2, 1, 3).reshape(2, 5, 32) @ weights["o_proj.weight"].T
    np.testing.assert_allclose(np.array(attend(x)), want, atol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_feed_forward(gated):
    mlp = randomized(FeedForward(WIDTH, FeedForwardConfig(width=24, gated=gated, bias=True)))
    x = np.random.default_rng(4).normal(size=(3, WIDTH))
    weights = {k: numpy_of(v) for k, v in tree_flatten(mlp.parameters())}

    def linear(name: str, h: np.ndarray) -> np.ndarray:
        return h @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    inner = linear("gate_proj" if gated else "up_proj", x)
    inner = inner / (1 + np.exp(-inner))
    inner = inner * linear("up_proj", x) if gated else inner
    np.testing.assert_allclose(np.array(mlp(mx.array(x))), linear("down_proj", inner), atol=1e-5)


@pytest.mark.parametrize(
    "scores, normalize",
    [("softmax", False), ("softmax", True), ("sigmoid", False), ("sigmoid", True)],
)
@pytest.mark.parametrize("tokens", [3, 40])  # below and above the sorting threshold
def test_experts_equal_every_expert_run_on_its_own(scores, normalize, tokens):
    config = ExpertsConfig(
        count=6,
        per_token=2,
        expert=FeedForwardConfig(width=12),
        router=RouterConfig(scores=scores, normalize=normalize, scaling=1.5),
        shared=FeedForwardConfig(width=8),
    )
    experts = randomized(Experts(WIDTH, config))
    x = mx.random.normal((1, tokens, WIDTH), key=mx.random.key(5))
    logits = numpy_of(x[0]) @ numpy_of(experts.gate.weight).T
    stacked = {k: numpy_of(v) for k, v in tree_flatten(experts.switch_mlp.parameters())}
    want = numpy_of(experts.shared_experts(x))[0]
    for n, row in enumerate(numpy_of(x[0])):
        chosen = np.argsort(-logits[n])[:2]
        odds = np.exp(logits[n])
        weight = (odds / odds.sum() if scores == "softmax" else odds / (1 + odds))[chosen]
        weight = weight / weight.sum() if normalize else weight
        for expert, w in zip(chosen, weight, strict=True):
            gate = stacked["gate_proj.weight"][expert] @ row
            up = stacked["up_proj.weight"][expert] @ row
            inner = gate / (1 + np.exp(-gate)) * up
            want[n] += 1.5 * w * (stacked["down_proj.weight"][expert] @ inner)
    np.testing.assert_allclose(np.array(experts(x))[0], want, atol=2e-5)


def test_sigmoids_that_round_to_one_keep_the_order_of_their_logits():
    experts = Experts(
        WIDTH,
        ExpertsConfig(count=4, per_token=1, expert=MLP, router=RouterConfig(scores="sigmoid")),
    )
    experts.gate.weight = mx.array([20.0, 40.0, 30.0, 25.0])[:, None] * mx.ones((4, WIDTH)) / WIDTH
    chosen, weights = experts.gate(mx.ones((1, WIDTH)))
    assert (chosen.item(), weights.item()) == (1, 1.0)


@pytest.mark.parametrize("group_score", ["max", "top2"])
def test_groups_limit_the_choice(group_score):
    router = RouterConfig(scores="sigmoid", groups=3, chosen_groups=1, group_score=group_score)
    config = ExpertsConfig(count=9, per_token=2, expert=MLP, router=router)
    experts = randomized(Experts(WIDTH, config), seed=6)
    x = mx.random.normal((1, 30, WIDTH), key=mx.random.key(7))
    chosen = np.array(experts.gate(x[0])[0])
    scores = 1 / (1 + np.exp(-numpy_of(experts.gate.logits(x[0])).reshape(30, 3, 3)))
    rank = np.sort(scores, -1)[..., -2:].sum(-1) if group_score == "top2" else scores.max(-1)
    assert (chosen // 3 == rank.argmax(-1)[:, None]).all()


def test_balancing_loss_is_per_token_when_uniform():
    config = ExpertsConfig(count=4, per_token=2, expert=MLP)
    experts = Experts(WIDTH, config)
    experts.gate.weight = mx.zeros_like(experts.gate.weight)
    loss = experts.balancing_loss(mx.random.normal((2, 8, WIDTH)))
    assert loss.item() == pytest.approx(2.0)


def test_latent_attention_absorbed_equals_expanded():
    block, x, _, _ = parts(BlockConfig(attention=LATENT, feed_forward=MLP))
    step = Step(5)
    absorbed = block.self_attn(x, Uncached(), step)
    block.self_attn.absorb_up_to = 0
    expanded = block.self_attn(x, Uncached(), step)
    np.testing.assert_allclose(np.array(absorbed), np.array(expanded), atol=2e-5)


def small_decoder(**attention) -> DecoderModel:
    block = BlockConfig(attention=replace(ATTENTION, **attention), feed_forward=MLP)
    config = DecoderConfig(vocabulary=40, width=WIDTH, context=64, blocks=(block, block))
    return randomized(DecoderModel(config), seed=8)


@pytest.mark.parametrize(
    "fields", [{}, {"window": 3}, {"rope": None, "alibi": (0.5, 0.25, 0.1, 0.05)}]
)
def test_packed_samples_equal_each_alone(fields):
    model = small_decoder(**fields)
    a, b = mx.array([[3, 7, 9, 1, 5]]), mx.array([[8, 2, 6]])
    packed = model(
        mx.concatenate([a, b], axis=1),
        segments=mx.array([[0] * 5 + [1] * 3]),
        positions=mx.array([[0, 1, 2, 3, 4, 0, 1, 2]]),
    )
    np.testing.assert_allclose(np.array(packed[:, :5]), np.array(model(a)), atol=2e-5)
    np.testing.assert_allclose(np.array(packed[:, 5:]), np.array(model(b)), atol=2e-5)


def test_shared_caches_equal_with_and_without_cache():
    block = BlockConfig(attention=ATTENTION, feed_forward=MLP)
    sharing = replace(block, attention=replace(ATTENTION, shares_cache_of=0))
    config = DecoderConfig(vocabulary=40, width=WIDTH, context=64, blocks=(block, sharing))
    model = randomized(DecoderModel(config), seed=9)
    tokens = mx.array([[3, 7, 9, 1, 5]])
    cache = model.make_cache()
    stepwise = [model(tokens[:, i : i + 1], cache) for i in range(5)]
    np.testing.assert_allclose(
        np.array(mx.concatenate(stepwise, axis=1)), np.array(model(tokens)), atol=2e-5
    )


def test_last_gives_the_newest_logits():
    model = small_decoder()
    tokens = mx.array([[3, 7, 9, 1, 5]])
    np.testing.assert_allclose(
        np.array(model(tokens, last=2)), np.array(model(tokens)[:, -2:]), atol=1e-6
    )


def test_prediction_head_follows_its_formula_and_its_cache():
    block = BlockConfig(attention=ATTENTION, feed_forward=MLP)
    config = DecoderConfig(
        vocabulary=40, width=WIDTH, context=64, blocks=(block,), prediction_heads=(block,)
    )
    model = randomized(DecoderModel(config), seed=10)
    tokens = mx.array([[3, 7, 9, 1, 5]])
    hidden, following = model.hidden(tokens)[:, :-1], tokens[:, 1:]
    logits, _ = model.predict_ahead(hidden, following)
    head = model.prediction_heads[0]
    both = [head.enorm(model.model.embed_tokens(following)), head.hnorm(hidden)]
    states = head.norm(head.block(head.eh_proj(mx.concatenate(both, -1)), Uncached(), Step(4)))
    np.testing.assert_allclose(np.array(logits), np.array(model.head(states)), atol=1e-5)
    cache = model.make_cache(ahead=True)
    parts = [
        model.predict_ahead(hidden[:, i : i + 2], following[:, i : i + 2], cache)[0] for i in (0, 2)
    ]
    np.testing.assert_allclose(np.array(mx.concatenate(parts, axis=1)), np.array(logits), atol=2e-5)
    with pytest.raises(ValueError, match="1 prediction heads, not 2"):
        model.predict_ahead(hidden, following, depth=1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AttentionConfig(heads=6, kv_heads=4, head_dim=8), "4 does not divide 6"),
        (lambda: replace(ATTENTION, window=0), "window must be a whole number above 0"),
        (lambda: replace(ATTENTION, alibi=(0.5,)), "1 slopes for 4 heads"),
        (lambda: FeedForwardConfig(width=8, activation="swoosh"), "'swoosh'"),
        (lambda: ExpertsConfig(count=2, per_token=3, expert=MLP), "3 is above count 2"),
        (
            lambda: ExpertsConfig(
                count=8, per_token=3, expert=MLP, router=RouterConfig(groups=4, chosen_groups=1)
            ),
            "more than the chosen groups hold",
        ),
        (lambda: replace(LATENT, rope=RopeConfig(dims=8)), "rope_dim 4"),
        (lambda: replace(LATENT, rope=RopeConfig(dims=4)), "needs tail=True"),
        (
            lambda: DecoderConfig(
                vocabulary=4,
                width=8,
                context=8,
                blocks=(
                    BlockConfig(attention=replace(ATTENTION, shares_cache_of=0), feed_forward=MLP),
                ),
            ),
            "not before it",
        ),
    ],
)
def test_impossible_decoders_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
