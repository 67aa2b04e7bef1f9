"""Which way an operation runs: our kernel, MLX's own path or the reference.

The rules are a table; the numbers are by GPU family with a default row. What ``mlxtx doctor`` found
on this machine (a kernel that does not compile or disagrees, a path that is faster) comes first.
Nothing here was timed on a Mac: the default numbers follow from counted bytes and launches, and
doctor replaces them by measurement.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import mlx.core as mx

from mlxtx.errors import MlxtxWarning

Path_ = Literal["kernel", "fast", "reference"]


@dataclass(frozen=True)
class Tuning:
    """Launch numbers of one GPU family."""

    simdgroups: int  # of a threadgroup of attention_decode
    single_pass_rows: int  # up to this many cache rows, one pass
    threadgroups: int  # wanted in flight, for the number of blocks
    kernel_rows: int  # attention over a plain cache of fewer rows goes to MLX's own kernel


# The last letter of the architecture ("applegpu_g14s"): p phone, g base, s Pro or Max, d Ultra.
TUNING = {
    "default": Tuning(simdgroups=8, single_pass_rows=512, threadgroups=80, kernel_rows=0),
    "s": Tuning(simdgroups=8, single_pass_rows=512, threadgroups=160, kernel_rows=0),
    "d": Tuning(simdgroups=8, single_pass_rows=512, threadgroups=320, kernel_rows=0),
}


def on_metal() -> bool:
    """Whether operations run on a Metal GPU now."""
    return mx.metal.is_available() and mx.default_device() == mx.gpu


@functools.cache
def architecture() -> str:
    """The GPU's name for itself, for example ``applegpu_g14s``; empty off Metal."""
    return str(mx.device_info().get("architecture", "")) if mx.metal.is_available() else ""


def tuning() -> Tuning:
    """The numbers for this GPU; doctor may have found that it allows fewer threads."""
    numbers = TUNING.get(architecture()[-1:], TUNING["default"])
    fewer = _tried[-1] if _tried else int(remembered().get("simdgroups", 0))
    return replace(numbers, simdgroups=fewer) if fewer else numbers


_tried: list[int] = []


@contextmanager
def trying(*, simdgroups: int) -> Iterator[None]:
    """Inside, threadgroups have this many simdgroups: how doctor looks for what a device allows."""
    _tried.append(simdgroups)
    try:
        yield
    finally:
        _tried.pop()


def choose(operation: str, *, supported: bool, fused_by_mlx: bool = False) -> Path_:
    """The way for ``operation``. ``supported``: our kernel takes this shape; ``fused_by_mlx``:
    ``mx.fast`` does the same in one fused launch, with nothing built in memory."""
    if not on_metal():
        return "reference"
    found = "off" if operation in _failed else remembered().get(operation)
    if found == "off":  # it failed at load, or doctor saw it fail or disagree on this machine
        return "fast" if fused_by_mlx else "reference"
    if fused_by_mlx and found != "kernel":
        return "fast"
    return "kernel" if supported else ("fast" if fused_by_mlx else "reference")


_failed: set[str] = set()


def switch_off(operation: str, why: Exception) -> None:
    """Our kernel for ``operation`` did not run: this process does without it from now on."""
    if operation not in _failed:
        reason = (str(why).splitlines() or [type(why).__name__])[0]
        warnings.warn(
            f"the Metal kernel {operation} does not run on this machine ({reason}); going on "
            "without it, slower. mlxtx doctor says more",
            MlxtxWarning,
            stacklevel=2,
        )
    _failed.add(operation)


def memory_file() -> Path:
    """Where doctor keeps its findings; ``MLXTX_DOCTOR_FILE`` moves it."""
    given = os.environ.get("MLXTX_DOCTOR_FILE")
    if given:
        return Path(given)
    from platformdirs import user_cache_path

    return user_cache_path("mlxtx") / "doctor.json"


def machine_key() -> str:
    """Findings hold for one GPU, one version of MLX and one set of kernels."""
    import hashlib
    from importlib.metadata import version

    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.metal")):
        digest.update(path.read_bytes())
    return f"{architecture()}|mlx {version('mlx')}|{digest.hexdigest()[:12]}"


@functools.cache
def remembered() -> dict[str, str]:
    """operation -> "off", "kernel" or "fast", as found on this very machine; empty if unknown.
    "simdgroups" -> how many of them a threadgroup may have, if fewer than the table says."""
    try:
        findings = json.loads(memory_file().read_text()).get(machine_key(), {})
    except (OSError, ValueError, AttributeError):
        return {}
    known = ("off", "kernel", "fast", "4", "2", "1")
    return {str(k): str(v) for k, v in findings.items() if v in known}
