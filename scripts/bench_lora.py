"""Fine-tuning against mlx-lm's: the same losses, speed, memory, and what fusing keeps.

    python scripts/bench_lora.py --peer-python /path/to/python/with/mlx-lm
    python scripts/bench_lora.py --only curve --steps 50

Every measurement runs in a process of its own, ours and the peer's in turns, on a model with
random weights that both read from the same folder. Give both the same BLAS (LD_PRELOAD).
Without --peer-python only our own lines are measured.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Spec = dict[str, Any]
PARTS = ("curve", "mixed", "single", "fuse")


# The two sides. Each takes a spec and gives its figures; only one of them is importable where
# it runs, so imports stand inside.


def train_ours(spec: Spec) -> dict[str, Any]:
    import mlx.core as mx

    from mlxtx.checkpoint import load_model
    from mlxtx.tuning.finetune import Method, prepare
    from mlxtx.tuning.samples import sample
    from mlxtx.tuning.settings import Training
    from mlxtx.tuning.trainer import Trainer

    model, _ = load_model(spec["model"], unpack=False)
    prepare(model, Method(adapter=spec["adapter"]))
    settings = Training(
        iters=spec["steps"],
        batch_size=spec["batch_size"],
        learning_rate=spec["learning_rate"],
        schedule="constant",
        optimizer="adam",
        optimizer_options={"bias_correction": False},
        clip=0.0,
        packing=spec.get("packing", True),
        shuffle=spec.get("shuffle", False),
        report_every=1,
        save_every=0,
    )
    samples = [sample(tokens) for tokens in spec["samples"]]
    losses, times, work = [], [], []

    def on_event(event: Any) -> None:
        losses.append(event.details["loss"])
        times.append(time.perf_counter())
        work.append(time.process_time())
        if len(times) == spec["warm"]:
            mx.reset_peak_memory()

    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(model, samples, settings, out, write=lambda _: None, on_event=on_event)
        started = time.perf_counter()
        trainer.run()
    return figures(spec, losses, [started, *times], work, mx.get_peak_memory())


def train_peer(spec: Spec) -> dict[str, Any]:
    import mlx.core as mx
    import mlx.optimizers as optim
    import numpy as np
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.trainer import TrainingArgs, iterate_batches, train
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(spec["model"]))
    model.freeze()
    load_adapters(model, spec["adapter"])
    losses, times, work = [], [], []

    class Report(TrainingCallback):
        def on_train_loss_report(self, info: dict) -> None:
            losses.append(info["train_loss"])
            times.append(time.perf_counter())
            work.append(time.process_time())
            if len(times) == spec["warm"]:
                mx.reset_peak_memory()

    class Tokens:
        """The samples in the form that the trainer reads."""

        def __init__(self, rows: list) -> None:
            self.rows = rows

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, index: int) -> tuple:
            return (self.rows[index], 0)

    def in_order(dataset: Any, batch_size: int, max_seq_length: int, **_: Any):
        """The batches of the other side; by default the trainer sorts by length."""
        while True:
            for start in range(0, len(dataset), batch_size):
                rows = [dataset[i][0] for i in range(start, start + batch_size)]
                width = 1 + 32 * -(-max(map(len, rows)) // 32)
                batch = np.zeros((batch_size, width), np.int32)
                for n, row in enumerate(rows):
                    batch[n, : len(row)] = row
                yield mx.array(batch), mx.array([(0, len(row)) for row in rows])

    with tempfile.TemporaryDirectory() as out:
        settings = TrainingArgs(
            batch_size=spec["batch_size"],
            iters=spec["steps"],
            steps_per_report=1,
            steps_per_save=10**9,
            max_seq_length=4096,
            adapter_file=f"{out}/adapters.safetensors",
        )
        started = time.perf_counter()
        train(
            model,
            optim.Adam(learning_rate=spec["learning_rate"]),
            Tokens(spec["samples"]),
            None,
            args=settings,
            iterate_batches=in_order if spec.get("in_order") else iterate_batches,
            training_callback=Report(),
        )
    return figures(spec, losses, [started, *times], work, mx.get_peak_memory())


def figures(spec: Spec, losses: list, times: list, work: list, peak: int) -> dict[str, Any]:
    """Steps behind the warm ones are whole passes over the samples, so that both sides have
    computed the same real tokens."""
    warm, steps = spec["warm"], spec["steps"]
    per_pass = sum(len(row) - 1 for row in spec["samples"])
    passes = (steps - warm) * spec["batch_size"] / len(spec["samples"])
    seconds = times[-1] - times[warm]
    return {
        "losses": losses,
        "tokens_per_second": per_pass * passes / seconds,
        # On a machine that has other work too, seconds of its processors say more than the clock.
        "tokens_per_cpu_second": per_pass * passes / (work[-1] - work[warm - 1]),
        "first_step_seconds": times[1] - times[0],
        "seconds": times[-1] - times[0],
        "peak_bytes": peak,
    }


def fuse_ours(spec: Spec) -> dict[str, Any]:
    from mlxtx.errors import MlxtxError
    from mlxtx.tuning.fuse import fuse

    found: dict[str, Any] = {}
    for name, options in spec["ways"].items():
        try:
            report = fuse(
                spec["model"],
                spec["adapter"],
                f"{spec['out']}/{name.replace(' ', '-')}",
                data=spec["data"],
                **options,
            )
            found[name] = report.to_json()
        except MlxtxError as error:
            found[name] = {"refused": str(error)}
    return found


def fuse_peer(spec: Spec) -> dict[str, Any]:
    """mlx-lm's own fuse into the packed base, its result evaluated by ``evaluate_ours``."""
    from mlx.utils import tree_unflatten
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model, save_config, save_model

    model, config = load_model(Path(spec["model"]))
    load_adapters(model, spec["adapter"])
    layers = [(n, m.fuse(dequantize=False)) for n, m in model.named_modules() if hasattr(m, "fuse")]
    model.update_modules(tree_unflatten(layers))
    out = Path(spec["out"])
    out.mkdir(parents=True, exist_ok=True)
    save_model(out, model)
    save_config(config, config_path=out / "config.json")
    return {"layers": len(layers)}


def evaluate_ours(spec: Spec) -> dict[str, Any]:
    from mlxtx.checkpoint import load_model
    from mlxtx.language_model import LanguageModel
    from mlxtx.text.tokenizer import Tokenizer
    from mlxtx.tuning.adapters import load_adapter
    from mlxtx.tuning.evaluate import evaluate_samples, held_out

    model, config = load_model(spec["model"])
    if spec.get("adapter"):
        load_adapter(model, spec["adapter"], config)
    language_model = LanguageModel(model, Tokenizer.load(Path(spec["tokenizer"])), config)
    return {"loss": evaluate_samples(model, held_out(language_model, spec["data"])).loss}


def tune_ours(spec: Spec) -> dict[str, Any]:
    import mlxtx

    result = mlxtx.tune(spec["model"], spec["data"], spec["out"], **spec["options"])
    return {"loss": result.loss}


WORKERS: dict[str, Callable[[Spec], dict[str, Any]]] = {
    function.__name__: function
    for function in (train_ours, train_peer, fuse_ours, fuse_peer, evaluate_ours, tune_ours)
}


class Bench:
    def __init__(self, peer: str | None, folder: Path):
        self.peer, self.folder = peer, folder
        self.results: dict[str, Any] = {}

    def run(self, worker: str, spec: Spec) -> dict[str, Any]:
        path = self.folder / "spec.json"
        path.write_text(json.dumps(spec))
        python = self.peer if worker.endswith("_peer") else sys.executable
        done = subprocess.run(
            [str(python), __file__, "--worker", worker, str(path)],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        if done.returncode:
            raise SystemExit(f"{worker} failed:\n{done.stderr[-3000:]}")
        return json.loads(done.stdout.splitlines()[-1])


# Models and data


def make_models(folder: Path, args: argparse.Namespace) -> dict[str, str]:
    """A Llama with random weights, the same in 4 bits, and an adapter to start from."""
    import mlx.core as mx
    import mlx.nn as nn

    from mlxtx.checkpoint import load_model
    from mlxtx.tiny_model import write_tiny_model
    from mlxtx.tuning.adapters import adapter_of, save_adapter
    from mlxtx.tuning.finetune import Method, prepare
    from mlxtx.tuning.model_files import save_model

    plain = write_tiny_model(
        folder / "f32",
        hidden_size=args.width,
        intermediate_size=args.width * 3,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        num_key_value_heads=max(1, args.width // 128),
        vocab_size=args.vocabulary,
        tie_word_embeddings=True,
    )
    model, config = load_model(plain)
    # As large as after training: the head is the embedding, and its logits are near 1.
    rows = model.model.embed_tokens.weight
    model.model.embed_tokens.weight = rows * (1 / float(mx.linalg.norm(rows, axis=1).mean()))
    save_model(model, config, plain)
    prepare(model, Method(rank=8))
    save_adapter(adapter_of(model), folder / "adapter", args.layers)
    model, config = load_model(plain)
    nn.quantize(model, group_size=64, bits=4)
    save_model(model, config, folder / "q4", plain)
    return {name: str(folder / name) for name in ("f32", "q4")}


def mixed_samples(count: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Lengths as chats have them: most short, a few long (24 to 400 tokens)."""
    chance = random.Random(seed)
    lengths = [min(400, max(24, int(chance.lognormvariate(4.6, 0.8)))) for _ in range(count)]
    return [[chance.randrange(1, vocabulary) for _ in range(n)] for n in lengths]


# The parts


def curve(bench: Bench, models: dict[str, str], args: argparse.Namespace) -> None:
    """Each step's loss from the same adapter, batches and settings. mlx-lm counts one token of
    padding behind each sample as a target (token 0), so here our samples end with it."""
    rows = mixed_samples(args.batch_size * 4, args.vocabulary, seed=1)
    spec = {
        "model": models["f32"],
        "adapter": str(bench.folder / "adapter"),
        "steps": args.steps,
        "warm": 1,
        "batch_size": args.batch_size,
        "learning_rate": 1e-3,
        "in_order": True,
    }
    ours = bench.run("train_ours", {**spec, "samples": [[*row, 0] for row in rows]})["losses"]
    print(f"curve: {len(ours)} steps, loss {ours[0]:.4f} to {ours[-1]:.4f}")
    if bench.peer:
        theirs = bench.run("train_peer", {**spec, "samples": rows})["losses"]
        gaps = [abs(a - b) / b for a, b in zip(ours, theirs, strict=True)]
        worst = max(gaps)
        print(
            f"curve: mlx-lm {theirs[0]:.4f} to {theirs[-1]:.4f}; largest gap {worst:.4%} of a loss"
        )
        bench.results["curve"] = {"ours": ours, "mlx_lm": theirs, "largest_gap": worst}


def speed(
    bench: Bench, title: str, spec: Spec, repeats: int, ways: dict[str, tuple[str, Spec]]
) -> None:
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for _ in range(repeats):  # in turns, so that the machine's mood hits all alike
        for name, (worker, changes) in ways.items():
            if worker.endswith("_peer") and not bench.peer:
                continue
            found[name].append(bench.run(worker, {**spec, **changes}))
    rows = {}
    for name, runs in found.items():
        if not runs:
            continue
        rows[name] = {
            "tokens_per_second": statistics.median(r["tokens_per_second"] for r in runs),
            "tokens_per_cpu_second": statistics.median(r["tokens_per_cpu_second"] for r in runs),
            "all": [round(r["tokens_per_second"], 1) for r in runs],
            "peak_bytes": max(r["peak_bytes"] for r in runs),
            "first_step_seconds": statistics.median(r["first_step_seconds"] for r in runs),
        }
        row = rows[name]
        print(
            f"{title:<22} {name:<24} {row['tokens_per_second']:>8,.0f} real tokens/s {row['all']}  "
            f"{row['tokens_per_cpu_second']:,.0f} a CPU second  "
            f"peak {row['peak_bytes'] / 1e6:,.0f} MB  first step {row['first_step_seconds']:.1f} s"
        )
    bench.results[title] = rows
    if "mlx-lm" in rows and "ours" in rows:
        ours, theirs = rows["ours"], rows["mlx-lm"]
        print(
            f"{title:<22} ours is {ours['tokens_per_second'] / theirs['tokens_per_second']:.2f} times"
            f" mlx-lm's speed ({ours['tokens_per_cpu_second'] / theirs['tokens_per_cpu_second']:.2f}"
            f" by CPU time) with {ours['peak_bytes'] / theirs['peak_bytes']:.2f} times its memory"
        )


def mixed(bench: Bench, models: dict[str, str], args: argparse.Namespace) -> None:
    count = args.batch_size * args.batches
    for name in args.bases:
        spec = {
            "model": models[name],
            "adapter": str(bench.folder / "adapter"),
            "samples": mixed_samples(count, args.vocabulary),
            "batch_size": args.batch_size,
            "warm": args.batches,
            "steps": args.batches * 2,
            "learning_rate": 1e-4,
        }
        ways = {
            "ours": ("train_ours", {}),
            "mlx-lm": ("train_peer", {}),
            "ours, padded, unsorted": ("train_ours", {"packing": False}),
        }
        speed(bench, f"mixed lengths, {name}", spec, args.repeats, ways)


def single(bench: Bench, models: dict[str, str], args: argparse.Namespace) -> None:
    chance = random.Random(2)
    for name in args.bases:
        spec = {
            "model": models[name],
            "adapter": str(bench.folder / "adapter"),
            "samples": [
                [chance.randrange(1, args.vocabulary) for _ in range(256)] for _ in range(4)
            ],
            "batch_size": 1,
            "warm": 4,
            "steps": 12,
            "learning_rate": 1e-4,
        }
        ways: dict[str, Any] = {"ours": ("train_ours", {}), "mlx-lm": ("train_peer", {})}
        speed(bench, f"1 of 256 tokens, {name}", spec, args.repeats, ways)


def fusing(bench: Bench, models: dict[str, str], args: argparse.Namespace) -> None:
    """An adapter trained on the 4-bit base, fused into it by both."""
    folder, chance = bench.folder, random.Random(3)
    words = ("lamp", "table", "window", "roof", "cat", "river", "bridge", "road")
    lines = []
    for _ in range(48):
        a, b = chance.sample(words, 2)
        lines.append(
            {"prompt": f"the {a}", "completion": f"The {a} is near the {b}, said the cat."}
        )
    for name, part in (("train", lines[:36]), ("held-out", lines[36:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in part))
    held = str(folder / "held-out.jsonl")
    for title, rate, iters in (("short run", 2e-4, 20), ("long run", 2e-3, 60)):
        adapter = str(folder / f"adapter {title}")
        options = {"iters": iters, "learning_rate": rate}
        bench.run(
            "tune_ours",
            {
                "model": models["q4"],
                "data": str(folder / "train.jsonl"),
                "out": adapter,
                "options": options,
            },
        )
        ways = {"same bits": {"force": True}, "unless lost": {}, "bits auto": {"bits": "auto"}}
        ways["dequantized"] = {"dequantize": True}
        spec = {"model": models["q4"], "adapter": adapter, "data": held, "ways": ways}
        found = bench.run("fuse_ours", {**spec, "out": str(folder / f"fused {title}")})
        first = found["same bits"]
        base, tuned = first["base_loss"], first["adapter_loss"]
        print(f"fuse, {title}: held-out loss {base:.4f} without, {tuned:.4f} with the adapter")
        for name, row in found.items():
            if "refused" in row:
                print(f"fuse, {title}: ours, {name:<12} refused: nothing written")
            else:
                print(
                    f"fuse, {title}: ours, {name:<12} {row['fused_loss']:.4f}, "
                    f"improvement left {(base - row['fused_loss']) / (base - tuned):.1%}"
                    + ("" if row["bits"] is None else f", {row['bits']} bits")
                )
        if bench.peer:
            out = str(folder / f"peer {title}")
            bench.run("fuse_peer", {"model": models["q4"], "adapter": adapter, "out": out})
            loss = bench.run(
                "evaluate_ours", {"model": out, "tokenizer": models["q4"], "data": held}
            )["loss"]
            left = (base - loss) / (base - tuned)
            print(
                f"fuse, {title}: mlx-lm             {loss:.4f}, improvement left {left:.1%}, written"
            )
            found["mlx_lm"] = {"fused_loss": loss, "left": left}
        bench.results[f"fuse, {title}"] = found


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--peer-python", metavar="PYTHON", help="an interpreter that has mlx-lm")
    made.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    made.add_argument("--bases", nargs="+", choices=["f32", "q4"], default=["f32", "q4"])
    made.add_argument("--width", type=int, default=384)
    made.add_argument("--layers", type=int, default=6)
    made.add_argument("--vocabulary", type=int, default=8192)
    made.add_argument("--batch-size", type=int, default=4)
    made.add_argument("--batches", type=int, default=8, help="batches in a pass over the samples")
    made.add_argument("--steps", type=int, default=50, help="steps of the loss curve")
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--json", metavar="FILE", help="write all figures there")
    made.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.worker:
        name, spec = args.worker
        print(json.dumps(WORKERS[name](json.loads(Path(spec).read_text()))))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args.peer_python, Path(folder))
        models = make_models(Path(folder), args)
        parts = {"curve": curve, "mixed": mixed, "single": single, "fuse": fusing}
        for name in args.only:
            parts[name](bench, models, args)
        if args.json:
            Path(args.json).write_text(json.dumps(bench.results, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
