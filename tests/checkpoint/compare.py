"""What the tests of conversions share."""

from __future__ import annotations

import hashlib

from mlxtx.checkpoint.safetensors import array_bytes
from mlxtx.checkpoint.source import Checkpoint


def tensors(folder):
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def equal(a, b):
    """Bit for bit, NaNs included."""
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and bytes(array_bytes(a)) == bytes(array_bytes(b))


def digest(folder):
    """A hash of every file, by name."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }
