"""What a person has chosen: one TOML file, read with care, changed line by line.

A value that is wrong is told and skipped, never a reason to stop. ``MLXTX_HOME`` names one folder
for settings and data together; without it they go where the platform keeps such things.
"""

from __future__ import annotations

import datetime
import os
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, get_type_hints


def config_folder() -> Path:
    """Where ``settings.toml`` is."""
    return _folder("user_config_dir")


def data_folder() -> Path:
    """Where chats, adapters and runs are."""
    return _folder("user_data_dir")


def _folder(kind: str) -> Path:
    if home := os.environ.get("MLXTX_HOME"):
        return Path(home).expanduser()
    import platformdirs

    return Path(getattr(platformdirs, kind)("mlxtx", appauthor=False))


@dataclass(frozen=True)
class About:
    """What a setting is for, and the range of its values."""

    help: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The names are those of ``LanguageModel.stream``."""

    temperature: Annotated[float, About("0 always takes the likeliest token", 0, 5)] = 0.7
    top_p: Annotated[float, About("keep the likeliest tokens up to this sum", 1e-6, 1)] = 0.95
    top_k: Annotated[int, About("keep this many tokens; 0 keeps all", 0)] = 0
    min_p: Annotated[float, About("drop tokens below this part of the likeliest", 0, 1)] = 0.0
    repetition_penalty: Annotated[float, About("above 1 repeats less", 0.1, 5)] = 1.0
    max_tokens: Annotated[int, About("the longest reply, in tokens", 1)] = 2048
    seed: Annotated[int, About("the same seed, the same reply; -1 is random", -1)] = -1


@dataclass(frozen=True)
class Preset:
    """A system prompt with sampling values under one name; what is unset is left as it is."""

    system: str = ""
    sampling: dict[str, float | int] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """The whole file. Top-level keys first, then the tables [sampling], [keys], [presets.NAME]."""

    theme: Annotated[str, About("colours of the app; /theme lists them")] = "mlxtx-dark"
    model: Annotated[str, About("answers first: a folder, a Hub id or bundled")] = "bundled"
    adapter: Annotated[str, About("folder of an adapter for that model; empty for none")] = ""
    kv: Annotated[str, About("KV cache, such as k8v4g64; empty is not quantized")] = ""
    system: Annotated[str, About("the system prompt of new chats")] = ""
    show_thinking: Annotated[bool, About("show thinking unfolded")] = False
    plain: Annotated[bool, About("always chat line by line (screen readers)")] = False
    model_folders: Annotated[list[str], About("folders with models, beside the Hub cache")] = field(
        default_factory=list
    )
    sampling: Sampling = field(default_factory=Sampling)
    # Names of the sampling values that somebody has chosen, be it what they are without.
    chosen_sampling: frozenset[str] = frozenset()
    keys: dict[str, str] = field(default_factory=dict)
    presets: dict[str, Preset] = field(default_factory=dict)


@cache
def known_settings(cls: type) -> dict[str, tuple[Any, About]]:
    """Name -> (type, what it is for) of the plain values of ``Settings`` or ``Sampling``."""
    hints = get_type_hints(cls, include_extras=True)
    return {
        name: (hint.__origin__, hint.__metadata__[0])
        for name, hint in hints.items()
        if hasattr(hint, "__metadata__")
    }


def settings_path() -> Path:
    return config_folder() / "settings.toml"


def load_settings(path: Path | None = None) -> tuple[Settings, list[str]]:
    """The settings in ``path`` and one line for each thing in it that could not be used."""
    path = path or settings_path()
    try:
        values = tomllib.loads(path.read_text("utf-8-sig"))
    except FileNotFoundError:
        return Settings(), []
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        return Settings(), [f"{path} was not read, the defaults are used: {error}"]
    problems: list[str] = []
    tables = {
        "sampling": lambda value: checked(Sampling, value, "sampling.", problems),
        "keys": lambda value: _checked_keys(value, problems),
        "presets": lambda value: _checked_presets(value, problems),
    }
    chosen: dict[str, Any] = {}
    for name, read in tables.items():
        if name in values:
            value = values.pop(name)
            if isinstance(value, dict):
                chosen[name] = read(value)
            else:
                problems.append(f"{name} must be a table [{name}]; it was skipped")
    sampling = chosen.pop("sampling", {})
    chosen |= {"sampling": Sampling(**sampling), "chosen_sampling": frozenset(sampling)}
    chosen |= checked(Settings, values, "", problems)
    return Settings(**chosen), problems


def checked(cls: type, values: dict[str, Any], prefix: str, problems: list[str]) -> dict[str, Any]:
    """The entries of ``values`` that ``cls`` knows and that have the right type and range."""
    good = {}
    for name, value in values.items():
        if name not in known_settings(cls):
            problems.append(f"{prefix}{name} is no setting; it was skipped")
            continue
        try:
            good[name] = _check(cls, name, value)
        except ValueError as error:
            problems.append(f"{prefix}{name} {error}; it was skipped")
    return good


_TYPE_NAMES = {
    float: "a number", int: "a whole number", bool: "true or false", str: "a string",
    list[str]: "a list of strings",
}  # fmt: skip


def _check(cls: type, name: str, value: Any) -> Any:
    """``value`` with the type and in the range of setting ``name``, or ValueError with why not."""
    kind, about = known_settings(cls)[name]
    if kind is float and type(value) is int:
        value = float(value)
    plain: Any = list if kind == list[str] else kind
    if type(value) is not plain or (
        plain is list and not all(isinstance(item, str) for item in value)
    ):
        raise ValueError(f"must be {_TYPE_NAMES[kind]}")
    number: Any = value
    if about.low is not None and not number >= about.low:
        raise ValueError(f"must be at least {about.low:g}")
    if about.high is not None and not number <= about.high:
        raise ValueError(f"must be at most {about.high:g}")
    return value


_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def parse_value(cls: type, name: str, text: str) -> Any:
    """``text`` as a person typed it for setting ``name`` of ``cls``. Raises ValueError."""
    known = known_settings(cls)
    if name not in known:
        raise ValueError(f"{name or 'that'} is no setting; there are {', '.join(known)}")
    text = text.strip()
    parsers: dict[Any, Callable[[str], Any]] = {
        bool: lambda text: _BOOLS[text.lower()],
        list[str]: lambda text: [part.strip() for part in text.split(",") if part.strip()],
    }
    kind = known[name][0]
    try:
        value = parsers.get(kind, kind)(text)
    except (KeyError, ValueError):
        raise ValueError(f"{name} must be {_TYPE_NAMES[kind]}") from None
    try:
        return _check(cls, name, value)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None


def _checked_keys(values: dict[str, Any], problems: list[str]) -> dict[str, str]:
    good = {}
    for name, keys in values.items():
        if isinstance(keys, str):
            good[name] = keys
        else:
            problems.append(f'keys.{name} must be a string such as "ctrl+r"; it was skipped')
    return good


def _checked_presets(values: dict[str, Any], problems: list[str]) -> dict[str, Preset]:
    good = {}
    for name, value in values.items():
        if not isinstance(value, dict) or not isinstance(value.get("system", ""), str):
            problems.append(f"presets.{name} must be a table with a string system; it was skipped")
            continue
        sampling = {key: item for key, item in value.items() if key != "system"}
        right = checked(Sampling, sampling, f"presets.{name}.", problems)
        good[name] = Preset(value.get("system", ""), right)
    return good


def save_setting(table: str, name: str, value: Any, path: Path | None = None) -> None:
    """Set ``name`` in [table] ("" for the top), leaving every other line as it was.

    ``value`` None removes it. A file that is no TOML is kept beside as ``settings.toml.broken``.
    Raises MlxtxError or OSError when the file can't be written.
    """
    from mlxtx.files import locked

    path = (path or settings_path()).resolve()  # a link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent):  # two apps may change two settings at once
        _save(table, name, value, path)


def _save(table: str, name: str, value: Any, path: Path) -> None:
    from mlxtx.files import write_text_atomic

    try:
        text = path.read_text("utf-8-sig") if path.exists() else ""
        before = tomllib.loads(text)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError):
        path.replace(path.with_name(path.name + ".broken"))
        text, before = "", {}
    wanted = _with_value(before, table, name, value)
    new = _edit(text, table, name, value)
    place = before.get(table)
    old = place.get(name) if isinstance(place, dict) else None
    if isinstance(value, dict) and isinstance(old, dict) and _read(new) != wanted:
        new = text  # it is a table of its own
        for key in old | value:
            new = _edit(new, f"{table}.{_key(name)}", key, value.get(key))
    # A layout the line editor does not know (dotted keys, inline tables): write it all afresh.
    write_text_atomic(path, new if _read(new) == wanted else _dump(wanted))


def _read(text: str) -> dict[str, Any] | None:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return None


def _with_value(values: dict[str, Any], table: str, name: str, value: Any) -> dict[str, Any]:
    new = {key: dict(item) if isinstance(item, dict) else item for key, item in values.items()}
    place = new
    for part in table.split(".") if table else []:
        inner = place.get(part)
        place[part] = dict(inner) if isinstance(inner, dict) else {}
        place = place[part]
    if value is None:
        place.pop(name, None)
    else:
        place[name] = value
    return new


def _edit(text: str, table: str, name: str, value: Any) -> str:
    """``text`` with the one entry of ``name`` in ``table`` changed, added or removed."""
    lines = text.removesuffix("\n").split("\n") if text else []
    ends = _entries(lines)
    headers = [i for i in ends if lines[i].lstrip().startswith("[")]
    start, end = 0, headers[0] if headers else len(lines)
    if table:
        names = f"(?:{re.escape(table)}|{re.escape(_quote(table))})"
        header = re.compile(rf"\s*\[\s*{names}\s*\]\s*(?:#.*)?")
        at = next((i for i in headers if header.fullmatch(lines[i])), None)
        if at is None:
            lines += ["", f"[{table}]"] if lines else [f"[{table}]"]
            start = end = len(lines)
        else:
            start, end = at + 1, next((i for i in headers if i > at), len(lines))
    pattern = re.compile(rf"\s*(?:{re.escape(name)}|{re.escape(_quote(name))})\s*=")
    at = next((i for i in ends if start <= i < end and pattern.match(lines[i])), None)
    new = [] if value is None else [f"{_key(name)} = {_toml(value)}"]
    if at is not None:
        comment = _comment(lines[at : ends[at]])
        lines[at : ends[at]] = [line + comment for line in new]
    else:
        while end > start and not lines[end - 1].strip():
            end -= 1
        lines[end:end] = new
    return "\n".join(lines) + "\n"


_CLOSING = re.compile("[]}]|'{3}|\"{3}")


def _entries(lines: list[str]) -> dict[int, int]:
    """Where each header, comment, empty line or key begins, and the line behind its value."""
    ends: dict[int, int] = {}
    at = 0
    while at < len(lines):
        # Only where something closes can a value of several lines end: few places to try.
        more = (end for end in range(at + 2, len(lines) + 1) if _CLOSING.search(lines[end - 1]))
        ends[at] = next(
            (end for end in chain([at + 1], more) if _read("\n".join(lines[at:end])) is not None),
            at + 1,
        )
        at = ends[at]
    return ends


def _comment(lines: list[str]) -> str:
    """The comment behind a key's value, with the space before it."""
    *before, last = lines
    for hash in re.finditer(r"\s*#", last):
        if _read("\n".join([*before, last[: hash.start()]])):
            return last[hash.start() :]
    return ""


def _dump(values: dict[str, Any], prefix: str = "") -> str:
    flat = {key: item for key, item in values.items() if not isinstance(item, dict)}
    out = [f"{_key(key)} = {_toml(item)}\n" for key, item in flat.items()]
    for key, item in values.items():
        if isinstance(item, dict):
            name = f"{prefix}{_key(key)}"
            out.append(f"\n[{name}]\n{_dump(item, name + '.')}")
    return "".join(out)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _quote(name)


def _quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda m: f"\\u{ord(m[0]):04x}", escaped) + '"'


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _quote(value)
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return repr(value)
