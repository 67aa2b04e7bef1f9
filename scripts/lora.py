"""Fine-tunes a model with LoRA, QLoRA, DoRA or in full.

    mlxtx lora --model MODEL --data FOLDER --out my-adapter --iters 200
    mlxtx lora --model MODEL --data FOLDER --dry-run      what would be trained on, and the cost
    mlxtx lora --model MODEL --data FOLDER --out my-adapter --iters 200 --resume

FOLDER holds train.jsonl (and valid.jsonl) with chats ({"messages": [...]}), {"prompt": ...,
"completion": ...} or {"text": ...}; a single file or a Hub dataset (owner/name) will do too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mlxtx.command_line import Parser, ProgressLine, in_colour
from mlxtx.errors import MlxtxError
from mlxtx.events import Event, Progress


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="mlxtx lora", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", "-m", required=True, metavar="PATH_OR_ID")
    made.add_argument("--data", required=True, metavar="PATH_OR_ID")
    made.add_argument("--out", "-o", default="adapters", metavar="FOLDER", help="(adapters)")
    made.add_argument("--resume", action="store_true", help="go on from the state in --out")
    made.add_argument("--force", action="store_true", help="try it even if memory looks short")
    made.add_argument("--dry-run", action="store_true", help="show the data and the plan, and stop")
    made.add_argument("--peft", metavar="FOLDER", help="write the adapter for PEFT too")
    made.add_argument("--plot", action="store_true", help="draw the loss at the end")
    _options(
        made.add_argument_group("what is trained"),
        ("method", str, "lora, rslora, dora, qlora (any packed base) or full (lora)"),
        ("rank", int, "rank of each adapter (8)"),
        ("alpha", float, "scale is alpha / rank (twice the rank)"),
        ("scale", float, "the scale itself, as mlx-lm counts it"),
        ("dropout", float, "dropout in front of the adapter (0)"),
        ("layers", int, "only the last L blocks (all)"),
        ("adapter-dtype", str, "float32 or bfloat16 (float32)"),
        ("adapter", str, "start from the adapter in this folder, with its rank, scale and layers"),
    )
    for name, about in (
        ("targets", "layers by name or pattern: q_proj, 'mlp.*', embed_tokens (all in the blocks)"),
        ("whole", "weights to train as they are, such as embed_tokens or lm_head"),
        ("sample-prompts", "prompts to answer while it trains (with --sample-every)"),
    ):
        made.add_argument(f"--{name}", nargs="+", default=argparse.SUPPRESS, help=about)
    _options(
        made.add_argument_group("data"),
        ("loss-on", str, "all, assistant (every turn) or last (turn) (assistant)"),
        ("max-length", int, "longest sample in tokens (2048)"),
        ("too-long", str, "what happens to longer ones: cut, drop or error (cut)"),
        (
            "validation-part",
            float,
            "part of the training data kept for validation where there is none (0)",
        ),
    )
    _options(
        made.add_argument_group("training"),
        ("iters", int, "steps (100)"),
        ("batch-size", int, "samples a batch (4)"),
        ("accumulate", int, "batches a step (1)"),
        ("learning-rate", float, "the highest one (1e-4; 1e-5 with full)"),
        ("schedule", str, "constant, linear or cosine (cosine)"),
        ("warmup", int, "steps up to the learning rate (0)"),
        ("final-rate", float, "last learning rate as a part of the highest (0.1)"),
        ("optimizer", str, "adamw, adam, adafactor, lion, muon or sgd (adamw)"),
        ("weight-decay", float, "(0.01; adam and sgd have none)"),
        ("clip", float, "largest norm of the gradients (1; 0: none)"),
        ("ahead-weight", float, "weight of extra prediction heads' loss (0.3)"),
        ("balance-weight", float, "weight of the experts' balancing loss (0)"),
        ("seed", int, "(0)"),
        ("report-every", int, "steps (10)"),
        ("validate-every", int, "steps (0: never)"),
        ("validate-batches", int, "at most so many (0: all)"),
        ("sample-every", int, "steps between answers to --sample-prompts (0: never)"),
        ("save-every", int, "steps (100)"),
        ("keep", int, "states kept (2)"),
        ("bad-steps", int, "steps in a row that are not finite before it stops (3)"),
    )
    made.add_argument(
        "--checkpoint",
        action="store_true",
        default=argparse.SUPPRESS,
        help="compute blocks again in the backward pass: less memory, about a third slower",
    )
    made.add_argument(
        "--no-packing",
        dest="packing",
        action="store_false",
        default=argparse.SUPPRESS,
        help="pad samples to the longest of their batch",
    )
    return made


def _options(group: Any, *options: tuple[str, type, str]) -> None:
    for name, kind, about in options:
        group.add_argument(
            f"--{name}", type=kind, default=argparse.SUPPRESS, help=about, metavar=name[0].upper()
        )


def main(argv: Sequence[str] | None = None) -> int:
    args = vars(parser().parse_args(argv))
    model, data, out = args.pop("model"), args.pop("data"), args.pop("out")
    resume, dry, plot = args.pop("resume"), args.pop("dry_run"), args.pop("plot")
    peft = args.pop("peft")
    if ("sample_prompts" in args) != bool(args.get("sample_every")):
        raise MlxtxError("--sample-prompts and --sample-every go together: give both or none")
    if dry:
        from mlxtx.tuning import preview

        with ProgressLine() as progress:
            found = preview(model, data, on_event=progress.show, **args)
        print(preview_text(found, color=in_colour(sys.stdout)))
        return 0
    from mlxtx.text.inert import inert
    from mlxtx.tuning.finetune import check_memory, make_job, run_job

    with ProgressLine() as progress:
        job = make_job(model, data, on_event=progress.show, **args)
    check_memory(job.memory, force=args["force"])
    for line in job.bad[:20]:
        print(f"left out {inert(str(line))}", file=sys.stderr)
    if len(job.bad) > 20:
        print(f"... and {len(job.bad) - 20} more", file=sys.stderr)
    if job.train.cut:
        longest = max(len(s) for s in job.train.samples)
        print(f"{job.train.cut} samples were cut to {longest} tokens", file=sys.stderr)
    if job.settings.validate_every and not job.validation.samples:
        print(
            "--validate-every has no effect: there are no validation records"
            " (--validation-part 0.05 keeps some)",
            file=sys.stderr,
        )
    result = run_job(job, out, resume=resume, on_event=lambda e: show(e))
    best = "" if result.best is None else f", best validation loss {result.best:.4f}"
    print(f"{result.step} steps, {result.tokens:,} tokens, {result.seconds:.0f} s{best}: {out}")
    if peft:
        from mlxtx.tuning.finetune import export_peft

        export_peft(job, peft)
    if plot:
        from mlxtx.scripts.plot import main as draw

        draw([str(out)])
    return 0


def show(event: Event) -> None:
    """One line a report."""
    if isinstance(event, Progress):
        line = progress_line(event)
        if line:
            print(line, flush=True)


def progress_line(event: Progress) -> str:
    d = event.details
    step = f"step {event.done:>{len(str(int(event.total)))}.0f} of {event.total:.0f}"
    if event.stage == "train":
        left = event.seconds_left
        return (
            f"{step}  loss {d['loss']:.4f}  rate {d['learning_rate']:.2e}"
            f"  {d['tokens_per_second']:,.0f} tokens/s  peak {size(d['peak_memory_bytes'])}"
            + ("" if left is None else f"  {duration(left)} left")
        )
    if event.stage == "validate":
        return f"{step}  validation loss {d['loss']:.4f}"
    if event.stage == "sample":
        from mlxtx.text.inert import inert

        return f"{step}  {inert(d['prompt'])!r} -> {inert(d['text'])!r}"
    if event.stage == "skip":
        return (
            f"{step}  skipped: the loss or its gradient was not finite ({d['in_a_row']} in a row)"
        )
    return ""


def size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def preview_text(found: Mapping[str, Any], color: bool) -> str:
    """The dry run for people; what counts in the loss is green, or between ⟦ ⟧ without colour."""
    from mlxtx.text.inert import inert

    on, off = ("\x1b[32m", "\x1b[0m") if color else ("⟦", "⟧")
    lines = []
    for number, pieces in enumerate(found["samples"], 1):
        text = "".join(f"{on}{inert(t)}{off}" if marked else inert(t) for t, marked in pieces)
        lines += [f"sample {number}:", text, ""]
    lengths, memory = found["lengths"], found["memory"]
    lines.append(
        f"{found['count']} samples ({found['validation_count']} for validation), "
        f"{found['tokens']:,} tokens, {found['tokens_in_loss']:,} in the loss; lengths "
        f"{lengths['shortest']} to {lengths['longest']}, half below {lengths['median']}; "
        f"{found['cut']} cut"
    )
    for line in found["bad_lines"][:20]:
        lines.append(f"left out {inert(line)}")
    if len(found["bad_lines"]) > 20:
        lines.append(f"... and {len(found['bad_lines']) - 20} more")
    parts = ", ".join(
        f"{k} {size(memory[k])}" for k in ("weights", "trained", "activations", "logits")
    )
    fits = "" if found["fits"] else ": TOO MUCH"
    lines.append(
        f"memory: about {size(memory['total'])} ({parts}) of {size(memory['available'])}{fits}"
    )
    lines.append(f"{found['trained_parameters']:,} trained parameters")
    if found["seconds_per_step"] is not None:
        lines.append(
            f"one step: {found['seconds_per_step']:.2f} s (the first is the slowest), "
            f"loss {found['loss']:.4f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    from mlxtx.cli import run

    raise SystemExit(run(lambda rest: main(rest), sys.argv[1:]))
