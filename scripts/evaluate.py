"""Loss and perplexity of a model on text, and its accuracy on multiple choices.

    mlxtx evaluate --model MODEL --data held-out.jsonl
    mlxtx evaluate --model MODEL --data book.txt --max-length 1024
    mlxtx evaluate --model MODEL --choices questions.jsonl

questions.jsonl has lines such as {"question": "2 + 2 =", "choices": ["3", "4"], "answer": 1}.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mlxtx.command_line import Parser, ProgressLine, at_least, to_json
from mlxtx.errors import MlxtxError


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="mlxtx evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--model", "-m", required=True, metavar="PATH_OR_ID")
    made.add_argument("--adapter", metavar="FOLDER", help="a LoRA adapter to put on it")
    made.add_argument("--data", metavar="PATH_OR_ID", help="text, or records as lora reads them")
    made.add_argument("--choices", metavar="FILE", help="a JSONL file of questions")
    made.add_argument(
        "--chat", action="store_true", help="with --choices: ask through the chat template"
    )
    made.add_argument("--loss-on", default="assistant", help="all, assistant or last (assistant)")
    made.add_argument(
        "--max-length", type=at_least(2), default=2048, metavar="N", help="tokens (2048)"
    )
    made.add_argument("--batch-size", type=at_least(1), default=4, metavar="N", help="samples (4)")
    made.add_argument("--force", action="store_true", help="load even if memory looks short")
    made.add_argument("--json", action="store_true", help="print the figures as JSON")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if not (args.data or args.choices):
        raise MlxtxError("give --data, --choices or both")
    if args.chat and not args.choices:
        raise MlxtxError("--chat goes with --choices, whose questions it asks")
    from mlxtx.language_model import load
    from mlxtx.tuning.evaluate import evaluate_choices, evaluate_samples, held_out, read_choices

    questions = read_choices(args.choices) if args.choices else None
    figures: dict[str, Any] = {}
    with ProgressLine() as progress:
        seen: dict[str, Any] = {"on_event": progress.show}
        model = load(args.model, adapter=args.adapter, force=args.force, **seen)
        if args.data:
            samples = held_out(model, args.data, max_length=args.max_length, loss_on=args.loss_on)
            found = evaluate_samples(model.model, samples, batch_size=args.batch_size, **seen)
            figures |= {**asdict(found), "perplexity": found.perplexity}
        if questions:
            chosen = evaluate_choices(model, questions, chat=args.chat, **seen)
            figures["choices"] = asdict(chosen)
    print(to_json(figures) if args.json else text(figures))
    return 0


def text(figures: dict[str, Any]) -> str:
    lines = []
    if "loss" in figures:
        lines.append(
            f"loss {figures['loss']:.4f}, perplexity {figures['perplexity']:.2f}, next token right "
            f"{figures['accuracy']:.1%}, over {figures['tokens']:,} tokens"
        )
    if "choices" in figures:
        choices = figures["choices"]
        lines.append(
            f"{choices['accuracy']:.1%} of {choices['questions']} questions right "
            f"({choices['accuracy_by_mean']:.1%} by the mean over tokens)"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    from mlxtx.cli import run

    raise SystemExit(run(lambda rest: main(rest), sys.argv[1:]))
