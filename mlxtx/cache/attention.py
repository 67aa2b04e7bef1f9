"""Softmax attention over keys and values that lie in plain arrays, and the masks it needs."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlxtx.cache.step import Step


@dataclass(frozen=True)
class AttentionSpec:
    """What a layer asks of attention, whatever holds its keys and values.

    ``window``: a token sees itself and the ``window - 1`` before it, and beyond those only
    every ``stride``-th token and the first ``global_tokens``. ``chunk``: it sees only its own
    chunk. ``slopes``: ALiBi, one a head; ``coarse_slopes``, where given, is a factor of them, and
    the rest times the key's position is rounded to bfloat16 (Falcon). ``value_dim``: keys and values share their rows (latent
    attention) and values are the first ``value_dim`` channels.
    """

    scale: float
    window: int | None = None
    chunk: int | None = None
    stride: int | None = None
    global_tokens: int = 0
    softcap: float | None = None
    slopes: tuple[float, ...] = ()
    coarse_slopes: float | None = None
    value_dim: int | None = None

    @property
    def only_window(self) -> bool:
        """Keys that left the window are never seen again."""
        return self.window is not None and self.stride is None and not self.global_tokens

    @property
    def only_near(self) -> bool:
        """What is seen is one stretch of rows: everything, or a window."""
        return self.stride is None and self.chunk is None and not self.global_tokens


def visible(
    spec: AttentionSpec, query_positions: mx.array, key_positions: mx.array
) -> mx.array:  # [1|B, T], [1|B, S] -> bool [1|B, 1, T, S]
    """Which keys each query may see. Keys at negative positions (padding, empty rows) never are."""
    query = query_positions[:, None, :, None]
    key = key_positions[:, None, None, :]
    mask = (key <= query) & (key >= 0)
    if spec.window is not None:
        near = query - key < spec.window
        if spec.stride is not None:
            near = near | ((query - key) % spec.stride == 0)
        if spec.global_tokens:
            near = near | (key < spec.global_tokens)
        mask = mask & near
    if spec.chunk is not None:
        mask = mask & (query // spec.chunk == key // spec.chunk)
    return mask


def causal_mask(spec: AttentionSpec, step: Step, rows: int) -> mx.array | str | None:
    """The mask of ``step``'s queries over the newest ``rows`` keys, in the cheapest form."""
    plain = step.padding is None and step.segments is None and step.positions is None
    seen = step.offset + step.count
    everything = (spec.window is None or seen <= spec.window) and (
        spec.chunk is None or seen <= spec.chunk
    )
    if plain and rows == seen and everything:
        return None if step.count == 1 else "causal"

    def make() -> mx.array:
        if step.positions is not None:
            keys = step.positions
        else:
            keys = mx.arange(seen - rows, seen)[None]
            keys = keys if step.padding is None else keys - step.padding
        mask = visible(spec, step.query_positions, keys)
        if step.segments is not None:
            same = step.segments[:, None, :, None] == step.segments[:, None, None, :]
            mask = mask & same
        return mask

    key = ("mask", rows, spec.window, spec.chunk, spec.stride, spec.global_tokens)
    return step.memo(key, make)


def alibi_bias(spec: AttentionSpec, step: Step, rows: int) -> mx.array:  # [1|B, H, T, S]
    """ALiBi (Press et al. 2022): each head's slope times the (negative) distance to the key."""

    def make() -> mx.array:
        seen = step.offset + step.count
        if step.positions is not None:
            return alibi(spec, step.positions, step.positions)
        keys = mx.arange(seen - rows, seen)[None]
        keys = keys if step.padding is None else keys - step.padding
        return alibi(spec, step.query_positions, keys)

    return step.memo(("alibi", rows, spec.slopes, spec.coarse_slopes), make)


def alibi(spec: AttentionSpec, queries: mx.array, keys: mx.array) -> mx.array:
    """ALiBi of queries at positions [1|B, T] and keys at [1|B, S]: [1|B, H, T, S]."""
    slopes = mx.array(spec.slopes)[None, :, None, None]
    if spec.coarse_slopes is None:
        return slopes * (keys[:, None, :] - queries[:, :, None])[:, None]
    # The softmax takes the missing query's position out again; the rounding stays.
    coarse = (slopes / spec.coarse_slopes).astype(mx.bfloat16) * keys[:, None, None].astype(
        mx.bfloat16
    )
    bias = coarse.astype(mx.float32) * spec.coarse_slopes  # [1|B, H, 1, S]
    return mx.broadcast_to(bias, (*bias.shape[:2], queries.shape[1], bias.shape[-1]))


def attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    spec: AttentionSpec,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    bias: mx.array | None = None,
) -> mx.array:
    """softmax(scale q k^T + bias) v, grouped-query (Vaswani et al. 2017; Ainslie et al. 2023).

    q [B, H, T, D], k [B, K, S, D], v [B, K, S, Dv] -> [B, H, T, Dv]. ``mask`` is boolean,
    broadcastable to [B, H, T, S], or "causal"; ``bias`` is added to the scores; ``sinks`` [H] are
    logits that take part in the softmax and carry no value.
    """
    if spec.softcap is None:
        if bias is not None:
            mask = merge_bias(bias, mask, q.dtype)
        return mx.fast.scaled_dot_product_attention(
            q,
            k,
            v,
            scale=spec.scale,
            mask=mask,
            sinks=None if sinks is None else sinks.astype(q.dtype),
        )
    return _plain_attention(q, k, v, spec=spec, mask=mask, sinks=sinks, bias=bias)


def expand_causal(mask: mx.array | str | None, queries: int, keys: int) -> mx.array | None:
    """A boolean array for the mask that is spelled "causal"."""
    if not isinstance(mask, str):
        return mask
    return mx.arange(keys - queries, keys)[:, None] >= mx.arange(keys)[None]


def merge_bias(bias: mx.array, mask: mx.array | str | None, dtype: mx.Dtype) -> mx.array:
    """A bias with a huge negative number where the mask hides a key. (Minus infinity for all keys,
    which padding sees none of, would give what is not a number, and layers hand that on.)"""
    seen = expand_causal(mask, *bias.shape[-2:])
    if seen is not None:
        bias = mx.where(seen, bias, mx.finfo(dtype).min / 2)
    return bias.astype(dtype)


def _plain_attention(q, k, v, *, spec, mask, sinks, bias) -> mx.array:
    """The same in plain operations, with the soft cap: cap * tanh(scores / cap) (Gemma 2)."""
    batch, heads, queries, dim = q.shape
    groups = k.shape[1]
    q = q.reshape(batch, groups, heads // groups, queries, dim)
    scores = ((q * spec.scale) @ k[:, :, None].swapaxes(-1, -2)).astype(mx.float32)
    scores = scores.reshape(batch, heads, queries, -1)  # [B, H, T, S]
    if spec.softcap is not None:
        scores = spec.softcap * mx.tanh(scores / spec.softcap)
    if bias is not None:
        scores = scores + bias
    mask = expand_causal(mask, queries, k.shape[2])
    if mask is not None:
        scores = mx.where(mask, scores, mx.finfo(mx.float32).min)
    if sinks is not None:
        column = mx.broadcast_to(
            sinks.astype(mx.float32)[None, :, None, None], (batch, heads, queries, 1)
        )
        scores = mx.concatenate([scores, column], axis=-1)
    weights = mx.softmax(scores, axis=-1, precise=True)
    if sinks is not None:
        weights = weights[..., :-1]
    weights = weights.reshape(batch, groups, heads // groups, queries, -1).astype(v.dtype)
    return (weights @ v[:, :, None]).reshape(batch, heads, queries, -1)
