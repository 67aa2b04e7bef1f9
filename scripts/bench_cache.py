"""Memory, time to first token and decode speed with a plain and a quantized cache, beside mlx-lm.

    python scripts/bench_cache.py
    python scripts/bench_cache.py --peer-python ENV/bin/python --contexts 2048,4096,8192

Each run is a process of its own, mlxtx and the peer by turns in every round (``--repeat``), on a
small random Llama whose attention dominates (4 layers, 8 query and 2 key/value heads of 64). Peaks
are bytes above the weights, as MLX counts them. On a CPU give both sides the same BLAS
(LD_PRELOAD=libopenblas.so.0).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
CHUNK = 2048  # tokens of a prompt at a time, on both sides


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench_cache", description="Bench the KV cache, plain and quantized."
    )
    parser.add_argument("--contexts", default="2048,4096,8192", help="prompt lengths, in tokens")
    parser.add_argument("--kv", default="plain,k8v8g64,k4v4g64", help="cache settings")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to decode")
    parser.add_argument(
        "--repeat", type=int, default=1, help="rounds of all cases; medians are told"
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--peer-python", help="a Python with mlx-lm, to be measured by turns")
    parser.add_argument("--second-turn", type=int, metavar="N", help="a chat of N tokens, instead")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        print(json.dumps(WORKERS[args.worker](json.loads(sys.stdin.read()))))
        return 0
    if args.second_turn:
        sides, contexts, tokens = [("second turn", sys.executable)], [args.second_turn], 8
    else:
        sides = [("mlxtx", sys.executable)]
        sides += [("mlx-lm", args.peer_python)] if args.peer_python else []
        contexts, tokens = [int(n) for n in args.contexts.split(",")], args.tokens
    rows: list[dict[str, Any]] = []
    for context in contexts:
        cases = [
            (side, python, {"context": context, "kv": kv, "dtype": args.dtype, "tokens": tokens})
            for kv in args.kv.split(",")
            for side, python in sides
        ]
        rounds = [[measure(*case) for case in cases] for _ in range(args.repeat)]
        rows += [
            {"side": side, **case}
            | {key: statistics.median(r[key] for r in runs) for key in runs[0]}
            for (side, _, case), runs in zip(cases, zip(*rounds, strict=True), strict=True)
        ]
    print_table(rows)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


def measure(side: str, python: str, case: dict[str, Any]) -> dict[str, float]:
    """The figures of one run in a fresh process."""
    done = subprocess.run(
        [python, os.path.abspath(__file__), "--worker", side],
        input=json.dumps(case),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-2000:]}")
    figures = json.loads(done.stdout.splitlines()[-1])
    print(f"{side}: {case} {figures}", file=sys.stderr, flush=True)
    return figures


def print_table(rows: list[dict[str, Any]]) -> None:
    numbers = [key for key in rows[0] if key not in ("side", "context", "kv", "dtype", "tokens")]
    print("| | context | cache | " + " | ".join(numbers) + " |")
    print("|" + "---|" * (3 + len(numbers)))
    for row in rows:
        figures = " | ".join(f"{row[key]:.2f}" for key in numbers)
        print(f"| {row['side']} | {row['context']} | {row['kv']} | {figures} |")


def measure_mlxtx(case: dict[str, Any]) -> dict[str, float]:
    """One prompt and its continuation, greedy."""
    import mlx.core as mx

    from mlxtx.events import Prefill
    from mlxtx.generation.loop import token_steps
    from mlxtx.generation.sampling import Sampler, Sampling

    model, prompt = _random_model(case)
    cache = model.make_cache(case["kv"])
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    start = now()
    times = []
    sampler = Sampler(Sampling(), [prompt], SHAPE["vocab_size"])
    for step in token_steps(
        model,
        [prompt],
        cache=cache,
        sampler=sampler,
        max_tokens=case["tokens"] + 1,
        prefill_chunk=CHUNK,
    ):
        if not isinstance(step, Prefill):
            times.append(now())
    return _figures(times, start, mx.get_peak_memory() - before)


def measure_mlx_lm(case: dict[str, Any]) -> dict[str, float]:
    """The same by mlx-lm's own token loop."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.models.llama import Model, ModelArgs

    mx.random.seed(0)
    model = Model(ModelArgs.from_dict(SHAPE))
    model.set_dtype(getattr(mx, case["dtype"]))
    mx.eval(model.parameters())
    prompt = mx.random.randint(0, SHAPE["vocab_size"], (case["context"],))
    mx.eval(prompt)
    quantized = {}
    if case["kv"] != "plain":
        bits = int(case["kv"][1 : case["kv"].index("v")])
        quantized = {"kv_bits": bits, "kv_group_size": 64, "quantized_kv_start": 0}
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    start = now()
    times = []
    for _ in generate_step(
        prompt, model, max_tokens=case["tokens"] + 1, prefill_step_size=CHUNK, **quantized
    ):
        times.append(now())
    return _figures(times, start, mx.get_peak_memory() - before)


def measure_second_turn(case: dict[str, Any]) -> dict[str, float]:
    """A long first message, a short answer, and a second message of 32 tokens."""

    from mlxtx.events import Prefill
    from mlxtx.generation.loop import token_steps
    from mlxtx.generation.sampling import Sampler, Sampling
    from mlxtx.generation.session import Session

    model, prompt = _random_model(case)
    session = Session(model, case["kv"])
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        session.start(prompt)
        sampler = Sampler(Sampling(), [prompt], SHAPE["vocab_size"])
        first = None
        for step in token_steps(
            model,
            [prompt],
            cache=session.cache,
            sampler=sampler,
            max_tokens=case["tokens"],
            prefill_chunk=CHUNK,
        ):
            if isinstance(step, Prefill):
                continue
            first = first or time.perf_counter() - start
            session.tokens.append(step.tokens[0])
        seconds.append(first or 0.0)
        prompt = [*session.tokens, *_random_tokens(32)]
    return {
        "first turn s": seconds[0],
        "second turn s": seconds[1],
        "part": seconds[1] / seconds[0],
    }


def _random_model(case: dict[str, Any]) -> tuple[Any, list[int]]:
    import mlx.core as mx

    from mlxtx.decoder.model import DecoderModel
    from mlxtx.families import family_for

    mx.random.seed(0)
    model = DecoderModel(family_for(SHAPE).decoder_config(SHAPE))
    model.set_dtype(getattr(mx, case["dtype"]))
    mx.eval(model.parameters())
    return model, _random_tokens(case["context"])


def _random_tokens(count: int) -> list[int]:
    import mlx.core as mx

    tokens: Any = mx.random.randint(0, SHAPE["vocab_size"], (count,)).tolist()
    return tokens


def now() -> tuple[float, float]:
    """Seconds on the clock, and seconds that processors worked: the second is hardly disturbed by
    what else the machine does."""
    return time.perf_counter(), time.process_time()


def _figures(
    times: list[tuple[float, float]], start: tuple[float, float], peak: int
) -> dict[str, float]:
    count = len(times) - 1
    return {
        "peak MB": peak / 1e6,
        "first token s": times[0][0] - start[0],
        "decode tok/s": count / (times[-1][0] - times[0][0]),
        "first token cpu s": times[0][1] - start[1],
        "decode cpu ms/tok": 1e3 * (times[-1][1] - times[0][1]) / count,
    }


WORKERS = {
    "mlxtx": measure_mlxtx,
    "mlx-lm": measure_mlx_lm,
    "second turn": measure_second_turn,
}

if __name__ == "__main__":
    raise SystemExit(main())
