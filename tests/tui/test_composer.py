"""Writing: lines, recall, paste, completion, files, commands, copying."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlxtx.tui import attach
from mlxtx.tui.actions import ACTIONS, slash_commands
from textual import events

from mlxtx.errors import MlxtxError
from tests.tui.fakes import (
    Count,
    Generate,
    Script,
    ask,
    make_app,
    reply,
    screen_text,
    send,
    toasts,
    wait_until,
)


async def test_enter_sends_and_ctrl_j_breaks_the_line(tmp_path: Path) -> None:
    script = Script()
    app = make_app(tmp_path, script)
    async with app.run_test() as pilot:
        await pilot.press("a", "ctrl+j", "b", "shift+enter", "c")
        assert app.chat.composer.text == "a\nb\nc"
        height = app.chat.composer.size.height
        assert height == 3, "the input grows with its text"
        await pilot.press("enter")
        await wait_until(pilot, lambda: script.submitted(Generate))
        assert app.chat.composer.text == "" and app.chat.composer.size.height == 1
    assert script.submitted(Generate)[0].messages[0]["content"] == "a\nb\nc"


async def test_the_input_grows_only_to_its_limit(tmp_path: Path) -> None:
    app = make_app(tmp_path)
    async with app.run_test(size=(80, 24)) as pilot:
        app.chat.composer.fill("\n".join(map(str, range(50))))
        await pilot.pause()
        assert app.chat.composer.outer_size.height <= 12
        assert "49" in screen_text(app)


async def test_a_paste_is_one_message_and_a_long_one_an_attachment(tmp_path: Path) -> None:
    script = Script()
    app = make_app(tmp_path, script)
    async with app.run_test(size=(100, 30)) as pilot:
        await pilot.pause()
        app.chat.composer.post_message(events.Paste("one\ntwo\r\nthree\x1b[2J"))
        await pilot.pause()
        assert app.chat.composer.text == "one\ntwo\nthree␛[2J"
        app.chat.composer.clear_text()
        megabyte = "a line of forty characters, all the same\n" * 25_000
        app.chat.composer.post_message(events.Paste(megabyte))
        await pilot.pause()
        assert app.chat.composer.text == "[pasted text 1: 25,001 lines, 1.0 MB] "
        await pilot.press(*"sum up", "enter")
        await wait_until(pilot, lambda: script.submitted(Generate) and not app.chat.reply)
        content = script.submitted(Generate)[0].messages[0]["content"]
        assert megabyte in content and content.endswith("sum up")
        assert "@pasted text 1" in screen_text(app)
    assert app.chat.conversation.path()[0].text.startswith("[pasted text 1:")


async def test_up_recalls_and_down_returns_to_the_draft(tmp_path: Path) -> None:
    app = make_app(tmp_path)
    async with app.run_test() as pilot:
        await ask(pilot, "first")
        await ask(pilot, "second")
        composer = app.chat.composer
        await pilot.press("up")
        assert composer.text == "second"
        await pilot.press("up")
        assert composer.text == "first"
        await pilot.press("down", "down")
        assert composer.text == ""
        # In a text that was begun, up moves the cursor and nothing is lost.
        await pilot.press(*"draft", "up")
        assert composer.text == "draft"


async def test_slash_commands_complete_and_unknown_ones_are_told(tmp_path: Path) -> None:
    app = make_app(tmp_path)
    async with app.run_test(size=(100, 30)) as pilot:
        await pilot.press(*"/rena")
        assert "/rename title" in screen_text(app)
        await pilot.press("tab", *"My chat")
        assert app.chat.composer.text == "/rename My chat"
        await pilot.press("enter")
        assert app.chat.conversation.chat.title == "My chat"
        await send(pilot, "/nonsense")
        assert "There is no command /nonsense. /help lists them." in toasts(app)
        assert app.chat.composer.text == "/nonsense"


async def test_a_message_that_begins_with_a_path_is_no_command(tmp_path: Path) -> None:
    script = Script()
    app = make_app(tmp_path, script)
    async with app.run_test() as pilot:
        await send(pilot, "/usr/bin holds what?")
        await wait_until(pilot, lambda: script.submitted(Generate))


async def test_every_action_has_a_method_and_every_key_one_meaning(tmp_path: Path) -> None:
    from mlxtx.tui.screens.chats import ChatsScreen
    from mlxtx.tui.screens.models import ModelsScreen
    from mlxtx.tui.screens.train import TrainScreen
    from mlxtx.tui.widgets.transcript import Transcript

    app = make_app(tmp_path)
    async with app.run_test():
        homes: dict[str, Any] = {
            "app": app, "chat": app.chat, "messages": Transcript, "chats": ChatsScreen,
            "models": ModelsScreen, "train": TrainScreen,
        }  # fmt: skip
        for action in ACTIONS:
            name = action.name.split("(")[0]
            home = app.chat if name.startswith("screen.") else homes[action.area]
            method = "action_" + name.removeprefix("screen.")
            assert callable(getattr(home, method, None)), action.id
    for area in homes:
        keys = [key for a in ACTIONS if a.area == area for key in a.keys.split(",") if key]
        assert len(keys) == len(set(keys)), area
        assert not [key for key in keys if "alt" in key or "super" in key]
    ids = [action.id for action in ACTIONS]
    assert len(ids) == len(set(ids))
    slashes = [a.slash for a in ACTIONS if a.slash]
    assert len(slashes) == len(set(slashes)) == len(slash_commands())


async def test_help_and_palette_show_the_table(tmp_path: Path) -> None:
    app = make_app(tmp_path)
    async with app.run_test(size=(100, 120)) as pilot:
        await send(pilot, "/help")
        await wait_until(pilot, lambda: "Keys and commands" in screen_text(app))
        text = screen_text(app)
        for action in ACTIONS:
            assert action.title in text, action.id
        await pilot.press("escape")
        titles = {command.title for command in app.get_system_commands(app.screen)}
        assert "Answer again, beside the reply there is" in titles and "Settings" in titles


async def test_a_file_is_attached_with_its_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.md").write_text("remember the milk")
    (tmp_path / "folder").mkdir()
    script = Script()
    app = make_app(tmp_path, script)
    async with app.run_test(size=(100, 30)) as pilot:
        await wait_until(pilot, lambda: app.model.state == "ready")
        await pilot.press(*"see @no")
        await wait_until(pilot, lambda: "@notes.md" in screen_text(app))
        await pilot.press("tab")
        assert app.chat.composer.text == "see @notes.md "
        await wait_until(pilot, lambda: "notes.md: 16 tokens" in screen_text(app))
        assert script.submitted(Count)
        await pilot.press("enter")
        await wait_until(pilot, lambda: script.submitted(Generate) and not app.chat.reply)
        assert "@notes.md  16 tokens" in screen_text(app)
    content = script.submitted(Generate)[0].messages[0]["content"]
    assert content == '<file name="notes.md">\nremember the milk\n</file>\n\nsee @notes.md'


async def test_a_file_that_is_no_text_is_refused_and_the_input_kept(tmp_path: Path) -> None:
    binary = tmp_path / "a.bin"
    binary.write_bytes(b"\0\1\2" * 100)
    script = Script()
    app = make_app(tmp_path, script)
    async with app.run_test() as pilot:
        await send(pilot, f"see @{binary}")
        assert any("a.bin is no text file" in toast for toast in toasts(app))
        assert app.chat.composer.text == f"see @{binary}" and not script.submitted(Generate)


def test_reading_files(tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"caf\xe9 \xff\x1b[2J ok")
    part = attach.read(bad)
    assert part["text"] == "caf� �␛[2J ok" and part["note"].startswith("bad.txt: 2 bytes")
    large = tmp_path / "large.txt"
    large.write_bytes(b"x" * (attach.LARGEST + 1))
    with pytest.raises(MlxtxError, match=r"large.txt has 4.0 MB"):
        attach.read(large)
    with pytest.raises(MlxtxError, match="can't be read"):
        attach.read(tmp_path / "gone.txt")


def test_which_words_name_files(tmp_path: Path) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two words.txt"
    one.write_text("1")
    two.write_text("2")
    text = f'mail me@{one} or @{one}, and @"{two}" and @nobody (@{one})'
    assert attach.mentioned(text) == [one, two]
    assert attach.completions(f"{tmp_path}/o") == [str(one)]
    assert attach.completions(str(tmp_path / "none" / "x")) == []


async def test_copying_message_code_selection_and_all(tmp_path: Path) -> None:
    text = "Look:\n\n```py\nx = 1\n```\n\nand\n\n```\ny\n```\n"
    app = make_app(tmp_path, Script(Generate=reply(text)))
    async with app.run_test(size=(100, 30)) as pilot:
        await send(pilot, "/copy code")
        assert any("no code block" in toast for toast in toasts(app))
        await ask(pilot, "code please")
        await pilot.press("ctrl+g")
        assert app.clipboard == text
        await pilot.press("escape", "b")
        assert app.clipboard == "x = 1"
        await pilot.press("b")
        assert app.clipboard == "y"
        await pilot.press("k", "y")
        assert app.clipboard == "code please"
        await pilot.press("i")
        await send(pilot, "/copy all")
        assert "## You\n\ncode please" in app.clipboard and "```py" in app.clipboard


async def test_a_selection_with_the_mouse_is_copied_without_decoration(tmp_path: Path) -> None:
    words = "word " * 40 + "\n\n- item one\n- item two\n\n```py\nif x:\n    y = 1\n```\n"
    app = make_app(tmp_path, Script(Generate=reply(words)))
    async with app.run_test(size=(100, 40)) as pilot:
        await ask(pilot, "question")
        rows = screen_text(app).split("\n")
        top = next(at for at, row in enumerate(rows) if "word word" in row)
        bottom = next(at for at, row in enumerate(rows) if "y = 1" in row)
        await pilot.mouse_down(offset=(2, top))
        await pilot.hover(offset=(60, bottom))
        await pilot.mouse_up(offset=(60, bottom))
        await pilot.press("ctrl+g")
        assert app.clipboard == (
            ("word " * 40).strip() + "\n\n• item one\n• item two\n\n\nif x:\n    y = 1"
        )


async def test_export_writes_a_new_file_and_never_over_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    app = make_app(tmp_path)
    async with app.run_test() as pilot:
        await ask(pilot, "What is a/b?")
        await send(pilot, "/export")
        assert "Hello **there**." in (tmp_path / "what-is-a-b.md").read_text()
        await send(pilot, "/export json chat.json")
        await send(pilot, "/export json chat.json")
        assert any("exists already" in toast for toast in toasts(app))
        await send(pilot, "/export md /no/such/folder/x.md")
        assert any("cannot write" in toast for toast in toasts(app))
        await send(pilot, "/import chat.json")
        await wait_until(pilot, lambda: app.chat.conversation.chat.id == 2)
        await send(pilot, "/import gone.json")
        assert any("gone.json was not read" in toast for toast in toasts(app))


def test_the_documentation_has_every_action_and_setting() -> None:
    from mlxtx.settings import Sampling, Settings, known_settings

    text = (Path(__file__).parents[2] / "docs" / "app.md").read_text("utf-8")
    for action in ACTIONS:
        assert f"| {action.title} |" in text, action.id
        assert not action.slash or f"`/{action.slash}" in text
    for table, cls in (("", Settings), ("sampling.", Sampling)):
        for name, (_, about) in known_settings(cls).items():
            assert f"| `{table}{name}` |" in text and about.help in text


async def test_enter_takes_no_completion_of_an_earlier_text(tmp_path: Path) -> None:
    app = make_app(tmp_path)
    async with app.run_test() as pilot:
        await pilot.press(*"/set")
        await wait_until(pilot, lambda: "/settings" in screen_text(app))
        # All in one go, as a busy program reads them: no change is told in between.
        for key, character in [("space", " "), *((c, c) for c in "top"), ("enter", "\r")]:
            app.chat.composer.post_message(events.Key(key, character))
        await pilot.pause()
        assert "/settings" not in app.chat.composer.text
