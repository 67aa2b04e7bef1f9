"""What people type, paste and import that nobody expects: nothing is lost, nothing ends the app."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from mlxtx.tui import attach
from mlxtx.tui.screens.dialogs import Ask
from textual import events

from mlxtx.engine import Count, Generate, Load, Stop
from mlxtx.events import Failed
from tests.tui.fakes import Script, ask, loaded, make_app, reply, toasts, wait_until

LONG = "word " * 3000


@pytest.mark.parametrize("word", ["~nobody", "~nobody/x", "a" * 300])
def test_paths_that_no_system_knows_are_only_text(word: str) -> None:
    assert attach.completions(word) == []
    assert attach.mentioned(f'@{word} and @"{word}"') == []


async def test_a_name_behind_a_tilde_may_be_typed(tmp_path: Path) -> None:
    script = Script()
    app = make_app(tmp_path, script)
    async with app.run_test(size=(40, 10)) as pilot:
        await pilot.press("@", "~", "n", "o")
        for command in ("adapter", "export", "import"):
            app.chat.composer.fill(f"/{command} ~nobody/{command}")
            await pilot.press("enter")
            await wait_until(pilot, lambda: not app.chat.composer.text)
        await ask(pilot, "@media" + "x" * 300)
    assert script.submitted(Generate)[0].messages[0]["content"].startswith("@media")


async def test_a_file_whose_name_has_a_space_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my notes.txt").write_text("what it says")
    monkeypatch.chdir(tmp_path)
    script = Script()
    app = make_app(tmp_path, script)
    async with app.run_test() as pilot:
        await pilot.press("@", "m", "y")
        await wait_until(pilot, lambda: app.chat.composer.completions.rows)
        await pilot.press("tab")
        assert app.chat.composer.text == '@"my notes.txt" '
        await pilot.press("enter")
        await wait_until(pilot, lambda: script.submitted(Generate))
    assert "what it says" in script.submitted(Generate)[0].messages[0]["content"]


USER = {"role": "user", "text": "a"}


@pytest.mark.parametrize(
    "chat",
    [
        {"messages": [{**USER, "id": [1]}, {**USER, "parent": [1], "id": {}}], "head": {}},
        {"messages": [USER], "settings": {"sampling": "x", "system": 3}},
        {"messages": [USER], "settings": {"sampling": {"seed": "x", "temperature": []}}},
        {
            "messages": [
                {**USER, "attachments": [{"name": "a", "text": "b", "bytes": "c", "tokens": "d"}]},
                {"role": "assistant", "text": "b", "stats": {"x_bytes": "x", "speed": [1]}},
            ]
        },
    ],
)
async def test_whatever_a_chat_file_holds_can_be_gone_on_with(tmp_path: Path, chat: dict) -> None:
    (tmp_path / "chat.json").write_text(json.dumps(chat))
    app = make_app(tmp_path, Script())
    async with app.run_test(size=(100, 30)) as pilot:
        await pilot.pause()
        app.chat.action_import(str(tmp_path / "chat.json"))
        await wait_until(pilot, lambda: len(app.chat.conversation.path()) == len(chat["messages"]))
        app.chat.action_stats()
        app.chat.action_sampling()
        await pilot.pause()
        await pilot.press("escape")
        await ask(pilot, "more")
        assert app.chat.conversation.path()[-1].text == "Hello **there**."


async def test_a_file_nested_without_end_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "chat.json").write_text("[" * 100_000)
    app = make_app(tmp_path, Script())
    async with app.run_test() as pilot:
        await pilot.pause()
        app.chat.action_import(str(tmp_path / "chat.json"))
        await pilot.pause()
        assert any("nested too deeply" in text for text in toasts(app))


async def test_a_long_paste_is_edited_with_its_message(tmp_path: Path) -> None:
    script = Script()
    app = make_app(tmp_path, script)
    async with app.run_test() as pilot:
        app.chat.composer.post_message(events.Paste(LONG))
        await wait_until(pilot, lambda: app.chat.composer.text)
        await pilot.press("enter")
        await wait_until(pilot, lambda: script.submitted(Generate) and app.chat.reply is None)
        app.chat.composer.fill("a draft")
        app.chat.action_edit()
        await pilot.press("end", "!", "enter")
        await wait_until(pilot, lambda: len(script.submitted(Generate)) == 2)
        assert app.chat.composer.sent[-2] == ("a draft", [])
    content = script.submitted(Generate)[1].messages[0]["content"]
    assert LONG in content and content.endswith("!")


async def test_what_waited_comes_back_whole_before_the_draft(tmp_path: Path) -> None:
    script = Script(Generate=reply("a ", asyncio.Event(), "b"))
    app = make_app(tmp_path, script)
    async with app.run_test() as pilot:
        composer = app.chat.composer
        composer.fill("one")
        await pilot.press("enter")
        await wait_until(pilot, lambda: app.chat.reply is not None)
        for number in (1, 2):
            composer.post_message(events.Paste(f"{number} {LONG}"))
            await wait_until(pilot, lambda: composer.text)
            await pilot.press("enter")
            await wait_until(pilot, lambda n=number: len(app.chat.queue) == n)
        composer.fill("draft")
        await pilot.press("escape")
        await wait_until(pilot, lambda: app.chat.reply is None)
        assert composer.text.endswith("\n\ndraft")
        await pilot.press("enter")
        await wait_until(pilot, lambda: len(script.submitted(Generate)) == 2)
    content = script.submitted(Generate)[1].messages[-1]["content"]
    assert f"1 {LONG}" in content and f"2 {LONG}" in content and content.endswith("draft")


async def test_a_reply_that_was_stopped_while_it_thought_is_begun_anew(tmp_path: Path) -> None:
    script = Script(Generate=reply(asyncio.Event(), thinking="hmm"))
    app = make_app(tmp_path, script)
    async with app.run_test() as pilot:
        app.chat.composer.fill("one")
        await pilot.press("enter")
        await wait_until(pilot, lambda: app.chat.reply and app.chat.reply.message.thinking)
        await pilot.press("escape")
        await wait_until(pilot, lambda: app.chat.reply is None)
        script.answers["Generate"] = reply("there", thinking="ah")
        app.chat.action_continue()
        await wait_until(pilot, lambda: app.chat.reply is None)
        answer = app.chat.conversation.path()[-1]
        assert (answer.thinking, answer.text, answer.state) == ("ah", "there", "done")
    job = script.submitted(Generate)[1]
    assert not job.goes_on and job.messages == [{"role": "user", "content": "one"}]


async def test_a_model_is_unloaded_while_it_loads(tmp_path: Path) -> None:
    gate = asyncio.Event()

    def slow(job):
        yield gate
        yield from loaded(job)

    script = Script(Load=slow)
    app = make_app(tmp_path, script)
    async with app.run_test() as pilot:
        await wait_until(pilot, lambda: script.submitted(Load))
        app.action_unload()
        gate.set()
        await wait_until(pilot, lambda: script.submitted(Stop))
        await pilot.pause()
        assert app.model.state == "none"
        await ask(pilot, "hi")
        assert app.model.state == "ready" and len(script.submitted(Load)) == 2


async def test_a_model_that_was_left_does_not_speak_for_the_next(tmp_path: Path) -> None:
    gates = {"first": asyncio.Event(), "second": asyncio.Event()}

    def slow(job):
        if job.model in gates:
            yield gates[job.model]
        if job.model == "first":
            yield Failed(message="the first one is broken")
        else:
            yield from loaded(job)

    app = make_app(tmp_path, Script(Load=slow))
    async with app.run_test() as pilot:
        await wait_until(pilot, lambda: app.model.state == "ready")
        app.load_model("first")
        app.load_model("second")
        gates["first"].set()
        ended = asyncio.Event()
        app.bridge.submit(Load(model="third"), lambda event: ended.set())
        await pilot.pause()
        assert (app.model.name, app.model.state) == ("second", "loading")
        gates["second"].set()
        await wait_until(pilot, lambda: app.model.state == "ready" and ended.is_set())
        assert not any("broken" in text for text in toasts(app))


async def test_a_chat_that_was_deleted_in_the_list_comes_back_later(tmp_path: Path) -> None:
    app = make_app(tmp_path, Script())
    async with app.run_test() as pilot:
        await ask(pilot, "keep me")
        for back in ("list", "chat"):
            app.action_chats()
            await pilot.pause()
            await pilot.press("d", "escape")
            await pilot.pause()
            assert app.store.chats() == []
            if back == "list":
                app.action_chats()
                await pilot.pause()
                await pilot.press("u", "escape")
                await pilot.pause()
            else:
                app.chat.action_undo()
            assert len(app.store.chats()) == 1
        assert app.chat.conversation.path()[0].text == "keep me"


async def test_an_input_without_a_column_is_drawn(tmp_path: Path) -> None:
    """As in a window of a few columns."""
    app = make_app(tmp_path, Script())
    async with app.run_test(size=(60, 20)) as pilot:
        app.chat.composer.styles.padding = (0, 40)
        await pilot.pause()
        assert app.chat.composer.content_size.width == 0
        app.chat.composer.styles.padding = 0
        await ask(pilot, "hi")
        assert app.chat.conversation.path()[-1].text == "Hello **there**."


async def paste(pilot: Any, text: str) -> None:
    before = pilot.app.chat.composer.text
    pilot.app.chat.composer.post_message(events.Paste(text))
    await wait_until(pilot, lambda: pilot.app.chat.composer.text != before)


async def test_a_command_takes_what_was_pasted_not_its_mark(tmp_path: Path) -> None:
    script = Script()
    app = make_app(tmp_path, script)
    async with app.run_test() as pilot:
        app.chat.composer.fill("/system ")
        await paste(pilot, LONG)
        await pilot.press("enter")
        await ask(pilot, "hi")
        assert script.submitted(Generate)[0].messages[0]["content"] == LONG.strip()
        app.chat.composer.fill("/sistem ")
        await paste(pilot, LONG)
        await pilot.press("enter")
        await wait_until(pilot, lambda: app.chat.composer.text.startswith("/sistem [pasted text"))
        app.chat.composer.move_cursor((0, 0))
        app.chat.composer.insert("no ")  # and so it is no command
        await pilot.press("enter")
        await wait_until(pilot, lambda: len(script.submitted(Generate)) == 2)
    assert LONG in script.submitted(Generate)[1].messages[-1]["content"]


async def recall_and_send(pilot: Any, script: Script, count: int) -> None:
    await wait_until(pilot, lambda: pilot.app.chat.composer.sent)
    await pilot.press("up", "enter")
    await wait_until(pilot, lambda: len(script.submitted(Generate)) == count)
    content = script.submitted(Generate)[-1].messages[-1]["content"]
    assert LONG in content and content.endswith("]")


async def test_what_was_pasted_is_recalled_with_its_message_also_after_a_start(
    tmp_path: Path,
) -> None:
    script = Script()
    app = make_app(tmp_path, script)
    async with app.run_test() as pilot:
        app.chat.composer.fill("look: ")
        await paste(pilot, LONG)
        await pilot.press("enter")
        await wait_until(pilot, lambda: script.submitted(Generate) and not app.chat.reply)
        app.chat.action_new()
        await recall_and_send(pilot, script, 2)
    async with make_app(tmp_path, script).run_test() as pilot:
        await recall_and_send(pilot, script, 3)


async def test_what_the_palette_writes_leaves_the_draft(tmp_path: Path) -> None:
    app = make_app(tmp_path, Script())
    async with app.run_test() as pilot:
        app.chat.composer.fill("a draft ")
        app.chat.action_attach("notes.md")
        assert app.chat.composer.text == "a draft @notes.md "
        app.chat.action_rename()
        assert app.chat.composer.text == "/rename "
        app.chat.composer.clear_text()
        await pilot.press("up")
        assert app.chat.composer.text == "a draft @notes.md "


async def test_a_file_that_changed_is_counted_again(tmp_path: Path) -> None:
    script = Script()
    app = make_app(tmp_path, script)
    file = tmp_path / "notes.md"
    async with app.run_test(size=(140, 30)) as pilot:
        await wait_until(pilot, lambda: app.model.state == "ready")
        for text in ("short", "a good deal longer"):
            file.write_text(text)
            app.chat.composer.fill(f"@{file} {text}")
            app.chat._count_files()
            await wait_until(pilot, lambda: "about" not in app.chat.composer.border_subtitle)
        counts = [len(job.text) // 3 for job in script.submitted(Count)]
        assert counts[0] < counts[-1]
        assert app.chat.composer.border_subtitle == f"notes.md: {counts[-1]} tokens"


async def test_two_enters_at_once_close_one_screen(tmp_path: Path) -> None:
    answers: list[str | None] = []
    app = make_app(tmp_path, Script())
    async with app.run_test(size=(100, 30)) as pilot:
        await pilot.press("f3")
        await wait_until(pilot, lambda: len(app.screen_stack) == 2)
        app.push_screen(Ask("Its name"), answers.append)
        await wait_until(pilot, lambda: len(app.screen_stack) == 3)
        await pilot.pause()
        for _ in range(2):
            app.post_message(events.Key("enter", "\r"))
        await wait_until(pilot, lambda: answers)
        assert answers == [""] and len(app.screen_stack) == 2


async def test_settings_over_the_panel_keep_what_was_typed_in_it(tmp_path: Path) -> None:
    app = make_app(tmp_path, Script())
    async with app.run_test(size=(100, 30)) as pilot:
        await pilot.press("ctrl+s")
        await wait_until(pilot, lambda: len(app.screen_stack) == 2)
        await pilot.press(*"Be brief", "f6")
        await wait_until(pilot, lambda: app.chat.system == "Be brief")
