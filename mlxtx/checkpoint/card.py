"""What comes along with the weights: tokenizer files, unchanged, and a model card."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from mlxtx.checkpoint import bundled
from mlxtx.checkpoint.source import read_config
from mlxtx.files import write_error, write_text_atomic

if TYPE_CHECKING:
    from mlxtx.checkpoint.convert import Conversion

# Copied byte for byte; weights, code and what is written anew stay behind.
COMPANIONS = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "LICENSE*", "NOTICE*")
LEFT_BEHIND = ("config.json", "hf_quant_config.json", "adapter_config.json", "README.md")


def copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer, chat template, generation config and processor files of a checkpoint."""
    for pattern in COMPANIONS:
        for path in sorted(source.glob(pattern)):
            if path.name in LEFT_BEHIND or path.name.endswith(".index.json") or not path.is_file():
                continue
            if path.name.startswith("."):  # as macOS puts beside files on other disks
                continue
            try:
                shutil.copyfile(path, folder / path.name)
            except OSError as error:
                raise write_error(folder / path.name, error) from error


def write_card(
    folder: Path, source: Path, origin: str, revision: str | None, result: Conversion
) -> None:
    """``README.md``: where the model comes from, how it was packed and what that costs."""
    about = _front_matter(source / "README.md")
    from_hub = origin != bundled.NAME and not os.path.exists(os.path.expanduser(origin))
    lines = ["---", "library_name: mlx", "pipeline_tag: text-generation", "tags:", "- mlx"]
    if from_hub:
        lines.append(f"base_model: {origin}")
    elif "base_model" in about:
        lines.append(f"base_model: {about['base_model']}")
    lines += [f"{key}: {about[key]}" for key in _LICENCE if key in about]
    lines += ["---", ""]
    name = origin if from_hub else source.name
    lines += [f"# {name}, converted", ""]
    lines.append(f"Converted from {'' if not from_hub else 'the Hub repository '}`{name}`")
    commit = revision or _commit(source)
    lines[-1] += f" at revision `{commit}`." if commit else "."
    lines.append(f"The licence of the original applies ({about.get('license', 'not stated')}).")
    family, original = (read_config(place).get("model_type") for place in (folder, source))
    lines += ["", f"- family: `{family}`"]
    if original != family:
        lines[-1] += f", the text part of `{original}`: what is for images and sound was left out"
    lines.append(f"- weights: {result.recipe}, {result.bits_per_weight:.2f} bits a weight")
    lines.append(f"- size: {result.nbytes / 1e9:.2f} GB, {result.parameters / 1e6:.0f}M parameters")
    if result.unpacked:
        shown = ", ".join(f"`{path}`" for path in result.unpacked[:8])
        more = f" and {len(result.unpacked) - 8} more" if len(result.unpacked) > 8 else ""
        lines.append(f"- not packed, as the group does not divide their columns: {shown}{more}")
    if result.calibration:
        lines += ["", "On a text that was not used to choose the bits:", ""]
        lines += [f"- {line}" for line in result.calibration.lines()]
    if result.proof:
        lines += ["", "Compared with the original:", ""]
        lines += [f"- {line}" for line in result.proof.lines()]
    lines += ["", "Made with mlxtx (`mlxtx convert`).", ""]
    write_text_atomic(folder / "README.md", "\n".join(lines))


_LICENCE = ("license", "license_name", "license_link")


def _front_matter(path: Path) -> dict[str, str]:
    """The plain ``key: value`` lines at the top of a model card, and lists of one line each."""
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8-sig", errors="replace")[:20_000]
    match = re.match(r"---[ \t]*\n(.*?)\n---", text, re.DOTALL)
    lines = match[1] if match else ""
    # ">" and "|" begin a text on the lines below, which is left out.
    pairs = re.findall(r"^(\w+):[ \t]*([^\s>|][^\n]*)$", lines, re.MULTILINE)
    for key, below in re.findall(r"^(\w+):[ \t]*((?:\n[ \t]*- [^\n]+)+)", lines, re.MULTILINE):
        items = [line.strip().removeprefix("- ").strip() for line in below.split("\n")[1:]]
        pairs.append((key, items[0] if len(items) == 1 else f"[{', '.join(items)}]"))
    return {key: value.strip() for key, value in pairs if value.strip().isprintable()}


def _commit(source: Path) -> str | None:
    """The commit of a folder in the Hub cache."""
    return source.name if re.fullmatch(r"[0-9a-f]{40}", source.name) else None
