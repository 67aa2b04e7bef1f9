"""Measures loading, prefill, decoding and memory, alone or side by side with mlx-lm.

    mlxtx bench --model path/or/hub-id --prompt-lengths 512,2048 --kv plain,k8v4g64
    mlxtx bench --random bfloat16 --against mlx-lm --peer-python path/to/python --rounds 5

Every round runs in a process of its own. With --against both engines do the same work in turns
(the order swaps every round), and each ratio is the median over the rounds of mlxtx divided by
mlx-lm. --random makes a Llama with random weights: 8 layers, width 512, 8 query and 2 key/value
heads, 32,000 tokens; with --config FILE it is the model of that config.json instead
(scripts/bench_experts.json is a mixture of experts). Set LD_PRELOAD before the command to give both sides the same BLAS.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlxtx.command_line import Parser
from mlxtx.errors import MlxtxError

RANDOM_MODEL = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
}
# Name in the table -> (key of a worker's answer, unit, divisor). Above the line: whole process.
PROCESS_FIGURES = {
    "load": ("load_seconds", "s", 1),
    "weights": ("weight_bytes", "MB", 1e6),
    "process peak": ("process_peak_bytes", "MB", 1e6),
}
CASE_FIGURES = {
    "first token": ("first_token_seconds", "s", 1),
    "prefill": ("prefill_tokens_per_second", "tokens/s", 1),
    "decode": ("decode_tokens_per_second", "tokens/s", 1),
    "peak": ("peak_bytes", "MB", 1e6),
}
STARTS = {
    "import": ("import mlxtx", "import mlx_lm"),
    "--help": ("from mlxtx.cli import main; main(['--help'])", "import mlx_lm"),
}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="mlxtx bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", "-m", metavar="PATH_OR_ID")
    parser.add_argument("--random", choices=["float32", "bfloat16", "float16", "4bit"])
    parser.add_argument("--config", type=Path, metavar="FILE", help="for --random")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"])
    parser.add_argument(
        "--prompt-lengths", default="512,2048", metavar="N,N", help="tokens (512,2048)"
    )
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="after each (64)")
    parser.add_argument(
        "--kv", default="plain", metavar="NAME,NAME", help="caches: k8v8g64 ... (plain)"
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(3)")
    parser.add_argument("--against", choices=["mlx-lm"])
    parser.add_argument(
        "--peer-python", default=sys.executable, metavar="PYTHON", help="has mlx-lm"
    )
    parser.add_argument("--startup", action="store_true", help="only the time to start")
    parser.add_argument("--json", action="store_true", help="every figure of every round")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    if args.rounds < 1 or args.new_tokens < 2:
        raise MlxtxError("--rounds must be 1 or more and --new-tokens 2 or more")
    if args.config and not args.random:
        raise MlxtxError("--config says what --random makes; give --random too")
    if args.model and args.random:
        raise MlxtxError("--random makes a model of its own; leave out --model")
    if args.dtype and args.against:
        raise MlxtxError(
            f"{args.against} takes the type of the checkpoint, so --dtype would measure two"
            " different models; convert it first (mlxtx convert --dtype)"
        )
    engines = ["mlxtx", *([args.against] if args.against else [])]
    result: dict[str, Any] = {"rounds": args.rounds}
    if args.against or args.startup:
        result["startup"] = startup_rounds(args)
    if not args.startup:
        with tempfile.TemporaryDirectory(prefix="mlxtx-bench-") as scratch:
            result |= {"cases": cases(args), "results": model_rounds(args, engines, scratch)}
    print(json.dumps(result) if args.json else table(result))
    return 0


def cases(args: argparse.Namespace) -> list[dict[str, Any]]:
    from mlxtx.cache.settings import parse_kv

    try:
        lengths = [int(text) for text in args.prompt_lengths.split(",")]
    except ValueError:
        raise MlxtxError(f"--prompt-lengths takes numbers, not {args.prompt_lengths}") from None
    if min(lengths) < 1:
        raise MlxtxError(f"--prompt-lengths must be 1 or more, not {min(lengths)}")
    for kv in args.kv.split(","):
        parse_kv(kv)
    return [
        {"prompt": length, "new": args.new_tokens, "kv": None if kv == "plain" else kv}
        for kv in args.kv.split(",")
        for length in lengths
    ]


def model_rounds(args: argparse.Namespace, engines: list[str], scratch: str) -> dict[str, Any]:
    """Engine -> its answer in every round."""
    folder = str(bench_model(args, Path(scratch)))
    answers: dict[str, list[Any]] = {engine: [] for engine in engines}
    for number in range(args.rounds):
        for engine in engines if number % 2 == 0 else reversed(engines):
            answers[engine].append(one_round(args, engine, folder))
    return answers


def bench_model(args: argparse.Namespace, scratch: Path) -> Path:
    from mlxtx.checkpoint import resolve

    if not args.random:
        if args.model:
            return resolve(args.model)
        from mlxtx.default_model import default_model

        return default_model()[0]
    kind = "bfloat16" if args.random == "4bit" else args.random
    folder = random_model(scratch / "model", kind, args.config)
    if args.random != "4bit":
        return folder
    from mlxtx import convert

    convert(folder, scratch / "model-4bit", bits=4, verify=False)
    return scratch / "model-4bit"


def random_model(folder: Path, kind: str, config_file: Path | None) -> Path:
    """A checkpoint with random weights of type ``kind``: the Llama, or what a config describes."""
    from mlxtx.tiny_model import write_tiny_model

    if config_file is None:
        return write_tiny_model(folder, torch_dtype=kind, **RANDOM_MODEL)
    import mlx.core as mx

    from mlxtx.decoder.model import DecoderModel
    from mlxtx.families import family_for
    from mlxtx.files import read_json_object
    from mlxtx.tuning.model_files import save_model

    config = read_json_object(config_file) | {"torch_dtype": kind}
    mx.random.seed(0)
    model = DecoderModel(family_for(config).decoder_config(config))
    model.set_dtype(getattr(mx, kind))
    save_model(model, config, folder)
    return folder


def one_round(args: argparse.Namespace, engine: str, folder: str) -> dict[str, Any]:
    """Runs the worker under the engine's interpreter; cases the engine cannot run are None."""
    job_cases = [for_engine(case, engine) for case in cases(args)]
    job = {
        "engine": engine,
        "model": folder,
        "dtype": args.dtype if engine == "mlxtx" else None,
        "cases": [case for case in job_cases if case],
    }
    python = sys.executable if engine == "mlxtx" else args.peer_python
    worker = Path(__file__).with_name("bench_worker.py")
    done = run([python, str(worker), json.dumps(job)], engine)
    answer = json.loads(done.splitlines()[-1])
    rows = iter(answer["cases"])
    answer["cases"] = [next(rows) if case else None for case in job_cases]
    return answer


def for_engine(case: dict[str, Any], engine: str) -> dict[str, Any] | None:
    """mlx-lm knows one number of bits for keys and values."""
    if engine == "mlxtx" or case["kv"] is None:
        return case
    same = re.fullmatch(r"k(\d)v\1g(\d+)", case["kv"])
    return {**case, "kv": {"bits": int(same[1]), "group": int(same[2])}} if same else None


def run(command: list[str], engine: str) -> str:
    # Code that is compiled anew at each start would be timed too, and only where modules load late.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env)
    except OSError as error:
        raise MlxtxError(f"cannot start {command[0]}: {error.strerror}") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        last = last.removeprefix("mlxtx.errors.MlxtxError: ")
        hint = ""
        if f"No module named '{engine.replace('-', '_')}'" in done.stderr:
            hint = f"; install {engine}, or name an interpreter that has it with --peer-python"
        raise MlxtxError(f"{engine} failed: {last}{hint}")
    return done.stdout


def startup_rounds(args: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """What -> (seconds of mlxtx, seconds of mlx-lm) a round, whole processes."""

    def seconds(python: str, code: str, engine: str) -> float:
        start = time.perf_counter()
        run([python, "-c", code], engine)
        return time.perf_counter() - start

    return {
        name: [
            (seconds(sys.executable, ours, "mlxtx"), seconds(args.peer_python, theirs, "mlx-lm"))
            for _ in range(max(3, args.rounds))
        ]
        for name, (ours, theirs) in STARTS.items()
    }


def table(result: dict[str, Any]) -> str:
    """Medians, and with two engines the median ratio of the pairs."""
    lines = []
    for name, pairs in result.get("startup", {}).items():
        ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        lines.append(
            f"start, {name:<9} {ours:.3f} s, import mlx_lm {theirs:.3f} s, ratio {ratio:.3f}"
        )
    results = result.get("results", {})
    if not results:
        return "\n".join(lines)
    engines = list(results)
    heads = [f"{engine:>12}" for engine in engines] + ["       ratio"] * (len(engines) > 1)
    lines.append(f"{'':<44}{''.join(heads)}")
    for name, (key, unit, scale) in PROCESS_FIGURES.items():
        values = [[answer[key] / scale for answer in results[engine]] for engine in engines]
        lines.append(row(f"{name} ({unit})", values))
    for index, case in enumerate(result["cases"]):
        head = f"{case['prompt']} + {case['new']} tokens, {case['kv'] or 'plain'}"
        for name, (key, unit, scale) in CASE_FIGURES.items():
            values = [
                [answer["cases"][index][key] / scale for answer in results[engine]]
                for engine in engines
                if results[engine][0]["cases"][index]
            ]
            lines.append(row(f"{head}: {name} ({unit})", values))
    return "\n".join(lines)


def row(name: str, values: list[list[float]]) -> str:
    cells = [f"{statistics.median(side):12.3f}" for side in values]
    if len(values) > 1:
        cells.append(f"{statistics.median(a / b for a, b in zip(*values, strict=True)):12.3f}")
    return f"{name:<44}{''.join(cells)}"


if __name__ == "__main__":
    from mlxtx.cli import run as run_command

    raise SystemExit(run_command(main, sys.argv[1:]))
