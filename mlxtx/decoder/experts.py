"""Mixtures of experts: a router, stacked experts of which only the chosen run, shared experts."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtx.decoder.config import ExpertsConfig, RouterConfig
from mlxtx.decoder.feed_forward import FeedForward, activation, gate_with
from mlxtx.decoder.norm import Norm


class ExpertLinear(nn.Module):
    """One linear map an expert, weight [E, out, in]."""

    def __init__(self, experts: int, inputs: int, outputs: int, bias: bool):
        super().__init__()
        scale = inputs**-0.5
        self.weight = mx.random.uniform(-scale, scale, (experts, outputs, inputs))
        if bias:
            self.bias = mx.zeros((experts, outputs))

    def __call__(self, x: mx.array, chosen: mx.array, ordered: bool) -> mx.array:
        """x [..., 1, in] through the experts ``chosen`` [...] -> [..., 1, out]."""
        y = self.product(x, chosen, ordered)
        return y if "bias" not in self else y + self.bias[chosen][..., None, :]

    def product(self, x: mx.array, chosen: mx.array, ordered: bool) -> mx.array:
        weight = self.weight.swapaxes(-1, -2)
        return mx.gather_mm(x, weight, rhs_indices=chosen, sorted_indices=ordered)

    def to_quantized(
        self, group_size: int = 64, bits: int = 4, mode: str = "affine", **_: Any
    ) -> QuantizedExpertLinear:
        return QuantizedExpertLinear(self.weight, self.get("bias"), group_size, bits, mode)


class QuantizedExpertLinear(ExpertLinear):
    """``ExpertLinear`` with quantized weights."""

    def __init__(
        self, weight: mx.array, bias: mx.array | None, group_size: int, bits: int, mode: str
    ):
        nn.Module.__init__(self)
        self.group_size, self.bits, self.mode = group_size, bits, mode
        self.weight, self.scales, *biases = mx.quantize(weight, group_size, bits, mode=mode)
        if biases:
            self.biases = biases[0]
        if bias is not None:
            self.bias = bias
        self.freeze()

    def product(self, x: mx.array, chosen: mx.array, ordered: bool) -> mx.array:
        return mx.gather_qmm(
            x,
            self.weight,
            self.scales,
            self.get("biases"),
            rhs_indices=chosen,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            sorted_indices=ordered,
        )


class StackedExperts(nn.Module):
    """All experts of a layer. Tokens are sorted by expert, so that each one's weights are read once."""

    sort_from = 64  # token-expert pairs

    def __init__(self, width: int, config: ExpertsConfig):
        super().__init__()
        count, expert = config.count, config.expert
        if expert.gated:
            self.gate_proj = ExpertLinear(count, width, expert.width, expert.bias)
        self.up_proj = ExpertLinear(count, width, expert.width, expert.bias)
        self.down_proj = ExpertLinear(count, expert.width, width, expert.bias)
        self.act_fn = activation(expert.activation)
        self._gated, self._clip, self._alpha = expert.gated, config.clip, config.clip_alpha

    def _inner(self, gate: mx.array | None, up: mx.array) -> mx.array:
        if gate is None:
            return self.act_fn(up)
        if self._clip is None:
            return gate_with(self.act_fn, gate, up)
        gate = mx.minimum(gate, self._clip)
        up = mx.clip(up, -self._clip, self._clip)
        return (up + 1) * gate * mx.sigmoid(self._alpha * gate)

    def __call__(self, x: mx.array, chosen: mx.array, weights: mx.array | None) -> mx.array:
        """x [N, D] through the experts ``chosen`` [N, K] -> [N, K, D].

        ``weights`` [N, K] multiply the experts' input (None: 1).
        """
        tokens, picks = chosen.shape
        order = None
        if chosen.size >= self.sort_from:
            flat = chosen.flatten()
            order = mx.argsort(flat)
            rows, chosen = x[order // picks][:, None], flat[order]  # [N * K, 1, D]
            if weights is not None:
                rows = rows * weights.flatten()[order][:, None, None]
        else:
            rows = x[:, None, None]  # [N, 1, 1, D]
            if weights is not None:
                rows = rows * weights[..., None, None]  # [N, K, 1, D]
        ordered = order is not None
        gate = self.gate_proj(rows, chosen, ordered) if self._gated else None
        y = self.down_proj(self._inner(gate, self.up_proj(rows, chosen, ordered)), chosen, ordered)
        y = y.squeeze(-2)
        if order is not None:
            y = y[mx.argsort(order)].reshape(tokens, picks, -1)
        return y


class Router(nn.Module):
    """Scores experts for each token and chooses some (``RouterConfig`` says how)."""

    def __init__(self, width: int, experts: int, per_token: int, config: RouterConfig):
        super().__init__()
        self.weight = mx.random.normal((experts, width)) * width**-0.5
        if config.bias:
            self.bias = mx.zeros((experts,))
        if config.correction_bias:
            self.e_score_correction_bias = mx.zeros((experts,))
        if config.norm:
            self.norm = Norm(width, config.norm)
        if config.expert_scale:
            self.expert_scale = mx.ones((experts,))
        self._config, self._per_token = config, per_token

    def logits(self, x: mx.array) -> mx.array:  # [N, D] -> [N, E], float32
        if self._config.norm:
            x = self.norm(x) * x.shape[-1] ** -0.5
        y = x.astype(mx.float32) @ self.weight.T.astype(mx.float32)
        return y + self.bias if "bias" in self else y

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Chosen experts [N, K] and their weights [N, K], float32."""
        config, logits = self._config, self.logits(x)
        if config.scores == "sparsemixer":
            return _sparsemixer(logits, config.jitter)
        scores = mx.sigmoid(logits) if config.scores == "sigmoid" else mx.softmax(logits, axis=-1)
        # Logits have the order of their scores, without ties where a sigmoid rounds to one.
        ranked = scores + self.e_score_correction_bias if config.correction_bias else logits
        if config.groups > 1:
            ranked = _keep_groups(ranked if config.correction_bias else scores, config)
        chosen = _top(ranked, self._per_token)
        weights = mx.take_along_axis(scores, chosen, axis=-1)
        if config.normalize:
            total = weights.sum(axis=-1, keepdims=True)
            weights = weights / (total + config.normalize_eps if config.normalize_eps else total)
        if config.expert_scale:
            weights = weights * self.expert_scale[chosen]
        return chosen, weights * config.scaling


def _top(scores: mx.array, count: int) -> mx.array:
    # Which experts are chosen has no gradient; without saying so the backward pass fails.
    return mx.argpartition(mx.stop_gradient(scores), kth=-count, axis=-1)[..., -count:]


def _keep_groups(scores: mx.array, config: RouterConfig) -> mx.array:
    """Scores with those outside the best groups of experts at minus infinity (DeepSeek-V2, V3)."""
    groups = scores.reshape(scores.shape[0], config.groups, -1)
    if config.group_score == "top2":
        rank = mx.topk(groups, 2, axis=-1).sum(axis=-1)
    else:
        rank = groups.max(axis=-1)
    count = config.groups - config.chosen_groups
    if count == 0:
        return scores
    dropped = mx.argpartition(mx.stop_gradient(rank), kth=count - 1, axis=-1)[..., :count]
    hidden = mx.put_along_axis(groups, dropped[..., None], mx.array(-mx.inf), axis=-2)
    return hidden.reshape(scores.shape)


def _sparsemixer(logits: mx.array, jitter: float) -> tuple[mx.array, mx.array]:
    """Two experts, each weighed by a softmax over the experts near its own logit (Phi-3.5-MoE)."""
    chosen, weights = [], []
    remaining = logits
    for _ in range(2):
        best = mx.argmax(mx.stop_gradient(remaining), axis=-1, keepdims=True)
        peak = mx.take_along_axis(remaining, best, axis=-1)
        gap = (peak - logits) / mx.maximum(mx.abs(logits), peak)
        near = mx.where(gap > 2 * jitter, -mx.inf, remaining)
        weights.append(mx.take_along_axis(mx.softmax(near, axis=-1), best, axis=-1))
        chosen.append(best)
        remaining = mx.put_along_axis(remaining, best, mx.array(-mx.inf), axis=-1)
    return mx.concatenate(chosen, axis=-1), mx.concatenate(weights, axis=-1)


class Experts(nn.Module):
    """A feed-forward of which each token uses a few experts, and perhaps one that all share."""

    def __init__(self, width: int, config: ExpertsConfig):
        super().__init__()
        self._config = config
        self.gate = Router(width, config.count, config.per_token, config.router)
        self.switch_mlp = StackedExperts(width, config)
        if config.shared:
            self.shared_experts = FeedForward(width, config.shared)
        if config.shared_gate:
            self.shared_expert_gate = nn.Linear(width, 1, bias=False)

    def __call__(self, x: mx.array, scored: mx.array | None = None) -> mx.array:
        """x [B, T, D] -> [B, T, D]; the router reads ``scored`` where it is not x itself."""
        flat = x.flatten(0, 1)
        chosen, weights = self.gate(flat if scored is None else scored.flatten(0, 1))
        weights = weights.astype(x.dtype)
        if self._config.scale_input:
            y = self.switch_mlp(flat, chosen, weights).sum(axis=1)
        else:
            y = (self.switch_mlp(flat, chosen, None) * weights[..., None]).sum(axis=1)
        y = y.reshape(x.shape)
        if self._config.shared:
            shared = self.shared_experts(x)
            if self._config.shared_gate:
                shared = shared * mx.sigmoid(self.shared_expert_gate(x))
            y = y + shared
        return y

    def balancing_loss(self, x: mx.array) -> mx.array:
        """The load-balancing loss of Switch Transformers (Fedus et al. 2021, equation 4), over
        the tokens x [B, T, D]: experts times the sum of each one's share of choices times its
        mean probability. 1 when perfectly balanced (times the choices a token)."""
        flat = x.flatten(0, 1)
        probabilities = mx.softmax(self.gate.logits(flat), axis=-1)  # [N, E]
        chosen, _ = self.gate(flat)
        experts = mx.arange(self._config.count)
        share = (chosen[..., None] == experts).sum(axis=1).mean(axis=0)  # [E]
        return self._config.count * (mx.stop_gradient(share) * probabilities.mean(axis=0)).sum()
