"""Makes the model in the box from nothing: all stages, one after the other, then judges and packs it.

    LD_PRELOAD=libopenblas.so.0 OPENBLAS_NUM_THREADS=1 python scripts/make_bundled.py RUNS --pack mlxtx/bundled

The stages stand in ``training/bundled/stages.py``. A stopped run is taken up again by the same line.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRAIN = [sys.executable, str(ROOT / "scripts" / "train_bundled.py")]


def main(argv: Sequence[str] | None = None) -> int:
    sys.path.insert(0, str(ROOT))
    from training.bundled.stages import STAGES

    parser = argparse.ArgumentParser(prog="make_bundled", description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="folder for a folder of each stage")
    parser.add_argument("--pack", type=Path, metavar="DIR", help="write the checkpoint to ship")
    parser.add_argument("--questions", default="200", help="compare settings on so many questions")
    args = parser.parse_args(argv)
    for name, options in STAGES.items():
        make(args.runs / name, options.split(), STAGES)
    judge = ["--out", str(args.runs / name), "--evaluate", "--questions", args.questions]
    packed = ["--pack", str(args.pack)] if args.pack else []
    subprocess.run([*TRAIN, *judge, *packed], check=True)
    return 0


def make(out: Path, options: Sequence[str], names: Collection[str]) -> None:
    """Makes one stage, or what is left of it. ``names`` are those of all stages."""
    from mlxtx.tuning.state import StateFolder

    saved = StateFolder(out / "state").steps()
    if saved and saved[-1] == int(options[options.index("--steps") + 1]):
        return
    words = [str(out.parent / word) if word in names else word for word in options]
    print(out.name, *options, flush=True)
    subprocess.run([*TRAIN, "--out", str(out), *words, "--resume"], check=True)


if __name__ == "__main__":
    sys.exit(main())
