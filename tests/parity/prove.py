"""Compares every case with transformers and writes down what is proven.

    python tests/parity/prove.py            # all cases -> mlxtx/families/proven.json
    python tests/parity/prove.py --only phi3 --seed 5 --heads 6 --window 9
    python tests/parity/prove.py --random 3 # three rounds of sizes drawn at random
    python tests/parity/prove.py --random 3 --vary   # and of switches, windows, scalings ...

Needs an environment in which mlxtx is installed and torch and transformers as well. Without sizes the recorded
fixtures are used; with sizes the cases are built anew and nothing is written down. Everything runs
through what users call: `mlxtx.load_model` reads the checkpoint, both generations of its config,
and what `save_model` writes under the family's own names is loaded in transformers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import make_fixtures
import mlx.core as mx
import numpy as np
import running
import torch
import transformers
from cases import CASES, Sizes
from recipe import Fixture, fixture_names
from transformers import AutoConfig
from vary import varied

from mlxtx import load_model
from mlxtx.families import families, family_for
from mlxtx.tuning.model_files import save_model

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from scripts.families import made_of  # noqa: E402

RESULTS = ROOT / "mlxtx" / "families" / "proven.json"
TOLERANCE = 3e-4


def prove(fixture: Fixture) -> dict[str, Any]:
    """The largest error of each way of feeding, in standard deviations of the logits."""
    arrays = fixture.arrays
    spread = float(arrays["logits_long"].std())
    long, short = arrays["tokens_long"], arrays["tokens_short"]

    def off(got: np.ndarray, expected: str = "logits_long") -> float:
        return float(np.abs(got - arrays[expected]).max()) / spread

    with tempfile.TemporaryDirectory() as folder:
        model, config = load_model(fixture.write_checkpoint(Path(folder) / "v5"), "float32")
        old, _ = load_model(fixture.write_checkpoint(Path(folder) / "old", True), "float32")
        save_model(model, config, Path(folder) / "saved")
        again = make_fixtures.load(Path(folder) / "saved")
        reloaded = max(
            off(make_fixtures.whole(again, arrays[f"tokens_{tag}"]), f"logits_{tag}")
            for tag in ("long", "short")
        )
    padded = running.left_padded(model, [long, short])
    steps = "logits_steps" if "logits_steps" in arrays else "logits_long"
    result = {
        "whole": max(
            off(running.whole(model, long)), off(running.whole(model, short), "logits_short")
        ),
        "steps": off(running.in_pieces(model, long, [1] * len(long)), steps),
        "chunks": off(running.in_pieces(model, long, running.CHUNKS, len(long))),
        "padded": max(off(padded[0]), off(padded[1], "logits_short")),
        "legacy": max(
            off(running.whole(old, long)), off(running.whole(old, short), "logits_short")
        ),
        "reloaded": reloaded,
    }
    if "logits_ahead" in arrays:
        tokens = mx.array(long)[None]
        logits, _ = model.predict_ahead(model.hidden(tokens)[:, :-1], tokens[:, 1:])
        result["ahead"] = off(np.array(logits)[0], "logits_ahead")
    result = {way: float(f"{error:.2g}") for way, error in result.items()}
    result["made_of"] = made_of([model.config])
    for tag, prompt in (("long", long), ("short", short)):
        expected, margins = arrays[f"greedy_{tag}"], arrays[f"margin_{tag}"]
        (new,) = running.greedy(model, [prompt], len(expected))
        miss = running.greedy_misses(new, expected, margins, TOLERANCE * spread)
        if miss is not None:
            result["greedy_miss"] = f"{tag} token {miss}"
    return result


def broken(result: dict[str, Any]) -> list[str]:
    errors = {way: error for way, error in result.items() if isinstance(error, float)}
    over = [f"{way} {error:.1e}" for way, error in errors.items() if error > TOLERANCE]
    return over + ([result["greedy_miss"]] if "greedy_miss" in result else [])


def drawn(rng: random.Random) -> Sizes:
    """Sizes no fixture has; head counts that divide, windows and contexts of any length."""
    kv_heads = rng.choice([1, 2, 3, 4])
    heads = kv_heads * rng.choice([1, 2, 3])
    size = rng.choice([8, 16, 24, 32])
    return Sizes(
        vocab=rng.choice([97, 128, 200]),
        hidden=heads * size,
        intermediate=rng.choice([48, 96, 130]),
        layers=rng.choice([2, 4, 6]),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=rng.choice([8, 16, 24, 32]),
        window=rng.randrange(3, 30),
        original_context=rng.randrange(8, 40),
        experts=rng.choice([4, 8, 16]),
        chosen=rng.choice([1, 2, 4]),
        expert_width=rng.choice([16, 20, 40]),
        seed=rng.randrange(1, 1 << 16),
    )


def built(name: str, sizes: Sizes, rng: random.Random | None) -> Fixture:
    """A case at other sizes, and with settings of its family drawn by ``rng``."""
    case = CASES[name]
    if rng is not None:
        known = AutoConfig.for_model(case.model_type).to_dict()
        case = varied(case, sizes, rng, known)
    fixture, remarks = make_fixtures.build(case, sizes)
    if any(remark.startswith("saved again") for remark in remarks):
        raise ValueError("; ".join(remarks))  # transformers differs from itself
    # Not everything that can be drawn can be said in the words of older configs.
    return dataclasses.replace(fixture, legacy_config=fixture.config) if remarks else fixture


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", help="case names, separated by commas")
    parser.add_argument("--random", type=int, metavar="ROUNDS", help="sizes drawn at random")
    parser.add_argument("--vary", action="store_true", help="draw the families' settings as well")
    for field in dataclasses.fields(Sizes):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int)
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    changed = {f.name: getattr(args, f.name) for f in dataclasses.fields(Sizes)}
    changed = {name: value for name, value in changed.items() if value is not None}
    names = args.only.split(",") if args.only else fixture_names()
    rng = random.Random(changed.pop("seed", 0) if args.random else 0)
    if args.random:
        rounds = [dataclasses.replace(drawn(rng), **changed) for _ in range(args.random)]
    else:
        rounds = [Sizes(**changed)] if changed else [None]
    failed, results, vary = 0, {}, rng if args.vary else None
    for sizes in rounds:
        if sizes is not None:
            print(sizes, flush=True)
        for name in names:
            try:
                fixture = Fixture.load(name) if sizes is None else built(name, sizes, vary)
            except Exception as problem:  # settings that transformers itself refuses
                print(f"----  {name:26s} not made: {str(problem)[:200]!r}", flush=True)
                continue
            try:
                result = results[name] = prove(fixture)
            except Exception as problem:
                failed += 1
                print(
                    f"FAIL  {name:26s} {type(problem).__name__}: {str(problem)[:300]}", flush=True
                )
                print(f"      {fixture.config}", flush=True)
                continue
            wrong = broken(result)
            failed += bool(wrong)
            worst = max(error for error in result.values() if isinstance(error, float))
            print(
                f"{'FAIL' if wrong else 'ok  '}  {name:26s} {worst:.1e} {'; '.join(wrong)}",
                flush=True,
            )
            if wrong and sizes is not None:
                print(f"      {fixture.config}", flush=True)
    if rounds == [None] and not args.only and not failed:
        write_down(results)
    return 1 if failed else 0


def write_down(results: dict[str, Any]) -> None:
    told: dict[str, Any] = {}
    for model_type in sorted(families()):
        of_type = [Fixture.load(name) for name in results if CASES[name].model_type == model_type]
        decoders = [
            family_for(f.config).decoder_config(f.config, [t.name for t in f.tensors])
            for f in of_type
        ]
        told[model_type] = {
            "made_of": made_of(decoders),
            "cases": {fixture.name: results[fixture.name] for fixture in of_type},
        }
    about = {"transformers": transformers.__version__, "tolerance": TOLERANCE, "families": told}
    RESULTS.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
