"""Metal source text -> a shared library for this CPU, kept by the hash of what went in."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
CLANG = "clang++-19"
SYMBOLIZER = "llvm-symbolizer-19"
CACHE_VARIABLE = "MLXTX_METAL_EMULATOR_CACHE"

# Metal has no literal of type double; _Float16 and __bf16 must round at each step, as on a GPU.
LANGUAGE = [
    "-std=c++17",
    "-x",
    "c++",
    "-w",
    "-march=x86-64-v3",
    "-fno-exceptions",
    "-fno-rtti",
    "-ffp-contract=off",
    "-Xclang",
    "-cl-single-precision-constant",
    "-Xclang",
    "-ffloat16-excess-precision=none",
    "-Xclang",
    "-fbfloat16-excess-precision=none",
]
# Scalar loads and stores stay as the source has them, so that the counters mean something.
OPTIMISE = ["-O2", "-fno-vectorize", "-fno-slp-vectorize", "-march=x86-64-v3", "-fPIC", "-w"]
HOOKS = ["-fsanitize=thread", "-mllvm", "-tsan-instrument-read-before-write=1"]


class CompileError(Exception):
    """The kernel's text is not what Metal (as clang knows it) accepts."""


def missing(mode: str = "checked") -> str | None:
    """Why the emulator cannot run here in this mode, and how to get it; None when it can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "the Metal emulator runs on x86-64 Linux only"
    if shutil.which(CLANG) and shutil.which(SYMBOLIZER):
        return None
    if mode == "plain" and importlib.util.find_spec("ziglang"):
        return None
    other = ", or for the plain mode: pip install ziglang" if mode == "plain" else ""
    return f"the Metal emulator needs clang 19: apt-get install clang-19 llvm-19{other}"


def compiler(*flags: str) -> list[str]:
    """A command that compiles: clang 19, or the clang of the ziglang wheel, which has no sanitizer
    and so no hooks. Its first call builds what it links, which takes a minute or two."""
    if shutil.which(CLANG):
        return [CLANG, *flags]
    zig = [sys.executable, "-m", "ziglang", "c++", "-fno-sanitize=undefined"]
    return zig + [flag.replace("x86-64-v3", "x86_64_v3") for flag in flags]


def cache_folder() -> Path:
    """Where built libraries are kept; the environment variable above moves it."""
    given = os.environ.get(CACHE_VARIABLE)
    base = Path(given) if given else Path.home() / ".cache" / "mlxtx" / "metal_emulator"
    base.mkdir(parents=True, exist_ok=True)
    return base


@functools.cache
def mlx_include() -> Path:
    """The headers MLX's wheel ships for its own kernels."""
    import mlx.core as mx

    return Path(mx.__file__).parent / "include"


@functools.cache
def toolchain_hash() -> str:
    """Changes when the emulator, the compiler or MLX's headers do."""
    import mlx.core as mx

    digest = hashlib.sha256(mx.__version__.encode())
    for path in sorted(HERE.rglob("*")):
        if path.suffix in (".h", ".cpp") or path.name in ("compiler.py",):
            digest.update(path.read_bytes())
    digest.update(subprocess.check_output(compiler("--version")))
    return digest.hexdigest()


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel function."""

    name: str
    text: str
    buffer: int | None  # None: a thread or threadgroup index
    attribute: str

    @property
    def is_reference(self) -> bool:
        return "&" in self.text

    @property
    def is_output(self) -> bool:
        return "device" in self.text.split() and not re.search(r"\bconst\b", self.text)


# Rows of EmuIds in shim.h.
INDICES = (
    "thread_position_in_grid",
    "thread_position_in_threadgroup",
    "threadgroup_position_in_grid",
    "threads_per_grid",
    "threads_per_threadgroup",
    "threadgroups_per_grid",
    "thread_index_in_simdgroup",
    "simdgroup_index_in_threadgroup",
    "thread_index_in_threadgroup",
    "simdgroups_per_threadgroup",
    "threads_per_simdgroup",
    "dispatch_threads_per_threadgroup",
)


@dataclass(frozen=True)
class Built:
    """A kernel ready to load."""

    library: Path
    parameters: tuple[Parameter, ...]
    text: str  # after preprocessing, before the rewriting below


def build(source: str, entry: str, *, hooks: bool, lint: bool = False) -> Built:
    """Compile ``source`` and make ``entry`` (``name`` or ``name<arguments>``) its kernel."""
    text = preprocess(source)
    parameters = parse_parameters(text, entry.split("<")[0].strip())
    key = hashlib.sha256("\0".join([source, entry, str(hooks), toolchain_hash()]).encode())
    library = cache_folder() / f"{key.hexdigest()[:32]}.so"
    if not library.exists():
        compile_library(rewrite(text) + entry_code(entry, parameters), library, hooks)
    return Built(library, parameters, text)


def preprocess(source: str) -> str:
    """Expand includes and macros; Metal's own headers are empty stubs."""
    key = hashlib.sha256(("preprocess" + source + toolchain_hash()).encode()).hexdigest()[:32]
    kept = cache_folder() / f"{key}.i"
    if kept.exists():
        return kept.read_text()
    command = compiler("-E", "-x", "c++", "-std=c++17", "-nostdinc", "-D__METAL_VERSION__=320")
    command += ["-D__METAL__", f"-I{HERE / 'stubs'}", f"-I{mlx_include()}", "-"]
    text = run(command, source)
    write_atomically(kept, text.encode())
    return text


VECTOR = r"(?:half|bfloat|float|char|uchar|short|ushort|int|uint|long|ulong|bool)[234]"


def rewrite(text: str) -> str:
    """Spell for C++ the few things it has no words for."""
    counter = iter(range(1 << 20))

    def shared(match: re.Match[str]) -> str:
        kind, name, extents = match.group(2), match.group(3), match.group(4)
        return (
            f"{match.group(1)}typedef {kind} emu_type_{name}{extents}; threadgroup "
            f"emu_type_{name}& {name} = *(threadgroup emu_type_{name}*)"
            f"emu_threadgroup({next(counter)}, sizeof(emu_type_{name}), 16);"
        )

    text = re.sub(
        r"(^|[;{}]\s*|\n\s*)threadgroup\s+((?:alignas\(\d+\)\s*)?[A-Za-z_][\w:]*(?:<[^;<>]*>)?)"
        r"\s+(\w+)\s*((?:\[[^\];]*\]\s*)*);",
        shared,
        text,
    )
    text = re.sub(
        r"constant\s+([\w:]+)\s+(\w+)\s*\[\[\s*function_constant\((\d+)\)\s*\]\]\s*;",
        r'static \1 \2; extern "C" void emu_constant_\3(const void* p) '
        r"{ __builtin_memcpy(&\2, p, sizeof \2); }",
        text,
    )
    text = re.sub(rf"(?<![\w:<]){VECTOR}(?=\s*\()", r"emu_make<\g<0>>", text)
    text = re.sub(r"(?<![\w:])(?:metal::)?vec<[^<>;(){}]+>(?=\s*\()", r"emu_make<\g<0>>", text)
    text = re.sub(r"constant\s+const\s+(\w+)\s+(\w+)\[\d+\]", r"const constant \1* \2", text)
    text = re.sub(r"template\s*\[\[host_name\(.*?\)\]\].*?;", "", text, flags=re.S)
    text = re.sub(r"#pragma METAL.*|\[\[threadgroup\(\d+\)\]\]", "", text)
    return re.sub(r"(?<![\w\[])kernel\s+void\b", "void", text)


def parse_parameters(text: str, name: str) -> tuple[Parameter, ...]:
    """The parameters of kernel function ``name``."""
    found = re.search(rf"\bvoid\s+{re.escape(name)}\s*\(", text)
    if not found:
        raise CompileError(f"no kernel function {name} in the source")
    depth, start, pieces = 1, found.end(), []
    last = start
    position = start
    while depth:
        character = text[position]
        depth += character in "([{<"
        depth -= character in ")]}>"
        if (character == "," and depth == 1) or depth == 0:
            pieces.append(text[last:position])
            last = position + 1
        position += 1
    parameters: list[Parameter] = []
    for piece in pieces:
        if piece.strip():
            numbers = [p.buffer for p in parameters if p.buffer is not None]
            parameters.append(parse_parameter(piece, max(numbers, default=-1) + 1))
    return tuple(parameters)


def parse_parameter(piece: str, following: int) -> Parameter:
    """One parameter; a pointer or reference without a number takes the next one."""
    piece = re.sub(r"^#.*$", "", piece, flags=re.M)
    attributes = " ".join(re.findall(r"\[\[(.*?)\]\]", piece, flags=re.S))
    text = " ".join(re.sub(r"\[\[.*?\]\]", "", piece, flags=re.S).split())
    buffer = re.search(r"buffer\((\d+)\)", attributes)
    name = re.findall(r"\w+", text)[-1]
    index = next((i for i in re.findall(r"\w+", attributes) if i in INDICES), "")
    if index:
        return Parameter(name, text, None, index)
    if buffer is None and not re.search(r"[*&]", text):
        raise CompileError(f"parameter {text!r} is neither a buffer nor an index")
    return Parameter(name, text, int(buffer.group(1)) if buffer else following, "")


def entry_code(entry: str, parameters: tuple[Parameter, ...]) -> str:
    """The C function the runtime calls, once for each lane."""
    arguments = []
    for parameter in parameters:
        if parameter.buffer is None:
            arguments.append(f"EmuId{{ids->v[{INDICES.index(parameter.attribute)}]}}")
        else:
            kind = "EmuReference" if parameter.is_reference else "EmuPointer"
            arguments.append(f"{kind}{{buffers[{parameter.buffer}]}}")
    return (
        '\nextern "C" __attribute__((disable_sanitizer_instrumentation)) '
        "void emu_entry(void** buffers, const EmuIds* ids) {\n  "
        + entry
        + "("
        + ", ".join(arguments)
        + ");\n}\n"
    )


def compile_library(text: str, library: Path, hooks: bool) -> None:
    """Two stages: the address spaces live in the type check and are gone before optimisation."""
    with tempfile.TemporaryDirectory() as folder:
        plain, stripped = Path(folder, "kernel.ll"), Path(folder, "stripped.ll")
        command = compiler(*LANGUAGE, "-O2", "-Xclang", "-disable-llvm-passes", "-S", "-emit-llvm")
        command += ["-gline-tables-only", "-fPIC", "-include", str(HERE / "shim.h"), "-"]
        command += ["-o", str(plain), *(HOOKS[:1] if hooks else [])]
        run(command, text)
        stripped.write_text(strip_address_spaces(plain.read_text()))
        object_file = Path(folder, "kernel.o")
        flags = OPTIMISE + (HOOKS if hooks else [])
        run(compiler(*flags, "-c", str(stripped), "-o", str(object_file)))
        partial = library.with_suffix(f".{os.getpid()}.part")
        run(compiler("-shared", str(object_file), "-o", str(partial)))
        partial.replace(library)


def strip_address_spaces(text: str) -> str:
    """One flat memory, so that the sanitizer pass instruments every load and store."""
    text = re.sub(r" ?addrspace\(\d+\)", "", text)
    text = re.sub(r"\baddrspacecast\b(\s*\(?ptr [^,\n]*? to ptr)", r"bitcast\1", text)
    text = re.sub(r"(@llvm\.mem(?:cpy|move|set)[\w.]*?)\.p\d+\.p\d+", r"\1.p0.p0", text)
    text = re.sub(r"(@llvm\.mem(?:set|cpy)[\w.]*?)\.p[1-9]\b", r"\1.p0", text)
    seen: set[str] = set()
    lines = []
    for line in text.splitlines():
        if line.startswith("declare "):
            name = re.search(r"@[\w.]+", line)
            if name and name.group(0) in seen:
                continue
            if name:
                seen.add(name.group(0))
        lines.append(line)
    return "\n".join(lines) + "\n"


def runtime_library() -> Path:
    """The runtime, built once; never instrumented."""
    key = hashlib.sha256((HERE / "runtime.cpp").read_bytes()).hexdigest()[:32]
    library = cache_folder() / f"runtime-{key}.so"
    if not library.exists():
        partial = library.with_suffix(f".{os.getpid()}.part")
        flags = ["-O2", "-std=c++17", "-fPIC", "-shared", str(HERE / "runtime.cpp")]
        run(compiler(*flags, "-o", str(partial)))
        partial.replace(library)
    return library


def write_atomically(path: Path, data: bytes) -> None:
    partial = path.with_suffix(f".{os.getpid()}.part")
    partial.write_bytes(data)
    partial.replace(path)


def run(command: list[str], text: str | None = None) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(done.stderr[:4000])
    return done.stdout
