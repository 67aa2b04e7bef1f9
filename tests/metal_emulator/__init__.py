"""Runs Metal kernels on a Linux CPU, in three modes, from the very text Metal compiles.

plain: numerics only, fast. checked: bounds, races, divergence, uninitialised reads, writes to
inputs,
misaligned and misplaced accesses. counted: bytes and 128-byte lines of each buffer.

``Emulator`` stands in for ``mx.fast.metal_kernel`` (see ``stand_in.py``); ``Kernel`` in
``machine.py`` runs a kernel function of any Metal source. Needs clang 19 on x86-64 Linux.
What it cannot show: acceptance by Apple's compiler, fast-math rounding, the order of a simdgroup's
sum, register pressure and time. It cannot run inside ``mx.compile``, and a gradient through it is
silently lost; the references are what those are tested on.
"""

from .compiler import missing
from .machine import EmulatorError, Kernel, Launch
from .stand_in import Emulator

__all__ = ["Emulator", "EmulatorError", "Kernel", "Launch", "missing"]
