"""What ``mlxtx plan`` says of memory, beside what a prompt and a few tokens then take.

    python scripts/count_memory.py [--write]

Random models of a few shapes, each case in a process of its own: planned from the folder before the
weights are loaded, then loaded and fed a prompt in the chunks that the plan gives. Peaks are whole
(weights, cache and the moment), as MLX counts them. ``--write`` puts the table into docs/cache.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlxtx.scripts.bench_cache import SHAPE

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cache.md"
MODELS: dict[str, dict[str, Any]] = {
    "llama, 2 of 8 heads": {**SHAPE},
    "llama, 8 of 8 heads": {**SHAPE, "num_key_value_heads": 8},
    "llama, wide feed-forward": {
        **SHAPE, "hidden_size": 256, "intermediate_size": 4096, "head_dim": 32,
    },
    "qwen3, head norms": {**SHAPE, "model_type": "qwen3", "head_dim": 128},
    "mistral, window of 512": {**SHAPE, "model_type": "mistral", "sliding_window": 512},
    "llama, large vocabulary": {**SHAPE, "vocab_size": 32768},
}  # fmt: skip
CASES = [
    ("llama, 2 of 8 heads", 4096, "plain"),
    ("llama, 2 of 8 heads", 4096, "k4v4g64"),
    ("llama, 8 of 8 heads", 2048, "plain"),
    ("llama, 8 of 8 heads", 4096, "k8v4g64"),
    ("llama, wide feed-forward", 1024, "plain"),
    ("llama, wide feed-forward", 2048, "k3v3g32"),
    ("qwen3, head norms", 2048, "k8v8g32r"),
    ("mistral, window of 512", 4096, "k8v8g64"),
    ("llama, large vocabulary", 2048, "k4v4g32r"),
]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="count_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="update docs/cache.md")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        print(json.dumps(measure(*json.loads(options.worker))))
        return 0
    table = render([(case, in_a_process(case)) for case in CASES])
    print(table)
    if options.write:
        from mlxtx.scripts.count_traffic import replace_table

        replace_table("memory", table, PAGE)
    return 0


def in_a_process(case: tuple[str, int, str]) -> dict[str, int]:
    command = [sys.executable, os.path.abspath(__file__), "--worker", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case} failed:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    print(case, found, file=sys.stderr, flush=True)
    return found


def measure(name: str, context: int, kv: str) -> dict[str, int]:
    """Bytes planned and measured."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlxtx.checkpoint.loading import load_model
    from mlxtx.diagnostics.memory_plan import plan_memory
    from mlxtx.generation.loop import token_steps
    from mlxtx.generation.sampling import Sampler, Sampling

    config = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        save_random(config, Path(folder))
        mx.clear_cache()
        planned = plan_memory(folder, context=context, kv=kv)
        mx.reset_peak_memory()
        model, _ = load_model(folder)
    named: Any = tree_flatten(model.parameters())
    weights = sum(array.nbytes for _, array in named)
    cache = model.make_cache(kv)
    sampler = Sampler(Sampling(), [[0]], config["vocab_size"])
    prompt = [token % config["vocab_size"] for token in range(context - 8)]
    others = mx.get_active_memory() - weights  # what this command holds besides
    for _ in token_steps(
        model, [prompt], cache=cache, sampler=sampler, max_tokens=8,
        prefill_chunk=planned.prefill_chunk,
    ):  # fmt: skip
        pass
    return {
        "planned weights": planned.weights,
        "weights": weights,
        "planned cache": planned.cache,
        "cache": cache.nbytes,
        "planned peak": planned.total,
        "peak": mx.get_peak_memory() - others,
    }


def save_random(config: dict[str, Any], folder: Path) -> None:
    """A checkpoint of random weights in float32."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlxtx.decoder.model import DecoderModel
    from mlxtx.families import family_for

    mx.random.seed(0)
    model = DecoderModel(family_for(config).decoder_config(config))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(config))


def render(rows: list[tuple[tuple[str, int, str], dict[str, int]]]) -> str:
    lines = [
        "| model | context | cache | weights, MB | cache, MB | planned peak, MB | measured | error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (name, context, kv), found in rows:
        for part in ("weights", "cache"):
            assert found[f"planned {part}"] == found[part], (name, kv, part, found)
        planned, peak = found["planned peak"], found["peak"]
        lines.append(
            f"| {name} | {context} | {kv} | {found['weights'] / 1e6:.2f} | "
            f"{found['cache'] / 1e6:.2f} | {planned / 1e6:.1f} | {peak / 1e6:.1f} | "
            f"{100 * (planned / peak - 1):+.0f} % |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
