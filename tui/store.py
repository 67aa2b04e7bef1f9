"""Conversations on disk: SQLite in WAL mode, a tree of messages, full-text search.

A reply is written while it is generated, so that whatever ends the program costs a second or two
of text at most. Regenerating or editing adds a sibling under the same parent: nothing is lost, and
``chats.head`` says which branch is shown.
"""

from __future__ import annotations

import itertools
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

# One entry a version, run in order: `PRAGMA user_version` counts those that a file has seen.
MIGRATIONS = (
    """
    CREATE TABLE chats (
        id INTEGER PRIMARY KEY, title TEXT NOT NULL DEFAULT '', named INTEGER NOT NULL DEFAULT 0,
        pinned INTEGER NOT NULL DEFAULT 0, head INTEGER, settings TEXT NOT NULL DEFAULT '{}',
        created REAL NOT NULL, updated REAL NOT NULL, deleted REAL
    );
    CREATE TABLE messages (
        id INTEGER PRIMARY KEY, chat INTEGER NOT NULL REFERENCES chats(id) ON DELETE CASCADE,
        parent INTEGER REFERENCES messages(id) ON DELETE CASCADE,
        role TEXT NOT NULL, text TEXT NOT NULL DEFAULT '', thinking TEXT NOT NULL DEFAULT '',
        thinking_seconds REAL NOT NULL DEFAULT 0, state TEXT NOT NULL DEFAULT 'done',
        model TEXT NOT NULL DEFAULT '', attachments TEXT NOT NULL DEFAULT '[]',
        stats TEXT NOT NULL DEFAULT '{}', created REAL NOT NULL, updated REAL NOT NULL,
        deleted REAL
    );
    CREATE INDEX messages_chat ON messages(chat);
    CREATE VIRTUAL TABLE messages_text USING fts5(text, tokenize='unicode61 remove_diacritics 2');
    CREATE TRIGGER messages_added AFTER INSERT ON messages WHEN new.state != 'streaming' BEGIN
        INSERT INTO messages_text(rowid, text) VALUES (new.id, new.text);
    END;
    CREATE TRIGGER messages_changed AFTER UPDATE OF text, state ON messages
    WHEN new.state != 'streaming' BEGIN
        DELETE FROM messages_text WHERE rowid = new.id;
        INSERT INTO messages_text(rowid, text) VALUES (new.id, new.text);
    END;
    CREATE TRIGGER messages_removed AFTER DELETE ON messages BEGIN
        DELETE FROM messages_text WHERE rowid = old.id;
    END;
    """,
)

# A reply that is "streaming" and was not touched for this long belongs to a program that is gone.
_ABANDONED_SECONDS = 10.0
_CHECKED_BYTES = 20_000_000
_KEEP_DELETED_SECONDS = 30 * 86400.0
_MATCH_OPEN, _MATCH_CLOSE = "\ue000", "\ue001"


@dataclass
class Message:
    """One turn. ``state``: "streaming", "done", "stopped" (by the user), "failed" or "lost"
    (the program ended while it was written)."""

    id: int = 0
    chat: int = 0
    parent: int | None = None
    role: str = "user"
    text: str = ""
    thinking: str = ""
    thinking_seconds: float = 0.0
    state: str = "done"
    model: str = ""
    attachments: list[dict[str, Any]] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)
    created: float = 0.0
    updated: float = 0.0
    deleted: float | None = None


@dataclass
class Chat:
    """``head`` is the last message of the branch that is shown; ``named`` by a person or not."""

    id: int = 0
    title: str = ""
    named: bool = False
    pinned: bool = False
    head: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    created: float = 0.0
    updated: float = 0.0
    deleted: float | None = None


@dataclass(frozen=True)
class Found:
    """A search hit: ``pieces`` are (text, matched) in reading order."""

    chat: Chat
    message: int | None
    pieces: tuple[tuple[str, bool], ...]


class Store:
    """All conversations. ``notices`` holds lines to show: what went wrong when it was opened.

    What goes wrong later (a full disk, a damaged page) is told to ``on_problem`` and stops nobody:
    reading gives less, and what can't be written gets a negative number and lives in memory.
    """

    def __init__(
        self, path: Path | str, on_problem: Callable[[str], None] = lambda line: None
    ) -> None:
        self.path = Path(path)
        self.notices: list[str] = []
        self._on_problem = on_problem
        self._told: set[str] = set()
        self._unsaved = itertools.count(-1, -1)
        self._db = self._open()
        self._tidy()

    def _open(self) -> sqlite3.Connection:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return self._opened()
        except (OSError, sqlite3.Error) as error:
            self.notices.append(
                f"Chats can't be kept in {self.path} ({error}): those of now are lost at the end, "
                "/export saves one."
            )
            return _connect(Path(":memory:"))

    def _opened(self) -> sqlite3.Connection:
        try:
            return _connect(self.path)
        except sqlite3.DatabaseError as error:
            # A locked or unwritable file is no corrupt one.
            locked = isinstance(error, sqlite3.OperationalError)
            if locked and not any(word in str(error) for word in ("no such", "malformed")):
                raise
            aside = self._set_aside("corrupt")
            self.notices.append(
                f"The chats in {self.path.name} could not be read ({error}). The file was kept "
                f"as {aside.name} and a new one was started."
            )
        except _NewerVersionError:
            self.path = self.path.with_name(f"{self.path.stem}-v{len(MIGRATIONS)}.db")
            self.notices.append(
                "Your chats were last opened by a newer mlxtx and are left alone; this version "
                f"keeps its own in {self.path.name}."
            )
        return _connect(self.path)

    def _set_aside(self, word: str) -> Path:
        aside = self.path.with_name(f"{self.path.stem}.{word}-{time.strftime('%Y%m%d-%H%M%S')}.db")
        for ending in ("", "-wal", "-shm"):
            part = Path(f"{self.path}{ending}")
            if part.exists():
                os.replace(part, f"{aside}{ending}")
        return aside

    def _tidy(self) -> None:
        now = time.time()
        self._write(
            "UPDATE messages SET state = 'lost' WHERE state = 'streaming' AND updated < ?",
            now - _ABANDONED_SECONDS,
        )
        for table in ("messages", "chats"):
            self._write(f"DELETE FROM {table} WHERE deleted < ?", now - _KEEP_DELETED_SECONDS)

    def close(self) -> None:
        self._db.close()

    def _rows(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        try:
            return self._db.execute(sql, tuple(map(_to_sql, values))).fetchall()
        except sqlite3.Error as error:
            self._failed("read", error)
            return []

    def _write(self, sql: str, *values: Any) -> int:
        """The number of the row that was added; 0 when nothing could be written."""
        try:
            return self._db.execute(sql, values).lastrowid or 0
        except sqlite3.Error as error:
            self._failed("saved", error)
            return 0

    def _failed(self, what: str, error: sqlite3.Error) -> None:
        line = f"The chats can't be {what} ({error}); what you see goes on, export it to keep it."
        # Once is enough: a reply is saved every second.
        if line not in self._told:
            self._told.add(line)
            self._on_problem(line)

    # Chats

    def add_chat(self, title: str = "", settings: dict[str, Any] | None = None) -> Chat:
        now = time.time()
        chat = Chat(title=title, settings=settings or {}, created=now, updated=now)
        chat.id = self._insert("chats", chat)
        return chat

    def chat(self, number: int) -> Chat | None:
        rows = self._rows("SELECT * FROM chats WHERE id = ?", number)
        return _from_row(Chat, rows[0]) if rows else None

    def chats(self, limit: int = 500) -> list[Chat]:
        """Those that are not deleted: pinned first, then the newest."""
        rows = self._rows(
            "SELECT * FROM chats WHERE deleted IS NULL "
            "ORDER BY pinned DESC, updated DESC, id DESC LIMIT ?",
            limit,
        )
        return [_from_row(Chat, row) for row in rows]

    def update_chat(self, number: int, **values: Any) -> None:
        """Change columns of a chat, for example ``title=`` or ``pinned=``."""
        self._update("chats", number, values)

    def delete_chat(self, number: int) -> None:
        """Hide the chat. ``restore_chat`` brings it back; after 30 days it is gone."""
        self._update("chats", number, {"deleted": time.time()})

    def restore_chat(self, number: int) -> None:
        self._update("chats", number, {"deleted": None})

    # Messages

    def add_message(self, message: Message) -> Message:
        """Store ``message`` (its id is set) and make it the head of its chat."""
        message.created = message.updated = time.time()
        message.id = self._insert("messages", message)
        if message.id > 0:
            self._update("chats", message.chat, {"head": message.id, "updated": message.updated})
        return message

    def update_message(self, number: int, **values: Any) -> None:
        self._update("messages", number, {**values, "updated": time.time()})

    def messages(self, chat: int) -> list[Message]:
        """Every message of the chat that is not deleted, all branches, oldest first."""
        rows = self._rows(
            "SELECT * FROM messages WHERE chat = ? AND deleted IS NULL ORDER BY id", chat
        )
        return [_from_row(Message, row) for row in rows]

    def delete_messages(self, numbers: Iterable[int]) -> None:
        now = time.time()
        for number in numbers:
            self._update("messages", number, {"deleted": now})

    def restore_messages(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._update("messages", number, {"deleted": None})

    def recent_messages(self, limit: int = 100) -> list[tuple[str, list[dict[str, Any]]]]:
        """What was written last, oldest first, with what was pasted: for the recall of the input.

        Very long ones are left out: this is read at the start.
        """
        rows = self._rows(
            "SELECT text, CASE WHEN text LIKE '%[pasted text %' THEN attachments ELSE '[]' END "
            "AS attachments FROM messages WHERE role = 'user' AND deleted IS NULL "
            "AND length(text) < 10000 "
            "AND (text NOT LIKE '%[pasted text %' OR length(attachments) < 200000) "
            "ORDER BY id DESC LIMIT ?",
            limit,
        )
        return [(row["text"], json.loads(row["attachments"])) for row in reversed(rows)]

    # Search

    def search(self, query: str, limit: int = 100) -> list[Found]:
        """Chats whose title or messages have words that begin like those of ``query``; without
        words all of them, with the beginning of their last message."""
        words = [word.replace('"', '""') for word in query.split()]
        if not words:
            return [Found(chat, None, self._beginning(chat.head)) for chat in self.chats(limit)]
        like = "%" + query.strip().replace("\\", "\\\\").replace("%", "\\%") + "%"
        titles = self._rows(
            "SELECT * FROM chats WHERE deleted IS NULL AND title LIKE ? ESCAPE '\\' "
            "ORDER BY pinned DESC, updated DESC LIMIT ?",
            like.replace("_", "\\_"),
            limit,
        )
        found = [Found(_from_row(Chat, row), None, ()) for row in titles]
        match = " ".join(f'"{word}"*' for word in words)
        hits = self._rows(
            "SELECT m.id AS message, m.chat AS chat, "
            "snippet(messages_text, 0, ?, ?, '…', 16) AS part "
            "FROM messages_text JOIN messages m ON m.id = messages_text.rowid "
            "JOIN chats c ON c.id = m.chat WHERE messages_text MATCH ? "
            "AND m.deleted IS NULL AND c.deleted IS NULL ORDER BY rank LIMIT ?",
            _MATCH_OPEN,
            _MATCH_CLOSE,
            match,
            limit,
        )
        for hit in hits:
            chat = self.chat(hit["chat"])
            if chat is not None:
                found.append(Found(chat, hit["message"], _pieces(hit["part"])))
        return found[:limit]

    def _beginning(self, message: int | None) -> tuple[tuple[str, bool], ...]:
        rows = self._rows("SELECT substr(text, 1, 200) FROM messages WHERE id = ?", message)
        return ((" ".join(rows[0][0].split()), False),) if rows else ()

    # Rows

    def _insert(self, table: str, item: Any) -> int:
        values = {k: _to_sql(v) for k, v in vars(item).items() if k != "id"}
        names = ", ".join(values)
        marks = ", ".join("?" * len(values))
        sql = f"INSERT INTO {table} ({names}) VALUES ({marks})"
        return self._write(sql, *values.values()) or next(self._unsaved)

    def _update(self, table: str, number: int, values: dict[str, Any]) -> None:
        known = {f.name for f in fields(Chat if table == "chats" else Message)}
        if not known.issuperset(values):
            raise ValueError(f"no such columns: {set(values) - known}")
        sets = ", ".join(f"{name} = ?" for name in values)
        self._write(
            f"UPDATE {table} SET {sets} WHERE id = ?", *map(_to_sql, values.values()), number
        )


class _NewerVersionError(Exception):
    pass


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=5.0, isolation_level=None)
    try:
        db.row_factory = sqlite3.Row
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > len(MIGRATIONS):
            raise _NewerVersionError
        db.execute("PRAGMA journal_mode = WAL")
        # In WAL mode NORMAL survives the death of the program; FULL would only add power cuts.
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("PRAGMA foreign_keys = ON")
        # A check reads the whole file: of a large one only the parts that are used are checked.
        small = not path.exists() or path.stat().st_size < _CHECKED_BYTES
        if small and db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("its pages are damaged")
        for number, script in enumerate(MIGRATIONS[version:], version + 1):
            db.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number}; COMMIT;")
        db.execute("SELECT count(*) FROM messages_text LIMIT 1")
    except BaseException:
        db.close()
        raise
    return db


def _from_row(cls: type, row: sqlite3.Row) -> Any:
    values = dict(row)
    for name in ("settings", "attachments", "stats"):
        if name in values:
            values[name] = json.loads(values[name])
    for name in ("named", "pinned"):
        if name in values:
            values[name] = bool(values[name])
    return cls(**values)


def _to_sql(value: Any) -> Any:
    if isinstance(value, (dict, list)):
        return json.dumps(value)
    # SQLite takes no lone surrogates, which a model or a paste can make.
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else value


def _pieces(snippet: str) -> tuple[tuple[str, bool], ...]:
    pieces = []
    for number, part in enumerate(snippet.replace("\n", " ").split(_MATCH_OPEN)):
        if number == 0:
            pieces.append((part, False))
            continue
        hit, _, rest = part.partition(_MATCH_CLOSE)
        pieces += [(hit, True), (rest, False)]
    return tuple(piece for piece in pieces if piece[0])
