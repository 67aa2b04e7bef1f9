"""Answers one prompt.

    mlxtx generate --model path/or/hub-id --prompt "Why is the sky blue?"
    echo "Why is the sky blue?" | mlxtx generate --max-tokens 64 --json

The prompt goes through the model's chat template when it has one (--raw leaves it as it is).
The answer goes to stdout while it is made, notes and figures to stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mlxtx.command_line import (
    Parser,
    ProgressLine,
    add_model_options,
    add_sampling_options,
    load_for,
    read_stdin,
    sampling_options,
    stats_line,
    stop_on_interrupt,
    to_json,
)
from mlxtx.errors import MlxtxError

if TYPE_CHECKING:
    from mlxtx.events import Done
    from mlxtx.language_model import LanguageModel, Prompt


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="mlxtx generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--prompt", "-p", metavar="TEXT", help="the prompt; - reads stdin")
    parser.add_argument("--system", metavar="TEXT", help="a system message before the prompt")
    parser.add_argument("--raw", action="store_true", help="no chat template: continue the text")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the text")
    parser.add_argument("--stats", action="store_true", help="figures on stderr at the end")
    add_model_options(parser)
    add_sampling_options(parser)
    more = parser.add_argument_group("search and scores")
    suppressed: dict[str, Any] = {"type": int, "default": argparse.SUPPRESS, "metavar": "N"}
    more.add_argument("--beams", help="beam search of this width", **suppressed)
    more.add_argument(
        "--length-penalty",
        type=float,
        default=argparse.SUPPRESS,
        metavar="X",
        help="with --beams: above 0 favours longer ones (1)",
    )
    more.add_argument("--logprobs", help="with --json: scores of the N best too", **suppressed)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    text = read_prompt(args.prompt)
    options = sampling_options(args)
    if "logprobs" in options and not args.json:
        raise MlxtxError("--logprobs goes with --json, which shows them")
    if "length_penalty" in options and options.get("beams", 1) < 2:
        raise MlxtxError("--length-penalty goes with --beams of 2 or more, which it ranks")
    model = load_for(args)
    prompt = as_prompt(model, text, args)
    with stop_on_interrupt() as flag:
        if args.json:
            reason = print_json(model, prompt, {**options, "should_stop": flag}, args)
        else:
            reason = print_text(model, prompt, {**options, "should_stop": flag}, args)
    return 130 if reason == "stopped" else 0


def read_prompt(given: str | None) -> str:
    """The option's text, or stdin."""
    if given is None and sys.stdin.isatty():
        raise MlxtxError("no prompt: use --prompt TEXT, or pipe a text into mlxtx generate")
    text = read_stdin() if given is None or given == "-" else given
    if not text.strip():
        raise MlxtxError("the prompt is empty")
    return text


def as_prompt(model: LanguageModel, text: str, args: argparse.Namespace) -> Prompt:
    """Messages for a model with a chat template, else the text itself."""
    if args.raw or (model.tokenizer.chat_template is None and not args.system):
        return f"{args.system}\n\n{text}" if args.system else text
    messages = [{"role": "user", "content": text}]
    return [{"role": "system", "content": args.system}, *messages] if args.system else messages


def print_text(
    model: LanguageModel, prompt: Prompt, options: dict[str, Any], args: argparse.Namespace
) -> str:
    done = show(model.stream(prompt, **options))
    if args.stats and done.stats:
        print(stats_line(done.stats, done.reason), file=sys.stderr)
    return done.reason


def show(events: Any) -> Done:
    """Writes the text of a stream to stdout, made inert, and gives its last event."""
    from mlxtx.events import Delta, Done
    from mlxtx.text.inert import inert

    done = Done(reason="stopped")
    end = ""
    with ProgressLine() as progress:
        for event in events:
            progress.show(event)
            if isinstance(event, Delta) and event.text:
                end = event.text[-1]
                sys.stdout.write(inert(event.text))
                sys.stdout.flush()
            elif isinstance(event, Done):
                done = event
    if end != "\n":
        sys.stdout.write("\n")
    return done


def print_json(
    model: LanguageModel, prompt: Prompt, options: dict[str, Any], args: argparse.Namespace
) -> str:
    completion = model.generate(prompt, **options)
    stats = asdict(completion.stats)
    stats.pop("job")
    result: dict[str, Any] = {
        "model": model.name,
        "text": completion.text,
        "tokens": completion.tokens,
        "finish_reason": completion.finish_reason,
        "stats": stats,
    }
    if completion.logprobs is not None:
        result["logprobs"] = [asdict(entry) for entry in completion.logprobs]
    # Escaped to ASCII: no character of the answer can reach the terminal as a control.
    print(to_json(result, ensure_ascii=True))
    if args.stats:
        print(stats_line(completion.stats, completion.finish_reason), file=sys.stderr)
    return completion.finish_reason


if __name__ == "__main__":
    from mlxtx.cli import run

    raise SystemExit(run(main, sys.argv[1:]))
