"""Files are never half there: written beside under another name, flushed to disk, then renamed.
What is read may come from anybody: its size is bounded, and what is wrong with it is one line."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from mlxtx.errors import MlxtxError

MAX_TEXT_BYTES = 256 << 20


def disk_full(error: OSError) -> bool:
    """Whether there is no room: on the disk, in a quota, or in the size a file may have."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def read_text(path: Path) -> str:
    """A UTF-8 file of bounded size."""
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise MlxtxError(f"{path} is larger than {MAX_TEXT_BYTES >> 20} MB; it is no such file")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise MlxtxError(f"{path} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise MlxtxError(f"cannot read {path}: {error.strerror or error}") from None


def replace_between(path: Path, begin: str, end: str, text: str) -> None:
    """Puts ``text`` between two marks of a page, in place of what stands there."""
    before, first, rest = read_text(path).partition(begin)
    _, last, after = rest.partition(end)
    if not first or not last:
        raise MlxtxError(f"{path} has no place for the table, between {begin} and {end}")
    write_text_atomic(path, f"{before}{begin}{text}{end}{after}")


def read_json(path: Path) -> Any:
    """A JSON file. Non-finite numbers as transformers tags them are floats."""
    try:
        return json.loads(read_text(path), object_hook=_untag)
    except (ValueError, RecursionError) as error:
        raise MlxtxError(f"{path} is not readable JSON: {str(error)[:100]}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds names and values."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise MlxtxError(f"{path} must hold a JSON object, not {value!r:.40}")
    return value


_TAGS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def _untag(value: dict[str, Any]) -> Any:
    if set(value) == {"__float__"} and str(value["__float__"]) in _TAGS:
        return _TAGS[str(value["__float__"])]
    return value


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """A file to write that takes its name only when the block ends without an error.

    mode: "wb" or "w" (UTF-8). On an error nothing is left behind and an old file stays as it was.
    Raises MlxtxError when the disk is full or the folder cannot be written.
    """
    path = Path(path)
    if not path.name or "\0" in path.name:
        raise MlxtxError(f"cannot write {str(path)!r}: that names no file")
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    encoding = None if "b" in mode else "utf-8"
    try:
        with open(beside, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync_folder(path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        with suppress(OSError):  # where it could not be made, the line above says why
            beside.unlink(missing_ok=True)


def write_bytes_atomic(path: str | Path, data: bytes) -> None:
    with atomic_write(path) as file:
        file.write(data)


def write_text_atomic(path: str | Path, text: str) -> None:
    with atomic_write(path, "w") as file:
        file.write(text)


def write_json_atomic(path: str | Path, value: Any) -> None:
    """JSON as a person would read it: two spaces, keys in the order given, one line at the end."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Others that ask for the same folder wait until the block ends, or get a BlockingIOError
    where they do not ``wait``; the lock goes with the process. Where the system or the disk has no
    such lock, nobody waits."""
    handle = None
    try:
        try:
            import fcntl

            handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except (ImportError, OSError):
            pass
        yield
    finally:
        if handle is not None:
            os.close(handle)


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` last through a power cut, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def write_error(path: Path, error: OSError) -> MlxtxError:
    """The line for a file that could not be written."""
    reason = error.strerror or str(error)
    if disk_full(error):
        return MlxtxError(
            f"the disk is full: {path} was not written ({reason}); free some space and retry"
        )
    return MlxtxError(f"cannot write {path}: {reason}")
