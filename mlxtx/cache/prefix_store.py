"""Long system prompts and documents as caches on disk, within a budget of bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlxtx.cache.model_cache import ModelCache
from mlxtx.cache.reuse import common_prefix
from mlxtx.cache.saved import SavedCacheInfo, load_cache, read_cache_info, save_cache
from mlxtx.cache.settings import KVSettings, parse_kv
from mlxtx.errors import MlxtxError

DEFAULT_BUDGET = 8 << 30
SUFFIX = ".cache.safetensors"


def default_folder() -> Path:
    """Where prefixes lie on this platform, or below ``MLXTX_HOME``."""
    if home := os.environ.get("MLXTX_HOME"):
        return Path(home).expanduser() / "prefixes"
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("mlxtx")) / "prefixes"


class PrefixStore:
    """A folder of saved caches. Those not used for longest leave first when bytes run out."""

    def __init__(self, folder: str | Path | None = None, *, budget: int = DEFAULT_BUDGET):
        self.folder = default_folder() if folder is None else Path(folder)
        self.budget = budget

    def __iter__(self) -> Iterator[SavedCacheInfo]:
        """The saved caches, oldest use first. Files that are no sound caches are passed over."""
        for path in self._paths():
            try:
                yield read_cache_info(path)
            except MlxtxError:
                continue

    def _paths(self) -> list[Path]:
        found = []
        for path in self.folder.glob(f"*{SUFFIX}"):
            try:
                found.append((path.stat().st_mtime_ns, path))
            except OSError:  # gone meanwhile
                continue
        return [path for _, path in sorted(found)]

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in self._paths())

    def add(
        self, cache: ModelCache, tokens: Sequence[int], *, fingerprint: str, title: str = ""
    ) -> Path:
        """Saves a cache of one sequence; what was not used for longest makes room for it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MlxtxError(f"cannot make the folder {self.folder}: {error.strerror}") from error
        key = f"{fingerprint} {cache.settings} {list(tokens)}"
        path = self.folder / (hashlib.sha256(key.encode()).hexdigest()[:20] + SUFFIX)
        save_cache(path, cache, model=fingerprint, tokens=[tokens], title=title)
        size = path.stat().st_size
        if size > self.budget:
            path.unlink()
            raise MlxtxError(
                f"this cache takes {size:,} bytes and the budget is {self.budget:,}: raise the "
                "budget, shorten the text, or quantize the cache (--kv k8v4g64)"
            )
        self._make_room(path)
        return path

    def _make_room(self, newest: Path) -> None:
        paths = [path for path in self._paths() if path != newest]
        room = self.budget - newest.stat().st_size - sum(path.stat().st_size for path in paths)
        for path in paths:
            if room >= 0:
                break
            room += path.stat().st_size
            path.unlink(missing_ok=True)

    def find(
        self,
        tokens: Sequence[int],
        model: Any,
        *,
        fingerprint: str,
        kv: str | KVSettings | None = None,
        beyond: int = 0,
    ) -> tuple[ModelCache, list[int]] | None:
        """The saved cache with the longest beginning of ``tokens``, cut to it, and the tokens it
        holds; None if there is none that fits the model and the setting and has more than
        ``beyond`` of them. One of which less than half is needed is passed over: reading it, and
        holding its buffers, costs more than feeding the few tokens that any two prompts of a chat
        template begin with."""
        settings = str(parse_kv(kv))
        found: list[tuple[int, SavedCacheInfo]] = []
        for info in self:
            if (info.model, info.settings, len(info.tokens)) != (fingerprint, settings, 1):
                continue
            kept = min(common_prefix(info.tokens[0], tokens), len(tokens) - 1)
            if beyond < kept and info.offset <= 2 * kept:
                found.append((kept, info))
        # Of equals the shortest first: layers with a window can't be cut by much.
        for kept, info in sorted(found, key=lambda one: (-one[0], one[1].offset)):
            try:
                cache, held = load_cache(info.path, model, fingerprint=fingerprint, kv=kv)
            except (MlxtxError, OSError):  # damaged or deleted meanwhile
                continue
            if cache.can_rollback(cache.offset - kept):
                with suppress(OSError):  # a folder that may only be read
                    os.utime(info.path)
                cache.rollback(cache.offset - kept)
                return cache, held[0][:kept]
        return None

    def remove(self, name: str) -> Path:
        """Deletes the one saved cache whose file name begins with ``name``."""
        matching = [path for path in self._paths() if path.name.startswith(name)]
        if len(matching) != 1 or not name:
            what = "no saved cache begins" if not matching else f"{len(matching)} begin"
            raise MlxtxError(f"{what} with {name!r}: see `mlxtx cache list`")
        matching[0].unlink(missing_ok=True)
        return matching[0]
