"""What Metal rejects (or should) and clang in C++ mode accepts, looked for in a kernel's text.

Three looks: the compiler with its warnings and read-only memory made const; the unoptimised
intermediate code, for what exists in it (mutable globals, recursion); and the tokens of the text,
for words Metal does not have. MLX's own headers are left alone.
"""

from __future__ import annotations

import re
import subprocess

from .compiler import (
    CLANG,
    HERE,
    LANGUAGE,
    CompileError,
    entry_code,
    parse_parameters,
    preprocess,
    rewrite,
)
from .machine import MAX_BUFFERS

WARNINGS = ["-Wimplicit-float-conversion", "-Wvla", "-Wuninitialized", "-Wreturn-type"]
# A word of C++ that the Metal language leaves out (Metal Shading Language Specification, 1.5).
FORBIDDEN = {
    r"\bdouble\b": "there is no double",
    r"\bgoto\b": "there is no goto",
    r"\b(?:throw|try|catch)\b": "there are no exceptions",
    r"\bvirtual\b": "there are no virtual functions",
    r"\bnew\s+[A-Za-z_]": "there is no new",
    r"\bdelete\b": "there is no delete",
    r"\bstd::": "there is no std namespace",
    r"\bthread_local\b": "there is no thread_local",
    r"\b(?:dynamic_cast|typeid)\b": "there is no run-time type information",
    r"\(\s*\*\s*\w+\s*\)\s*\(": "there are no function pointers",
    r"\b(?:printf|malloc|free|memcpy|memset|assert)\s*\(": "there is no C library",
    r"\basm\b": "there is no assembly",
    r"\bauto\s*\*": "an auto pointer hides its address space",
    r"\bthreadgroup\s+[\w:<>, ]+\s+\w+\s*(?:\[[^\]]*\]\s*)+=": "threadgroup memory has no initialiser",
}
TYPES = (
    "bool|char|uchar|short|ushort|int|uint|long|ulong|half|bfloat|float|size_t|void|"
    "u?int(?:8|16|32|64)_t|float16_t|bfloat16_t|(?:half|bfloat|float|u?(?:char|short|int|long))[234]|"
    r"(?:metal::)?vec\s*<[^<>;]*>"
)
SPACES = "device|constant|threadgroup|thread"


def lint(source: str, entry: str) -> list[str]:
    """One line for each thing wrong with the kernel ``entry`` of ``source``; empty if none."""
    text = preprocess(source)
    own = own_text(text)
    found = look_at_tokens(own, entry.split("<")[0])
    try:
        parameters = parse_parameters(text, entry.split("<")[0].strip())
    except CompileError as error:
        return [*found, str(error)]
    numbers = [p.buffer for p in parameters if p.buffer is not None]
    if len(numbers) > MAX_BUFFERS:
        found.append(f"{len(numbers)} buffers: a kernel has at most {MAX_BUFFERS}")
    if len(set(numbers)) < len(numbers):
        found.append("two parameters have the same buffer index")
    compiled = rewrite(text) + entry_code(entry, parameters)
    return found + look_at_compiler(compiled) + look_at_code(compiled)


def own_text(text: str) -> str:
    """The preprocessed text without what came from MLX's headers."""
    kept, keep = [], True
    for line in text.splitlines():
        marker = re.match(r'# \d+ "([^"]*)"', line)
        if marker:
            keep = "mlx/backend" not in marker.group(1)
        elif keep:
            kept.append(line)
    return "\n".join(kept)


def look_at_tokens(own: str, name: str) -> list[str]:
    found = [message for pattern, message in FORBIDDEN.items() if re.search(pattern, own)]
    parameters = "|".join(re.findall(r"\btypename\s+(\w+)", own))
    kinds = f"{TYPES}|{parameters}" if parameters else TYPES
    # A pointer or reference whose declaration names no address space.
    bare = rf"(?<![\w:])(?!(?:{SPACES})\b)(?:{kinds})\s*(?:const\s*)?[*&]\s*(\w+)\s*(?=[,;)=])"
    for match in re.finditer(bare, own):
        before = re.split(r"[;,(){}]", own[: match.start()])[-1]
        if not re.search(rf"\b(?:{SPACES})\b", before):
            found.append(f"'{match.group(0).strip()}': a pointer needs an address space")
    for statement, kernel in statements(own, name):
        if re.match(r"threadgroup\s+[\w:<>, ]+?\s+\w+\s*(\[|;|$)", statement) and not kernel:
            found.append(f"'{statement}': threadgroup variables live in the kernel function")
        if kernel is None and re.match(
            r"(?:static\s+)?(?:const|constexpr)\s+[\w:]+\s+\w+\s*(\[[^\]]*\]\s*)?=", statement
        ):
            found.append(f"'{statement[:60]}': a global constant needs the constant address space")
        if kernel is not None and re.match(r"static\b(?!.*\bconstexpr\b)", statement):
            found.append(f"'{statement[:60]}': there are no static locals")
    return found


def statements(own: str, name: str) -> list[tuple[str, bool | None]]:
    """Each statement, and where it stands: None outside, True in the kernel, False elsewhere."""
    result: list[tuple[str, bool | None]] = []
    depth, begin, inside = 0, 0, False
    flat = re.sub(r"^#.*$", "", own, flags=re.M)
    for i, character in enumerate(flat):
        if character not in ";{}":
            continue
        statement = " ".join(flat[begin:i].split())
        begin = i + 1
        if statement:
            result.append((statement, None if depth == 0 else inside))
        if character == "{":
            if depth == 0:
                inside = bool(re.search(rf"\b{re.escape(name)}\s*\(", statement))
            depth += 1
        elif character == "}":
            depth -= 1
    return result


def look_at_compiler(text: str) -> list[str]:
    command = [CLANG, *(f for f in LANGUAGE if f != "-w"), *WARNINGS, "-DMETAL_EMULATOR_LINT"]
    command += ["-fsyntax-only", "-include", str(HERE / "shim.h"), "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    found = []
    for line in done.stderr.splitlines():
        match = re.match(r"(.*?):(\d+):\d+: (error|warning): (.*)", line)
        if not match or "mlx/backend" in match.group(1):
            continue
        place, kind, message = f"{match.group(1)}:{match.group(2)}", match.group(3), match.group(4)
        if (
            kind == "error"
            or ("loses" in message and "__bf16" in message)
            or "variable length" in message
            or "uninitialized" in message
            or "does not return a value" in message
        ):
            found.append(f"{place}: {message}")
    return found


def look_at_code(text: str) -> list[str]:
    command = [CLANG, *LANGUAGE, "-O2", "-Xclang", "-disable-llvm-passes", "-S", "-emit-llvm"]
    command += ["-include", str(HERE / "shim.h"), "-", "-o", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        return []  # the compiler has said why
    found = []
    for match in re.finditer(r"^@(\S+) = .*?\b(global)\b", done.stdout, flags=re.M):
        known = match.group(1).startswith(("emu_", "_ZL9has_", "llvm.", "_ZGV"))
        if not known and "external" not in match.group(0) and not is_constant(match.group(1), text):
            found.append(f"global variable {match.group(1)}: only constants may be global")
    calls: dict[str, set[str]] = {}
    current = ""
    for line in done.stdout.splitlines():
        head = re.match(r"define .*?@([\w.$]+)\(", line)
        if head:
            current = head.group(1)
        for called in re.findall(r"\bcall\b.*?@([\w.$]+)\(", line):
            calls.setdefault(current, set()).add(called)
    return found + [f"{name} calls itself" for name in calls if name in reached(name, calls)]


def is_constant(name: str, text: str) -> bool:
    """A global of the constant address space, or a function constant, which the driver sets."""
    plain = re.sub(r"^_ZL?\d+", "", name)
    return bool(
        re.search(rf"\bconstant\s+(?:constexpr\s+)?[\w:]+\s+{re.escape(plain)}\b", text)
    ) or (f"(&{plain}, p" in text)


def reached(start: str, calls: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    todo = list(calls.get(start, ()))
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo.extend(calls.get(name, ()))
    return seen
