"""Training data from files: JSONL, JSON, CSV and Parquet, in a folder or a Hub dataset repository.

A record is a chat (``messages``, perhaps ``tools``), a ``prompt`` with its ``completion``, or a
plain ``text``. Every record that can't be used is named with its line and the reason.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxtx.errors import MlxtxError

Record = Mapping[str, Any]
TRAIN_NAMES = ("train", "training")
VALIDATION_NAMES = ("valid", "validation", "val", "dev", "eval")
TEST_NAMES = ("test",)
_WORST_LINES = 5  # bad lines that an error quotes


@dataclass(frozen=True)
class BadLine:
    """A record that can't be used: the file, its line (or record number, from 1), the reason."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass
class Records:
    """Good records with where they came from, and the bad ones."""

    good: list[Record] = field(default_factory=list)
    places: list[tuple[str, int]] = field(default_factory=list)
    bad: list[BadLine] = field(default_factory=list)

    def add(self, file: str, line: int, record: Any) -> None:
        reason = problem(record)
        if reason:
            self.bad.append(BadLine(file, line, reason))
        else:
            self.good.append(record)
            self.places.append((file, line))


def problem(record: Any) -> str:
    """Why a record can't be used, or ""."""
    if not isinstance(record, Mapping):
        return f"not a JSON object but {type(record).__name__}"
    if "messages" in record:
        return _chat_problem(record)
    if "prompt" in record or "completion" in record:
        for key in ("prompt", "completion"):
            if not isinstance(record.get(key), str):
                return f"{key!r} is missing or not a string"
        return "" if record["completion"] else "'completion' is empty"
    if "text" in record:
        text = record["text"]
        if not isinstance(text, str):
            return "'text' is not a string"
        return "" if text.strip() else "'text' is empty"
    keys = ", ".join(map(repr, record)) or "none"
    return f"has neither 'messages' nor 'prompt' and 'completion' nor 'text' (keys: {keys:.120})"


def _chat_problem(record: Record) -> str:
    messages = record["messages"]
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        return "'messages' is not a list with at least one message"
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return f"message {number} is not an object with a 'role'"
        content, calls = message.get("content"), message.get("tool_calls")
        if content is None and not calls:
            return f"message {number} has neither 'content' nor 'tool_calls'"
        if content is not None and not isinstance(content, str | list):
            return f"the 'content' of message {number} is not a text"
    if not any(m["role"] == "assistant" for m in messages):
        return "no message is the assistant's, so there is nothing to learn"
    if not isinstance(record.get("tools") or [], list):
        return "'tools' is not a list"
    return ""


# Files


def read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """The number and the value of each line that is not empty; a ValueError where it is no JSON."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield number, ValueError(f"not valid JSON: {error}")


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        records = json.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise MlxtxError(f"{path} is not valid JSON: {error}") from None
    if isinstance(records, Mapping):
        lists = [v for v in records.values() if isinstance(v, list)]
        records = lists[0] if len(lists) == 1 else [records]
    if not isinstance(records, list):
        raise MlxtxError(f"{path} must hold a list of records")
    yield from enumerate(records, 1)


def _csv(path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(1 << 30)
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.DictReader(file)
        for row in reader:
            if None in row:
                yield reader.line_num, ValueError("has more fields than the header")
            else:
                yield reader.line_num, {k: _cell(k, v) for k, v in row.items() if v is not None}


def _cell(key: str, value: str) -> Any:
    """Chats stand in a CSV as JSON."""
    if key not in ("messages", "tools"):
        return value
    try:
        return json.loads(value) if value else None
    except ValueError:
        return value


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise MlxtxError(f"reading {path.name} needs pyarrow: pip install pyarrow") from None
    number = 0
    for batch in parquet.ParquetFile(path).iter_batches():
        for record in batch.to_pylist():
            number += 1
            yield number, {k: v for k, v in record.items() if v is not None}


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
_KINDS = ", ".join(_READERS)


def read_file(path: Path, into: Records | None = None) -> Records:
    """All records of one file."""
    records = Records() if into is None else into
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise MlxtxError(f"can't read {path.name}: known kinds of files are {_KINDS}")
    try:
        for line, record in reader(path):
            if isinstance(record, ValueError):
                records.bad.append(BadLine(path.name, line, str(record)))
            else:
                records.add(path.name, line, record)
    except OSError as error:
        raise MlxtxError(f"can't read {path}: {error.strerror or error}") from None
    return records


@dataclass
class Data:
    """The records of the training and the validation split."""

    train: Records
    validation: Records

    @property
    def bad(self) -> list[BadLine]:
        return self.train.bad + self.validation.bad


def read_data(source: str | Path, *, validation_part: float = 0.0) -> Data:
    """Training data from a file, a folder, or a Hub dataset repository.

    In a folder files are told apart by their names (train..., valid...); without a validation
    file the last ``validation_part`` of the training records is kept for it. Raises MlxtxError
    when nothing can be used, with the first bad lines and why.
    """
    path = Path(source)
    if not path.exists():
        path = _dataset_folder(str(source))
    if path.is_file():
        data = Data(read_file(path), Records())
    else:
        data = _read_folder(path)
    if not data.train.good:
        worst = "; ".join(map(str, data.train.bad[:_WORST_LINES]))
        why = f"no record can be used: {worst}" if worst else "there are no records"
        raise MlxtxError(f"nothing to train on in {source}: {why}")
    return split(data, validation_part)


def split(data: Data, part: float) -> Data:
    """Keeps the last ``part`` of the training records for validation where there are none."""
    if not 0 <= part < 1:
        raise MlxtxError(f"validation_part must be from 0 up to 1, not {part}")
    if not part or data.validation.good:
        return data
    count = min(max(1, round(len(data.train.good) * part)), len(data.train.good) - 1)
    if count > 0:
        data.validation.good = data.train.good[-count:]
        data.validation.places = data.train.places[-count:]
        del data.train.good[-count:], data.train.places[-count:]
    return data


def _read_folder(folder: Path) -> Data:
    files = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in _READERS]
    files = [p for p in files if not any(part.startswith(".") for part in p.parts[-2:])]
    train, validation, test = (
        [p for p in files if _split_word(p, folder) in names]
        for names in (TRAIN_NAMES, VALIDATION_NAMES, TEST_NAMES)
    )
    if not train:
        others = [p for p in files if p not in validation and p not in test]
        train = others if len(others) == 1 else []
    if not train:
        found = ", ".join(p.name for p in files[:5]) or "none"
        raise MlxtxError(
            f"{folder} has no training file (train.jsonl, train.csv ...; files found: {found})"
        )
    data = Data(Records(), Records())
    for path in train:
        read_file(path, data.train)
    for path in validation:
        read_file(path, data.validation)
    return data


def _split_word(path: Path, folder: Path) -> str:
    """What tells of the split: the last word of ``news_train.jsonl`` (and of ``train_dev.jsonl``),
    the first of ``train-00000-of-00002.parquet``, else the name of a folder inside ``folder``, as
    in ``train/0.parquet``."""
    stem = path.stem.lower().replace("-", "_").split("_")
    for word in (stem[-1], stem[0]):
        if word in TRAIN_NAMES + VALIDATION_NAMES + TEST_NAMES:
            return word
    return "" if path.parent == folder else path.parent.name.lower()


def _dataset_folder(repo: str) -> Path:
    """The downloaded data files of a Hub dataset repository."""
    if repo.count("/") != 1 or repo.startswith((".", "/", "~")):
        raise MlxtxError(
            f"{repo} is neither a file, a folder nor a dataset repository (owner/name)"
        )
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            repo, repo_type="dataset", allow_patterns=[f"*{kind}" for kind in _READERS]
        )
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MlxtxError(f"can't download the dataset {repo}: {first}") from error
    return Path(folder)
