"""Records what mlx-lm writes for the parity checkpoints: names, types, shapes, checksums.

    python tests/checkpoint/make_mlx_lm_layouts.py     # needs mlx-lm; writes mlx_lm_layouts.json.gz

For one checkpoint of each family that mlx-lm loads: the plain layout, and packed with 4 bits in
groups of 32. The suite converts the same checkpoints and compares.
"""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
import zlib
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import load_model, quantize_model, save_model

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "parity"))

from recipe import Fixture, fixture_names  # noqa: E402


def layout(folder: Path) -> dict[str, list]:
    found = {}
    for name, array in mx.load(str(folder / "model.safetensors")).items():
        data = bytes(memoryview(mx.contiguous(array.reshape(-1)).view(mx.uint8)))
        found[name] = [str(array.dtype).rpartition(".")[2], list(array.shape), zlib.crc32(data)]
    return found


def main() -> None:
    recorded: dict[str, dict] = {}
    seen: set[str] = set()
    for name in fixture_names():
        fixture = Fixture.load(name)
        if fixture.model_type in seen:
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            fixture.write_checkpoint(path / "source", legacy=True)
            try:
                model, config = load_model(path / "source")
                save_model(path / "plain", model)
                model, _ = quantize_model(model, config, 32, 4)
                save_model(path / "packed", model)
            except (Exception, SystemExit) as error:
                print(f"{name}: mlx-lm cannot ({type(error).__name__})")
                continue
            seen.add(fixture.model_type)
            recorded[name] = {"plain": layout(path / "plain"), "packed": layout(path / "packed")}
    text = json.dumps(recorded, separators=(",", ":"))
    (HERE / "mlx_lm_layouts.json.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    print(f"{len(recorded)} checkpoints")


if __name__ == "__main__":
    main()
