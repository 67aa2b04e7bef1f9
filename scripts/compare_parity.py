"""mlx-lm and mlxtx side by side on the parity fixtures, against what transformers computed.

    python scripts/compare_parity.py                          # print the table
    python scripts/compare_parity.py --write docs/parity.md   # and put it into the page

Runs from a checkout, in an environment where mlx-lm is installed as well. Both load the same
files in float32, with the config of published checkpoints and with the one transformers 5 saves.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 3e-4  # of the logits' standard deviation


@dataclass(frozen=True)
class Outcome:
    """How a program did on one checkpoint: its largest error, or why there is none."""

    error: float | None = None
    failure: str = ""
    tokens: bool = True  # greedy tokens equal wherever the margin is clear

    @property
    def good(self) -> bool:
        return self.error is not None and self.error <= TOLERANCE and self.tokens

    def __str__(self) -> str:
        if self.error is None:
            return self.failure
        word = "equal" if self.good else "differs" if self.error > TOLERANCE else "other tokens"
        return f"{word} ({self.error:.0e})"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", help="case names, separated by commas")
    parser.add_argument("--write", type=Path, help="a page whose table is to be replaced")
    args = parser.parse_args(argv)
    sys.path.insert(0, str(ROOT / "tests" / "parity"))
    from mlxtx.scripts.families import write_table
    from recipe import fixture_names

    names = args.only.split(",") if args.only else fixture_names()
    rows = []
    for name in names:
        outcomes = [run(name, legacy, load) for load in (peer, ours) for legacy in (True, False)]
        rows.append((name, outcomes))
        print(name, *outcomes, sep=" | ", flush=True)
    table = render(rows)
    print(f"\n{table}" if not args.write else f"\n{counts(rows)}")
    if args.write:
        write_table(args.write, table)
    return 0 if all(outcome.good for _, outcomes in rows for outcome in outcomes[2:]) else 1


def run(name: str, legacy: bool, load: Callable[[Path], tuple[Any, Any]]) -> Outcome:
    """One program on one checkpoint: both prompts whole, the long one in chunks, greedy tokens."""
    import numpy as np
    import running
    from recipe import Fixture

    fixture = Fixture.load(name)
    arrays = fixture.arrays
    spread = float(arrays["logits_long"].std())
    try:
        with tempfile.TemporaryDirectory() as folder:
            model, make_cache = load(fixture.write_checkpoint(Path(folder) / name, legacy))
            errors = [
                np.abs(forward(model, arrays[f"tokens_{tag}"]) - arrays[f"logits_{tag}"]).max()
                for tag in ("long", "short")
            ]
            tokens = True
            for tag in ("long", "short"):
                new = greedy(model, make_cache, arrays[f"tokens_{tag}"].tolist(), 16)
                expected, margins = arrays[f"greedy_{tag}"], arrays[f"margin_{tag}"]
                clear = TOLERANCE * spread
                tokens &= running.greedy_misses(new, expected, margins, clear) is None
    except (Exception, SystemExit) as problem:
        return Outcome(failure=reason(problem))
    return Outcome(error=float(max(errors)) / spread, tokens=tokens)


def ours(folder: Path) -> tuple[Any, Any]:
    from mlxtx import load_model

    model, _ = load_model(folder, "float32")
    return model, model.make_cache


def peer(folder: Path) -> tuple[Any, Any]:
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    model, _ = load_model(folder, lazy=False)
    return model, lambda: make_prompt_cache(model)


def forward(model: Any, tokens: Any) -> Any:
    import mlx.core as mx
    import numpy as np

    return np.array(model(mx.array(tokens)[None]).astype(mx.float32))[0]


def greedy(model: Any, make_cache: Callable[[], Any], text: list[int], count: int) -> list[int]:
    import mlx.core as mx

    text, start = list(text), len(text)
    cache, fed = make_cache(), 0
    for _ in range(count):
        if hasattr(model, "outgrows") and model.outgrows(cache, len(text) - fed):
            cache, fed = make_cache(), 0
        logits = model(mx.array([text[fed:]]), cache=cache)[0, -1]
        fed = len(text)
        text.append(int(mx.argmax(logits)))
    return text[start:]


def reason(problem: BaseException) -> str:
    line = (str(problem).strip().splitlines() or [""])[0]
    if "not supported" in line:
        return "not supported"
    return f"{type(problem).__name__}: {line[:70]}".replace("|", "/")


def render(rows: Sequence[tuple[str, Sequence[Outcome]]]) -> str:
    head = (
        "| checkpoint | mlx-lm, published config | mlx-lm, config of transformers 5 | mlxtx, both |"
    )
    lines = [head, "|---|---|---|---|"]
    for name, (old, new, our_old, our_new) in rows:
        both = max((our_old, our_new), key=lambda outcome: (not outcome.good, outcome.error or 0))
        lines.append(f"| {name} | {old} | {new} | {both} |")
    return "\n".join([counts(rows), "", *lines])


def counts(rows: Sequence[tuple[str, Sequence[Outcome]]]) -> str:
    def tell(who: str, column: int) -> str:
        outcomes = [outcomes[column] for _, outcomes in rows]
        good = sum(outcome.good for outcome in outcomes)
        failed = sum(outcome.error is None for outcome in outcomes)
        wrong = len(outcomes) - good - failed
        return f"{who}: {good} equal, {wrong} differ without a word, {failed} do not load."

    return "\n".join(
        [
            f"Of {len(rows)} checkpoints:",
            "",
            f"- {tell('mlx-lm, published config', 0)}",
            f"- {tell('mlx-lm, config of transformers 5', 1)}",
            f"- {tell('mlxtx, published config', 2)}",
            f"- {tell('mlxtx, config of transformers 5', 3)}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
