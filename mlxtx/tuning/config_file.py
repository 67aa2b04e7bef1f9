"""A ``DecoderConfig`` as a plain dictionary and as TOML, both ways.

Fields that stand at their default are left out. In TOML equal neighbouring blocks are one
``[[blocks]]`` table with ``repeat = n``.
"""

from __future__ import annotations

import json
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from mlxtx.decoder import config as configs
from mlxtx.decoder.config import ConfigError, DecoderConfig
from mlxtx.errors import MlxtxError
from mlxtx.files import write_text_atomic

# Where a field may hold one of two kinds, the key that only the second kind has.
_TELLING_KEYS = {"LatentAttentionConfig": "kv_rank", "ExpertsConfig": "per_token"}


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dictionaries and lists; only what differs from the defaults."""
    result = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if field.default is not MISSING and value == field.default:
            continue
        if field.default_factory is not MISSING and value == field.default_factory():
            continue
        result[field.name] = _plain(value)
    return result


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_dict(value)
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def from_dict(values: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that ``to_dict`` described. Raises MlxtxError with the path of a wrong key."""
    try:
        return _build(DecoderConfig, _expanded(values), "decoder")
    except (ConfigError, TypeError) as error:
        raise MlxtxError(f"the decoder's description is not possible: {error}") from None


def _expanded(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with ``repeat`` written out."""
    blocks: list[Any] = []
    for block in values.get("blocks", ()):
        block = dict(block)
        blocks += [block] * int(block.pop("repeat", 1))
    return {**values, "blocks": blocks}


def _build(kind: type, values: Any, path: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} must be a table, not {values!r}")
    hints = typing.get_type_hints(kind, vars(configs))
    unknown = set(values) - set(hints)
    if unknown:
        raise ConfigError(f"{path} has an unknown key: {', '.join(sorted(unknown))}")
    return kind(**{name: _value(hints[name], v, f"{path}.{name}") for name, v in values.items()})


def _value(hint: Any, value: Any, path: str) -> Any:
    if value in (None, "none") and type(None) in typing.get_args(hint):
        return None
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        kinds = [k for k in typing.get_args(hint) if k is not type(None)]
        return _value(_chosen(kinds, value), value, path)
    if origin is tuple:
        item = typing.get_args(hint)[0]
        return tuple(_value(item, v, f"{path}[{n}]") for n, v in enumerate(value))
    if is_dataclass(hint):
        return _build(typing.cast(type, hint), value, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, bool, str) and type(value) is not hint:
        raise ConfigError(f"{path} must be of type {hint.__name__}, not {value!r}")
    return value


def _chosen(kinds: list[Any], value: Any) -> Any:
    for kind in kinds:
        key = _TELLING_KEYS.get(getattr(kind, "__name__", ""))
        if key and isinstance(value, Mapping) and key in value:
            return kind
    return next(k for k in kinds if getattr(k, "__name__", "") not in _TELLING_KEYS)


def read_toml(path: str | Path) -> DecoderConfig:
    """The decoder a TOML file describes."""
    try:
        values = tomllib.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise MlxtxError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise MlxtxError(f"{path} is not valid TOML: {error}") from None
    return from_dict(values)


def write_toml(config: DecoderConfig, path: str | Path) -> None:
    write_text_atomic(path, to_toml(config))


def to_toml(config: DecoderConfig) -> str:
    values = to_dict(config)
    lines = [f"{k} = {_toml(v)}" for k, v in values.items() if k != "blocks"]
    repeated: list[tuple[dict[str, Any], int]] = []
    for block in values["blocks"]:
        if repeated and repeated[-1][0] == block:
            repeated[-1] = (block, repeated[-1][1] + 1)
        else:
            repeated.append((block, 1))
    for block, count in repeated:
        lines += ["", "[[blocks]]"] + ([f"repeat = {count}"] if count > 1 else [])
        lines += [f"{k} = {_toml(v)}" for k, v in block.items()]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return repr(value) if isinstance(value, float) else json.dumps(value)
