"""What people type, paste and import that nobody expects: nothing is lost, nothing ends the app."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from mlxtx.tui import attach
from textual import events

from mlxtx.engine import Generate, Load, Stop
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
        assert app.chat.composer.sent[-2] == "a draft"
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
