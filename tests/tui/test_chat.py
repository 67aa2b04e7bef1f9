"""Sending, stopping, queueing, failing: the life of a reply."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from mlxtx.engine import Generate, Load, Stop
from mlxtx.events import Delta, Failed, Prefill, Stats
from tests.tui.fakes import (
    Script,
    ask,
    fails,
    loaded,
    make_app,
    reply,
    screen_text,
    send,
    toasts,
    wait_until,
)


async def test_a_message_is_answered_and_kept(tmp_path: Path) -> None:
    script = Script()
    app = make_app(tmp_path, script)
    async with app.run_test(size=(100, 30)) as pilot:
        await ask(pilot, "hi there")
        text = screen_text(app)
        assert "hi there" in text and "Hello there." in text
        assert "42.0 tok/s" in text and "context 22 / 4,096 (1%)" in text
        assert "cache 1.5 MB" in text and "memory 4.7 MB / 12.0 GB" in text
        assert "first 0.3 s" in text
    (job,) = script.submitted(Generate)
    assert job.messages == [{"role": "user", "content": "hi there"}]
    assert job.defaults["temperature"] == 0.7 and job.options == {}
    # What was said is there for the next start.
    again = make_app(tmp_path, Script(), given={"last": True})
    async with again.run_test(size=(100, 30)) as pilot:
        await wait_until(pilot, lambda: "Hello there." in screen_text(again))
        states = [m.state for m in again.chat.conversation.path()]
        assert states == ["done", "done"]


async def test_the_second_turn_sends_the_whole_chat(tmp_path: Path) -> None:
    script = Script()
    app = make_app(tmp_path, script)
    async with app.run_test() as pilot:
        await ask(pilot, "one")
        await ask(pilot, "two")
    contents = [m["content"] for m in script.submitted(Generate)[1].messages]
    assert contents == ["one", "Hello **there**.", "two"]


async def test_stop_keeps_the_text_and_late_events_are_dropped(tmp_path: Path) -> None:
    script = Script(Generate=reply("first ", 0.05, "second ", asyncio.Event(), "never"))
    app = make_app(tmp_path, script)
    async with app.run_test() as pilot:
        await send(pilot, "go")
        await wait_until(pilot, lambda: "second" in screen_text(app))
        running = app.chat.reply.job
        await pilot.press("escape")
        assert script.submitted(Stop)[0].job == running
        await wait_until(pilot, lambda: app.chat.reply is None)
        message = app.chat.conversation.path()[-1]
        assert (message.text, message.state) == ("first second ", "stopped")
        script.engines[0].deliver(Delta(job=running, text="stale"))
        await pilot.pause(0.2)
        assert "stale" not in screen_text(app) and "stopped" in screen_text(app)
        assert app.store.messages(1)[-1].text == "first second "


async def test_messages_typed_during_a_reply_wait_their_turn(tmp_path: Path) -> None:
    gate = asyncio.Event()
    script = Script(Generate=reply("slow", gate, " end"))
    app = make_app(tmp_path, script)
    async with app.run_test(size=(100, 30)) as pilot:
        await send(pilot, "one")
        await send(pilot, "two")
        await send(pilot, "three")
        await wait_until(pilot, lambda: "2 waiting: two" in screen_text(app))
        gate.set()
        await wait_until(pilot, lambda: len(script.submitted(Generate)) == 3 and not app.chat.reply)
        roles = [(m.role, m.text) for m in app.chat.conversation.path()]
        assert [text for role, text in roles if role == "user"] == ["one", "two", "three"]
        assert [role for role, _ in roles] == ["user", "assistant"] * 3


async def test_stopping_gives_the_waiting_messages_back(tmp_path: Path) -> None:
    script = Script(Generate=reply("a", asyncio.Event(), "b"))
    app = make_app(tmp_path, script)
    async with app.run_test() as pilot:
        await send(pilot, "one")
        await send(pilot, "two")
        await wait_until(pilot, lambda: app.chat.reply and app.chat.reply.message.text)
        await pilot.press("escape")
        await wait_until(pilot, lambda: app.chat.reply is None)
        assert app.chat.composer.text == "two" and not app.chat.queue


async def test_a_failed_reply_says_why_and_can_be_repeated(tmp_path: Path) -> None:
    script = Script(Generate=fails("the prompt has 9,000 tokens, the context 4,096"))
    app = make_app(tmp_path, script)
    async with app.run_test(size=(100, 30)) as pilot:
        await send(pilot, "long")
        await wait_until(pilot, lambda: "failed: the prompt has 9,000" in screen_text(app))
        script.answers["Generate"] = reply("better")
        await pilot.press("ctrl+r")
        await wait_until(pilot, lambda: "better" in screen_text(app))
        assert "2/2" in screen_text(app)


async def test_an_engine_that_dies_is_told_the_chat_kept_and_f8_starts_it(tmp_path: Path) -> None:
    script = Script(Generate=reply("half a ", asyncio.Event()))
    app = make_app(tmp_path, script)
    async with app.run_test(size=(120, 30)) as pilot:
        await send(pilot, "go")
        await wait_until(pilot, lambda: "half a" in screen_text(app))
        engine, job = script.engines[0], app.chat.reply.job
        engine.die()
        engine.deliver(Failed(job=job, message="The engine ended by itself (signal SIGABRT)."))
        await wait_until(pilot, lambda: app.chat.reply is None)
        assert "f8 restarts the engine · The engine ended by itself (sig" in screen_text(app)
        assert any("Your chat is saved" in toast for toast in toasts(app))
        kept = app.store.messages(1)[-1]
        assert kept.text == "half a " and kept.state == "failed"
        script.answers["Generate"] = reply("back again")
        await pilot.press("f8")
        await wait_until(pilot, lambda: app.model.state == "ready")
        await ask(pilot, "still there?")
        assert "back again" in screen_text(app)


async def test_a_model_that_vanished_is_told_in_one_line(tmp_path: Path) -> None:
    app = make_app(
        tmp_path, Script(Load=fails("there is no folder /gone")), given={"model": "/gone"}
    )
    async with app.run_test(size=(100, 30)) as pilot:
        await wait_until(pilot, lambda: app.model.state == "failed")
        assert "f3 chooses a model · " in screen_text(app)
        assert "/gone: there is no folder /gone" in toasts(app)


async def test_sending_after_a_failed_load_loads_again(tmp_path: Path) -> None:
    script = Script(Load=fails("not now"))
    app = make_app(tmp_path, script)
    async with app.run_test() as pilot:
        await wait_until(pilot, lambda: app.model.state == "failed")
        script.answers["Load"] = loaded
        await ask(pilot, "hi")
        assert app.model.state == "ready" and len(script.submitted(Load)) == 2


async def test_reading_a_long_prompt_shows_progress_and_time_left(tmp_path: Path) -> None:
    def play(job: object) -> object:
        yield Prefill(done=1000, total=4000, seconds=2.0)
        yield asyncio.Event()

    app = make_app(tmp_path, Script(Generate=play))
    async with app.run_test(size=(120, 30)) as pilot:
        await send(pilot, "read this")
        await wait_until(
            pilot, lambda: "reading 1,000 of 4,000 tokens, 6.0 s left" in screen_text(app)
        )


async def test_thinking_is_folded_timed_and_can_be_unfolded(tmp_path: Path) -> None:
    script = Script(Generate=reply("The answer.", thinking="let me see, line by line"))
    app = make_app(tmp_path, script)
    async with app.run_test(size=(100, 30)) as pilot:
        await ask(pilot, "why")
        text = screen_text(app)
        assert "▸ Thought" in text and "let me see" not in text and "The answer." in text
        await pilot.press("ctrl+t")
        assert "let me see, line by line" in screen_text(app)
        await pilot.press("ctrl+t")
        assert "let me see" not in screen_text(app)
    # The next prompt does not carry the thinking.
    assert app.chat.conversation.prompt()[-1]["content"] == "The answer."


async def test_escape_sequences_from_a_model_are_shown_not_obeyed(tmp_path: Path) -> None:
    script = Script(Generate=reply("a\x1b[2Jb\x1b", "]0;title\x07c\x9b31m\r\nd\u202e"))
    app = make_app(tmp_path, script)
    async with app.run_test(size=(100, 30)) as pilot:
        await ask(pilot, "x")
        text = screen_text(app)
        assert "a␛[2Jb␛]0;title␇c" in text
        assert not set("\x1b\x07\x9b\r\u202e") & set(text)


async def test_regenerate_edit_and_versions(tmp_path: Path) -> None:
    script = Script(Generate=reply("one"))
    app = make_app(tmp_path, script)
    async with app.run_test(size=(100, 30)) as pilot:
        await ask(pilot, "question")
        script.answers["Generate"] = reply("two")
        await pilot.press("ctrl+r")
        await wait_until(pilot, lambda: not app.chat.reply and "two" in screen_text(app))
        assert "2/2" in screen_text(app)
        # Back to the first version with the keys of the message.
        await pilot.press("escape", "left")
        assert "one" in screen_text(app) and "1/2" in screen_text(app)
        # Editing the question makes a sibling of it, and the old branch stays.
        script.answers["Generate"] = reply("three")
        await pilot.press("k", "e")
        assert app.chat.composer.text == "question"
        app.chat.composer.fill("better question")
        await pilot.press("enter")
        await wait_until(pilot, lambda: not app.chat.reply and "three" in screen_text(app))
        assert [m.text for m in app.chat.conversation.path()] == ["better question", "three"]
        await pilot.press("escape", "k", "left")
        assert [m.text for m in app.chat.conversation.path()] == ["question", "two"]


async def test_continue_lets_the_same_message_grow(tmp_path: Path) -> None:
    script = Script(Generate=reply("begin ", reason="length"))
    app = make_app(tmp_path, script)
    async with app.run_test() as pilot:
        await ask(pilot, "go")
        script.answers["Generate"] = reply("and end.")
        await send(pilot, "/continue")
        await wait_until(pilot, lambda: not app.chat.reply)
        path = app.chat.conversation.path()
        assert len(path) == 2 and path[-1].text == "begin and end."
        assert "begin and end." in screen_text(app)
    job = script.submitted(Generate)[1]
    assert job.goes_on and job.messages[-1] == {"role": "assistant", "content": "begin "}


async def test_delete_a_message_and_undo(tmp_path: Path) -> None:
    app = make_app(tmp_path)
    async with app.run_test() as pilot:
        await ask(pilot, "one")
        await ask(pilot, "two")
        await pilot.press("escape", "k", "d")
        assert [m.text for m in app.chat.conversation.path()] == ["one", "Hello **there**."]
        # The footer has the keys of where one is, and undo leaves one there.
        assert "y copy" in screen_text(app) and "enter send" not in screen_text(app)
        await pilot.press("u")
        assert len(app.chat.conversation.path()) == 4
        assert "y copy" in screen_text(app) and app.chat.transcript.has_focus
        await pilot.press("i")
        assert "enter send" in screen_text(app) and app.chat.composer.has_focus


async def test_branch_makes_a_chat_of_its_own(tmp_path: Path) -> None:
    app = make_app(tmp_path)
    async with app.run_test() as pilot:
        await ask(pilot, "one")
        await ask(pilot, "two")
        await pilot.press("escape", "g", "j", "f")
        assert app.chat.conversation.chat.id == 2
        assert [m.text for m in app.chat.conversation.path()] == ["one", "Hello **there**."]
        assert len(app.store.messages(1)) == 4


@pytest.mark.parametrize("size", [(80, 24), (200, 50), (40, 12), (20, 8)])
async def test_every_size_of_terminal(tmp_path: Path, size: tuple[int, int]) -> None:
    words = " ".join(["word"] * 60)
    app = make_app(tmp_path, Script(Generate=reply(f"# Title\n\n{words}\n\n```py\nx = 1\n```\n")))
    async with app.run_test(size=size) as pilot:
        await ask(pilot, "go")
        rows = screen_text(app).split("\n")
        assert len(rows) == size[1] and all(len(row) <= size[0] for row in rows)
        # The end of the reply is in view, with its figures.
        assert any("tok/s" in row for row in rows)
        assert size[1] < 12 or any("x = 1" in row for row in rows)
        widest = max(row.count("word") for row in rows)
        assert widest <= 20, "a line of prose is at most 100 cells wide"


async def test_speed_shows_while_a_reply_is_written(tmp_path: Path) -> None:
    def play(job: object) -> object:
        yield Prefill(done=10, total=10, seconds=0.1)
        yield Delta(text="words ")
        yield Stats(generated_tokens=30, decode_tokens_per_second=61.5, memory_bytes=2_000_000_000)
        yield asyncio.Event()

    app = make_app(tmp_path, Script(Generate=play))
    async with app.run_test(size=(120, 30)) as pilot:
        await wait_until(pilot, lambda: app.model.state == "ready")
        await send(pilot, "go")
        await wait_until(pilot, lambda: "61.5 tok/s" in screen_text(app))
        assert "memory 2.0 GB / 12.0 GB" in screen_text(app)
        assert "context 40 / 4,096" in screen_text(app)


def test_meters_of_every_width() -> None:
    from mlxtx.tui.widgets.bars import Figures, arrange

    figures = Figures(
        speed=42.0, first_token=0.3, context_used=12_000, context_size=40_960, cache_bytes=10**9,
        cache_setting="k8v4g64", memory=4 * 10**9, memory_limit=12 * 10**9,
    )  # fmt: skip
    assert {width: arrange(figures, width) for width in (20, 60, 80, 120)} == {
        20: ("42.0 tok/s", ""),
        60: ("42.0 tok/s · first 0.3 s", "context 29% · memory 4.0 GB"),
        80: ("42.0 tok/s · first 0.3 s", "context 29% · memory 4.0 GB · cache 1.0 GB k8v4g64"),
        120: (
            "42.0 tok/s · first 0.3 s",
            "context 12,000 / 40,960 (29%) · memory 4.0 GB / 12.0 GB · cache 1.0 GB k8v4g64",
        ),
    }


async def test_folding_with_keys_and_clicks(tmp_path: Path) -> None:
    script = Script(Generate=reply("The answer.", thinking="<think>\nlet me see\n</think>"))
    app = make_app(tmp_path, script)
    async with app.run_test(size=(100, 30)) as pilot:
        await ask(pilot, "\n".join(f"row {number}" for number in range(100)))
        assert "88 more lines" in screen_text(app) and "row 99" not in screen_text(app)
        rows = screen_text(app).split("\n")
        at = next(number for number, row in enumerate(rows) if "▸ Thought" in row)
        await pilot.click(offset=(5, at))
        await wait_until(pilot, lambda: "let me see" in screen_text(app))
        assert "<think>" not in screen_text(app)
        await pilot.press("escape", "k", "enter")
        await wait_until(pilot, lambda: "row 11" in screen_text(app))
        app.chat.transcript.scroll_end(animate=False)
        await pilot.pause()
        assert "row 99" in screen_text(app)


async def test_versions_are_switched_with_the_mouse(tmp_path: Path) -> None:
    answers = iter(["one", "two"])
    app = make_app(tmp_path, Script(Generate=lambda job: reply(next(answers))(job)))
    async with app.run_test(size=(100, 30)) as pilot:
        await ask(pilot, "question")
        await pilot.press("ctrl+r")
        await wait_until(pilot, lambda: "2/2" in screen_text(app) and not app.chat.reply)
        rows = screen_text(app).split("\n")
        at = next(number for number, row in enumerate(rows) if "2/2" in row)
        await pilot.click(offset=(rows[at].index("◂"), at))
        await wait_until(pilot, lambda: "1/2" in screen_text(app) and "one" in screen_text(app))


async def test_commands_of_the_chat(tmp_path: Path) -> None:
    script = Script()
    app = make_app(tmp_path, script)
    async with app.run_test(size=(100, 30)) as pilot:
        await send(pilot, "/system Be brief.")
        await send(pilot, "/kv k8v4g64")
        await ask(pilot, "hi")
        job = script.submitted(Generate)[0]
        assert job.messages[0]["content"] == "Be brief." and job.options["kv"] == "k8v4g64"
        assert "cache 1.5 MB" in screen_text(app)
        await send(pilot, "/model org/other")
        assert script.submitted(Load)[-1].model == "org/other" and app.model.kv == "k8v4g64"
        await wait_until(pilot, lambda: "other" in screen_text(app).split("\n")[0])
        await send(pilot, "/attach a file.md")
        assert app.chat.composer.text == '@"a file.md" '
        app.chat.composer.clear_text()
        await send(pilot, "/rename")
        assert app.chat.composer.text == "/rename hi"
        app.chat.composer.clear_text()
        await send(pilot, "/edit")
        assert app.chat.composer.text == "hi" and app.chat.editing is not None
        await pilot.press("escape")
        assert app.chat.composer.text == "" and app.chat.editing is None
        await pilot.press("escape")
        assert app.chat.transcript.has_focus
        await pilot.press("tab")
        assert app.chat.composer.has_focus
        await send(pilot, "/import")
        assert "Name a file: /import chat.json" in toasts(app)


async def test_what_needs_quiet_waits_for_the_reply(tmp_path: Path) -> None:
    app = make_app(tmp_path, Script(Generate=reply("text", asyncio.Event())))
    async with app.run_test() as pilot:
        await send(pilot, "go")
        await wait_until(pilot, lambda: "text" in screen_text(app))
        await pilot.press("ctrl+r")
        assert any("Wait for the reply" in toast for toast in toasts(app))
        await send(pilot, "next")
        await send(pilot, "/unqueue")
        assert app.chat.queue == [] and "waiting" not in screen_text(app)
        await pilot.press("escape")
        await wait_until(pilot, lambda: app.chat.reply is None)
