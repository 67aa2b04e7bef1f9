"""How a cache keeps its rows, spelled in a few characters and parsed here alone.

k8v4g64        keys at 8 bits, values at 4, in groups of 64 channels
k4v4g32r       ... turned by a Hadamard matrix first (spreads outliers over the channels)
k4v4g64f4n128  ... the first 4 and the newest 128 rows stay as they are
w4096s4        every layer sees only the newest 4096 tokens and the first 4
plain          rows as they are
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mlxtx.errors import MlxtxError

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64)
DEFAULT_GROUP_SIZE = 64

_SPELLING = re.compile(
    r"(?:k(?P<key_bits>\d+)v(?P<value_bits>\d+)(?:g(?P<group_size>\d+))?(?P<rotate>r)?)?"
    r"(?:f(?P<first>\d+))?(?:n(?P<newest>\d+))?"
    r"(?:w(?P<window>\d+)(?:s(?P<sink_tokens>\d+))?)?"
)


@dataclass(frozen=True, kw_only=True)
class KVSettings:
    """``key_bits`` and ``value_bits`` None: rows stay as they are. ``first`` and ``newest`` count
    rows of a quantized cache that stay unquantized. ``window`` and ``sink_tokens`` let every
    layer forget all but the newest and the first tokens. A latent cache has one kind of row, kept
    at ``key_bits``."""

    key_bits: int | None = None
    value_bits: int | None = None
    group_size: int = DEFAULT_GROUP_SIZE
    rotate: bool = False
    first: int = 0
    newest: int = 0
    window: int | None = None
    sink_tokens: int = 0

    def __post_init__(self) -> None:
        if (self.key_bits is None) != (self.value_bits is None):
            raise MlxtxError("a quantized cache needs bits for keys and for values, as in k8v4")
        for name, bits in (("keys", self.key_bits), ("values", self.value_bits)):
            if bits is not None and bits not in BITS:
                known = ", ".join(map(str, BITS))
                raise MlxtxError(f"{name} of a cache can have {known} bits, not {bits}")
        if self.group_size not in GROUP_SIZES:
            raise MlxtxError(f"groups of a cache have 32 or 64 channels, not {self.group_size}")
        if not self.quantized and (self.first or self.newest or self.rotate):
            raise MlxtxError("'f', 'n' and 'r' belong to a quantized cache: k8v4g64n128, say")
        if self.window is not None and self.window < 1:
            raise MlxtxError(f"a window of {self.window} tokens shows nothing; it needs at least 1")

    @property
    def quantized(self) -> bool:
        return self.key_bits is not None

    def __str__(self) -> str:
        text = ""
        if self.quantized:
            text = f"k{self.key_bits}v{self.value_bits}g{self.group_size}"
            text += "r" if self.rotate else ""
        text += f"f{self.first}" if self.first else ""
        text += f"n{self.newest}" if self.newest else ""
        text += f"w{self.window}" if self.window is not None else ""
        text += f"s{self.sink_tokens}" if self.sink_tokens else ""
        return text or "plain"


PLAIN = KVSettings()


def parse_kv(kv: str | KVSettings | None) -> KVSettings:
    """The settings that ``kv`` spells; None is plain. Raises MlxtxError for anything impossible."""
    if isinstance(kv, KVSettings):
        return kv
    text = (kv or "plain").strip().lower()
    if text == "plain":
        return PLAIN
    match = _SPELLING.fullmatch(text)
    if match is None:
        raise MlxtxError(
            f"can't read the cache setting {kv!r}: write plain, k8v4g64 (bits of keys and values, "
            "group), k4v4g32r (rotated), and behind it f4 (first), n128 (newest), w4096s4 (window)"
        )
    found = {name: value for name, value in match.groupdict().items() if value is not None}
    rotate = found.pop("rotate", None) is not None
    return KVSettings(rotate=rotate, **{name: int(value) for name, value in found.items()})


def kv_from_bits(bits: str) -> KVSettings:
    """``--kv-bits 8,4`` (keys, values) or ``--kv-bits 8`` (both), in the default groups."""
    try:
        numbers = [int(part) for part in bits.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise MlxtxError(f"can't read the bits {bits!r}: write 8 or 8,4 (keys, values)")
    return KVSettings(key_bits=numbers[0], value_bits=numbers[-1])
