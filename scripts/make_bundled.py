"""Makes the model in the box from nothing: all stages, one after the other, then judges and packs it.

    LD_PRELOAD=libopenblas.so.0 OPENBLAS_NUM_THREADS=1 python scripts/make_bundled.py RUNS --pack mlxtx/bundled

The stages stand in ``training/bundled/stages.py``. A stopped run is taken up again by the same line.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
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
    made = [make(stage, args.runs) for stage in STAGES]
    packed = ["--pack", str(args.pack)] if args.pack else []
    subprocess.run(
        [*TRAIN, "--out", str(made[-1]), "--evaluate", "--questions", args.questions, *packed],
        check=True,
    )
    return 0


def make(stage: str, runs: Path) -> Path:
    """Trains one stage, or what is left of it; gives its folder."""
    from mlxtx.tuning.state import StateFolder

    words = stage.split()
    for option in ("--out", "--finish", "--head"):
        if option in words:
            place = words.index(option) + 1
            words[place] = str(runs / words[place])
    out = Path(words[words.index("--out") + 1])
    saved = StateFolder(out / "state").steps()
    if not saved or saved[-1] < int(words[words.index("--steps") + 1]):
        print(stage, flush=True)
        subprocess.run([*TRAIN, *words, "--resume"], check=True)
    return out


if __name__ == "__main__":
    sys.exit(main())
