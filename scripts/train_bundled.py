"""Makes the model in the box: writes its conversations, trains it from nothing, packs and judges it.

    LD_PRELOAD=libopenblas.so.0 OPENBLAS_NUM_THREADS=1 python scripts/train_bundled.py --out RUN
    python scripts/train_bundled.py --out RUN --evaluate --pack mlxtx/bundled

Runs from a checkout of the repository: the conversations come from ``training/bundled``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# GLM-4.5's form with every layer dense: the plain modern decoder (RMSNorm, RoPE, GQA, q/k norm,
# SwiGLU, tied embeddings) of the families whose checkpoints hold an extra prediction head. The
# keys about experts must be there and name none.
LAYERS = 4
CONFIG: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "vocab_size": 2048,
    "hidden_size": 192,
    "num_hidden_layers": LAYERS,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "use_qk_norm": True,
    "attention_bias": False,
    "intermediate_size": 512,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "partial_rotary_factor": 1.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "first_k_dense_replace": LAYERS,
    "n_routed_experts": 1,
    "n_shared_experts": 1,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
}
ROW_LENGTH = 256
SHIPPED_BITS = 8
WEIGHT_BITS = (None, 16, 8, 4, 3)  # None: float32
KV_SETTINGS = ("k8v8g64", "k4v4g64", "k2v2g64")


def main(argv: Sequence[str] | None = None) -> int:
    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser(prog="train_bundled", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--conversations", type=int, default=1_250_000)
    parser.add_argument(
        "--steps", type=int, default=22_000, help="of batch-size rows of 256 tokens"
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=0.005)
    parser.add_argument("--optimizer", default="muon")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--finish",
        type=Path,
        metavar="RUN",
        help="go on from the newest state of RUN, which may still be going, with a learning rate "
        "that falls linearly to nothing in --steps",
    )
    parser.add_argument(
        "--head",
        type=Path,
        metavar="RUN",
        help="train only the extra head, for the token after next, beside the weights of RUN",
    )
    parser.add_argument(
        "--mean",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="train nothing: take the mean of the weights that these runs ended with",
    )
    parser.add_argument("--constant", action="store_true", help="keep the learning rate")
    parser.add_argument(
        "--choice-weight", type=float, default=4.0, help="of the tokens that choose an answer"
    )
    parser.add_argument(
        "--cut",
        type=float,
        default=0.8,
        help="part of single answers that are not told to the end",
    )
    parser.add_argument(
        "--share",
        type=share,
        nargs="+",
        default=[],
        metavar="KIND=WEIGHT",
        help="of a kind of conversations, in place of the one in conversations.py: sum=80",
    )
    parser.add_argument("--resume", action="store_true", help="go on if the run was stopped")
    parser.add_argument("--evaluate", action="store_true", help="only judge what --out holds")
    parser.add_argument(
        "--questions", type=int, default=0, help="compare settings on so many questions (all)"
    )
    parser.add_argument(
        "--pack", type=Path, metavar="DIR", help="only write the checkpoint to ship"
    )
    args = parser.parse_args(argv)
    if args.evaluate:
        evaluate(args)
    if args.pack:
        pack(args)
    if not (args.evaluate or args.pack):
        prepare(args)
        (mean if args.mean else train)(args)
    return 0


def share(text: str) -> tuple[str, float]:
    from training.bundled.conversations import KINDS

    kind, _, weight = text.partition("=")
    if kind not in KINDS:
        raise argparse.ArgumentTypeError(f"{kind} is none of {', '.join(KINDS)}")
    return kind, float(weight)


def prepare(args: argparse.Namespace) -> None:
    """The conversations and the vocabulary, unless the folder has them."""
    from training.bundled.data_set import held_out, training_set, write_jsonl
    from training.bundled.vocabulary import as_read, train_vocabulary, write_tokenizer

    data = args.out / "data"
    if (args.out / "model" / "tokenizer.model").is_file():  # which is written last
        return
    data.mkdir(parents=True, exist_ok=True)
    write_jsonl(held_out(), data / "held_out.jsonl")
    if not args.mean:
        rows = list(training_set(args.conversations, args.seed, args.cut, dict(args.share)))
        write_jsonl(rows, data / "train.jsonl")
    if before := runs_before(args):
        shutil.copytree(before[0] / "model", args.out / "model", dirs_exist_ok=True)
        return
    texts = (as_read(m) for row in rows[:20_000] for m in row["messages"])
    write_tokenizer(args.out / "model", train_vocabulary(texts, CONFIG["vocab_size"]))


def runs_before(args: argparse.Namespace) -> list[Path]:
    """The runs that this one begins from."""
    return args.mean or [run for run in (args.finish or args.head,) if run]


def train(args: argparse.Namespace) -> None:
    from mlxtx.text.tokenizer import Tokenizer
    from mlxtx.tuning.scratch import initial_model
    from mlxtx.tuning.settings import Training
    from training.bundled.fixed_row_trainer import AheadTrainer, FixedRowTrainer, parameter_count
    from training.bundled.packing import decoder_config
    from training.bundled.rows import lay_rows

    tokenizer = Tokenizer.load(args.out / "model")
    with open(args.out / "data" / "train.jsonl", encoding="utf-8") as file:
        rows = lay_rows(
            map(json.loads, file),
            tokenizer,
            length=ROW_LENGTH,
            context=CONFIG["max_position_embeddings"],
            seed=args.seed,
            choice_weight=args.choice_weight,
        )
    used = (rows.segments > 0).mean()
    scored = (rows.weights > 0).sum()
    model = initial_model(decoder_config(CONFIG, heads=int(bool(args.head))), args.seed)
    print(
        f"{parameter_count(model):,} parameters; {len(rows)} rows, {used:.1%} full, "
        f"{scored:,} tokens in the loss; {args.steps * args.batch_size / len(rows):.1f} epochs",
        flush=True,
    )
    settings = Training(
        iters=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        optimizer=args.optimizer,
        schedule="constant" if args.constant else "linear",
        warmup=0 if args.finish else 20 if args.head else 100,
        final_rate=0.0,
        weight_decay=0.01,
        seed=args.seed,
        report_every=25,
        save_every=200,
    )
    trainer = (AheadTrainer if args.head else FixedRowTrainer)(
        model, rows, settings, args.out, write=lambda folder: save(model, folder), on_event=tell
    )
    if args.head:
        take_decoder(trainer, args.head)
    if not (args.resume and trainer.resume()):
        step = begin_from(trainer, args.finish) if args.finish else None
        note_command(runs_before(args), args.out, step)
    trainer.run()


def mean(args: argparse.Namespace) -> None:
    """Writes the mean of the weights of runs that went different ways from the same one: more
    accurate than any of them (Wortsman et al. 2022, "Model soups", arXiv 2203.05482)."""
    import mlx.core as mx

    from training.bundled.packing import load_weights

    ends = [load_weights(run / "model") for run in args.mean]
    weights = {name: sum(end[name] for end in ends) / len(ends) for name in ends[0]}
    mx.eval(weights)
    write_weights(weights, args.out)
    note_command(args.mean, args.out)


def begin_from(trainer, run: Path) -> int:
    """Takes over the weights and the optimizer of another run, not its place in the data; gives the
    step that run was at."""
    from mlx.utils import tree_unflatten

    from mlxtx.tuning.state import StateFolder

    state = StateFolder(run / "state").load()
    if state is None:
        raise SystemExit(f"{run} has no saved state yet")
    trainer.model.update(tree_unflatten(list(state.weights.items())))
    trainer.optimizer.restore(state.optimizer)
    print(f"from step {state.step} of {run}", flush=True)
    return state.step


def take_decoder(trainer, run: Path) -> None:
    """Takes over the weights that RUN ended with, which no state of the head's own run holds."""
    from mlx.utils import tree_unflatten

    from training.bundled.packing import load_weights

    trainer.model.update(tree_unflatten(list(load_weights(run / "model").items())))


def note_command(runs: Sequence[Path], out: Path, step: int | None = None) -> None:
    """Notes this command behind those that led to ``runs``, and where a run was taken over at a
    ``step`` before its end."""
    lines = list(dict.fromkeys(line for run in runs for line in history(run)))
    if lines and step is not None and f"--steps {step} " not in lines[-1] + " ":
        lines[-1] += f"  # stopped at step {step}"
    (out / "history.txt").write_text("\n".join([*lines, command()]) + "\n")


def history(run: Path) -> list[str]:
    """The commands that led to a run, the first one first."""
    path = run / "history.txt"
    return path.read_text().splitlines() if path.exists() else []


def command() -> str:
    """This command, with only the names of the folders of runs."""
    words = [
        Path(word).name if "/" in word else word for word in sys.argv[1:] if word != "--resume"
    ]
    return "python scripts/train_bundled.py " + " ".join(words)


def evaluate(args: argparse.Namespace) -> None:
    """Asks the held-out questions at every setting; writes table.json, table.md and answers.jsonl."""
    from training.bundled import evaluate as judge
    from training.bundled.packing import load_weights, rounded

    weights = load_weights(args.out / "model")
    every = judge.read_rows(args.out / "data" / "held_out.jsonl")
    some = random.Random(0).sample(every, args.questions) if args.questions else every
    table: dict[str, dict[str, float]] = {}

    def measure(name: str, rows, bits: int | None, kv: str | None = None):
        judged = judge.answers(language_model(args.out, rounded(weights, bits)), rows, kv=kv)
        table[name] = judge.scores(judged)
        print(name, {k: round(v, 3) for k, v in table[name].items()}, flush=True)
        return judged

    shipped = measure(f"{SHIPPED_BITS} bits, all {len(every)}", every, SHIPPED_BITS)
    told = [{**a.row, "said": a.text, "right": a.right} for a in shipped]
    if any(name.startswith("prediction_heads") for name in weights):
        guide = language_model(args.out, rounded(weights, SHIPPED_BITS))
        ahead = judge.guessed_ahead(guide, shipped[::5])
        print(f"the extra head guesses {ahead:.1%} of the tokens after next", flush=True)
        (args.out / "ahead.json").write_text(json.dumps(ahead))
    lines = "".join(json.dumps(row) + "\n" for row in told)
    (args.out / "answers.jsonl").write_text(lines)
    names = {None: "float32", 16: "bf16"}
    for bits in WEIGHT_BITS:
        measure(f"{names.get(bits, f'{bits} bits')}, {len(some)}", some, bits)
    for kv in KV_SETTINGS:
        measure(f"{SHIPPED_BITS} bits, {kv}, {len(some)}", some, SHIPPED_BITS, kv)
    (args.out / "table.json").write_text(json.dumps(table, indent=1))
    (args.out / "table.md").write_text(judge.markdown(table))


def language_model(out: Path, weights):
    from mlx.utils import tree_unflatten

    from mlxtx.decoder.model import DecoderModel
    from mlxtx.language_model import LanguageModel
    from mlxtx.text.tokenizer import Tokenizer
    from training.bundled.packing import decoder_config

    heads = sum(name.endswith("eh_proj.weight") for name in weights)
    model = DecoderModel(decoder_config(CONFIG, heads=heads))
    model.update(tree_unflatten(list(weights.items())))
    return LanguageModel(model, Tokenizer.load(out / "model"), CONFIG)


def pack(args: argparse.Namespace) -> None:
    """Writes the shipped checkpoint and its card from the run's own records."""
    from training.bundled.card import model_card
    from training.bundled.facts import all_items
    from training.bundled.packing import GROUP, load_weights, write_checkpoint

    weights = load_weights(args.out / "model")
    card = model_card(
        {
            "parameters": sum(w.size for w in weights.values()),
            "facts": len(all_items()),
            "layers": CONFIG["num_hidden_layers"],
            "width": CONFIG["hidden_size"],
            "heads": CONFIG["num_attention_heads"],
            "kv_heads": CONFIG["num_key_value_heads"],
            "head_dim": CONFIG["head_dim"],
            "feed_forward": CONFIG["intermediate_size"],
            "vocabulary": CONFIG["vocab_size"],
            "context": CONFIG["max_position_embeddings"],
            "bits": SHIPPED_BITS,
            "group": GROUP,
            "history": "\n".join("    " + line for line in history(args.out)),
            "stages": stages(args.out),
            "ahead": json.loads((args.out / "ahead.json").read_text()),
            "table": (args.out / "table.md").read_text(),
        }
    )
    write_checkpoint(args.out / "model", args.pack, CONFIG, bits=SHIPPED_BITS, card=card)


def stages(out: Path) -> str:
    """A line for each training that led to ``out``: steps, tokens, the last loss and the date."""
    lines = []
    for command_line in history(out):
        words = command_line.split()
        metrics = out.parent / words[words.index("--out") + 1] / "metrics.jsonl"
        if "--mean" in words:
            continue
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        last = [row for row in rows if row["stage"] == "train"][-1]
        date = datetime.date.fromtimestamp(metrics.stat().st_mtime).isoformat()
        lines.append(
            f"- `{metrics.parent.name}`: {last['step']:,} steps, {last['tokens']:,} tokens, "
            f"loss {last['loss']:.3f}, {date}"
        )
    return "\n".join(lines)


def save(model, out: Path) -> None:
    from mlx.utils import tree_flatten

    write_weights(dict(tree_flatten(model.parameters())), out)


def write_weights(weights, out: Path) -> None:
    import mlx.core as mx

    folder = out / "model"
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")


def tell(event) -> None:
    details = " ".join(f"{k} {v:.5g}" for k, v in event.details.items())
    print(f"{event.stage} {event.done}/{event.total} {details}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
