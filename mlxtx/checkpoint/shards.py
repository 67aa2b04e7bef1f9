"""Sharded safetensors files written a piece at a time, in any order, and taken up again.

The shapes are known before the numbers: every header is written first, then bytes go to the place
they belong to. ``mx.save_safetensors`` would hold a whole shard in memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import mlx.core as mx

from mlxtx.checkpoint.safetensors import array_bytes, encode_header, tensor_bytes
from mlxtx.errors import MlxtxError
from mlxtx.files import locked, sync_folder, write_error, write_json_atomic

MAX_SHARD_BYTES = 5 << 30
# Finished work is made durable and noted each time so many bytes have been written.
SYNC_BYTES = 128 << 20

# name -> (the format's type name, shape)
Layout = Mapping[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Place:
    file: str
    start: int
    nbytes: int


def split_shards(tensors: Layout, limit: int = MAX_SHARD_BYTES) -> list[list[str]]:
    """Names of each shard, in order; a tensor beyond the limit has a shard of its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = tensor_bytes(dtype, shape)
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


class ShardWriter:
    """The weight files of one checkpoint in ``folder``.

    tensors: what the files hold, in order. metadata: the files' ``__metadata__``. ``write`` puts
    bytes in their place; ``finish_unit`` notes that all of a unit is written; ``close`` makes the
    files and the index complete. A writer made again over the same folder and plan knows the
    units that were finished (``done``); ``key`` tells plans apart. The journal that says so lies
    beside the folder, so that the folder holds nothing but the checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Layout,
        key: str,
        *,
        metadata: Mapping[str, str] | None = None,
        limit: int = MAX_SHARD_BYTES,
    ) -> None:
        self.folder = folder
        self.places: dict[str, Place] = {}
        self.done: set[int] = set()
        self._headers: dict[str, bytes] = {}
        self._sizes: dict[str, int] = {}
        self._open: dict[str, IO[bytes]] = {}
        self._unsynced = 0
        self._waiting: list[int] = []
        shards = split_shards(tensors, limit)
        for number, names in enumerate(shards, 1):
            file = "model.safetensors"
            if len(shards) > 1:
                file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            header = encode_header({name: tensors[name] for name in names}, metadata)
            position = len(header)
            for name in names:
                nbytes = tensor_bytes(*tensors[name])
                self.places[name] = Place(file, position, nbytes)
                position += nbytes
            self._headers[file], self._sizes[file] = header, position
        self._start(key)

    @property
    def tensor_bytes(self) -> int:
        return sum(place.nbytes for place in self.places.values())

    def _start(self, key: str) -> None:
        with writing(self.folder):
            self._prepare(key)

    def _prepare(self, key: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        journal = journal_of(self.folder)
        if not self._resumable(journal, key):
            # Also what belonged to another plan's weights: a tokenizer, a chat template. (Without
            # a journal there was no such plan, and the files are somebody's.)
            every = self.folder.iterdir() if journal.exists() else self.folder.glob("*.safetensors")
            for old in (*(path for path in every if not path.is_dir()), journal):
                old.unlink(missing_ok=True)
            self.done = set()
            for file, header in self._headers.items():
                with open(self.folder / file, "wb") as handle:
                    handle.write(header)
                    handle.truncate(self._sizes[file])
            # The first line comes last: a journal is a promise that the files are there.
            with open(journal, "wb") as handle:
                handle.write((json.dumps({"plan": key}) + "\n").encode())
        self._journal = open(journal, "ab")  # noqa: SIM115 - closed in close()

    def _resumable(self, journal: Path, key: str) -> bool:
        """Whether the journal belongs to this plan; reads the units it lists."""
        if not journal.is_file():
            return False
        *lines, _ = journal.read_bytes().split(b"\n")  # the last line may be cut short
        try:
            entries = [json.loads(line) for line in lines]
        except ValueError:
            return False
        if not entries or entries[0] != {"plan": key}:
            return False
        for file, header in self._headers.items():
            path = self.folder / file
            if not path.is_file() or path.stat().st_size != self._sizes[file]:
                return False
            with open(path, "rb") as handle:
                if handle.read(len(header)) != header:
                    return False
        self.done = {unit for entry in entries[1:] for unit in entry["done"]}
        # What follows a line that was cut short must not be glued to it.
        with open(journal, "r+b") as handle:
            handle.truncate(sum(len(line) + 1 for line in lines))
        return True

    def write(self, name: str, array: mx.array, offset: int = 0) -> int:
        """Put an array's bytes ``offset`` bytes into the tensor ``name``; returns the end."""
        place = self.places[name]
        data = array_bytes(array)
        end = offset + len(data)
        assert end <= place.nbytes, f"{name} has {place.nbytes} bytes, not {end}"
        with writing(self.folder / place.file) as path:
            if place.file not in self._open:
                self._open[place.file] = open(path, "r+b")  # noqa: SIM115 - closed in close()
            handle = self._open[place.file]
            handle.seek(place.start + offset)
            handle.write(data)
        self._unsynced += len(data)
        return end

    def finish_unit(self, unit: int) -> None:
        """All bytes of a unit are written. Noted once they have reached the disk."""
        self._waiting.append(unit)
        if self._unsynced >= SYNC_BYTES:
            self.sync()

    def sync(self) -> None:
        """Make what is written durable, then note it."""
        with writing(self.folder):
            for handle in self._open.values():
                handle.flush()
                os.fsync(handle.fileno())
            if self._waiting:
                self._journal.write((json.dumps({"done": self._waiting}) + "\n").encode())
                self._journal.flush()
                os.fsync(self._journal.fileno())
        self.done.update(self._waiting)
        self._waiting = []
        self._unsynced = 0

    def close(self) -> None:
        """Release the files; what was finished is noted, so that the work can go on later."""
        try:
            self.sync()
        finally:
            for handle in (*self._open.values(), self._journal):
                with suppress(OSError):  # the disk is full, which sync has told
                    handle.close()
            self._open = {}

    def write_index(self, parameters: int) -> None:
        """The index of all shards (also written for one, as mlx-lm does)."""
        total = sum(place.nbytes for place in self.places.values())
        files = {name: self.places[name].file for name in sorted(self.places)}
        write_json_atomic(
            self.folder / "model.safetensors.index.json",
            {
                "metadata": {"total_size": total, "total_parameters": parameters},
                "weight_map": files,
            },
        )


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """While this process writes ``folder`` (made when missing) no other does, wherever the file
    system can tell. What a killed run left half-written is taken away."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(locked(folder, wait=False))
        except BlockingIOError:
            raise MlxtxError(
                f"{folder} is being written by another conversion; wait for it, or choose another"
                " folder"
            ) from None
        for left in folder.glob(".*.partial"):
            left.unlink()
        yield


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """What goes wrong on the way to the disk is one line for people."""
    try:
        yield path
    except OSError as error:
        raise write_error(path, error) from error


def journal_of(folder: Path) -> Path:
    return folder.with_name(folder.name + ".jsonl")


def publish(folder: Path, out: Path, *, overwrite: bool) -> None:
    """Give a finished folder its name. An old one of that name goes only when the new one is
    complete."""
    import shutil

    old = out.with_name(out.name + ".replaced")
    with writing(out):
        if out.exists():
            if not overwrite:
                raise MlxtxError(f"{out} exists; choose another name or pass --overwrite")
            if old.exists():  # of a conversion that ended right after it had taken its place
                shutil.rmtree(old)
            os.replace(out, old)
        os.replace(folder, out)
        sync_folder(out.parent)
        journal_of(folder).unlink(missing_ok=True)
        if old.exists():
            shutil.rmtree(old)
