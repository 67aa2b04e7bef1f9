"""Random sequences of append, roll back, share, save and load, against rows in a plain list."""

from __future__ import annotations

import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mlxtx.cache import kernels, parts
from mlxtx.cache.attention import AttentionSpec
from mlxtx.cache.layer import RowsCache, layer_layout
from mlxtx.cache.model_cache import ModelCache
from mlxtx.cache.saved import load_cache, save_cache
from mlxtx.cache.settings import parse_kv
from mlxtx.cache.step import Step
from mlxtx.errors import MlxtxError
from tests.cache.numpy_cache import NumpyCache, attend

REWIND = 5
KV = ["plain", "k8v4g32", "k4v8g64r", "k6v3g32", "k5v2g64r", "k4v4g32f3", "k8v8g32n6"]
KV += ["k2v4g32rf2n4", "w9", "w7s2", "k4v4g64w8s3", "k3v5g32n5w9"]
SPECS = {
    "causal": {},
    "window": {"window": 6},
    "window of one": {"window": 1},
    "chunk": {"chunk": 7},
    "global": {"window": 5, "global_tokens": 3},
    "strided": {"window": 4, "stride": 3},
    "softcap": {"softcap": 2.0, "window": 8},
    "alibi": {"slopes": (0.5, 0.25, 0.125, 0.0625), "window": 9},
}


def same(q, k, step):
    return q, k


operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.sampled_from([1, 1, 2, 3, 8, 17, 45])),
        st.tuples(st.just("rollback"), st.integers(1, REWIND)),
        st.tuples(st.just("share"), st.integers(0, 1)),
        st.tuples(st.just("save"), st.just(0)),
        st.tuples(st.just("mark"), st.integers(1, 20)),
    ),
    min_size=2,
    max_size=7,
)


class Both:
    """One layer's cache and its model, fed alike."""

    def __init__(self, kv, spec, dims, padding, sinks, seed):
        self.spec, self.padding, self.sinks = spec, padding, sinks
        self.heads, self.kv_heads, self.dim, self.value_dim = dims
        self.settings = parse_kv(kv)
        layout = layer_layout(spec, self.settings, padding=max(padding), rewind=REWIND)
        self.layout = layout
        self.cache = self.make_cache(self.settings)
        self.model = NumpyCache(layout)
        self.random = np.random.default_rng(seed)
        self.peak = 0

    def make_cache(self, settings, *, left_padding=None, rewind=REWIND) -> ModelCache:
        layer = RowsCache(self.layout, settings)
        return ModelCache([layer], settings=settings, left_padding=self.padding)

    def save_and_load(self) -> None:
        tokens = self.random.integers(0, 9, (len(self.padding), self.model.rows)).tolist()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cache.safetensors"
            save_cache(path, self.cache, model="m", tokens=tokens)
            self.cache, loaded = load_cache(path, self, fingerprint="m", kv=self.settings)
        assert loaded == tokens

    def there_and_back(self, count: int) -> None:
        """Marks this point, goes on, and comes back."""
        mark, model = self.cache.mark(), self.model.copy()
        self.append(count)
        self.cache.return_to(mark)
        # What left the tail for the body meanwhile stays there, unless a ring was put back.
        if self.layout.reach is None:
            self.model.rollback(count)
        else:
            self.model = model

    def normal(self, *shape) -> np.ndarray:
        return self.random.normal(size=shape).astype(np.float32)

    def append(self, count: int) -> None:
        batch = len(self.padding)
        q = self.normal(batch, self.heads, count, self.dim)
        k = self.normal(batch, self.kv_heads, count, self.dim)
        latent = self.spec.value_dim is not None
        v = None if latent else self.normal(batch, self.kv_heads, count, self.value_dim)
        step = Step(count, self.model.rows, left_padding=self.padding)
        got = self.cache.layers[0].attend(
            mx.array(q),
            mx.array(k),
            None if v is None else mx.array(v),
            prepare=same,
            spec=self.spec,
            step=step,
            sinks=None if self.sinks is None else mx.array(self.sinks),
        )
        self.model.append(k, k if v is None else v)
        keys, values = self.model.decoded()
        if latent:
            values = keys[..., : self.spec.value_dim]
        spec = self.spec
        if self.settings.window is not None and (spec.window or 1 << 30) > self.settings.window:
            kept = max(spec.global_tokens, self.settings.sink_tokens)
            spec = AttentionSpec(
                **{**vars(spec), "window": self.settings.window, "global_tokens": kept}
            )
        wanted = attend(q, keys, values, spec, padding=self.padding, sinks=self.sinks)
        np.testing.assert_allclose(np.array(got), wanted, atol=2e-5, rtol=2e-4)
        self.peak = max(self.peak, self.model.rows)
        self.cache.offset += count
        assert self.cache.layers[0].rows == self.model.rows

    def rollback(self, count: int) -> None:
        count = min(count, self.model.rows)
        allowed = self.cache.can_rollback(count)
        if self.peak - (self.model.rows - count) <= REWIND:
            assert allowed
        if not allowed:
            with pytest.raises(MlxtxError):
                self.cache.rollback(count)
            return
        self.cache.rollback(count)
        self.model.rollback(count)

    def fork(self) -> Both:
        other = Both.__new__(Both)
        other.__dict__.update(self.__dict__)
        other.cache, other.model = self.cache.copy(), self.model.copy()
        return other


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kv=st.sampled_from(KV),
    spec=st.sampled_from(sorted(SPECS)),
    dims=st.sampled_from([(4, 2, 32, 32), (4, 1, 80, 16), (4, 4, 24, 24)]),
    latent=st.booleans(),
    padding=st.sampled_from([(0,), (0, 0), (3, 0), (1, 6)]),
    sinks=st.booleans(),
    operations=operations,
    way=st.sampled_from(["whole", "sliced", "kernels"]),
    seed=st.integers(0, 99),
)
@example(  # taken back twice: together further than a ring can go
    kv="plain",
    spec="window",
    dims=(4, 2, 32, 32),
    latent=False,
    padding=(0,),
    sinks=False,
    operations=[("append", 45), ("rollback", 5), ("rollback", 4), ("append", 1)],
    way="whole",
    seed=0,
)
def test_every_kind_equals_attention_over_its_rows(
    kv, spec, dims, latent, padding, sinks, operations, way, seed
):
    # Slices so small that every pass is made of several.
    with pytest.MonkeyPatch.context() as patch:
        if way == "kernels":  # off Metal they are their references, of the same results
            patch.setattr(kernels, "on_metal", lambda: True)
        if way == "sliced":
            patch.setattr(parts, "SCORES_AT_A_TIME", 64)
            patch.setattr(parts, "SMALLEST_SLICE", 16)
            patch.setattr(parts, "QUERIES_AT_A_TIME", 4)
        drive(kv, spec, dims, latent, padding, sinks, operations, seed)


def drive(kv, spec, dims, latent, padding, sinks, operations, seed):
    heads, kv_heads, dim, value_dim = dims
    if latent:
        kv_heads, value_dim = 1, dim - 8
    attention = AttentionSpec(
        scale=dim**-0.5, value_dim=value_dim if latent else None, **SPECS[spec]
    )
    sink_logits = np.array([0.5, -1.0, 2.0, 0.0], np.float32) if sinks else None
    both = Both(kv, attention, (heads, kv_heads, dim, value_dim), padding, sink_logits, seed)
    others: list[Both] = []
    for name, number in operations:
        if name == "append":
            both.append(number)
        elif name == "rollback" and both.model.rows:
            both.rollback(number)
        elif name == "save" and both.model.rows:
            both.save_and_load()
        elif name == "mark" and both.model.rows:
            both.there_and_back(number)
        elif name == "share":  # go on with a copy, or come back to one that stood still meanwhile
            others.append(both)
            both = both.fork() if number or len(others) < 2 else others.pop(0)
    for other in [*others, both]:
        other.append(2)
