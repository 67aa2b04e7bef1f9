from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("textual", reason="pip install textual to test the terminal app")


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes what a person has: settings, chats, Hub cache."""
    monkeypatch.setenv("MLXTX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.delenv("NO_COLOR", raising=False)
    # Whether the bundled model is there must not decide a test.
    monkeypatch.setattr("mlxtx.tui.library.BUNDLED", tmp_path / "no-bundled")


async def _settled(min_sleep: float = 0, max_sleep: float = 30.0) -> None:
    """Wait until every widget waits for a message, there is none, and the screen is painted."""
    from textual._context import active_app

    loop, app = asyncio.get_running_loop(), active_app.get()
    end = loop.time() + max_sleep
    quiet = 0
    # Answers to the last message may still be on their way: one quiet look is not enough.
    while quiet < 10 and loop.time() < end and not app._exit:
        await asyncio.sleep(0)
        queues = [pump._message_queue for pump in (app, *app._registry)]
        waiting = all(q.empty() and q.ready_event._waiters for q in queues)
        screen = app.screen
        painted = not (
            screen._callbacks
            or screen._dirty_widgets
            or screen._layout_required
            or screen._repaint_required
            or screen._scroll_required
        )
        quiet = quiet + 1 if waiting and painted else 0


@pytest.fixture(autouse=True)
def keys_have_been_handled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Textual's pilot takes a process that uses no processor for one that is done; on a busy
    machine it may only be waiting for its turn."""
    monkeypatch.setattr("textual.pilot.wait_for_idle", _settled)
    monkeypatch.setattr("textual.app.wait_for_idle", _settled)
