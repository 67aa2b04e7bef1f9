"""Converts a checkpoint: packs it into few bits, unpacks it, or changes its type.

    mlxtx convert MODEL --out FOLDER --bits 4            pack (groups of 64)
    mlxtx convert MODEL --out FOLDER --recipe mixed_4_6  more bits where it matters
    mlxtx convert MODEL --out FOLDER --calibrate text.txt --target-bpw 4.5
    mlxtx convert MODEL --out FOLDER --dequantize        back to the Hugging Face layout
    mlxtx convert MODEL --out FOLDER --bits 4 --upload owner/name

MODEL is a folder or a Hub id. It is only read; what is written is compared with it at the end.
A conversion that was interrupted goes on where it stopped when the same command is run again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mlxtx.command_line import Parser, ProgressLine
from mlxtx.events import Progress


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="mlxtx convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("source", nargs="?", metavar="MODEL", help="a folder or a Hub id")
    made.add_argument("--model", "-m", metavar="MODEL", help="the same")
    made.add_argument("--out", "-o", required=True, metavar="FOLDER", help="where the result goes")
    made.add_argument("--overwrite", action="store_true", help="replace a model in --out")
    made.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    packing = made.add_argument_group("packing")
    packing.add_argument("--bits", type=int, metavar="N", help="2, 3, 4, 5, 6 or 8")
    packing.add_argument(
        "--group-size", type=int, default=64, metavar="N", help="numbers a scale: 32, 64 or 128"
    )
    packing.add_argument(
        "--mode", default="affine", metavar="MODE", help="affine, mxfp4, mxfp8 or nvfp4"
    )
    packing.add_argument(
        "--recipe", metavar="R", help="mixed_2_6, mixed_3_4, mixed_3_6, mixed_4_6, mixed_4_8, or "
        "a file of 'pattern = bits' lines",
    )  # fmt: skip
    packing.add_argument(
        "--calibrate", metavar="FILE", help="choose bits by their effect on a text"
    )
    packing.add_argument(
        "--target-bpw", type=float, metavar="X", help="with --calibrate: bits a weight to reach"
    )
    packing.add_argument("--dequantize", action="store_true", help="unpack; Hugging Face layout")
    made.add_argument("--dtype", help="float32, float16 or bfloat16 for what is not packed")
    made.add_argument(
        "--no-verify", dest="verify", action="store_false", help="leave out the comparison"
    )
    made.add_argument("--upload", metavar="OWNER/NAME", help="put the result on the Hub")
    made.add_argument(
        "--private", action="store_true", help="with --upload: in a private repository"
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    options = vars(parser().parse_args(argv))
    named, model = options.pop("source"), options.pop("model")
    repo, private = options.pop("upload"), options.pop("private")
    from mlxtx.errors import MlxtxError

    if bool(named) == bool(model):
        raise MlxtxError("name one model to convert: mlxtx convert MODEL --out FOLDER")
    if private and not repo:
        raise MlxtxError("--private goes with --upload OWNER/NAME")
    if repo:  # before hours of work
        from mlxtx.checkpoint.upload import check_upload

        check_upload(repo)
    from mlxtx.checkpoint.convert import convert
    from mlxtx.diagnostics.memory_plan import size_text

    screen = ProgressLine(describe=text_of)
    try:
        result = convert(named or model, options.pop("out"), on_event=screen.show, **options)
    except KeyboardInterrupt:
        screen.clear()
        print("stopped; the same command goes on from here", file=sys.stderr)
        raise
    finally:
        screen.clear()
    print(
        f"{result.folder}: {result.recipe}, {result.bits_per_weight:.2f} bits a weight, "
        f"{size_text(result.nbytes)}"
    )
    if result.unpacked:
        print(
            f"not packed, as the group does not divide their columns: {', '.join(result.unpacked)}"
        )
    for part in (result.calibration, result.proof):
        for line in part.lines() if part else ():
            print(f"  {line}")
    if repo:
        from mlxtx.checkpoint.upload import upload

        print(upload(result.folder, repo, private=private, show_progress=screen.on))
    return 0


def text_of(event: Progress) -> str:
    """``convert 1.20 of 4.00 GB, 12 s left``."""
    if event.unit == "bytes":
        amount = f"{event.done / 1e9:.2f} of {event.total / 1e9:.2f} GB"
    else:
        amount = f"{event.done:.0f} of {event.total:.0f} {event.unit}"
    left = event.seconds_left
    return f"{event.stage} {amount}" + (f", {left:.0f} s left" if left is not None else "")


if __name__ == "__main__":
    from mlxtx.cli import run

    sys.exit(run(lambda rest: main(rest), sys.argv[1:]))
