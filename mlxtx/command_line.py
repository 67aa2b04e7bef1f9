"""What the commands share: their options for models and sampling, progress on a terminal, Ctrl-C."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from mlxtx.errors import MlxtxError
from mlxtx.events import Event, Loaded, Prefill, Progress, Stats

if TYPE_CHECKING:
    from mlxtx.language_model import LanguageModel


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the options in one line."""

    def error(self, message: str) -> NoReturn:
        raise MlxtxError(f"{message} ({self.prog} --help shows the options)")


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number of ``least`` or more."""

    def whole(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be {least} or more, not {text}")
        return int(text)

    whole.__name__ = "int"  # argparse names it when the text is no number
    return whole


def add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", "-m", metavar="PATH_OR_ID", help="a folder or a Hub id")
    group.add_argument("--adapter", metavar="FOLDER", help="a LoRA adapter to put on it")
    group.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    group.add_argument("--dtype", choices=["float32", "float16", "bfloat16"])
    group.add_argument("--context", type=int, metavar="N", help="tokens that must fit in memory")
    group.add_argument("--force", action="store_true", help="load even if memory looks short")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Each option's destination is the name of a field of ``Options``; unset ones are left out."""
    group = parser.add_argument_group("sampling")
    number: dict[str, Any] = {"metavar": "X"}
    text: dict[str, Any] = {"metavar": "TEXT"}
    for name, kind, settings, about in (
        ("max-tokens", int, {"metavar": "N"}, "at most this many new tokens (512)"),
        ("temperature", float, number, "0 takes the likeliest token (0)"),
        ("top-k", int, {"metavar": "N"}, "only the N likeliest tokens (0: all)"),
        ("top-p", float, number, "only the fewest tokens that reach X together (1: all)"),
        ("min-p", float, number, "only tokens X times as likely as the likeliest (0: all)"),
        ("repetition-penalty", float, number, "above 1: repeat less (1)"),
        ("presence-penalty", float, number, "above 0: new tokens are preferred (0)"),
        ("frequency-penalty", float, number, "the same, counting (0)"),
        ("seed", int, {"metavar": "N"}, "the same seed gives the same answer"),
        ("stop", str, {**text, "action": "append"}, "end before this text; may be repeated"),
        ("kv", str, {"metavar": "NAME"}, "how the cache keeps keys and values, such as k8v4g64"),
        ("prefill-chunk", int, {"metavar": "N"}, "prompt tokens in one forward pass"),
    ):
        group.add_argument(
            f"--{name}", type=kind, default=argparse.SUPPRESS, help=about, **settings
        )
    group.add_argument(
        "--logit-bias",
        metavar="TOKEN=X",
        action="append",
        type=_bias,
        default=argparse.SUPPRESS,
        help="add X to a token id's logit; may be repeated",
    )


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not TOKEN=X, as 42=-5 is") from None


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, by the names of ``mlxtx.generation.generate.Options``."""
    from mlxtx.generation.generate import Options

    options = {name: value for name, value in vars(args).items() if name in _names(Options)}
    if "logit_bias" in options:
        options["logit_bias"] = dict(options["logit_bias"])
    chosen = Options.named(**options)  # what is wrong is told before a model is loaded
    filters = ("top_k", "top_p", "min_p")
    idle = [name for name in filters if getattr(chosen, name) != getattr(Options, name)]
    if idle and not chosen.temperature:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        print(f"mlxtx: without a --temperature above 0, {names} changes nothing", file=sys.stderr)
    return options


def _names(options: Any) -> set[str]:
    return set(options.__dataclass_fields__)


def in_colour(stream: TextIO) -> bool:
    """Whether colours belong there; NO_COLOR is as https://no-color.org has it."""
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return wanted and stream.isatty()


def to_json(value: Any, **layout: Any) -> str:
    """JSON, which has no infinity and no NaN: null stands in their place."""

    def finite(part: Any) -> Any:
        if isinstance(part, dict):
            return {name: finite(inner) for name, inner in part.items()}
        if isinstance(part, list | tuple):
            return [finite(inner) for inner in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(finite(value), allow_nan=False, **layout)


def fitted(line: str, stream: TextIO) -> str:
    """What of a line can be overwritten: a terminal breaks a longer one in two."""
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except OSError:
        return line
    return line[: columns - 1] if columns else line


def read_stdin() -> str:
    """All of stdin, less the line end that ``echo`` and editors put last."""
    return sys.stdin.read().removesuffix("\n")


def load_for(args: argparse.Namespace) -> LanguageModel:
    """The model the options name, or the default one; says so, and shows progress, on stderr."""
    source = args.model
    if source is None:
        from mlxtx.default_model import default_model

        source, notice = default_model()
        print(f"mlxtx: {notice}", file=sys.stderr)
    return load_shown(
        source,
        adapter=args.adapter,
        revision=args.revision,
        dtype=args.dtype,
        context=args.context,
        kv=getattr(args, "kv", None),
        force=args.force,
    )


def load_shown(source: str, **options: Any) -> LanguageModel:
    """``mlxtx.load``, with its progress on stderr."""
    from mlxtx.language_model import load

    with ProgressLine() as progress:
        return load(source, **options, on_event=progress.show)


def _progress_text(event: Progress) -> str:
    done, total = event.done, event.total
    if event.unit == "bytes":
        return f"{event.stage} {done / 1e6:,.0f} of {total / 1e6:,.0f} MB{_left(event)}"
    return f"{event.stage} {done:,.0f} of {total:,.0f} {event.unit}{_left(event)}"


class ProgressLine:
    """One line on a terminal that is overwritten; nothing where stderr is a file or pipe.
    describe: what to write of a ``Progress``."""

    def __init__(
        self, stream: TextIO | None = None, describe: Callable[[Progress], str] = _progress_text
    ) -> None:
        self.describe = describe
        self.stream = stream or sys.stderr
        self.on = self.stream.isatty()
        self.width = 0

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def show(self, event: Event) -> None:
        match event:
            case Progress(total=total) if total:
                self._write(self.describe(event))
            case Prefill(done=done, total=total) if done < total:
                self._write(f"reading the prompt: {done:,} of {total:,} tokens")
            case Prefill() | Loaded():
                self.clear()

    def clear(self) -> None:
        if self.width:
            self._write("")
            self.stream.write("\r")
            self.stream.flush()

    def _write(self, text: str) -> None:
        if self.on:
            text = fitted(text, self.stream)
            self.stream.write("\r" + text.ljust(self.width))
            self.stream.flush()
            self.width = len(text)


def _left(event: Progress) -> str:
    seconds = event.seconds_left
    return "" if seconds is None or seconds < 1 else f", {seconds:,.0f} s left"


def stats_line(stats: Stats, reason: str) -> str:
    """One line of figures for people."""
    reused = f" ({stats.reused_tokens} from the cache)" if stats.reused_tokens else ""
    return (
        f"{stats.prompt_tokens} prompt tokens{reused} at"
        f" {stats.prefill_tokens_per_second:,.1f}/s,"
        f" {stats.generated_tokens} new at {stats.decode_tokens_per_second:,.1f}/s,"
        f" first after {stats.time_to_first_token:.2f} s,"
        f" cache {stats.cache_bytes / 1e6:,.1f} MB, peak {stats.peak_memory_bytes / 1e6:,.1f} MB,"
        f" ended by: {reason.replace('_', ' ')}"
    )


class StopFlag:
    """Set by the first Ctrl-C of a block, so that an answer ends and what arrived is kept."""

    def __init__(self) -> None:
        self.stopped = False

    def __call__(self) -> bool:
        return self.stopped


@contextmanager
def stop_on_interrupt() -> Iterator[StopFlag]:
    """Within the block the first Ctrl-C sets the flag; the second one interrupts as usual."""
    flag = StopFlag()

    def handle(signum: int, frame: object) -> None:
        if flag.stopped:
            raise KeyboardInterrupt
        flag.stopped = True

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, before)
