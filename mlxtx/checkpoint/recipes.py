"""Which module is packed how: recipes by name, rule files, and what never is packed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from mlxtx.checkpoint.quantization import MODES, Quantization
from mlxtx.errors import MlxtxError
from mlxtx.files import read_text

# Modules that are never packed: tiny, and much depends on them (routers never are either).
NEVER_PACKED = ("embed_positions", "_gate")

# Named recipes: bits for most modules, and for those that suffer most.
MIXED = {
    "mixed_2_6": (2, 6),
    "mixed_3_4": (3, 4),
    "mixed_3_6": (3, 6),
    "mixed_4_6": (4, 6),
    "mixed_4_8": (4, 8),
}


@dataclass
class Recipe:
    """Ordered rules (pattern, packing or None); the first pattern that fits a module's path counts,
    and ``default`` where none does. Patterns are shell-like (``*`` and ``?``) and have to be met
    by at least one module."""

    default: Quantization
    rules: Sequence[tuple[str, Quantization | None]] = ()
    name: str = ""
    met: set[str] = field(default_factory=set)

    def __call__(self, *paths: str) -> Quantization | None:
        """The packing of a module; ``paths`` are its names (as written, and ours)."""
        for pattern, quantization in self.rules:
            if any(fnmatchcase(path, pattern) for path in paths):
                self.met.add(pattern)
                return quantization
        return self.default

    def check_met(self) -> None:
        unmet = [pattern for pattern, _ in self.rules if pattern not in self.met]
        if unmet and not self.name:
            raise MlxtxError(f"no module of this model fits the rule {unmet[0]!r}; check the name")

    def describe(self) -> str:
        if self.name:
            return f"{self.name} ({self.default} for most modules)"
        if not self.rules:
            return str(self.default)
        return f"{self.default}, except " + ", ".join(
            f"{pattern}: {quantization or 'not packed'}" for pattern, quantization in self.rules
        )


def make_recipe(
    recipe: str | Path | Mapping[str, int] | None,
    *,
    bits: int | None,
    group_size: int | None,
    mode: str,
    layers: int,
) -> Recipe | None:
    """The recipe that a user asked for, or None when nothing is to be packed.

    recipe: None, the name of a mixed recipe, a file of ``pattern = bits`` rules, or a mapping of
    the same. ``bits`` is then the default of what no rule names.
    """
    if recipe is None:
        return None if bits is None and mode == "affine" else Recipe(_of(mode, bits, group_size))
    if isinstance(recipe, Mapping):
        rules = [(pattern, parse_bits(str(how), group_size)) for pattern, how in recipe.items()]
        return Recipe(_of(mode, bits, group_size), rules)
    if str(recipe) in MIXED:
        if mode != "affine":
            raise MlxtxError(f"the recipe {recipe} is made of affine bits, not of {mode}")
        low, high = MIXED[str(recipe)]
        return Recipe(
            _of("affine", bits or low, group_size),
            mixed_rules(_of("affine", high, group_size), layers),
            str(recipe),
        )
    path = Path(recipe)
    if not path.is_file():
        raise MlxtxError(f"no recipe {recipe}: give a rule file or one of {', '.join(MIXED)}")
    return Recipe(_of(mode, bits, group_size), read_rules(path, group_size))


def _of(mode: str, bits: int | None, group_size: int | None) -> Quantization:
    """The usual group of 64 is meant for affine packing; the other modes have their own."""
    if mode != "affine" and group_size == 64:
        group_size = None
    return Quantization.of(mode, bits, group_size)


def mixed_rules(high: Quantization, layers: int) -> list[tuple[str, Quantization | None]]:
    """More bits for embeddings and head, and in the first and last eighth of the layers and every
    third between them for the values and the way down of the feed-forward: what llama.cpp's
    Q4_K_M and mlx-lm's mixed recipes found to suffer most."""
    rules: list[tuple[str, Quantization | None]] = [("lm_head", high), ("*embed_tokens", high)]
    eighth = layers // 8
    for layer in range(layers):
        if layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2:
            for name in ("*v_proj", "*v_a_proj", "*v_b_proj", "*down_proj"):
                rules.append((f"*.{layer}.{name}", high))
    return rules


def read_rules(path: Path, group_size: int | None) -> list[tuple[str, Quantization | None]]:
    """Lines of ``pattern = bits``, ``pattern = bits/group``, ``pattern = mxfp4`` or ``pattern =
    none``; ``#`` begins a comment."""
    rules = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        pattern, equals, how = (part.strip() for part in line.partition("="))
        if not equals or not pattern:
            raise MlxtxError(f"{path}, line {number}: expected 'pattern = bits', not {line!r:.80}")
        try:
            rules.append((pattern, parse_bits(how, group_size)))
        except MlxtxError as error:
            raise MlxtxError(f"{path}, line {number}: {error}") from None
    return rules


def parse_bits(text: str, group_size: int | None = None) -> Quantization | None:
    """``6``, ``6/32``, ``mxfp8`` or ``none``."""
    if text == "none":
        return None
    if text in MODES and text != "affine":
        return Quantization.of(text)
    match = re.fullmatch(r"(\d+)(?:/(\d+))?", text)
    if not match:
        raise MlxtxError(f"{text!r:.40} is no number of bits, no mode and not 'none'")
    return Quantization.of("affine", int(match[1]), int(match[2]) if match[2] else group_size)
