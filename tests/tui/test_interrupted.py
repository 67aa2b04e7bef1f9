"""What comes between a message and its reply: other chats, other models, a restart, a model that
still loads. The reply keeps what it has, and what waits is given back."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from mlxtx.engine import Generate, Load
from tests.tui.fakes import Script, ask, loaded, make_app, reply, screen_text, send, wait_until


def held_load(gate: asyncio.Event) -> Any:
    """A model that is there when the gate is open."""

    def load(job: Load) -> Any:
        yield gate
        yield from loaded(job)

    return load


async def test_opening_the_chat_that_is_answered_lets_the_reply_go_on(tmp_path: Path) -> None:
    gate = asyncio.Event()
    app = make_app(tmp_path, Script(Generate=reply("begin", gate, " end")))
    async with app.run_test() as pilot:
        await send(pilot, "go")
        await wait_until(pilot, lambda: "begin" in screen_text(app))
        await pilot.press("f5")
        await pilot.pause()
        await pilot.press("enter")
        await wait_until(pilot, lambda: app.screen is app.chat)
        assert app.chat.reply is not None
        gate.set()
        await wait_until(pilot, lambda: app.chat.reply is None)
        message = app.chat.conversation.path()[-1]
        assert (message.text, message.state) == ("begin end", "done")


async def test_undo_waits_for_the_reply(tmp_path: Path) -> None:
    gate = asyncio.Event()
    script = Script()
    app = make_app(tmp_path, script)
    async with app.run_test() as pilot:
        await ask(pilot, "one")
        await pilot.press("escape", "d", "i")
        script.answers["Generate"] = reply("begin", gate, " end")
        await send(pilot, "two")
        await wait_until(pilot, lambda: "begin" in screen_text(app))
        await send(pilot, "/undo")
        assert app.chat.reply is not None and len(app.chat.undo_deleted) == 1
        gate.set()
        await wait_until(pilot, lambda: app.chat.reply is None)
        assert app.store.messages(1)[-1].text == "begin end"
        await send(pilot, "/undo")
        assert not app.chat.undo_deleted


async def test_a_restart_ends_the_reply_and_gives_back_what_waits(tmp_path: Path) -> None:
    gate = asyncio.Event()
    app = make_app(tmp_path, Script(Load=held_load(gate)))
    async with app.run_test(size=(100, 30)) as pilot:
        await send(pilot, "one")
        await send(pilot, "two")
        await wait_until(pilot, lambda: "1 waiting: two" in screen_text(app))
        await pilot.press("f8")
        await wait_until(pilot, lambda: app.chat.composer.text == "two")
        text = screen_text(app)
        assert app.chat.reply is None and not app.chat.queue
        assert "waiting" not in text and "stopped" in text
        gate.set()


async def test_another_chat_does_not_take_what_waits(tmp_path: Path) -> None:
    app = make_app(tmp_path, Script(Generate=reply("begin", asyncio.Event())))
    async with app.run_test() as pilot:
        for text in ("one", "two", "three"):
            await send(pilot, text)
        await pilot.press("ctrl+n")
        await wait_until(pilot, lambda: app.chat.composer.text == "two\n\nthree")


async def test_a_file_that_is_gone_at_its_turn_gives_back_all_that_waits(tmp_path: Path) -> None:
    gate = asyncio.Event()
    file = tmp_path / "notes.bin"
    file.write_bytes(b"\0" * 10)
    app = make_app(tmp_path, Script(Generate=reply("begin", gate)))
    async with app.run_test() as pilot:
        for text in ("one", f"@{file}", "three"):
            await send(pilot, text)
        gate.set()
        await wait_until(pilot, lambda: app.chat.reply is None)
        assert app.chat.composer.text == f"@{file}\n\nthree" and not app.chat.queue


async def test_escape_stops_a_reply_that_waits_for_its_model(tmp_path: Path) -> None:
    gate = asyncio.Event()
    script = Script(Load=held_load(gate))
    app = make_app(tmp_path, script)
    async with app.run_test() as pilot:
        await send(pilot, "one")
        await wait_until(pilot, lambda: script.submitted(Generate))
        await pilot.press("escape")
        assert app.chat.reply is None and app.chat.conversation.path()[-1].state == "stopped"
        gate.set()
        await ask(pilot, "two")


async def test_an_edit_ends_with_its_message_or_its_chat(tmp_path: Path) -> None:
    app = make_app(tmp_path)
    async with app.run_test() as pilot:
        await ask(pilot, "one")
        app.chat.action_edit()
        app.chat.action_new()
        assert app.chat.composer.border_title is None
        await ask(pilot, "two")
        app.chat.action_edit()
        await pilot.press("escape", "escape")  # from the edit to the messages
        app.chat.editing = app.chat.conversation.path()[0]
        await pilot.press("g", "d", "i")
        assert app.chat.editing is None
        await ask(pilot, "three")
        assert [m.text for m in app.chat.conversation.path()] == ["three", "Hello **there**."]
