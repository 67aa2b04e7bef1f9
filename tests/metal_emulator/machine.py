"""Loads built kernels into the runtime, launches them and reads back data, reports and counters."""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from .compiler import SYMBOLIZER, Parameter, build, runtime_library

Mode = Literal["plain", "checked", "counted"]
MODES: dict[Mode, int] = {"plain": 0, "checked": 1, "counted": 2}
MAX_THREADS = 1024
MAX_BUFFERS = 31


class EmulatorError(Exception):
    """A kernel did what Metal does not allow, or what no program may rely on."""

    def __init__(self, reports: Sequence[str]):
        super().__init__("\n".join(reports))
        self.reports = list(reports)


class _Report(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_char * 24),
        ("where", ctypes.c_uint64),
        ("is_site", ctypes.c_int),
        ("slot", ctypes.c_int),
        ("offset", ctypes.c_int64),
        ("size", ctypes.c_int),
        ("lane", ctypes.c_int),
        ("other", ctypes.c_int),
        ("group", ctypes.c_uint32 * 3),
    )


# Bytes and lines count once for a load of the whole simdgroup, however many lanes share them;
# ``unique`` counts each byte of the buffer once; ``cached`` lines are those not among the last eight
# the simdgroup read (a share of the first-level cache); ``minimum`` is the lines touched at all.
COUNTER_NAMES = (
    "read_bytes",
    "written_bytes",
    "unique_read",
    "unique_written",
    "read_lines",
    "read_lines_cached",
    "written_lines",
    "minimum_lines",
)


class _Counters(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in COUNTER_NAMES)


@dataclass
class Launch:
    """What one launch did."""

    name: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    outputs: dict[int, np.ndarray]  # buffer index -> bytes
    threadgroup_bytes: int
    counters: dict[str, dict[str, int]] = field(default_factory=dict)  # buffer name -> counts


@functools.cache
def _runtime() -> ctypes.CDLL:
    library = ctypes.CDLL(str(runtime_library()), mode=ctypes.RTLD_GLOBAL)
    library.emu_buffer.restype = ctypes.c_void_p
    library.emu_buffer.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.c_int]
    library.emu_launch.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int, ctypes.c_uint32]
    library.emu_threadgroup_bytes.restype = ctypes.c_uint64
    library.emu_unwritten.restype = ctypes.c_uint64
    library.emu_reports.argtypes = [ctypes.POINTER(_Report), ctypes.c_int]
    return library


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    _runtime()
    return ctypes.CDLL(str(path))


class Kernel:
    """A kernel function of a Metal source, built for this CPU."""

    def __init__(self, source: str, entry: str, mode: Mode = "checked"):
        self.name = entry
        self.mode: Mode = mode
        self.built = build(source, entry, hooks=mode != "plain")
        self.library = _load(self.built.library)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return self.built.parameters

    def launch(
        self,
        buffers: Mapping[int, np.ndarray],
        *,
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        constants: Mapping[int, bool | int] | None = None,
        seed: int = 0,
        filled: bool = False,
    ) -> Launch:
        """Run over ``grid`` threads. ``buffers``: buffer index -> contiguous array; an output is
        given as an array of its size and comes back in ``Launch.outputs``. ``filled``: outputs
        keep the given contents (otherwise they start as bytes 0xFF). Raises EmulatorError."""
        runtime = _runtime()
        group: tuple[int, int, int] = tuple(
            min(g, n) for g, n in zip(threadgroup, grid, strict=True)
        )  # type: ignore[assignment]
        if group[0] * group[1] * group[2] > MAX_THREADS:
            raise EmulatorError([f"THREADS {group}: more than {MAX_THREADS} in a threadgroup"])
        used = [p for p in self.parameters if p.buffer is not None]
        if len(used) > MAX_BUFFERS:
            raise EmulatorError([f"BUFFERS {len(used)}: a kernel has at most {MAX_BUFFERS}"])
        for number, value in (constants or {}).items():
            raw = (ctypes.c_bool if isinstance(value, bool) else ctypes.c_int)(value)
            getattr(self.library, f"emu_constant_{number}")(ctypes.byref(raw))

        runtime.emu_reset()
        pointers = (ctypes.c_void_p * 40)()
        for parameter in used:
            assert parameter.buffer is not None
            data = buffers.get(parameter.buffer)
            if data is None:
                continue  # a buffer that a function constant leaves out
            data = np.ascontiguousarray(data)
            slot = parameter.buffer + 1
            address = runtime.emu_buffer(slot, data.nbytes, int(parameter.is_output))
            if parameter.is_output and not filled:
                ctypes.memset(address, 0xFF, data.nbytes)
            else:
                ctypes.memmove(address, data.ctypes.data, data.nbytes)
            pointers[parameter.buffer] = address
        entry = ctypes.cast(self.library.emu_entry, ctypes.c_void_p)
        sizes = [(ctypes.c_uint32 * 3)(*values) for values in (grid, group)]
        runtime.emu_launch(entry, pointers, sizes[0], sizes[1], MODES[self.mode], seed)

        reports = self._reports(used)
        outputs = {}
        for parameter in used:
            index = parameter.buffer
            assert index is not None
            if not parameter.is_output or index not in buffers:
                continue
            size = buffers[index].nbytes
            raw_bytes = ctypes.string_at(pointers[index], size)
            outputs[index] = np.frombuffer(raw_bytes, dtype=np.uint8)
            if self.mode == "checked" and not filled:
                unwritten = runtime.emu_unwritten(index + 1)
                if unwritten:
                    reports.append(f"UNWRITTEN {unwritten} of {size} bytes of '{parameter.name}'")
        if reports:
            raise EmulatorError(reports)
        result = Launch(self.name, grid, group, outputs, int(runtime.emu_threadgroup_bytes()))
        if self.mode == "counted":
            for parameter in used:
                if parameter.buffer in buffers:
                    counts = _Counters()
                    runtime.emu_counters(parameter.buffer + 1, ctypes.byref(counts))
                    result.counters[parameter.name] = {
                        name: getattr(counts, name) for name in COUNTER_NAMES
                    }
        return result

    def _reports(self, used: Sequence[Parameter]) -> list[str]:
        store = (_Report * 64)()
        count = min(64, _runtime().emu_reports(store, 64))
        names = {p.buffer + 1: p.name for p in used if p.buffer is not None}
        return [self._describe(store[i], names) for i in range(count)]

    def _describe(self, report: _Report, names: Mapping[int, str]) -> str:
        kind = report.kind.decode()
        thread = f"thread {report.lane} of group {tuple(report.group)}"
        if report.is_site:
            where = f"line {report.where >> 16}" if report.where else ""
        else:
            where = self._line(report.where)
        if kind == "BARRIER":
            what = f"reached by {report.offset} of {report.size} threads"
        elif kind == "DIVERGENT":
            what = f"collective reached by {report.offset} of {report.size} lanes"
        elif kind == "TGMEM":
            what = f"{report.offset} bytes of threadgroup memory, more than {report.size}"
        elif kind == "SHUFFLE":
            what = "value of a lane that does not take part"
        else:
            name = names.get(report.slot, "threadgroup memory" if report.slot == 0 else "?")
            what = f"{report.size} bytes at byte {report.offset} of '{name}'"
            if report.other >= 0:
                what += f", with thread {report.other}"
        return f"{kind}: {what} by {thread} {where}"

    def _line(self, address: int) -> str:
        """file:line of an instruction, by the debug lines of the library."""
        base = _base_address(self.built.library)
        command = [SYMBOLIZER, f"--obj={self.built.library}", hex(address - 1 - base)]
        text = subprocess.run(command, capture_output=True, text=True).stdout
        places = re.findall(r"^(.*):(\d+):\d+$", text, flags=re.M)
        outside = [p for p in places if not p[0].endswith("shim.h")]
        return "{}:{}".format(*outside[0]) if outside else ""


def _base_address(library: Path) -> int:
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(library)):
            return int(line.split("-")[0], 16)
    return 0
