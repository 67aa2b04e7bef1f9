"""What comes between a message and its reply: other chats, other models, a restart, a model that
still loads. The reply keeps what it has, and what waits is given back."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from mlxtx.engine import Generate, Load, Stop
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


async def test_a_message_that_waits_is_answered_by_the_model_chosen_meanwhile(
    tmp_path: Path,
) -> None:
    first = asyncio.Event()

    def load(job: Load) -> Any:
        if job.model == "bundled":
            yield first
        yield from loaded(job)

    def generate(job: Generate) -> Any:
        model = next(job.model for job in reversed(script.jobs) if isinstance(job, Load))
        return reply(f"{model} says hello")(job)

    script = Script(Load=load, Generate=generate)
    app = make_app(tmp_path, script)
    async with app.run_test() as pilot:
        await wait_until(pilot, lambda: script.submitted(Load))
        await send(pilot, "one")
        app.load_model("org/second")
        await wait_until(pilot, lambda: app.chat.reply is None)
        message = app.chat.conversation.path()[-1]
        assert (message.text, message.state) == ("org/second says hello", "done")
        assert app.store.messages(1)[-1].model == "second"
        # The model is there before its message: the last job is the one that was answered.
        kinds = [type(job).__name__ for job in script.jobs if not isinstance(job, Stop)]
        assert kinds == ["Load", "Generate", "Load", "Generate"]


async def test_what_was_chosen_goes_before_the_sampling_of_a_model_that_still_loads(
    tmp_path: Path,
) -> None:
    gate = asyncio.Event()
    script = Script(Load=held_load(gate))
    app = make_app(tmp_path, script)
    async with app.run_test() as pilot:
        await send(pilot, "/set top_k 7")
        await send(pilot, "one")
        await wait_until(pilot, lambda: script.submitted(Generate))
        gate.set()
    job = script.submitted(Generate)[0]
    assert job.options == {"top_k": 7} and job.defaults["temperature"] == 0.7


async def test_an_adapter_of_the_settings_may_be_under_the_home_folder(tmp_path: Path) -> None:
    script = Script()
    (tmp_path / "settings.toml").write_text('adapter = "~/mine"\n')
    app = make_app(tmp_path, script)
    async with app.run_test() as pilot:
        await wait_until(pilot, lambda: script.submitted(Load))
    assert script.submitted(Load)[0].adapter == str(Path.home() / "mine")


async def test_the_memory_of_a_model_that_was_unloaded_is_not_shown(tmp_path: Path) -> None:
    app = make_app(tmp_path)
    async with app.run_test(size=(120, 30)) as pilot:
        await ask(pilot, "one")
        assert "memory 4.7 MB" in screen_text(app)
        await send(pilot, "/unload")
        await wait_until(pilot, lambda: "memory 4.7 MB" not in screen_text(app))


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
