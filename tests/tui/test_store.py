"""Chats on disk: the tree, search, crashes, damaged and foreign files."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from mlxtx.tui.conversation import Conversation, import_chat, prompt_text
from mlxtx.tui.store import MIGRATIONS, Message, Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "chats.db")


def chat_of(store: Store, *texts: str) -> Conversation:
    """A conversation of alternating messages."""
    conversation = Conversation(store)
    for number, text in enumerate(texts):
        role = "assistant" if number % 2 else "user"
        conversation.add(Message(role=role, text=text), conversation.chat.head)
    return conversation


def test_an_empty_chat_is_not_stored(store: Store) -> None:
    Conversation(store).change_settings(system="x")
    assert store.chats() == []


def test_settings_made_before_the_first_message_are_stored_with_it(store: Store) -> None:
    conversation = Conversation(store)
    conversation.change_settings(system="short")
    conversation.add(Message(text="hi"), None)
    found = store.chat(conversation.chat.id)
    assert found is not None and found.settings == {"system": "short"} and found.title == "hi"


def test_versions_are_siblings_and_the_branch_is_remembered(store: Store) -> None:
    conversation = chat_of(store, "q", "a1")
    question, first = conversation.path()
    second = conversation.add(Message(role="assistant", text="a2"), question.id)
    conversation.add(Message(text="more"), second.id)
    assert [m.text for m in conversation.path()] == ["q", "a2", "more"]
    assert conversation.show_sibling(second, -1) and not conversation.show_sibling(first, -1)
    assert [m.text for m in conversation.path()] == ["q", "a1"]
    # The next start shows the same branch; switching back finds the end of the other.
    again = Conversation(store, store.chat(conversation.chat.id))
    assert [m.text for m in again.path()] == ["q", "a1"]
    assert again.show_sibling(again.path()[1], 1)
    assert [m.text for m in again.path()] == ["q", "a2", "more"]


def test_delete_takes_what_follows_and_undo_gives_it_back(store: Store) -> None:
    conversation = chat_of(store, "q", "a", "q2", "a2")
    gone = conversation.delete(conversation.path()[1])
    assert len(gone) == 3 and [m.text for m in conversation.path()] == ["q"]
    assert [m.text for m in store.messages(conversation.chat.id)] == ["q"]
    conversation.restore(gone)
    assert [m.text for m in conversation.path()] == ["q", "a", "q2", "a2"]


def test_deleting_a_version_shows_the_other(store: Store) -> None:
    conversation = chat_of(store, "q", "a1")
    second = conversation.add(Message(role="assistant", text="a2"), conversation.path()[0].id)
    conversation.delete(second)
    assert [m.text for m in conversation.path()] == ["q", "a1"]


def test_search_finds_words_by_their_beginning_in_any_branch(store: Store) -> None:
    conversation = chat_of(store, "Wie rotiert RoPE?", "Es dreht Zahlenpaare; häufig.")
    conversation.add(Message(role="assistant", text="another branch"), conversation.path()[0].id)
    chat_of(store, "unrelated", "nothing")
    (hit,) = store.search("dreh zahlen")
    assert hit.chat.id == conversation.chat.id
    assert ("dreht", True) in hit.pieces and ("Zahlenpaare", True) in hit.pieces
    assert [found.chat.id for found in store.search("haufig")] == [conversation.chat.id]
    assert len(store.search("branch")) == 1
    assert store.search('"; DROP TABLE chats; -- %_') == []
    assert len(store.search("")) == 2 and store.search("unrelated")[0].message is None


def test_search_follows_changes_and_deletions(store: Store) -> None:
    conversation = chat_of(store, "q")
    reply = Message(role="assistant", text="alpha", state="streaming")
    conversation.add(reply, conversation.chat.head)
    assert store.search("alpha") == [], "a reply is found when it is finished"
    reply.state, reply.text = "done", "beta"
    conversation.save(reply, "state", "text")
    assert store.search("alpha") == [] and len(store.search("beta")) == 1
    conversation.delete(reply)
    assert store.search("beta") == []
    store.delete_chat(conversation.chat.id)
    assert store.search("q") == []
    store.restore_chat(conversation.chat.id)
    assert len(store.search("q")) >= 1


def test_pinned_chats_come_first(store: Store) -> None:
    numbers = [chat_of(store, f"chat {n}").chat.id for n in range(3)]
    store.update_chat(numbers[0], pinned=True)
    assert [chat.id for chat in store.chats()] == [numbers[0], numbers[2], numbers[1]]
    with pytest.raises(ValueError, match="no such columns"):
        store.update_chat(numbers[0], **{"title = 'x' --": 1})


def test_a_reply_cut_off_by_a_crash_is_marked_and_kept(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import sys, time
        from mlxtx.events import Delta
        from mlxtx.tui.conversation import Conversation
        from mlxtx.tui.reply import Reply
        from mlxtx.tui.store import Message, Store
        from mlxtx.tui.widgets.bars import Figures
        conversation = Conversation(Store(sys.argv[1]))
        conversation.add(Message(text="go"), None)
        message = Message(role="assistant", state="streaming")
        conversation.add(message, conversation.chat.head)
        reply = Reply(conversation, message, Figures())
        start = time.time()
        while True:
            now = f"{time.time() - start:.3f} "
            reply.take(Delta(text=now))
            print(now, flush=True)
            time.sleep(0.01)
    """)
    command = [sys.executable, "-c", program, str(tmp_path / "chats.db")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        last = float(line)
        if last > 2.6:
            break
    process.send_signal(signal.SIGKILL)
    for line in process.stdout:
        last = float(line)
    process.wait()
    db = sqlite3.connect(tmp_path / "chats.db")
    db.execute("UPDATE messages SET updated = updated - 60")
    db.commit()
    db.close()
    message = Store(tmp_path / "chats.db").messages(1)[-1]
    assert message.state == "lost"
    kept = float(message.text.split()[-1])
    assert last - kept < 2.0, "at most two seconds of text are missing"


def test_a_reply_of_another_running_program_is_left_alone(tmp_path: Path) -> None:
    conversation = chat_of(Store(tmp_path / "chats.db"), "q")
    conversation.add(Message(role="assistant", state="streaming"), conversation.chat.head)
    assert Store(tmp_path / "chats.db").messages(1)[-1].state == "streaming"


@pytest.mark.parametrize("damage", ["header", "middle", "empty json", "cut"])
def test_a_corrupt_file_is_kept_aside_and_told(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "chats.db"
    store = Store(path)
    for number in range(40):
        chat_of(store, f"question {number} " + "x" * 4000, "answer")
    store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store.close()
    data = bytearray(path.read_bytes())
    if damage == "header":
        data[:16] = b"not a database.."
    elif damage == "middle":
        for at in range(4096, len(data) - 4096, 8192):
            data[at : at + 64] = os.urandom(64)
    elif damage == "cut":
        data = data[: len(data) // 2]
    else:
        data = bytearray(b"{}" * 3000)
    path.write_bytes(bytes(data))
    new = Store(path)
    assert new.chats() == [] and len(new.notices) == 1
    (aside,) = tmp_path.glob("chats.corrupt-*.db")
    assert aside.name in new.notices[0] and aside.read_bytes() == bytes(data)
    chat_of(new, "works again")
    assert len(Store(path).chats()) == 1


def test_a_file_of_a_newer_version_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "chats.db"
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    db.close()
    before = path.read_bytes()
    store = Store(path)
    chat_of(store, "hi")
    assert path.read_bytes() == before and "newer mlxtx" in store.notices[0]
    assert store.path.name == f"chats-v{len(MIGRATIONS)}.db"


def test_migrations_run_once_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlxtx.tui import store as module

    chat_of(Store(tmp_path / "chats.db"), "old")
    more = (*MIGRATIONS, "ALTER TABLE chats ADD COLUMN colour TEXT NOT NULL DEFAULT 'grey';")
    monkeypatch.setattr(module, "MIGRATIONS", more)
    for _ in range(2):
        db = module._connect(tmp_path / "chats.db")
        assert db.execute("PRAGMA user_version").fetchone()[0] == 2
        assert db.execute("SELECT title, colour FROM chats").fetchone()[:] == ("old", "grey")
        db.close()


def test_old_deletions_are_cleaned_up(store: Store) -> None:
    conversation = chat_of(store, "q", "a")
    store.update_chat(conversation.chat.id, deleted=time.time() - 40 * 86400)
    again = Store(store.path)
    assert again.chat(conversation.chat.id) is None and again.messages(1) == []


def test_lone_surrogates_and_nul_are_stored(store: Store) -> None:
    conversation = chat_of(store, "a\ud800b\0c")
    assert store.messages(conversation.chat.id)[0].text == "a?b\0c"


def test_export_and_import_keep_every_branch(store: Store, tmp_path: Path) -> None:
    conversation = chat_of(store, "q", "a1")
    question = conversation.path()[0]
    conversation.add(Message(role="assistant", text="a2", thinking="hm"), question.id)
    conversation.show_sibling(conversation.path()[1], -1)
    conversation.change_settings(system="be short")
    chat = import_chat(Store(tmp_path / "other.db"), conversation.to_json())
    copy = Conversation(Store(tmp_path / "other.db"), chat)
    assert [m.text for m in copy.path()] == ["q", "a1"]
    assert [m.thinking for m in copy.siblings(copy.path()[1])] == ["", "hm"]
    assert copy.settings["system"] == "be short" and copy.chat.title == "q"
    assert "## You\n\nq\n" in conversation.to_markdown()


def test_a_plain_list_of_messages_is_imported(store: Store) -> None:
    text = '[{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]'
    chat = import_chat(store, text)
    assert chat.settings == {"system": "s"}
    assert [m.text for m in Conversation(store, chat).path()] == ["hi"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("not json", "no JSON"),
        ("42", "no list of messages"),
        ('{"messages": []}', "no list of messages"),
        ('[{"role": "user"}]', "message 1 has no role and text"),
        ('[{"role": "root", "content": "x"}]', "message 1 has no role and text"),
        ('["x"]', "message 1 has no role"),
        ('[{"role": "system", "content": "x"}]', "no messages"),
    ],
)
def test_a_bad_import_says_why_and_adds_nothing(store: Store, text: str, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        import_chat(store, text)
    assert store.chats() == []


def test_wrong_types_in_an_import_are_left_out(store: Store) -> None:
    row = '{"role": "user", "text": "x", "stats": [1], "attachments": [1, {"name": 2}], "state": 3}'
    message = Conversation(store, import_chat(store, f"[{row}]")).path()[0]
    assert (message.stats, message.attachments, message.state) == ({}, [], "done")


def test_attached_files_stand_before_the_message(store: Store) -> None:
    message = Message(text="what is it?", attachments=[{"name": "n.md", "text": "hello"}])
    assert prompt_text(message) == '<file name="n.md">\nhello\n</file>\n\nwhat is it?'


def test_the_prompt_has_the_system_text_and_no_empty_replies(store: Store) -> None:
    conversation = chat_of(store, "one", "")
    conversation.add(Message(text="two"), conversation.chat.head)
    assert conversation.prompt("be kind") == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "one\n\ntwo"},  # templates want the roles to alternate
    ]


def test_half_a_character_may_be_searched(store: Store) -> None:
    chat_of(store, "hello \ud83d")
    assert store.search("\ud83d nothing") == [] and len(store.search("hello \ud83d")) > 0


def test_a_place_that_can_not_be_written_costs_no_talk(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.db").mkdir()
    for path in (tmp_path / "file" / "chats.db", tmp_path / "folder.db"):
        store = Store(path)
        assert "can't be kept" in store.notices[0]
        chat_of(store, "hello", "hi")
        assert [hit.chat.title for hit in store.search("hello")][:1] == ["hello"]
        store.close()
