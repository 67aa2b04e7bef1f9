"""The model families that are supported, what their blocks are made of, and what is proven.

    mlxtx families                # a table
    mlxtx families --markdown     # the same for a page
    mlxtx families --write README.md  # and put it into that page, between its marks
    mlxtx families gemma3_text    # one family, with every case it was compared in

What is proven was recorded by tests/parity/prove.py, which compares every family with
transformers; the rest comes from the registry.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxtx.command_line import Parser
from mlxtx.files import replace_between

if TYPE_CHECKING:
    from mlxtx.decoder.config import BlockConfig, DecoderConfig

BEGIN, END = "<!-- the table begins -->", "<!-- the table ends -->"
COLUMNS = ("family", "made of", "cases", "whole", "steps", "chunks", "padded", "reloaded")
WAYS = COLUMNS[3:]
ACTIVATED = {("silu", True): "SwiGLU", ("gelu_tanh", True): "GeGLU", ("gelu", True): "GeGLU"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="mlxtx families", description="List the model families that are supported."
    )
    parser.add_argument("family", nargs="?", help="a model_type: show every case of it")
    parser.add_argument("--markdown", action="store_true", help="a table for a page")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="a page that holds the table")
    parser.add_argument("--json", action="store_true", help="what was recorded, as data")
    args = parser.parse_args(argv)
    proven = recorded()
    if args.family:
        from mlxtx.families import family_for

        family_for({"model_type": args.family})  # names the nearest if there is none
        proven["families"] = {args.family: proven["families"].get(args.family, {"cases": {}})}
        table = case_rows(proven["families"][args.family]["cases"])
    else:
        table = family_rows(proven["families"])
    if args.json:
        print(json.dumps(proven, indent=1))
        return 0
    page = f"{(markdown if args.markdown or args.write else text)(table)}\n\n{summary(proven)}"
    if args.write:
        write_table(args.write, page)
    else:
        print(page)
    return 0


def write_table(page: Path, table: str) -> None:
    """Puts a table between a page's marks, where an older one stands."""
    replace_between(page, BEGIN, END, f"\n{table}\n")


def recorded() -> dict[str, Any]:
    """What tests/parity/prove.py wrote down."""
    return json.loads(files("mlxtx.families").joinpath("proven.json").read_text())


def family_rows(proven: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for every registered family; its worst error of all cases in every column."""
    from mlxtx.families import families

    rows: list[tuple[str, ...]] = [COLUMNS]
    for name in sorted(families()):
        about = proven.get(name, {"made_of": "", "cases": {}})
        cases = about["cases"].values()
        worst = [max((case[way] for case in cases), default=None) for way in WAYS]
        rows.append((name, about["made_of"], str(len(cases)), *map(show, worst)))
    return rows


def case_rows(cases: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("case", "made of", *WAYS)]
    for name, case in sorted(cases.items()):
        rows.append((name, case["made_of"], *(show(case[way]) for way in WAYS)))
    return rows


def show(error: float | None) -> str:
    return "-" if error is None else f"{error:.0e}"


def summary(proven: Mapping[str, Any]) -> str:
    return (
        "Errors are the largest difference of any logit, in standard deviations of the logits,"
        f" from transformers {proven['transformers']} (float32, eager); {proven['tolerance']:.0e} is"
        " allowed. Each case ran with both generations of config.json, as a whole prompt, token by"
        " token, in uneven chunks and in a left-padded batch, gave the same greedy tokens, and was"
        " saved under the family's own names and reloaded in transformers."
    )


def text(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ------------------------------------------------------------------ what a decoder is made of


def made_of(decoders: Iterable[DecoderConfig]) -> str:
    """The parts of some decoders in the field's words, each once, in the order of the block."""
    parts: dict[str, None] = {}
    decoders = list(decoders)
    for part in (_norms, _attention, _positions, _feed_forward):
        for decoder in decoders:
            for block in decoder.blocks:
                parts |= dict.fromkeys(part(block))
    for decoder in decoders:
        parts |= dict.fromkeys(_frame(decoder))
    return ", ".join(parts)


def _norms(block: BlockConfig) -> list[str]:
    before = block.attention_norm or block.feed_forward_norm
    norm = before or block.attention_output_norm
    kind = {"rms": "RMSNorm", "layer": "LayerNorm"}[norm.kind] if norm else "no norm"
    if block.form == "parallel":
        place = "parallel" if block.feed_forward_norm else "parallel, one norm"
    elif block.norm_after_add:
        place = "post"
    elif block.attention_output_norm:
        place = "sandwich" if before else "output norms"
    else:
        place = "pre"
    return [f"{place} {kind}" if place != "parallel, one norm" else f"parallel, one {kind}"]


def _attention(block: BlockConfig) -> list[str]:
    from mlxtx.decoder.config import LatentAttentionConfig

    attention = block.attention
    if isinstance(attention, LatentAttentionConfig):
        return ["latent attention"]
    kind = "GQA" if attention.kv_heads > 1 else "MQA"
    found = ["MHA" if attention.kv_heads == attention.heads else kind]
    features = {
        "q/k norm": attention.q_norm,
        "windows": attention.window,
        "chunks": attention.chunk,
        "soft cap": attention.softcap,
        "sinks": attention.sinks,
        "gated": attention.gate,
        "clipped": attention.clip_qkv,
        "query temperature": attention.temperature,
        "shared caches": attention.shares_cache_of is not None,
        "values from keys": attention.value_is_key,
    }
    return found + [name for name, present in features.items() if present]


def _positions(block: BlockConfig) -> list[str]:
    attention = block.attention
    rope = attention.rope
    if rope is None:
        return ["ALiBi"] if getattr(attention, "alibi", ()) else []
    scaling = f" {rope.scaling.kind}" if rope.scaling else ""
    partial = "partial " if rope.dims < getattr(attention, "head_dim", rope.dims) else ""
    return [f"{partial}RoPE{scaling}"]


def _feed_forward(block: BlockConfig) -> list[str]:
    from mlxtx.decoder.config import ExpertsConfig

    found = []
    for part in (block.feed_forward, block.experts):
        if isinstance(part, ExpertsConfig):
            shared = " + shared" if part.shared else ""
            found.append(f"experts ({part.router.scores}){shared}")
            part = part.expert
        if part is not None:
            name = ACTIVATED.get((part.activation, part.gated))
            found.append(name or f"{'gated ' if part.gated else ''}{part.activation}")
    return found


def _frame(decoder: DecoderConfig) -> list[str]:
    embedding = decoder.embedding
    features = {
        "learned positions": embedding.positions and not embedding.sinusoidal,
        "layers without positions": not embedding.positions
        and any(b.attention.rope is None and not b.attention.alibi for b in decoder.blocks),
        "embedding norm": embedding.norm,
        "projected embeddings": embedding.width and embedding.width != decoder.width,
        "per-layer embeddings": embedding.per_layer,
        "multipliers": embedding.multiplier != 1 or decoder.head.multiplier != 1,
        "logit cap": decoder.head.softcap,
        "prediction heads": decoder.prediction_heads,
    }
    return [name for name, present in features.items() if present]


if __name__ == "__main__":
    from mlxtx.cli import run

    raise SystemExit(run(main, sys.argv[1:]))
