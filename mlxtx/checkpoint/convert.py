"""Convert a checkpoint of any size: streamed to disk, taken up again after a stop, and proven."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxtx.checkpoint.calibrate import Calibration
from mlxtx.checkpoint.calibrate import calibrate as measure
from mlxtx.checkpoint.card import copy_companions, write_card
from mlxtx.checkpoint.formats import FLOAT_DTYPES
from mlxtx.checkpoint.hub import resolve
from mlxtx.checkpoint.loading import float_dtype
from mlxtx.checkpoint.proof import Proof, prove
from mlxtx.checkpoint.quantization import Quantization, QuantizationTable
from mlxtx.checkpoint.recipes import NEVER_PACKED, Recipe, make_recipe
from mlxtx.checkpoint.shards import (
    MAX_SHARD_BYTES,
    ShardWriter,
    alone,
    journal_of,
    publish,
    writing,
)
from mlxtx.checkpoint.source import Checkpoint
from mlxtx.checkpoint.units import (
    Unit,
    make_units,
    original_modules,
    run_unit,
    stored_layout,
)
from mlxtx.checkpoint.weights import WeightPlan, describe, plain_config
from mlxtx.decoder.model import DecoderModel
from mlxtx.errors import MlxtxError
from mlxtx.events import Event, Progress
from mlxtx.families import family_for
from mlxtx.files import write_json_atomic
from mlxtx.naming.map import Layout

OnEvent = Callable[[Event], None]


@dataclass
class Conversion:
    """What a conversion made.

    folder: the new checkpoint; nbytes of its weights; bits_per_weight with the scales; unpacked:
    modules that stayed as they were because their columns do not divide by the group; proof: how
    far it is from the source, calibration: what the choice of bits is worth; None when not asked
    for.
    """

    folder: Path
    nbytes: int
    parameters: int
    recipe: str
    unpacked: list[str] = field(default_factory=list)
    calibration: Calibration | None = None
    proof: Proof | None = None

    @property
    def bits_per_weight(self) -> float:
        return self.nbytes * 8 / self.parameters


def convert(
    source: str | Path,
    out: str | Path,
    *,
    bits: int | None = None,
    group_size: int = 64,
    mode: str = "affine",
    dtype: str | None = None,
    recipe: str | Path | Mapping[str, int] | None = None,
    dequantize: bool = False,
    verify: bool = True,
    overwrite: bool = False,
    revision: str | None = None,
    calibrate: str | Path | None = None,
    target_bpw: float | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_event: OnEvent | None = None,
) -> Conversion:
    """Write ``source`` (a folder or Hub id) to the new folder ``out`` in another form.

    bits, group_size, mode: pack the weights ("affine" with 2, 3, 4, 5, 6 or 8 bits and groups of
    32, 64 or 128; "mxfp4", "mxfp8", "nvfp4"). recipe: more bits for some modules, see docs/convert.md.
    dequantize: unpack, and write the Hugging Face layout under the family's own names; otherwise
    the layout is MLX's, and what is packed stays packed unless packed anew. dtype: "float32",
    "float16" or "bfloat16" for what is not packed (None: as it is stored). calibrate and
    target_bpw: choose the bits of each module from what its rounding does to a text.
    verify: compare logits with the source's, layer by layer.

    Peak memory is set by one layer at most, not by the model. An interrupted conversion goes on
    where it stopped when it is called again; nothing stands under ``out`` before all is done. The
    source is only read. Raises MlxtxError with one line that says what to do.
    """
    folder = resolve(source, revision, on_event=on_event)
    with writing(Path(out)):  # whose name may be too long, or in a folder that is not to be seen
        target = _checked_target(Path(os.path.expanduser(out)), folder, overwrite)
    partial = target.with_name(target.name + ".partial")
    checkpoint = Checkpoint(folder)
    job = _plan(
        checkpoint,
        bits=bits,
        group_size=group_size,
        mode=mode,
        dtype=dtype,
        recipe=recipe,
        dequantize=dequantize,
        calibrate=calibrate,
        target_bpw=target_bpw,
        on_event=on_event,
    )
    layout = stored_layout(job.units)
    key = _key(checkpoint, job, layout)
    _check_space(partial, layout)
    with alone(partial):
        writer = ShardWriter(
            partial,
            layout,
            key,
            metadata={"format": "pt" if job.layout == "hf" else "mlx"},
            limit=max_shard_bytes,
        )
        with contextlib.closing(writer):
            _stream(job, writer, on_event)
        writer.write_index(job.weights.size)
        write_json_atomic(partial / "config.json", job.config)
        copy_companions(folder, partial)
        result = Conversion(
            target,
            writer.tensor_bytes,
            job.weights.size,
            job.describe(),
            sorted(job.unpacked),
            job.calibration,
        )
        if verify:
            result.proof = prove(
                folder, partial, on_event=on_event, repacked=job.recipe is not None
            )
        write_card(partial, folder, str(source), revision, result)
        publish(partial, target, overwrite=overwrite)
    return result


@dataclass
class _Job:
    """A conversion before anything is read."""

    model: DecoderModel
    weights: WeightPlan
    units: list[Unit]
    layout: Layout
    config: dict[str, Any]
    recipe: Recipe | None
    calibration: Calibration | None
    unpacked: list[str]

    def describe(self) -> str:
        if self.recipe:
            return self.recipe.describe()
        return "packed as the source is" if "quantization" in self.config else "not packed"


def _plan(
    checkpoint: Checkpoint,
    *,
    bits: int | None,
    group_size: int,
    mode: str,
    dtype: str | None,
    recipe: str | Path | Mapping[str, int] | None,
    dequantize: bool,
    calibrate: str | Path | None,
    target_bpw: float | None,
    on_event: OnEvent | None,
) -> _Job:
    wanted = float_dtype(dtype)
    packing = bits is not None or recipe is not None or mode != "affine" or calibrate is not None
    if group_size != 64 and not packing:
        raise MlxtxError("--group-size alone packs nothing: give --bits or --recipe too")
    if dequantize and packing:
        raise MlxtxError("choose either --dequantize or a quantization, not both")
    if (calibrate is None) != (target_bpw is None):
        raise MlxtxError("--calibrate FILE and --target-bpw X belong together")
    if calibrate is not None and (bits is not None or recipe is not None or mode != "affine"):
        raise MlxtxError("--calibrate chooses the bits: leave out --bits, --recipe and --mode")
    model, plan = describe(checkpoint, unpack=packing or dequantize)
    layout: Layout = "hf" if dequantize else "mlx"
    config = plain_config(checkpoint.config)
    names = family_for(config).names(config)
    saving = names.plan_save({name: form.shape for name, form in plan.forms.items()}, layout)
    units = make_units(plan, saving, _cast(plan, wanted))
    chosen, calibration = None, None
    if calibrate is not None and target_bpw is not None:
        calibration = measure(
            checkpoint,
            Path(calibrate),
            target_bpw,
            group_size,
            scale_bits=8 * (wanted or _main_dtype(plan)).size,
            together=[original_modules(unit, one) for unit in units for one in unit.outputs],
            on_event=on_event,
        )
        chosen = calibration.recipe
    elif packing:
        chosen = make_recipe(
            recipe, bits=bits, group_size=group_size, mode=mode, layers=len(model.config.blocks)
        )
    unpacked = _choose(units, model, chosen) if chosen else []
    table = _table(units, chosen.default) if chosen else _kept_table(units, plan)
    if table:
        config["quantization"] = config["quantization_config"] = table
    if wanted is not None:
        said = next(name for name, dtype_ in FLOAT_DTYPES.items() if dtype_ == wanted)
        keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
        config |= dict.fromkeys(keys, said)
    return _Job(model, plan, units, layout, config, chosen, calibration, unpacked)


def _main_dtype(plan: WeightPlan) -> mx.Dtype:
    """The floating-point type that most of a checkpoint's numbers have."""
    sizes: Counter[mx.Dtype] = Counter()
    for form in plan.forms.values():
        if mx.issubdtype(form.dtype, mx.floating):
            sizes[form.dtype] += math.prod(form.shape)
    return sizes.most_common(1)[0][0] if sizes else mx.float32


def _cast(plan: WeightPlan, wanted: mx.Dtype | None) -> Callable[[mx.Dtype], mx.Dtype]:
    """The type to write: in a half-precision checkpoint, what is kept in float32 stays so."""
    main = _main_dtype(plan)

    def cast(dtype: mx.Dtype) -> mx.Dtype:
        if wanted is None or not mx.issubdtype(dtype, mx.floating):
            return dtype
        return dtype if dtype == mx.float32 and main != mx.float32 else wanted

    return cast


def _choose(units: list[Unit], model: DecoderModel, recipe: Recipe) -> list[str]:
    """Give every output its packing; returns the modules that a group does not divide."""
    modules = dict(model.named_modules())
    unfit = []
    for unit in units:
        for output in unit.outputs:
            ours = original_modules(unit, output)
            able = all(hasattr(modules.get(path), "to_quantized") for path in ours)
            if not output.name.endswith(".weight") or not able or len(output.form.shape) < 2:
                continue
            if any(path.endswith(NEVER_PACKED) for path in ours):
                continue
            quantization = recipe(output.module, *ours)
            if quantization and not quantization.fits(output.form.shape):
                unfit.append(output.module)
            elif quantization:
                output.quantization = quantization
    recipe.check_met()
    return unfit


def _table(units: list[Unit], default: Quantization) -> dict[str, Any] | None:
    packed = {
        output.module: output.quantization
        for unit in units
        for output in unit.outputs
        if output.quantization
    }
    different: dict[str, Quantization | None] = {k: q for k, q in packed.items() if q != default}
    return QuantizationTable(default, different).to_json()


def _kept_table(units: list[Unit], plan: WeightPlan) -> dict[str, Any] | None:
    """The packing of modules that stay packed, under their new names."""
    packed: dict[str, Quantization] = {}
    for unit in units:
        for output in unit.outputs:
            for path in original_modules(unit, output):
                if path in plan.quantizations and output.name.endswith(".scales"):
                    packed[output.module] = plan.quantizations[path]
        if any(not group.keeps_packing for group in unit.saves) and any(
            form_name.endswith(".scales") for group in unit.loads for form_name in group.targets
        ):
            raise MlxtxError(
                f"{unit.loads[0].sources[0]} cannot stay packed under its new name; "
                "give --bits or --dequantize"
            )
    if not packed:
        return None
    default = Counter(packed.values()).most_common(1)[0][0]
    different: dict[str, Quantization | None] = {k: q for k, q in packed.items() if q != default}
    return QuantizationTable(default, different).to_json()


def _stream(job: _Job, writer: ShardWriter, on_event: OnEvent | None) -> None:
    total = sum(unit.nbytes(job.weights) for unit in job.units)
    before = sum(job.units[n].nbytes(job.weights) for n in writer.done)
    started, done = time.monotonic(), before
    for number, unit in enumerate(job.units):
        if number in writer.done:
            continue
        for read in run_unit(unit, job.weights, writer):
            done += read
            if on_event:
                on_event(
                    Progress(
                        stage="convert",
                        done=done,
                        total=total,
                        unit="bytes",
                        # Time as if all of it had been done at this speed: what is left follows.
                        seconds=(time.monotonic() - started) * done / max(done - before, 1),
                        details={"tensor": unit.loads[0].sources[0]},
                    )
                )
        writer.finish_unit(number)


def _key(checkpoint: Checkpoint, job: _Job, layout: Mapping[str, Any]) -> str:
    """Two runs may share their half-done work only when all of this is the same."""
    stats = [(checkpoint.folder / file).stat() for file in checkpoint.files]
    what = {
        "versions": [version("mlxtx"), version("mlx")],
        "files": [
            [name, stat.st_size, stat.st_mtime_ns]
            for name, stat in zip(checkpoint.files, stats, strict=True)
        ],
        "layout": layout,
        "config": job.config,
        "units": [[list(load.sources) for load in unit.loads] for unit in job.units],
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def _check_space(partial: Path, layout: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    from mlxtx.checkpoint.safetensors import tensor_bytes

    needed = sum(tensor_bytes(*entry) for entry in layout.values()) + (64 << 20)
    have = sum(path.stat().st_blocks * 512 for path in partial.glob("*.safetensors"))
    place = partial.parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free + have
    if free < needed:
        raise MlxtxError(
            f"{partial.parent} has {free / 1e9:.2f} GB free and the result needs "
            f"{needed / 1e9:.2f} GB; free some space or choose another folder"
        )


def _checked_target(out: Path, source: Path, overwrite: bool) -> Path:
    target, origin = out.resolve(), source.resolve()
    if target == origin or target in origin.parents or origin in target.parents:
        raise MlxtxError(f"{out} and the source {source} lie in each other; choose another folder")
    partial, replaced = (target.with_name(target.name + end) for end in (".partial", ".replaced"))
    if any(one == origin or one in origin.parents for one in (partial, replaced)):
        raise MlxtxError(f"{source} is where work on {out} lies; choose another name for {out}")
    begun = journal_of(partial).exists()
    if not begun and (partial / "config.json").exists():  # which is written after the journal
        raise MlxtxError(
            f"{partial} is a model, and where work on {out} would lie; choose another name for {out}"
        )
    if not target.exists():
        return target
    if begun and not overwrite:
        raise MlxtxError(
            f"{out} exists, and an unfinished conversion beside it; pass --overwrite to go on"
        )
    if not overwrite:
        raise MlxtxError(f"{out} exists; choose another folder or pass --overwrite")
    if not (target / "config.json").is_file():
        raise MlxtxError(f"{out} is no model's folder, so it is not overwritten")
    return target
