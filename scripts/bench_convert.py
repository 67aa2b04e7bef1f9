"""Measures conversions: time and memory beside mlx-lm's, and that a kill changes nothing.

    python scripts/bench_convert.py --peer PYTHON     16 layers, about 1 GB, to 4 bits; PYTHON has mlx-lm
    python scripts/bench_convert.py --gigabytes 6 --layers 40      ours alone, with the proof
    python scripts/bench_convert.py --kill 20                      killed at random, run again
    python scripts/bench_convert.py --matmul                       what the CPU layers rest on

Both sides run in processes of their own, in turns, on a random Llama-like checkpoint; what is
printed is the median of the rounds. Give both the same BLAS (LD_PRELOAD), and the peer an
environment without torch, whose import would be counted as mlx-lm's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OURS = """
import json, sys, time
started = time.perf_counter()
from mlxtx.checkpoint.convert import convert
result = convert(sys.argv[1], sys.argv[2], bits=4, verify=sys.argv[3] == "proof")
seconds = time.perf_counter() - started
lines = result.proof.lines() if result.proof else []
"""
THEIRS = """
import json, sys, time
started = time.perf_counter()
from mlx_lm.convert import convert
convert(sys.argv[1], mlx_path=sys.argv[2], quantize=True)
seconds, lines = time.perf_counter() - started, []
"""
TAIL = """
import resource
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print("RESULT", json.dumps({"seconds": seconds, "peak": peak, "lines": lines}))
"""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="bench_convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--peer", metavar="PYTHON", help="an interpreter that has mlx-lm")
    made.add_argument("--gigabytes", type=float, default=1.0, help="size of the checkpoint (1)")
    made.add_argument("--layers", type=int, default=16)
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--kill", type=int, metavar="N", help="kill the conversion N times")
    made.add_argument("--matmul", action="store_true", help="only time products on this CPU")
    made.add_argument("--folder", help="where checkpoints are made (a temporary folder)")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.matmul:
        return matmul()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source = Path(folder) / "source"
        make_checkpoint(source, args.gigabytes, args.layers)
        if args.kill:
            return kill(source, Path(folder), args.kill)
        return paired(source, Path(folder), args.peer, args.rounds)


def paired(source: Path, folder: Path, peer: str | None, rounds: int) -> int:
    cases = [
        ("mlxtx", sys.executable, OURS, "plain"),
        ("mlxtx, proof", sys.executable, OURS, "proof"),
    ]
    if peer:
        cases.append(("mlx-lm", peer, THEIRS, ""))
    found: dict[str, list[dict[str, Any]]] = {name: [] for name, *_ in cases}
    for _ in range(rounds):
        for name, python, script, option in cases:
            found[name].append(run(python, script, source, folder / "out", option))
    for name, results in found.items():
        seconds = statistics.median(result["seconds"] for result in results)
        peak = statistics.median(result["peak"] for result in results)
        print(f"{name:14s} {seconds:7.2f} s   peak {peak / 1e6:7.0f} MB")
    for line in found["mlxtx, proof"][-1]["lines"]:
        print(f"  {line}")
    return 0


def run(python: str, script: str, source: Path, out: Path, option: str) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    command = [python, "-c", script + TAIL, str(source), str(out), option]
    done = subprocess.run(command, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    raise SystemExit(f"{python} failed:\n{done.stderr[-2000:]}")


def kill(source: Path, folder: Path, times: int) -> int:
    """Kill the same conversion at random moments; the result must be that of an undisturbed one."""
    started = time.perf_counter()
    run(sys.executable, OURS, source, folder / "whole", "proof")
    whole = time.perf_counter() - started
    out, killed = folder / "out", 0
    chance = random.Random(3)
    while killed < times:
        command = [sys.executable, "-c", OURS, str(source), str(out), "proof"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(chance.uniform(0.3, whole))
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
        if out.exists():
            if digest(out) != digest(folder / "whole"):
                print(f"after {killed} kills: the result differs")
                return 1
            shutil.rmtree(out)
    command = [sys.executable, "-c", OURS, str(source), str(out), "proof"]
    subprocess.run(command, check=True)
    same = digest(out) == digest(folder / "whole")
    print(
        f"killed {killed} times: the result is {'the same, byte for byte' if same else 'DIFFERENT'}"
    )
    return 0 if same else 1


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def make_checkpoint(folder: Path, gigabytes: float, layers: int) -> None:
    """A random bfloat16 checkpoint like Llama's with 32,000 tokens, written tensor by tensor."""
    import numpy as np

    from mlxtx.checkpoint.safetensors import encode_header
    from mlxtx.tiny_model import tiny_tokenizer

    # Attention of 2.5 and a feed-forward of 8 squares of the width a layer, two tables of tokens.
    target, vocabulary = gigabytes * 5e8, 32_000
    width = 128
    while layers * 10.5 * width**2 + 2 * vocabulary * width < target:
        width += 128
    heads = width // 128
    kv = 128 * (heads // 4 if heads % 4 == 0 else 1)
    inner = int(width * 8 / 3) // 128 * 128
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + f"{norm}_layernorm.weight": (width,) for norm in ("input", "post_attention")
        }
        shapes |= {layer + f"self_attn.{p}_proj.weight": (kv, width) for p in "kv"}
        shapes |= {layer + f"self_attn.{p}_proj.weight": (width, width) for p in "qo"}
        shapes |= {layer + f"mlp.{p}_proj.weight": (inner, width) for p in ("gate", "up")}
        shapes[layer + "mlp.down_proj.weight"] = (width, inner)
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}
    folder.mkdir(parents=True)
    chance = np.random.default_rng(0)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(encode_header({name: ("BF16", shape) for name, shape in shapes.items()}))
        for name, shape in shapes.items():
            scale = 0.1 if "norm" in name else shape[-1] ** -0.5
            for start in range(0, int(np.prod(shape)), 1 << 22):
                count = min(1 << 22, int(np.prod(shape)) - start)
                values = scale * chance.standard_normal(count, dtype=np.float32) + ("norm" in name)
                (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tofile(file)
    config = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv // 128,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    size = (folder / "model.safetensors").stat().st_size
    print(f"{layers} layers of width {width}: {size / 1e9:.2f} GB", flush=True)


def matmul() -> int:
    """Milliseconds of x [M, I] times W [O, I] transposed, by how W is stored and multiplied."""
    import mlx.core as mx

    def best(job: Any) -> float:
        times = []
        for _ in range(6):
            started = time.perf_counter()
            mx.eval(job())
            times.append(time.perf_counter() - started)
        return 1000 * min(times)

    rows, columns = 1408, 512
    weight = mx.random.normal((rows, columns)) * 0.02
    half = weight.astype(mx.bfloat16)
    wide, narrow = mx.quantize(weight, 64, 4), mx.quantize(half, 64, 4)
    mx.eval(weight, half, wide, narrow)
    print("M     float32  exchanged  bfloat16  widened  4 bit f32  4 bit bf16  unpacked")
    for count in (1, 4, 16, 64, 512):
        x = mx.random.normal((count, columns))
        y = x.astype(mx.bfloat16)
        mx.eval(x, y)
        times = [
            best(lambda x=x: x @ weight.T),
            best(lambda x=x: (weight @ mx.contiguous(x.T)).T),
            best(lambda y=y: y @ half.T),
            best(lambda y=y: y.astype(mx.float32) @ half.astype(mx.float32).T),
            best(lambda x=x: mx.quantized_matmul(x, *wide)) if count <= 64 else float("nan"),
            best(lambda y=y: mx.quantized_matmul(y, *narrow)) if count <= 16 else float("nan"),
            best(lambda x=x: x @ mx.dequantize(*wide).T),
        ]
        print(f"{count:<5d} " + "  ".join(f"{t:8.2f}" for t in times), flush=True)
    return 0


if __name__ == "__main__":
    from mlxtx.cli import run as run_command

    sys.exit(run_command(lambda rest: main(rest), sys.argv[1:]))
