"""The cache setting that was measured and chosen for a model, for ``--kv auto``."""

from __future__ import annotations

import json
from pathlib import Path

from mlxtx.cache.settings import parse_kv
from mlxtx.errors import MlxtxError
from mlxtx.files import locked, write_json_atomic
from mlxtx.settings import data_folder


def _file() -> Path:
    return data_folder() / "kv.json"


def _key(model: str | Path) -> str:
    path = Path(model).expanduser()
    return str(path.resolve()) if path.exists() else str(model)


def _all() -> dict[str, str]:
    try:
        found = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def default_kv(model: str | Path) -> str:
    """The stored setting of a folder or Hub id; "plain" if none was stored."""
    found = _all().get(_key(model))
    try:
        return str(parse_kv(found)) if isinstance(found, str) else "plain"
    except MlxtxError:
        return "plain"


def store_default_kv(model: str | Path, kv: str) -> Path:
    """Remembers ``kv`` for the model; returns the file."""
    path = _file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent):
        write_json_atomic(path, {**_all(), _key(model): str(parse_kv(kv))})
    return path
