"""The loss of a small decoder in float64 numpy, written from the formulas alone.

MLX's exponential on the CPU is only good to float32 even for float64 arrays, so finite
differences have to be taken here.
"""

from __future__ import annotations

import numpy as np

from mlxtx.decoder.config import DecoderConfig, ExpertsConfig


def rms_norm(x, weight, eps=1e-6):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rotate(x, base=10000.0):  # [T, H, D]
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None] * base ** (-np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attention(w, config, x):  # [T, D] -> [T, D]
    q, k, v = (
        (x @ w[f"{name}_proj.weight"].T).reshape(len(x), -1, config.head_dim) for name in "qkv"
    )
    q, k = rotate(q), rotate(k)
    group = config.heads // config.kv_heads
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(config.head_dim)
    scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
    return np.einsum("hts,shd->thd", softmax(scores), v).reshape(len(x), -1) @ w["o_proj.weight"].T


def gated(x, gate, up, down):
    g = x @ gate.T
    return (g / (1 + np.exp(-g)) * (x @ up.T)) @ down.T


def experts(w, config, x, balances):
    logits = x @ w["gate.weight"].T
    scores = softmax(logits)
    chosen = np.argsort(-logits, axis=-1)[:, : config.per_token]
    stacks = [w[f"switch_mlp.{part}_proj.weight"] for part in ("gate", "up", "down")]
    out = np.zeros_like(x)
    for t, picks in enumerate(chosen):
        for e in picks:
            out[t] += scores[t, e] * gated(x[t], *(s[e] for s in stacks))
    balances.append((chosen, scores))
    return out


def under(weights, prefix):
    return {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}


def block(w, config, x, balances):
    x = x + attention(
        under(w, "self_attn."), config.attention, rms_norm(x, w["input_layernorm.weight"])
    )
    h, mlp = rms_norm(x, w["post_attention_layernorm.weight"]), under(w, "mlp.")
    if isinstance(config.feed_forward, ExpertsConfig):
        return x + experts(mlp, config.feed_forward, h, balances)
    return x + gated(h, *(mlp[f"{part}_proj.weight"] for part in ("gate", "up", "down")))


def target_losses(w, tied, state, targets):
    logits = state @ (w["model.embed_tokens.weight"] if tied else w["lm_head.weight"]).T
    return -np.log(softmax(logits))[np.arange(len(targets)), targets]


def loss(w, config: DecoderConfig, samples, ahead_weight=0.0, balance_weight=0.0) -> float:
    """Mean over all targets, plus the weighted losses of prediction heads and balancing."""
    heads, tied = config.prediction_heads, config.head.tied
    losses: list[list[float]] = [[] for _ in range(1 + len(heads))]
    balances: list[list] = [[] for _ in config.blocks]
    embeddings = w["model.embed_tokens.weight"]
    for sample in samples:
        x = embeddings[sample.tokens[:-1]]
        for n, layer in enumerate(config.blocks):
            x = block(under(w, f"model.layers.{n}."), layer, x, balances[n])
        state = rms_norm(x, w["model.norm.weight"])
        for depth in range(len(heads) + 1):
            if depth:
                own = under(w, f"prediction_heads.{depth - 1}.")
                state = state[:-1]
                both = [
                    rms_norm(embeddings[sample.tokens[depth:-1]], own["enorm.weight"]),
                    rms_norm(state, own["hnorm.weight"]),
                ]
                mixed = np.concatenate(both, axis=-1) @ own["eh_proj.weight"].T
                mixed = block(under(own, "block."), heads[depth - 1], mixed, [])
                state = rms_norm(mixed, own["norm.weight"])
            each = target_losses(w, tied, state, sample.tokens[1 + depth :])
            losses[depth] += list(each[sample.in_loss[1 + depth :]])
    total = np.mean(losses[0])
    for extra in losses[1:]:
        total += ahead_weight / len(heads) * np.mean(extra)
    return total + balance_weight * _balance(config, balances)


def _balance(config, balances) -> float:
    layers = []
    for layer, seen in zip(config.blocks, balances, strict=True):
        if not seen:
            continue
        chosen = np.concatenate([c for c, _ in seen])
        scores = np.concatenate([s for _, s in seen])
        count = layer.feed_forward.count
        share = np.array([(chosen == e).any(-1).mean() for e in range(count)])
        layers.append(count * (share * scores.mean(0)).sum())
    return float(np.mean(layers)) if layers else 0.0
