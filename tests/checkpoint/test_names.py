"""The two-way name map: every rule kind there and back, on real arrays."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxtx.errors import MlxtxError
from mlxtx.naming.map import (
    SAVED_BUFFERS,
    Drop,
    NameMap,
    Rule,
    Template,
    rename,
    stacked_experts,
)
from mlxtx.naming.transforms import (
    Chain,
    Each,
    Moved,
    Reversed,
    Same,
    Shifted,
    Split,
    Stacked,
    Transform,
    Transposed,
    Unflattened,
    chain,
)


def run(groups, tensors):
    out = {}
    for group in groups:
        arrays = group.apply([tensors[name] for name in group.sources])
        assert len(arrays) == len(group.targets)
        out.update(zip(group.targets, arrays, strict=True))
    return out


def shapes(tensors):
    return {name: tuple(a.shape) for name, a in tensors.items()}


def numbered(*shape):
    return mx.arange(int(np.prod(shape)), dtype=mx.float32).reshape(shape)


def test_template_keys_and_numbers():
    template = Template("model.layers.{i}.mlp.experts.{e}.w1")
    assert template.key == "model.layers.#.mlp.experts.#.w1"
    assert template.bind((3, 7)) == {"i": 3, "e": 7}
    assert Template("layers.61.{i}.x").bind((60, 1)) is None
    assert Template("layers.61.{i}.x").bind((61, 1)) == {"i": 1}
    assert Template("a.{i}.b.{i}").bind((1, 2)) is None


def test_an_empty_map_keeps_names_and_order():
    tensors = {"model.norm.weight": numbered(3), "lm_head.weight": numbered(2, 3)}
    plan = NameMap().plan_load(shapes(tensors))
    assert [g.targets for g in plan.groups] == [("model.norm.weight",), ("lm_head.weight",)]
    assert plan.dropped == [] and plan.incomplete == []


def test_gpt2_layout():
    """Conv1D weights are transposed, then split; biases only split; masks are dropped."""
    ours = tuple(f"model.layers.{{i}}.self_attn.{p}_proj" for p in "qkv")
    conv = "transformer.h.{i}.attn.c_attn"
    names = NameMap(
        (Rule((conv,), ours, chain(Transposed(), Split((4, 4, 4)))),),
        drops=SAVED_BUFFERS,
        aliases=((r"^h\.", "transformer.h."),),
    )
    weight, bias = numbered(4, 12), numbered(12)
    tensors = {
        "h.0.attn.c_attn.weight": weight,
        "h.0.attn.c_attn.bias": bias,
        "h.0.attn.bias": numbered(1, 1, 4, 4),
    }
    plan = names.plan_load(shapes(tensors))
    assert plan.dropped == ["h.0.attn.bias"]
    loaded = run(plan.groups, tensors)
    w = np.array(weight).T
    for n, p in enumerate("qkv"):
        part = loaded[f"model.layers.0.self_attn.{p}_proj.weight"]
        assert np.array_equal(np.array(part), w[4 * n : 4 * n + 4])
        part = loaded[f"model.layers.0.self_attn.{p}_proj.bias"]
        assert np.array_equal(np.array(part), np.array(bias)[4 * n : 4 * n + 4])
    saved = run(names.plan_save(shapes(loaded)).groups, loaded)
    assert set(saved) == {
        "transformer.h.0.attn.c_attn.weight",
        "transformer.h.0.attn.c_attn.bias",
    }
    assert np.array_equal(np.array(saved["transformer.h.0.attn.c_attn.weight"]), np.array(weight))


def test_experts_stack_in_number_order_and_save_in_both_layouts():
    names = NameMap(
        (
            *stacked_experts(
                "model.layers.{i}.block_sparse_moe.experts.{e}",
                "model.layers.{i}.mlp.switch_mlp",
                {"gate_proj": "w1", "down_proj": "w2"},
            ),
            rename(
                "model.layers.{i}.block_sparse_moe.switch_mlp.gate_proj",
                "model.layers.{i}.mlp.switch_mlp.gate_proj",
                layout="mlx",
            ),
        )
    )
    # The file's own order is alphabetical, so expert 10 stands before expert 2.
    tensors = {
        f"model.layers.0.block_sparse_moe.experts.{e}.{w}.weight": mx.full((2, 3), e)
        for w in ("w1", "w2")
        for e in sorted(range(11), key=str)
    }
    plan = names.plan_load(shapes(tensors))
    loaded = run(plan.groups, tensors)
    gate = loaded["model.layers.0.mlp.switch_mlp.gate_proj.weight"]
    assert gate.shape == (11, 2, 3)
    assert np.array_equal(np.array(gate)[:, 0, 0], np.arange(11))
    again = run(names.plan_save(shapes(loaded), "hf").groups, loaded)
    assert set(again) == set(tensors)
    assert all(mx.array_equal(again[n], tensors[n]) for n in tensors)
    mlx = run(names.plan_save(shapes(loaded), "mlx").groups, loaded)
    assert set(mlx) == {
        "model.layers.0.block_sparse_moe.switch_mlp.gate_proj.weight",
        "model.layers.0.mlp.switch_mlp.down_proj.weight",
    }
    assert set(run(names.plan_load(shapes(mlx)).groups, mlx)) == set(loaded)


def test_a_group_with_a_missing_tensor_is_named():
    rules = stacked_experts("l.{i}.experts.{e}", "l.{i}.switch_mlp", {"gate_proj": "w1"})
    there = {f"l.0.experts.{e}.w1.weight": (2, 3) for e in (0, 1, 3)}
    plan = NameMap(rules).plan_load(there)
    assert plan.incomplete == [(tuple(there), ("l.0.experts.2.w1.weight",))]
    assert {g.targets[0] for g in plan.groups} == set(there)


def test_one_tensor_under_two_spellings_is_refused():
    names = NameMap(aliases=((r"^h\.", "transformer.h."),))
    with pytest.raises(MlxtxError, match=r"transformer\.h\.0\.x twice"):
        names.plan_load({"h.0.x": (1,), "transformer.h.0.x": (1,)})


def test_a_shape_that_does_not_fit_names_the_tensor():
    names = NameMap((Rule(("qkv",), ("q", "k"), Split((4, 2))),))
    (group,) = names.plan_load({"qkv.weight": (5, 8)}).groups
    with pytest.raises(MlxtxError, match=r"qkv\.weight \(5, 8\) into q\.weight, k\.weight: 5 rows"):
        group.apply([mx.zeros((5, 8))])


def test_when_chooses_between_layouts_that_share_a_name():
    conv = Rule(
        ("mixer.conv1d.weight",),
        ("mixer.conv1d.weight",),
        Moved(1, 2),
        layout="hf",
        when=lambda shape: shape[-1] != 1,
    )
    names = NameMap((conv,))
    (group,) = names.plan_load({"mixer.conv1d.weight": (8, 1, 4)}).groups
    assert group.apply([mx.zeros((8, 1, 4))])[0].shape == (8, 4, 1)
    (group,) = names.plan_load({"mixer.conv1d.weight": (8, 4, 1)}).groups
    assert group.transform == Same()


def test_exact_rules_and_drop_patterns():
    """Fused, transposed, interleaved experts without an ending, as gpt-oss has them."""
    experts = "model.layers.{i}.mlp.experts"
    ours = "model.layers.{i}.mlp.switch_mlp"
    names = NameMap(
        (
            Rule(
                (f"{experts}.gate_up_proj",),
                (f"{ours}.gate_proj.weight", f"{ours}.up_proj.weight"),
                chain(Transposed(), Split((1, 1), groups=3)),
            ),
            Rule(
                (f"{experts}.gate_up_proj_bias",),
                (f"{ours}.gate_proj.bias", f"{ours}.up_proj.bias"),
                Split((1, 1), groups=3),
            ),
        ),
        drops=(Drop("mtp.*"),),
    )
    tensors = {
        "model.layers.1.mlp.experts.gate_up_proj": numbered(2, 4, 6),
        "model.layers.1.mlp.experts.gate_up_proj_bias": numbered(2, 6),
        "mtp.head.weight": numbered(1),
    }
    plan = names.plan_load(shapes(tensors))
    assert plan.dropped == ["mtp.head.weight"]
    loaded = run(plan.groups, tensors)
    fused = np.array(tensors["model.layers.1.mlp.experts.gate_up_proj"])
    up = np.array(loaded["model.layers.1.mlp.switch_mlp.up_proj.weight"])
    assert np.array_equal(up, fused[:, :, 1::2].swapaxes(1, 2))
    bias = np.array(loaded["model.layers.1.mlp.switch_mlp.gate_proj.bias"])
    assert np.array_equal(
        bias, np.array(tensors[f"{experts}.gate_up_proj_bias".format(i=1)])[:, ::2]
    )
    saved = run(names.plan_save(shapes(loaded)).groups, loaded)
    assert all(mx.array_equal(saved[n], a) for n, a in tensors.items() if n in saved)
    assert set(saved) == set(tensors) - {"mtp.head.weight"}


def test_packed_weights_split_like_their_unpacked_rows():
    weight = mx.random.normal((24, 64), key=mx.random.key(0))
    packed, scales, biases = mx.quantize(weight, 64, 4)
    names = NameMap((Rule(("qkv",), ("q", "k", "v"), Split((4, 2, 2), groups=3)),))
    tensors = {"qkv.weight": packed, "qkv.scales": scales, "qkv.biases": biases}
    plan = names.plan_load(shapes(tensors))
    assert all(group.keeps_packing for group in plan.groups)
    loaded = run(plan.groups, tensors)
    whole = mx.dequantize(packed, scales, biases, 64, 4).reshape(3, 8, 64)
    for name, rows in (("q", slice(0, 4)), ("k", slice(4, 6)), ("v", slice(6, 8))):
        parts = [loaded[f"{name}.{s}"] for s in ("weight", "scales", "biases")]
        assert mx.array_equal(mx.dequantize(*parts, 64, 4), whole[:, rows].reshape(-1, 64))


@st.composite
def transforms(draw) -> tuple[Transform, list[tuple[int, ...]], int]:
    """(a transform, the shapes of its sources, the rows' axis)."""
    rows_axis = draw(st.sampled_from([-1, -2]))
    sizes = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    groups = draw(st.integers(1, 3))
    split = Split(sizes, groups)
    rows = groups * sum(sizes)
    stack = tuple(draw(st.lists(st.integers(1, 3), max_size=1)))
    shape = (*stack, rows) if rows_axis == -1 else (*stack, rows, draw(st.integers(1, 5)))
    flipped = (*shape[:-2], shape[-1], shape[-2]) if rows_axis == -2 else shape
    experts = draw(st.integers(1, 3))
    return draw(
        st.sampled_from(
            [
                (split, [shape], rows_axis),
                (Chain((Transposed(), split)), [flipped], rows_axis),
                (Stacked(), [shape] * experts, rows_axis),
                (Unflattened(rows), [(rows * 2, 3)], -2),
                (chain(Unflattened(rows), Transposed()), [(rows * 2, 3)], -2),
                (chain(split, Each((Same(),) * len(sizes))), [shape], rows_axis),
                (
                    # Latent attention's kv_b_proj: per head, keys transposed and values not.
                    chain(Unflattened(2), Split((3, 4)), Each((Transposed(), Same()))),
                    [(14, 5)],
                    -2,
                ),
                (Shifted(1.0), [shape], rows_axis),
                (Reversed(Reversed(split)), [shape], rows_axis),
                (Moved(0, -1), [(2, 3, 4)], -2),
            ]
        )
    )


@given(transforms())
def test_every_transform_is_its_own_way_back(case):
    transform, given_shapes, axis = case
    arrays = [numbered(*shape) + 100 * n for n, shape in enumerate(given_shapes)]
    there = transform.load(arrays, axis)
    back = transform.save(there, axis)
    assert len(back) == len(arrays)
    for before, after in zip(arrays, back, strict=True):
        assert before.shape == after.shape
        assert mx.array_equal(before, after)
    assert sum(a.size for a in there) == sum(a.size for a in arrays)


def test_an_expert_with_a_number_beyond_all_is_told_in_a_moment():
    rule = Rule(("mlp.experts.{e}.up",), ("mlp.switch_mlp.up",), Stacked())
    names = {f"mlp.experts.{e}.up.weight": (4, 4) for e in (0, 1, 10**15)}
    ((have, lack),) = NameMap((rule,)).plan_load(names).incomplete
    assert have == tuple(names) and lack == ("mlp.experts.2.up.weight", "mlp.experts.3.up.weight")
