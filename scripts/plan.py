"""What a model will need in memory, from its config and tensor headers alone.

mlxtx plan MODEL --context 32768 --kv k8v4g64
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from mlxtx.command_line import Parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="mlxtx plan", description="Plan a model's memory without loading or downloading it."
    )
    parser.add_argument("model", help="a folder or a Hub id")
    parser.add_argument("--revision", help="a branch, tag or commit of the Hub repository")
    parser.add_argument("--context", type=int, help="tokens of each sequence")
    cache = parser.add_mutually_exclusive_group()
    cache.add_argument("--kv", help="how the cache keeps rows: plain, k8v4g64, k4v4g32r, auto")
    cache.add_argument("--kv-bits", metavar="K,V", help="bits of keys and values, as in 8,4")
    parser.add_argument("--batch", type=int, default=1, help="sequences at once")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16 instead of the model's own")
    parser.add_argument("--lora", action="store_true", help="plan a training step with adapters")
    parser.add_argument("--rank", type=int, help="with --lora: of the adapters (8)")
    parser.add_argument(
        "--checkpoint", action="store_true", help="with --lora: activations computed again"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as data")
    args = parser.parse_args(argv)
    if not args.lora and (args.checkpoint or args.rank is not None):
        parser.error("--rank and --checkpoint go with --lora")

    from mlxtx.diagnostics.memory_plan import plan_memory, render

    plan = plan_memory(
        args.model,
        context=args.context,
        kv=args.kv,
        kv_bits=args.kv_bits,
        batch=args.batch,
        lora=args.lora,
        rank=8 if args.rank is None else args.rank,
        checkpoint=args.checkpoint,
        revision=args.revision,
        dtype=args.dtype,
    )
    print(json.dumps(plan.to_json(), indent=2) if args.json else render(plan))
    return 0 if plan.fits else 1


if __name__ == "__main__":
    from mlxtx.cli import run

    raise SystemExit(run(main, sys.argv[1:]))
