"""Merges an adapter into its model, and shows what was kept of it.

    mlxtx fuse --model MODEL --adapter FOLDER --out fused --data held-out.jsonl

A packed model is packed again with the adapter inside. When too little of the adapter's
improvement is left, nothing is written: --bits 8, --bits auto or --dequantize keep more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mlxtx.command_line import Parser, ProgressLine, to_json


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="mlxtx fuse", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", "-m", required=True, metavar="PATH_OR_ID")
    made.add_argument("--adapter", required=True, metavar="FOLDER")
    made.add_argument("--out", "-o", default="fused", metavar="FOLDER", help="(fused)")
    made.add_argument(
        "--data", metavar="PATH", help="held-out text to measure on (a few sentences)"
    )
    made.add_argument("--dequantize", action="store_true", help="write all weights unpacked")
    made.add_argument(
        "--bits",
        metavar="N",
        help="for the adapted layers of a packed model: 2, 3, 4, 5, 6, 8 or auto",
    )
    made.add_argument(
        "--keep",
        type=float,
        default=0.95,
        metavar="PART",
        help="least part of the adapter to keep (0.95)",
    )
    made.add_argument("--force", action="store_true", help="write whatever was lost")
    made.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    made.add_argument("--json", action="store_true", help="print the report as JSON")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    args = vars(parser().parse_args(argv))
    as_json = args.pop("json")
    from mlxtx.tuning.fuse import fuse

    with ProgressLine() as progress:
        args["on_event"] = progress.show
        report = fuse(args.pop("model"), args.pop("adapter"), args["out"], **_rest(args))
    if as_json:
        print(to_json(report.to_json()))
        return 0
    how = "unpacked" if report.bits is None else f"{report.bits} bits"
    print(
        f"loss {report.base_loss:.4f} without the adapter, {report.adapter_loss:.4f} with it, "
        f"{report.fused_loss:.4f} fused ({report.layers} layers, {how}): kept {report.kept:.1%}; "
        f"largest difference of a logit {report.logit_difference:.3g}"
    )
    print(args["out"])
    return 0


def _rest(args: dict) -> dict:
    return {name: value for name, value in args.items() if name != "out"}


if __name__ == "__main__":
    from mlxtx.cli import run

    raise SystemExit(run(lambda rest: main(rest), sys.argv[1:]))
