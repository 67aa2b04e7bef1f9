"""A decoder described as data: frozen dataclasses in the field's words, checked when made.

``DecoderConfig.blocks`` holds one entry a layer, so that alternating windows, layers without
RoPE and dense-first mixtures of experts are simply different entries. A family
(``mlxtx/families``) turns a ``config.json`` into this; the block (``block.py``) turns this into
arithmetic. Sizes are in channels, heads or tokens as the name says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

ACTIVATIONS = ["silu", "gelu", "gelu_tanh", "gelu_quick"]
ACTIVATIONS += ["relu", "relu2", "xielu", "sigmoid", "tanh"]


class ConfigError(ValueError):
    """A decoder that cannot exist: the message names the field and its value."""


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _positive(owner: object, *names: str) -> None:
    for name in names:
        value, kind = getattr(owner, name), owner.__annotations__[name]
        whole, none = kind.startswith("int"), value is None and kind.endswith("None")
        good = isinstance(value, int if whole else int | float) and 0 < value < 2**63
        what = f"{type(owner).__name__}.{name} must be a {'whole ' * whole}number above 0"
        _check(good or none, f"{what}, not {value!r:.60}")


def _known(owner: object, name: str, values: Sequence[str]) -> None:
    value, where = getattr(owner, name), f"{type(owner).__name__}.{name}"
    _check(value in values, f"{where} is unknown: {value!r} (known: {', '.join(values)})")


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """RMSNorm or LayerNorm. The result is multiplied by ``offset + weight`` (offset 1: zero-centred)."""

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    weight: bool = True
    bias: bool = False
    offset: float = 0.0

    def __post_init__(self) -> None:
        _known(self, "kind", ("rms", "layer"))
        _check(not self.bias or self.kind == "layer", "NormConfig.bias needs kind 'layer'")
        good = isinstance(self.eps, int | float) and 0 <= self.eps < 1e9
        _check(good, f"NormConfig.eps must be a number that is not negative: {self.eps!r:.60}")


@dataclass(frozen=True, kw_only=True)
class HeadNormConfig:
    """A norm of queries or keys: over each head's channels with one weight for all heads ("head"),
    a weight for each head ("each_head"), or over all heads' channels together ("width")."""

    norm: NormConfig
    over: Literal["head", "each_head", "width"] = "head"


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How RoPE frequencies are stretched beyond the trained context. ``kind`` decides which fields count.

    linear (factor), dynamic (factor, context), llama3 (factor, low/high_frequency_factor,
    original_context), yarn (factor, beta_*, truncate, attention_factor, original_context),
    longrope (short/long_factors, attention_factor, original_context), proportional (factor,
    turning: the fraction of the channels that turn).
    """

    kind: Literal["linear", "dynamic", "llama3", "yarn", "longrope", "proportional"]
    factor: float = 1.0
    original_context: int = 0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    long_attention_factor: float | None = None  # beyond the original context (None: the same)
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    turning: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "factor", "low_frequency_factor", "high_frequency_factor")
        _positive(self, "beta_fast", "beta_slow", "attention_factor", "long_attention_factor")

    @property
    def depends_on_length(self) -> bool:
        return self.kind in ("dynamic", "longrope") or self.long_attention_factor is not None


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021) of the first ``dims`` channels of each head.

    ``interleaved`` rotates neighbouring pairs (0, 1), (2, 3) ...; otherwise channel i goes with
    i + dims/2. ``tail`` rotates the last ``dims`` channels instead of the first, ``backwards``
    by the negative angle.
    """

    dims: int
    base: float = 10000.0
    interleaved: bool = False
    scaling: RopeScaling | None = None
    tail: bool = False
    backwards: bool = False

    def __post_init__(self) -> None:
        _check(self.dims > 0 and self.dims % 2 == 0, f"RopeConfig.dims must be even: {self.dims!r}")
        _positive(self, "base")
        _check(self.base != 1, "RopeConfig.base must not be 1, or all channels turn alike")
        pairs, longrope = self.dims // 2, self.scaling and self.scaling.kind == "longrope"
        for name in ("short_factors", "long_factors") if longrope else ():
            count = len(getattr(self.scaling, name))
            _check(
                count == pairs, f"RopeScaling.{name} has {count} entries for {pairs} frequencies"
            )


@dataclass(frozen=True, kw_only=True)
class TemperatureConfig:
    """Queries grow with their position: 1 + beta log(1 + floor((position + shift) / floor))
    (Llama 4, Ministral 3)."""

    beta: float
    floor: float
    shift: float = 0.0


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Softmax attention: multi-head, multi-query and grouped-query, over keys and values of their own."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float | None = None  # None: head_dim ** -0.5
    qkv_bias: bool = False
    output_bias: bool = False
    clip_qkv: float | None = None  # behind the norms of queries and keys, before RoPE
    rope: RopeConfig | None = None
    alibi: tuple[float, ...] = ()  # one slope a head
    alibi_coarse: float | None = None  # a factor of them; the rest is rounded to bfloat16 (Falcon)
    q_norm: HeadNormConfig | None = None
    k_norm: HeadNormConfig | None = None
    v_norm: HeadNormConfig | None = None
    norm_after_rope: bool = False
    window: int | None = None  # a token sees itself and window - 1 before it
    chunk: int | None = None  # a token sees only its own chunk of this many
    stride: int | None = None  # with a window: beyond it, only every stride-th token
    global_tokens: int = 0  # with a window: the first tokens stay visible
    softcap: float | None = None
    sinks: bool = False  # one learned logit a head that takes part in the softmax alone
    temperature: TemperatureConfig | None = None
    gate: bool = False  # the output is multiplied by sigmoid(gate_proj(x))
    shares_cache_of: int | None = None  # keys and values of that earlier layer
    value_is_key: bool = False  # values are the keys before their norm

    def __post_init__(self) -> None:
        _positive(self, "heads", "kv_heads", "head_dim", "window", "chunk", "stride", "clip_qkv")
        _positive(self, "softcap")
        _check(
            self.heads % self.kv_heads == 0,
            f"AttentionConfig.kv_heads must divide heads: {self.kv_heads} does not divide {self.heads}",
        )
        _check(
            self.rope is None or self.rope.dims <= self.head_dim,
            f"RopeConfig.dims {self.rope and self.rope.dims} is larger than head_dim {self.head_dim}",
        )
        _check(
            not self.alibi or len(self.alibi) == self.heads,
            f"AttentionConfig.alibi has {len(self.alibi)} slopes for {self.heads} heads",
        )

    @property
    def value_dim(self) -> int:
        return self.head_dim


@dataclass(frozen=True, kw_only=True)
class LatentAttentionConfig:
    """Multi-head latent attention (DeepSeek-V2): the cache holds one latent row a token.

    A row is ``kv_rank`` normalised latent channels and ``rope_dim`` rotated key channels,
    shared by all heads.
    """

    heads: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    rope: RopeConfig
    q_rank: int | None = None
    scale: float | None = None  # None: (nope_dim + rope_dim) ** -0.5
    bias: bool = False
    norm: NormConfig = field(default_factory=NormConfig)
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    temperature: TemperatureConfig | None = None

    def __post_init__(self) -> None:
        _positive(self, "heads", "kv_rank", "nope_dim", "rope_dim", "value_dim", "q_rank", "window")
        _check(
            self.rope.dims == self.rope_dim,
            f"RopeConfig.dims {self.rope.dims} is not LatentAttentionConfig.rope_dim {self.rope_dim}",
        )
        _check(self.rope.tail, "LatentAttentionConfig.rope needs tail=True: a row ends with it")


@dataclass(frozen=True, kw_only=True)
class FeedForwardConfig:
    """down(act(gate(x)) * up(x)) when gated, down(act(up(x))) otherwise."""

    width: int
    activation: str = "silu"
    gated: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        _positive(self, "width")
        _known(self, "activation", ACTIVATIONS)


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How each token chooses its experts.

    ``scores``: "softmax" over all experts (``normalize`` makes it one over the chosen), "sigmoid"
    of each, or "sparsemixer" (Phi-3.5-MoE). ``correction_bias`` is added for choosing only. With
    groups, only experts of the ``chosen_groups`` best groups can be chosen, ranked by their best
    score or, with ``group_score="top2"``, the sum of two.
    """

    scores: Literal["softmax", "sigmoid", "sparsemixer"] = "softmax"
    normalize: bool = False
    normalize_eps: float = 0.0
    scaling: float = 1.0
    bias: bool = False
    correction_bias: bool = False
    groups: int = 1
    chosen_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    jitter: float = 0.0  # sparsemixer's threshold
    norm: NormConfig | None = None  # of the router's input, then divided by width ** 0.5
    expert_scale: bool = False  # each expert's weight is multiplied by a learned number


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """A mixture of experts: each token runs through ``per_token`` of ``count`` feed-forwards."""

    count: int
    per_token: int
    expert: FeedForwardConfig
    router: RouterConfig = field(default_factory=RouterConfig)
    shared: FeedForwardConfig | None = None
    shared_gate: bool = False  # the shared expert is multiplied by sigmoid(shared_expert_gate(x))
    scale_input: bool = False  # scores multiply the expert's input, not its output (Llama 4)
    clip: float | None = None  # clipped SwiGLU (gpt-oss): (up + 1) * gate * sigmoid(alpha gate)
    clip_alpha: float = 1.702

    def __post_init__(self) -> None:
        _positive(self, "count", "per_token")
        _check(
            self.per_token <= self.count,
            f"ExpertsConfig.per_token {self.per_token} is above count {self.count}",
        )
        router = self.router
        _check(
            self.count % router.groups == 0,
            f"RouterConfig.groups {router.groups} does not divide {self.count} experts",
        )
        _check(
            router.chosen_groups <= router.groups,
            f"RouterConfig.chosen_groups {router.chosen_groups} is above groups {router.groups}",
        )
        _check(
            self.per_token <= self.count // router.groups * router.chosen_groups,
            f"ExpertsConfig.per_token {self.per_token} is more than the chosen groups hold",
        )


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """One layer; ``form`` says how its branches meet the residual stream (``block.py`` has the
    formulas).

    Parallel branches share a norm when ``feed_forward_norm`` is None. ``*_output_norm`` normalises
    a branch before it is added; ``norm_after_add`` moves the two norms behind the additions. With
    ``residual_after_norm`` a branch is added to its own norm's result (some BLOOMs).

    Gemma 4 adds: ``experts`` beside the feed-forward, both behind norms of their own;
    ``per_layer_input`` channels that each layer mixes in from an embedding of its own; and
    ``layer_scale``, a learned number that multiplies the layer's result.
    """

    attention: AttentionConfig | LatentAttentionConfig
    feed_forward: FeedForwardConfig | ExpertsConfig
    form: Literal["sequential", "parallel"] = "sequential"
    attention_norm: NormConfig | None = field(default_factory=NormConfig)
    attention_output_norm: NormConfig | None = None
    feed_forward_norm: NormConfig | None = field(default_factory=NormConfig)
    feed_forward_output_norm: NormConfig | None = None
    norm_after_add: bool = False
    residual_after_norm: bool = False
    residual_multiplier: float = 1.0
    experts: ExpertsConfig | None = None
    per_layer_input: int | None = None
    layer_scale: bool = False

    def __post_init__(self) -> None:
        _known(self, "form", ("sequential", "parallel"))
        fits = self.form == "sequential" or not self.norm_after_add
        _check(fits, "BlockConfig.norm_after_add needs form 'sequential'")


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig:
    """Token embeddings, and learned or sinusoidal positions added to them."""

    multiplier: float = 1.0
    width: int | None = None  # embeddings of another width, projected in and out (OPT-350m)
    norm: NormConfig | None = None
    positions: int = 0  # rows of a learned table
    position_offset: int = 0  # OPT looks up position + 2
    sinusoidal: bool = False
    per_layer: int | None = None  # channels of an embedding of its own for every layer (Gemma 4)
    per_layer_vocabulary: int | None = None


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """From hidden states to logits."""

    tied: bool = False
    bias: bool = False
    multiplier: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        _check(not (self.tied and self.bias), "HeadConfig.bias needs a head that is not tied")
        _positive(self, "softcap")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A whole decoder. ``context`` is the longest sequence it was made for, in tokens."""

    vocabulary: int
    width: int
    blocks: tuple[BlockConfig, ...]
    context: int
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    final_norm: NormConfig | None = field(default_factory=NormConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    prediction_heads: tuple[BlockConfig, ...] = ()  # multi-token prediction (DeepSeek-V3)
    refeed_beyond: int | None = None  # a text that grows past this length is fed anew (Phi-3)

    def __post_init__(self) -> None:
        _positive(self, "vocabulary", "width", "context")
        _check(len(self.blocks) > 0, "DecoderConfig.blocks is empty")
        for index, block in enumerate(self.blocks):
            source = getattr(block.attention, "shares_cache_of", None)
            _check(
                source is None or 0 <= source < index,
                f"DecoderConfig.blocks[{index}] shares the cache of layer {source}, which is not before it",
            )
