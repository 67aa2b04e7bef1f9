"""One picture of each state of each screen; ``pytest tests/tui/test_snapshots.py
--snapshot-update`` makes them anew after a wanted change (look at them first)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from mlxtx.tui.app import MlxtxApp
from mlxtx.tui.store import Message, Store

from mlxtx.events import Delta, Prefill, Progress, Stats
from tests.tui.fakes import Script, ask, make_app, reply, screen_text, send, wait_until
from tests.tui.test_models import found, plan
from tests.tui.test_train import preview, training

# The pictures depend on what draws them.
MADE_WITH = {"textual": "8.2.8", "rich": "15.0.0"}
_OTHER = [f"{name} {version(name)}" for name, made in MADE_WITH.items() if version(name) != made]
pytestmark = pytest.mark.skipif(
    bool(_OTHER), reason=f"snapshots were made with {MADE_WITH}, here is {', '.join(_OTHER)}"
)

ANSWER = """# Rotary positions

RoPE turns each pair of a query's numbers by an angle that grows with the position, so that
**only distances** matter. See `rope_theta` in the config.

- cheap: no parameters
- relative: shifting both tokens changes nothing
  1. queries
  2. keys

| part | what it does |
|---|---|
| base | how fast the angles fall |
| scaling | stretches them for longer contexts |

```python
def rotate(x, angle):
    # turn by angle
    return x * cos(angle) + half(x) * sin(angle)
```

> That is all.
"""

Steps = Callable[[Any], Awaitable[None]]


@pytest.fixture
def picture(snap_compare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``picture(script, steps, size)``: the app after ``steps``, compared with its snapshot."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLXTX_HOME", "home")
    monkeypatch.setattr("textual.widgets.TextArea._toggle_cursor_blink_visible", lambda area: None)
    monkeypatch.setattr("textual.widgets.Input._toggle_cursor", lambda field: None)

    def compare(script: Script, steps: Steps, size: tuple[int, int] = (80, 24)) -> bool:
        app = make_app(Path(), script)

        async def run_before(pilot: Any) -> None:
            await wait_until(pilot, lambda: app.model.state == "ready")
            await steps(pilot)
            # What lies behind a question is drawn from what was there when it was first painted:
            # paint until nothing changes any more.
            before = None
            for _ in range(20):
                app.screen.refresh()
                await pilot.pause()
                now = app.export_screenshot()
                if now == before:
                    break
                before = now

        return bool(snap_compare(app, terminal_size=size, run_before=run_before))

    return compare


def app_of(pilot: Any) -> MlxtxApp:
    app: MlxtxApp = pilot.app
    return app


async def key(pilot: Any, name: str, words: str) -> None:
    await pilot.press(name)
    await wait_until(pilot, lambda: words in screen_text(pilot.app))


def test_empty_chat(picture: Any) -> None:
    async def steps(pilot: Any) -> None:
        pass

    assert picture(Script(), steps)


def test_answered_chat(picture: Any) -> None:
    async def steps(pilot: Any) -> None:
        await ask(pilot, "How does RoPE work?\nIn short, please.")
        message = app_of(pilot).chat.conversation.path()[-1]
        message.thinking_seconds = 3.2
        app_of(pilot).chat.show_path()

    script = Script(Generate=reply(ANSWER, thinking="They ask about RoPE."))
    assert picture(script, steps, (100, 40))


def test_writing_in_an_open_fence(picture: Any) -> None:
    def play(job: object) -> Any:
        yield Prefill(done=1204, total=1204, seconds=0.4)
        yield Delta(text="Look:\n\n```python\ndef f(x):\n    # not closed **yet**\n    retu")
        yield Stats(generated_tokens=31, decode_tokens_per_second=61.5, memory_bytes=4_700_000_000)
        yield asyncio.Event()

    async def steps(pilot: Any) -> None:
        await send(pilot, "code, please")
        await send(pilot, "and a test for it")
        await wait_until(pilot, lambda: "61.5 tok/s" in screen_text(pilot.app))

    assert picture(Script(Generate=play), steps)


def test_versions_stopped_and_the_cursor(picture: Any) -> None:
    async def steps(pilot: Any) -> None:
        await ask(pilot, "question")
        await pilot.press("ctrl+r")
        await wait_until(pilot, lambda: "half" in screen_text(pilot.app))
        await key(pilot, "escape", "stopped")
        await pilot.press("escape")

    answers = iter([["First answer."], ["Second, half", asyncio.Event()]])
    assert picture(Script(Generate=lambda job: reply(*next(answers))(job)), steps)


def test_commands_are_completed(picture: Any) -> None:
    async def steps(pilot: Any) -> None:
        await pilot.press("/", "s")

    assert picture(Script(), steps)


def test_the_engine_ended(picture: Any) -> None:
    async def steps(pilot: Any) -> None:
        await ask(pilot, "hi")
        app_of(pilot)._engine_ended("The engine ended by itself (signal SIGABRT).", "")
        await wait_until(pilot, lambda: "f8 restarts the engine" in screen_text(pilot.app))

    assert picture(Script(), steps)


def test_sampling_panel(picture: Any) -> None:
    async def steps(pilot: Any) -> None:
        await key(pilot, "ctrl+s", "repetition_penalty")
        await pilot.press("tab")

    assert picture(Script(), steps)


def test_conversations(picture: Any) -> None:
    async def steps(pilot: Any) -> None:
        store: Store = app_of(pilot).store
        for title in ("About rivers", "A haiku about caches", "Why masks are triangular"):
            chat = store.add_chat(title)
            store.add_message(Message(chat=chat.id, role="user", text="Tell me, " + title))
        store.update_chat(2, pinned=True)
        await key(pilot, "f5", "About rivers")

    assert picture(Script(), steps)


def test_models_here(picture: Any, tmp_path: Path) -> None:
    from tests.tui.test_models import make_model

    for name, bits, family in (("qwen3-4b", 4, "qwen3"), ("llama-3.2-1b", 0, "llama")):
        make_model(tmp_path / "m" / name, bits=bits, family=family, size=700_000)
    (tmp_path / "m" / "broken").mkdir()
    (tmp_path / "m" / "broken" / "config.json").write_text("{")
    (tmp_path / "settings.toml").write_text('model_folders = ["m"]\n')

    async def steps(pilot: Any) -> None:
        await key(pilot, "f3", "qwen3-4b")
        await pilot.press("end")
        await wait_until(pilot, lambda: "tokens fit" in screen_text(pilot.app))

    assert picture(Script(Plan=plan), steps)


def test_hub_with_a_download(picture: Any) -> None:
    def download(job: object) -> Any:
        yield Progress(stage="download", done=250e6, total=1e9, unit="bytes", seconds=10.0)
        yield asyncio.Event()

    async def steps(pilot: Any) -> None:
        await key(pilot, "f3", "No model here yet")
        await key(pilot, "t", "org/small-any")
        await key(pilot, "enter", "30 s left")
        await wait_until(pilot, lambda: "tokens fit" in screen_text(pilot.app))

    assert picture(Script(Search=found, Plan=plan, Download=download), steps, (100, 24))


def test_training_form_with_a_dry_run(picture: Any) -> None:
    async def steps(pilot: Any) -> None:
        await key(pilot, "f4", "Train an adapter")
        pilot.app.screen.query_one("#data").value = "data.jsonl"
        await key(pilot, "ctrl+r", "120 samples")

    assert picture(Script(Preview=preview), steps, (100, 30))


def test_training_run(picture: Any) -> None:
    async def steps(pilot: Any) -> None:
        await key(pilot, "f4", "Train an adapter")
        pilot.app.screen.query_one("#data").value = "data.jsonl"
        await pilot.press("ctrl+s")
        await wait_until(pilot, lambda: "a helper" in screen_text(pilot.app))

    assert picture(Script(Train=training(asyncio.Event())), steps, (100, 30))


def test_questions_and_small_windows(picture: Any, tmp_path: Path) -> None:
    from tests.tui.test_models import make_model

    make_model(tmp_path / "m" / "qwen3-4b", bits=4, size=700_000)
    (tmp_path / "settings.toml").write_text('model_folders = ["m"]\n')

    async def steps(pilot: Any, name: str, words: str) -> None:
        await key(pilot, "f3", "qwen3-4b")
        await wait_until(pilot, lambda: "tokens fit" in screen_text(pilot.app))
        await key(pilot, name, words)

    windows = (("d", "Delete qwen3-4b?"), ("a", "Adapters for"), ("c", "group size"))
    for name, words in windows:
        assert picture(Script(Plan=plan), partial(steps, name=name, words=words))


def test_settings(picture: Any) -> None:
    async def steps(pilot: Any) -> None:
        await key(pilot, "f6", "sampling.seed")

    assert picture(Script(), steps)


def test_help(picture: Any) -> None:
    async def steps(pilot: Any) -> None:
        await key(pilot, "f1", "Keys and commands")

    assert picture(Script(), steps)


def test_light_theme_wide(picture: Any) -> None:
    async def steps(pilot: Any) -> None:
        await send(pilot, "/theme mlxtx-light")
        await ask(pilot, "How does RoPE work?")

    assert picture(Script(Generate=reply(ANSWER)), steps, (160, 40))
