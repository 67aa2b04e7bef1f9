"""Caches of long beginnings, kept on disk: build, list and delete them.

mlxtx cache build MODEL --system assistant.txt
mlxtx cache build MODEL --text manual.txt --kv k8v4g64
mlxtx cache list
mlxtx cache rm NAME
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlxtx.command_line import Parser, ProgressLine, load_shown
from mlxtx.errors import MlxtxError


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="mlxtx cache", description="Keep the caches of long prompts on disk.")
    parser.add_argument(
        "--folder",
        type=Path,
        help="where they lie (the cache folder, the only one that chats look in)",
    )
    parser.add_argument("--budget", type=float, metavar="GB", help="in all (8.6), oldest out first")
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="read a text once and keep what was computed")
    build.add_argument("model", help="a folder or a Hub id")
    what = build.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", type=Path, help="the beginning of a prompt, as it is")
    what.add_argument("--system", type=Path, help="the system message of a chat")
    build.add_argument("--kv", help="how rows are kept, as in chat: k8v4g64, auto")
    build.add_argument("--revision")
    build.add_argument("--adapter")
    build.add_argument("--force", action="store_true", help="load even if memory looks short")
    commands.add_parser("list", help="what is there, oldest use first")
    remove = commands.add_parser("rm", help="delete one")
    remove.add_argument("name", help="the beginning of its name in the list")
    args = parser.parse_args(argv)

    from mlxtx.cache.prefix_store import DEFAULT_BUDGET, PrefixStore

    if args.budget is not None and not 0 <= args.budget < 1e9:
        raise MlxtxError(f"--budget must be from 0 to 1e9 GB, not {args.budget}")
    budget = DEFAULT_BUDGET if args.budget is None else int(args.budget * 1e9)
    store = PrefixStore(args.folder, budget=budget)
    if args.command == "build":
        build_prefix(store, args)
    elif args.command == "rm":
        print(f"deleted {store.remove(args.name).name}")
    else:
        list_prefixes(store)
    return 0


def build_prefix(store: Any, args: argparse.Namespace) -> None:
    """Feeds the text to the model and saves the cache."""
    import mlx.core as mx

    from mlxtx.cache.fingerprint import fingerprint
    from mlxtx.cache.reuse import common_prefix
    from mlxtx.events import Prefill
    from mlxtx.generation.loop import prefill
    from mlxtx.generation.session import shared_limit

    path = args.text or args.system
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MlxtxError(f"cannot read {path}: {error}") from None
    loaded = load_shown(
        args.model, revision=args.revision, adapter=args.adapter, kv=args.kv, force=args.force
    )
    if args.system:
        # What every chat with this system message begins with: where two of them part.
        chats = [
            loaded.encode([{"role": "system", "content": text}, {"role": "user", "content": user}])
            for user in ("a", "1")
        ]
        tokens = chats[0][: common_prefix(*chats)]
    else:
        tokens = loaded.encode(text)
    longest = shared_limit(loaded.model.config)
    if not 0 < len(tokens) <= longest:
        raise MlxtxError(
            f"{path} comes to {len(tokens):,} tokens; a beginning that this model's prompts can"
            f" share has from 1 to {longest:,}"
        )
    session = loaded.session(args.kv)
    with ProgressLine() as progress:
        for piece in prefill(loaded.model, [tokens], session.cache, chunk=loaded.prefill_chunk):
            if isinstance(piece, Prefill):
                progress.show(piece)
    mx.eval(session.cache.state())
    kept = store.add(
        session.cache, tokens, fingerprint=fingerprint(loaded.model), title=f"{loaded.name}: {path}"
    )
    print(f"kept {len(tokens):,} tokens in {kept.name} ({kept.stat().st_size / 1e6:,.1f} MB)")


def list_prefixes(store: Any) -> None:
    total = 0
    for info in store:
        total += info.nbytes
        name = info.path.name.split(".")[0]
        size = f"{info.nbytes / 1e6:,.1f} MB"
        title = "".join(c for c in info.title if c.isprintable())
        print(f"{name}  {size:>12}  {info.offset:>8,} tokens  {info.settings:<10}  {title}")
    print(f"{total / 1e6:,.1f} MB of {store.budget / 1e6:,.0f} MB in {store.folder}")


if __name__ == "__main__":
    from mlxtx.cli import run

    raise SystemExit(run(main, sys.argv[1:]))
