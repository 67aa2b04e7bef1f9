"""Memory bandwidth of Apple's chips, and what it bounds."""

from __future__ import annotations

# GB/s, as Apple states it (technical specifications of the Macs; the larger configuration where a
# chip has two).
BANDWIDTH = {
    "M1": 68, "M1 Pro": 200, "M1 Max": 400, "M1 Ultra": 800,
    "M2": 100, "M2 Pro": 200, "M2 Max": 400, "M2 Ultra": 800,
    "M3": 100, "M3 Pro": 150, "M3 Max": 400, "M3 Ultra": 819,
    "M4": 120, "M4 Pro": 273, "M4 Max": 546,
    "M5": 153, "M5 Pro": 307, "M5 Max": 614,
}  # fmt: skip


def bandwidth_of(device_name: str) -> int | None:
    """GB/s of a chip as macOS names it ("Apple M4 Pro"), or None if it is not in the table."""
    return BANDWIDTH.get(device_name.removeprefix("Apple ").strip())


def row_bytes(dim: int, bits: int, group_size: int = 64) -> float:
    """Bytes of one cache row of ``dim`` channels: 16 bits plain, or codes with 16-bit scale and
    bias for each group."""
    if bits == 16:
        return dim * 2
    groups = -(-dim // group_size)
    return groups * (group_size * bits / 8 + 4)


def decode_bytes(
    *, layers: int, kv_heads: int, dim: int, length: int, key_bits: int, value_bits: int
) -> float:
    """Bytes the attention of one decoded token must read from the cache."""
    row = row_bytes(dim, key_bits) + row_bytes(dim, value_bits)
    return layers * kv_heads * length * row
