"""Makes the model in the box: writes its conversations, trains it from nothing, packs and judges it.

    LD_PRELOAD=libopenblas.so.0 python scripts/train_bundled.py --out RUN
    python scripts/train_bundled.py --out RUN --evaluate

Runs from a checkout of the repository: the conversations come from ``training/bundled``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 2048,
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 512,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
ROW_LENGTH = 512


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="train_bundled", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--conversations", type=int, default=45_000)
    parser.add_argument("--steps", type=int, default=2400, help="of batch-size rows of 512 tokens")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--optimizer", default="muon")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args(argv)
    sys.path.insert(0, str(ROOT))
    prepare(args)
    train(args)
    return 0


def prepare(args: argparse.Namespace) -> None:
    """The conversations and the vocabulary, unless the folder has them."""
    from training.bundled.conversations import held_out, training_set, write_jsonl
    from training.bundled.vocabulary import train_vocabulary, write_tokenizer

    data = args.out / "data"
    if (args.out / "model" / "tokenizer.model").is_file() and (data / "train.jsonl").is_file():
        return
    data.mkdir(parents=True, exist_ok=True)
    rows = list(training_set(args.conversations, args.seed))
    write_jsonl(rows, data / "train.jsonl")
    write_jsonl(list(training_set(300, args.seed + 1)), data / "valid.jsonl")
    write_jsonl(held_out(), data / "held_out.jsonl")
    texts = (m["content"] for row in rows[:20_000] for m in row["messages"])
    write_tokenizer(args.out / "model", train_vocabulary(texts, CONFIG["vocab_size"]))


def train(args: argparse.Namespace) -> None:
    from mlxtx.families import family_for
    from mlxtx.text.tokenizer import Tokenizer
    from mlxtx.tuning.scratch import initial_model
    from mlxtx.tuning.trainer import Training
    from training.bundled.fixed_row_trainer import FixedRowTrainer, parameter_count
    from training.bundled.rows import lay_rows

    tokenizer = Tokenizer.load(args.out / "model")
    with open(args.out / "data" / "train.jsonl", encoding="utf-8") as file:
        rows = lay_rows(
            map(json.loads, file),
            tokenizer,
            length=ROW_LENGTH,
            context=CONFIG["max_position_embeddings"],
            seed=args.seed,
        )
    used = (rows.segments > 0).mean()
    scored = rows.in_loss.sum()
    model = initial_model(family_for(CONFIG).decoder_config(dict(CONFIG)), args.seed)
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
        schedule="cosine",
        warmup=100,
        final_rate=0.02,
        weight_decay=0.01,
        seed=args.seed,
        report_every=25,
        save_every=250,
    )
    trainer = FixedRowTrainer(
        model, rows, settings, args.out, write=lambda folder: save(model, folder), on_event=tell
    )
    if args.resume:
        trainer.resume()
    trainer.run()


def save(model, folder: Path) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    folder = folder / "model"
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")


def tell(event) -> None:
    details = " ".join(f"{k} {v:.5g}" for k, v in event.details.items())
    print(f"{event.stage} {event.done}/{event.total} {details}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
