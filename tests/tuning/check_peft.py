"""Compares adapters with PEFT itself, both ways. Not a test, for PEFT and torch are not needed here:

python tests/tuning/check_peft.py --peer-python /path/to/python/with/peft
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

# Family, DoRA, targets of ours, targets of PEFT's.
CASES = (
    ("llama", False, "all", "all-linear"),
    ("llama", True, "all", "all-linear"),
    ("llama", False, ["q_proj", "embed_tokens"], ["q_proj", "embed_tokens"]),
    ("phi3", False, "all", "all-linear"),
    ("gpt2", False, "all", "all-linear"),
)


def peer(folder: Path) -> None:
    """Under PEFT: the logits of our adapter, and an adapter of its own with its logits."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    tokens = torch.tensor(np.load(folder / "tokens.npy")).long()
    settings = json.loads((folder / "case.json").read_text())

    def base():
        return AutoModelForCausalLM.from_pretrained(
            folder / "model", dtype=torch.float32, attn_implementation="eager"
        ).eval()

    with torch.no_grad():
        plain = base()(tokens).logits
        ours = PeftModel.from_pretrained(base(), str(folder / "ours")).eval()
        ours_logits = ours(tokens).logits
        torch.manual_seed(1)
        made = get_peft_model(
            base(),
            LoraConfig(
                r=3,
                lora_alpha=5,
                use_rslora=True,
                use_dora=settings["dora"],
                init_lora_weights=False,
                target_modules=settings["targets"],
                task_type="CAUSAL_LM",
                fan_in_fan_out=settings["family"] == "gpt2",
            ),
        ).eval()
        made.save_pretrained(folder / "theirs")
        theirs_logits = made(tokens).logits
    np.savez(folder / "peer.npz", plain=plain, ours=ours_logits, theirs=theirs_logits)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer-python")
    parser.add_argument("--peer", type=Path)
    args = parser.parse_args()
    if args.peer:
        peer(args.peer)
        return
    import mlx.core as mx

    from mlxtx.checkpoint import load_model
    from mlxtx.tuning.adapters import adapter_of, load_adapter
    from mlxtx.tuning.lora import LowRank
    from mlxtx.tuning.model_files import save_model
    from mlxtx.tuning.peft import write_peft
    from mlxtx.tuning.targets import remove_adapters
    from tests.tuning.test_peft import FAMILIES, TOKENS, made

    for family, dora, targets, theirs in CASES:
        with tempfile.TemporaryDirectory() as name:
            folder, config = Path(name), FAMILIES[family]
            net = made(config, targets, LowRank(rank=2, scale=1.5, dora=dora))
            wanted = np.array(net(TOKENS))
            adapter = adapter_of(net)
            remove_adapters(net)
            plain = np.array(net(TOKENS))
            save_model(net, config, folder / "model")
            write_peft(adapter, folder / "ours", net, config)
            np.save(folder / "tokens.npy", np.array(TOKENS))
            case = {"family": family, "dora": dora, "targets": theirs}
            (folder / "case.json").write_text(json.dumps(case))
            subprocess.run([args.peer_python, __file__, "--peer", name], check=True)
            found = np.load(folder / "peer.npz")
            again, _ = load_model(folder / "model")
            load_adapter(again, folder / "theirs", config)
            theirs = np.array(again(mx.array(TOKENS)))
            gaps = {
                "base": np.abs(plain - found["plain"]).max(),
                "ours in PEFT": np.abs(wanted - found["ours"]).max(),
                "PEFT's in ours": np.abs(theirs - found["theirs"]).max(),
            }
            changed = np.abs(found["theirs"] - found["plain"]).max()
            print(f"{family}{' DoRA' if dora else ''}: largest difference of a logit", end=" ")
            print(", ".join(f"{k} {v:.1e}" for k, v in gaps.items()), f"(effect {changed:.2f})")
            if max(gaps.values()) > 1e-3:
                sys.exit("they differ")


if __name__ == "__main__":
    main()
