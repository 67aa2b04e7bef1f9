"""What quantizing the cache costs in quality, on your model and your text.

mlxtx kv-check MODEL --text notes.txt --store
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mlxtx.command_line import Parser, ProgressLine, at_least, load_shown, to_json

# Used when no text is given: a page of plain prose.
PAGE = """The ferry leaves the town twice a day, early in the morning and again before the light
goes. In winter the second crossing is often called off, and then the people who came for the
market have to stay the night. There is one inn, with six rooms and a long table, and whoever sits
at it is asked where they come from and what they think of the weather. The innkeeper writes the
answers in a book. She says that in thirty years the weather has been called wet four thousand
times, dry nine hundred times, and strange only twice. The first strange day was the one on which
the fog came in from the land instead of from the water. The second she does not like to speak of.

A machine that keeps a record of what it has read faces the same question as the book: how much of
each answer has to be kept. Write down every word, and the shelf fills up. Write down too little,
and the answers run together until wet and dry look alike. Somewhere between the two lies the
shortest note from which the reader can still tell what was meant. Where that is depends on the
reader, so the honest way is to try it: keep the long record and the short one side by side, ask
both the same things, and count how often they disagree."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="mlxtx kv-check",
        description="Measure what quantized caches cost: KL divergence and agreement by setting.",
    )
    parser.add_argument("model", help="a folder or a Hub id")
    parser.add_argument("--text", type=Path, help="a text like those the model will be used on")
    parser.add_argument(
        "--tokens", type=at_least(1), default=1024, help="of the text, at most (1024)"
    )
    parser.add_argument("--kv", help="settings to compare, separated by commas")
    parser.add_argument(
        "--loss", type=float, default=None, help="KL allowed, in nats a token (0.01)"
    )
    parser.add_argument("--store", action="store_true", help="make the choice the model's default")
    parser.add_argument("--revision")
    parser.add_argument("--adapter")
    parser.add_argument("--force", action="store_true", help="load even if memory looks short")
    parser.add_argument("--json", action="store_true", help="print the scores as data")
    args = parser.parse_args(argv)
    if args.loss is not None and not args.loss >= 0:
        parser.error(f"--loss must be 0 or more, not {args.loss}")

    from mlxtx.diagnostics.kv_check import LADDER, LARGEST_LOSS, check_kv, render, smallest_within
    from mlxtx.diagnostics.kv_defaults import store_default_kv
    from mlxtx.errors import MlxtxError
    from mlxtx.events import Progress

    try:
        text = PAGE if args.text is None else args.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MlxtxError(f"cannot read {args.text}: {error}") from None
    ladder = args.kv.split(",") if args.kv else LADDER
    loaded = load_shown(args.model, revision=args.revision, adapter=args.adapter, force=args.force)
    tokens = loaded.encode(text)[: args.tokens]
    with ProgressLine() as progress:
        scores = check_kv(
            loaded.model,
            tokens,
            ladder=ladder,
            on_progress=lambda done, total: progress.show(
                Progress(stage="kv-check", done=done, total=total, unit="tokens")
            ),
        )
    largest_loss = LARGEST_LOSS if args.loss is None else args.loss
    chosen = smallest_within(scores, largest_loss)
    if args.json:
        print(to_json({"scores": [s.to_json() for s in scores], "chosen": chosen.kv}, indent=2))
    else:
        print(render(scores, chosen, largest_loss))
    if args.store:
        store_default_kv(args.model, chosen.kv)
        if not args.json:
            print(f"stored: --kv auto means {chosen.kv} for this model from now on")
    return 0


if __name__ == "__main__":
    from mlxtx.cli import run

    raise SystemExit(run(main, sys.argv[1:]))
