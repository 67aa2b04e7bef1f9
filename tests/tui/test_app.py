"""The app around the chat: start, plain fallback, damage, long chats, scrolling, conversations."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlxtx.scripts import chat
from mlxtx.tui import app as app_module
from mlxtx.tui.screens.chats import ago
from mlxtx.tui.store import Message, Store

from mlxtx.engine import Generate, Load
from mlxtx.events import Done, Loaded, Warned
from tests.tui.fakes import (
    Script,
    ask,
    make_app,
    reply,
    screen_text,
    send,
    toasts,
    until,
    wait_until,
)


def long_chat(path: Path, messages: int) -> None:
    store = Store(path)
    chat = store.add_chat("A long chat")
    parent = None
    for number in range(messages):
        role = "assistant" if number % 2 else "user"
        text = f"Message **{number}** " + "word " * 60
        parent = store.add_message(Message(chat=chat.id, parent=parent, role=role, text=text)).id
    store.close()


async def test_the_first_screen_says_what_answers_and_how_to_get_more(tmp_path: Path) -> None:
    app = make_app(tmp_path)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.pause()
        text = screen_text(app)
        assert "small built-in guide" in text and "For a bigger one press f3" in text


async def test_a_warning_of_the_engine_is_a_notice(tmp_path: Path) -> None:
    script = Script()
    app = make_app(tmp_path, script)
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_until(pilot, lambda: script.engines)
        script.engines[0].deliver(Warned(message="the kernel [b]x[/b] does not run"))
        await wait_until(pilot, lambda: "the kernel [b]x[/b] does not run" in toasts(app))


@pytest.mark.parametrize(
    ("variable", "value", "settings"),
    [("NO_COLOR", "1", ""), ("TERM", "dumb", ""), ("TERM", "xterm", "plain = true\n")],
)
def test_the_plain_loop_is_opened_instead(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, value: str, settings: str
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "settings.toml").write_text(settings)
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    seen: list[Any] = []
    monkeypatch.setattr("mlxtx.scripts.chat.main", lambda argv: seen.append(argv) or 0)
    assert app_module.main(["--model", "m", "--temperature", "0.5"]) == 0
    assert seen == [["--plain", "--model", "m", "--temperature", "0.5"]]


async def test_options_of_the_command_line_go_before_the_settings(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text(
        'model = "old"\nadapter = "its"\n[sampling]\ntop_k = 5\n'
    )
    script = Script()
    given = {"model": "org/new", "temperature": 0.1, "system": "short", "kv": "k8v4g64"}
    app = make_app(tmp_path, script, given={**given, "seed": None})
    async with app.run_test() as pilot:
        assert (app.model.name, app.model.adapter) == ("org/new", "")
        await ask(pilot, "hi")
    job = script.submitted(Generate)[0]
    assert job.options["temperature"] == 0.1 and job.options["top_k"] == 5
    assert job.options["kv"] == "k8v4g64" and job.messages[0]["content"] == "short"
    assert 'model = "old"' in (tmp_path / "settings.toml").read_text()


async def test_every_option_of_chat_holds_in_the_app(tmp_path: Path) -> None:
    """Also one that equals our default, where the model would sample otherwise."""

    def load(job: Any) -> Any:
        yield Loaded(
            model=job.model, seconds=0.1, bytes=1, details={"sampling": {"temperature": 0.0}}
        )
        yield Done(reason="done")

    script = Script(Load=load)
    given = vars(
        chat.arguments(
            [
                "--model",
                "m",
                "--context",
                "64",
                "--force",
                "--kv",
                "k8v4g64",
                "--temperature",
                "0.7",
                "--presence-penalty",
                "0.5",
                "--frequency-penalty",
                "0.25",
                "--stop",
                "END",
                "--logit-bias",
                "5=-2",
                "--prefill-chunk",
                "32",
            ]
        )
    )
    app = make_app(tmp_path, script, given=given)
    async with app.run_test() as pilot:
        await ask(pilot, "hi")
        await send(pilot, "/kv")
        await send(pilot, "/set temperature 0.1")
        await ask(pilot, "again")
        await wait_until(pilot, lambda: len(script.submitted(Generate)) == 2)
    assert script.submitted(Load)[0].options == {"context": 64, "force": True, "kv": "k8v4g64"}
    first, second = (job.options for job in script.submitted(Generate))
    assert (first["temperature"], first["kv"]) == (0.7, "k8v4g64")
    assert first["stop"] == ["END"] and first["logit_bias"] == [(5, -2.0)]
    names = ("presence_penalty", "frequency_penalty", "prefill_chunk")
    assert [first[name] for name in names] == [0.5, 0.25, 32]
    assert second["temperature"] == 0.1 and "kv" not in second


async def test_the_last_chat_is_the_newest_not_the_pinned_one(tmp_path: Path) -> None:
    store = Store(tmp_path / "chats.db")
    for title in ("pinned", "newest"):
        number = store.add_chat(title).id
        store.add_message(Message(chat=number, parent=None, role="user", text=f"in the {title}"))
        store.update_chat(number, pinned=title == "pinned")
    store.close()
    app = make_app(tmp_path, given={"last": True})
    async with app.run_test() as pilot:
        await wait_until(pilot, lambda: "in the newest" in screen_text(app))


async def test_actions_without_keys_and_of_messages_get_keys(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text(
        '[keys]\n"chat.undo" = "ctrl+b"\n"messages.screen.edit" = "x"\n'
    )
    app = make_app(tmp_path)
    async with app.run_test() as pilot:
        await pilot.press("ctrl+b")
        await wait_until(pilot, lambda: "There is nothing to undo." in toasts(app))
        await ask(pilot, "hello")
        await pilot.press("escape", "up", "x")
        await wait_until(pilot, lambda: app.chat and app.chat.composer.text == "hello")


async def test_a_corrupt_database_is_told_and_the_app_works(tmp_path: Path) -> None:
    (tmp_path / "chats.db").write_bytes(b"this is no database" * 1000)
    app = make_app(tmp_path)
    async with app.run_test() as pilot:
        await wait_until(pilot, lambda: any("was kept as chats.corrupt" in t for t in toasts(app)))
        await ask(pilot, "hi")
        assert len(app.store.messages(1)) == 2


async def test_a_database_that_fails_later_stops_nobody(tmp_path: Path) -> None:
    app = make_app(tmp_path)
    async with app.run_test() as pilot:
        await ask(pilot, "one")
        app.store._db.close()
        await ask(pilot, "two")
        assert sum("can't be saved" in toast for toast in toasts(app)) == 1
        assert [m.text for m in app.chat.conversation.path()][::2] == ["one", "two"]
        await pilot.press("escape", "d", "u", "y", "i")
        await pilot.press("ctrl+n")
        await ask(pilot, "three")
        app.store._db = sqlite3.connect(":memory:")


async def test_a_bug_ends_with_one_line_and_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app = make_app(tmp_path)

    def broken() -> None:
        raise RuntimeError("a bug\x1b[2J")

    with pytest.raises(RuntimeError):
        async with app.run_test():
            app.call_later(broken)
            await until(lambda: app.return_code)
    assert app.return_code == 1
    log = tmp_path / "home" / "crash.log"
    assert "RuntimeError: a bug" in log.read_text()
    shown = (
        "".join(segment.text for segments in app._exit_renderables for segment in segments.segments)
        or capsys.readouterr().err
    )
    assert "mlxtx stopped: RuntimeError: a bug" in shown and "Traceback" not in shown
    assert "crash.log" in shown.replace("\n", "") and "\x1b[2J" not in shown


async def test_a_long_chat_opens_at_its_end_with_only_the_last_laid_out(tmp_path: Path) -> None:
    long_chat(tmp_path / "chats.db", 300)
    app = make_app(tmp_path, given={"last": True})
    async with app.run_test(size=(100, 30)) as pilot:
        await wait_until(pilot, lambda: "Message 299" in screen_text(app))
        transcript = app.chat.transcript
        assert len(transcript.views) == 300 and transcript.hidden == 270
        assert len(app.screen.query("*")) < 20, "messages are no widgets"
        # Going up lays out more, and what is read stays where it is.
        transcript.scroll_to(y=2, animate=False)
        await pilot.pause()
        assert "Message **270**" in screen_text(app).split("\n")[1]
        transcript.scroll_to(y=1, animate=False)
        await wait_until(pilot, lambda: transcript.hidden == 240)
        assert not transcript.following
        assert "Message **270**" in screen_text(app).split("\n")[2]
        await pilot.press("escape", "g")
        assert transcript.hidden == 0 and "Message **0**" in screen_text(app)
        await pilot.press("G")
        await pilot.pause()
        assert "Message 299" in screen_text(app)


async def test_the_transcript_follows_until_the_reader_scrolls(tmp_path: Path) -> None:
    gate = asyncio.Event()
    lines = [f"line {number}\n\n" for number in range(40)]
    app = make_app(tmp_path, Script(Generate=reply(*lines, gate, "the very end")))
    async with app.run_test(size=(80, 24)) as pilot:
        await send(pilot, "go")
        await wait_until(pilot, lambda: "line 39" in screen_text(app))
        await pilot.press("pageup")
        await pilot.pause()
        before = screen_text(app)
        assert "line 39" not in before
        gate.set()
        await wait_until(pilot, lambda: app.chat.reply is None)
        reading = [row[:60].rstrip() for row in before.split("\n")[2:15]]
        assert [row[:60].rstrip() for row in screen_text(app).split("\n")[2:15]] == reading
        # At the end again it follows again.
        await pilot.press("ctrl+end")
        await wait_until(pilot, lambda: "the very end" in screen_text(app))
        assert app.chat.transcript.following


async def test_resizing_keeps_the_end_in_view(tmp_path: Path) -> None:
    app = make_app(tmp_path, Script(Generate=reply("word " * 400 + "END")))
    async with app.run_test(size=(120, 40)) as pilot:
        await ask(pilot, "go")
        for size in ((60, 20), (200, 50), (80, 24)):
            await pilot.resize_terminal(*size)
            await wait_until(pilot, lambda: "END" in screen_text(app))


async def test_a_reply_of_a_megabyte_does_not_freeze(tmp_path: Path) -> None:
    parts = [("x" * 200 + " ") * 50 for _ in range(100)]
    app = make_app(tmp_path, Script(Generate=reply(*parts)))
    async with app.run_test(size=(100, 30)) as pilot:
        await send(pilot, "go")
        await wait_until(pilot, lambda: app.chat.reply is None and app.chat.transcript.views, 60)
        assert len(app.chat.conversation.path()[-1].text) == 1_005_000


async def test_conversations_search_rename_pin_delete_undo_open(tmp_path: Path) -> None:
    app = make_app(tmp_path, Script(Generate=reply("Rivers flow to the sea.")))
    async with app.run_test(size=(110, 30)) as pilot:
        for text in ("about rivers", "about stones", "about trees"):
            await send(pilot, "/new")
            await ask(pilot, text)
        await send(pilot, "/chats")
        await wait_until(pilot, lambda: "about stones" in screen_text(app))
        assert "Rivers flow to the sea." in screen_text(app) and "just now" in screen_text(app)
        # Rename the one that is shown in the chat: its title follows.
        await pilot.press("r")
        await pilot.pause()
        await pilot.press(*" and woods", "enter")
        await wait_until(pilot, lambda: "about trees and woods" in screen_text(app))
        assert app.chat.conversation.chat.title == "about trees and woods"
        await pilot.press("end", "p")
        await wait_until(pilot, lambda: app.store.chats()[0].title == "about rivers")
        await pilot.press("end", "d")
        await wait_until(pilot, lambda: len(app.store.chats()) == 2)
        await pilot.press("u")
        await wait_until(pilot, lambda: len(app.store.chats()) == 3)
        await pilot.press("u")
        assert "There is nothing to undo." in toasts(app)
        # Search in all messages, and open what was found.
        await pilot.press("slash", *"stones")
        await wait_until(pilot, lambda: "about trees" not in screen_text(app))
        await pilot.press("down", "enter")
        await wait_until(pilot, lambda: len(app.screen_stack) == 1)
        assert app.chat.conversation.chat.title == "about stones"
        assert "Rivers flow" in screen_text(app)


async def test_deleting_the_open_chat_closes_it_and_undo_opens_it(tmp_path: Path) -> None:
    app = make_app(tmp_path)
    async with app.run_test() as pilot:
        await ask(pilot, "mine")
        await send(pilot, "/delete")
        assert app.chat.conversation.path() == [] and app.store.chats() == []
        await send(pilot, "/undo")
        await wait_until(pilot, lambda: len(app.chat.conversation.path()) == 2)
        await send(pilot, "/undo")
        assert "There is nothing to undo." in toasts(app)


async def test_exporting_and_importing_conversations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    app = make_app(tmp_path)
    async with app.run_test(size=(100, 30)) as pilot:
        await ask(pilot, "hello")
        await pilot.press("f5")
        await pilot.pause()
        await pilot.press("e")
        await pilot.pause()
        await pilot.press("enter")
        await wait_until(pilot, lambda: (tmp_path / "chat-1.json").exists())
        for name, count in (("chat-1.json", 2), ("gone.json", 2)):
            await pilot.press("i")
            await pilot.pause()
            await pilot.press(*name, "enter")
            await wait_until(pilot, lambda count=count: len(app.store.chats()) == count)
        assert any("gone.json was not read" in toast for toast in toasts(app))


async def test_opening_another_chat_stops_the_reply_and_keeps_it(tmp_path: Path) -> None:
    app = make_app(tmp_path, Script(Generate=reply("some text", asyncio.Event(), "never")))
    async with app.run_test() as pilot:
        await send(pilot, "go")
        await wait_until(pilot, lambda: "some text" in screen_text(app))
        await pilot.press("ctrl+n")
        await pilot.pause()
        assert app.chat.reply is None and app.chat.conversation.path() == []
        kept = app.store.messages(1)[-1]
        assert (kept.text, kept.state) == ("some text", "stopped")


async def test_quitting_while_it_writes_keeps_the_text(tmp_path: Path) -> None:
    app = make_app(tmp_path, Script(Generate=reply("some text", asyncio.Event())))
    async with app.run_test() as pilot:
        await send(pilot, "go")
        await wait_until(pilot, lambda: "some text" in screen_text(app))
        await pilot.press("ctrl+q")
    assert Store(tmp_path / "chats.db").messages(1)[-1].text == "some text"


async def test_stats_and_figures_of_a_reply(tmp_path: Path) -> None:
    app = make_app(tmp_path)
    async with app.run_test() as pilot:
        await send(pilot, "/stats")
        assert "There are no figures yet." in toasts(app)
        await ask(pilot, "hi")
        await send(pilot, "/stats")
        text = toasts(app)[-1]
        assert "decode tokens a second: 42.0" in text and "cache bytes: 1.5 MB" in text


async def test_the_palette_finds_chats_and_actions(tmp_path: Path) -> None:
    app = make_app(tmp_path)
    async with app.run_test(size=(100, 30)) as pilot:
        await ask(pilot, "quokka facts")
        await pilot.press("ctrl+n", "ctrl+p")
        await pilot.press(*"quokka")
        await wait_until(pilot, lambda: "Open: quokka facts" in screen_text(app))
        await pilot.press("enter")
        await wait_until(pilot, lambda: app.chat.conversation.chat.title == "quokka facts")


def test_times_in_words() -> None:
    assert [ago(s) for s in (5, 150, 7200, 90000, 3e6, 7e7)] == [
        "just now", "2 min ago", "2 hours ago", "1 day ago", "1 month ago", "2 years ago",
    ]  # fmt: skip


def test_copying_on_a_mac_goes_through_pbcopy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlxtx.tui.clipboard import copy_with_tool

    tool, out = tmp_path / "pbcopy", tmp_path / "copied"
    tool.write_text(f"#!/bin/sh\ncat > {out}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    assert copy_with_tool("über\n") == "pbcopy" and out.read_text() == "über\n"
    # Over SSH, or without a tool that works, the terminal is asked.
    monkeypatch.setenv("SSH_CONNECTION", "x")
    assert copy_with_tool("b") == ""
    monkeypatch.delenv("SSH_CONNECTION")
    tool.write_text("#!/bin/sh\nexit 1\n")
    assert copy_with_tool("c") == ""
    tool.unlink()
    assert copy_with_tool("d") == ""


async def test_a_click_does_not_arm_the_keys_of_messages_and_typing_goes_to_the_input(
    tmp_path: Path,
) -> None:
    app = make_app(tmp_path)
    async with app.run_test() as pilot:
        await ask(pilot, "hi")
        await pilot.click("Transcript", offset=(10, 2))
        await pilot.press("d")
        assert app.chat.composer.text == "d" and len(app.chat.conversation.path()) == 2
        app.chat.composer.clear_text()
        await pilot.press("escape", "w", "x")
        assert app.chat.composer.text == "wx"


async def test_recall_reaches_back_to_earlier_starts(tmp_path: Path) -> None:
    app = make_app(tmp_path)
    async with app.run_test() as pilot:
        await ask(pilot, "from the first start")
    again = make_app(tmp_path)
    async with again.run_test() as pilot:
        await wait_until(pilot, lambda: again.chat.composer.sent)
        await pilot.press("up")
        assert again.chat.composer.text == "from the first start"


async def test_hints_and_help_show_the_keys_of_the_settings(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text('[keys]\n"chat.new" = "ctrl+b"\n')
    app = make_app(tmp_path)
    async with app.run_test(size=(100, 60)) as pilot:
        await pilot.pause()
        assert "ctrl+b new" in screen_text(app) and "ctrl+n" not in screen_text(app)
        await pilot.press("f1")
        await wait_until(pilot, lambda: "ctrl+b  /new" in screen_text(app))


def test_no_file_grows_out_of_hand() -> None:
    folder = Path(app_module.__file__).parent
    assert len((folder / "app.py").read_text().splitlines()) < 300
    for file in folder.rglob("*.py"):
        assert len(file.read_text().splitlines()) <= 500, file.name


def test_the_help_of_the_command_needs_no_app() -> None:
    program = "import sys, mlxtx.scripts.chat; print('textual' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "False"


async def test_screens_may_be_left_before_they_are_built(tmp_path: Path) -> None:
    names = ("models", "train", "chats", "settings", "help", "chat")
    rng = random.Random(4)
    app = make_app(tmp_path)
    async with app.run_test(size=(100, 30)) as pilot:
        for _ in range(60):
            getattr(app, f"action_{rng.choice(names)}")()
            for _ in range(rng.choice((0, 1, 3, 8, 30, 100))):
                await asyncio.sleep(0)
        app.action_chat()
        await pilot.pause()
        assert "Write a message" in screen_text(app)
