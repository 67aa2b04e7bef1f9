"""From a search on the Hub to a reply, in the app with its real engines, and no network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxtx.engine_process import EngineProcess
from mlxtx.tiny_model import write_tiny_model
from tests.checkpoint.hub_server import Hub
from tests.tui.fakes import ask, make_app, screen_text, toasts, wait_until


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with one model large enough for more than one of the 10 MB that huggingface_hub reads at once."""
    folder = write_tiny_model(
        tmp_path / "source", hidden_size=384, intermediate_size=1280, num_hidden_layers=3
    )
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    with Hub({"org/tiny": {"main": files}}, held={"model.safetensors"}).serving() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield hub


def app_on_the_hub(tmp_path: Path) -> Any:
    return make_app(tmp_path, make_engine=EngineProcess)


async def test_a_model_is_found_downloaded_paused_resumed_and_answers(
    tmp_path: Path, hub: Hub
) -> None:
    app = app_on_the_hub(tmp_path)
    async with app.run_test(size=(120, 30)) as pilot:
        await pilot.press("f3")
        await wait_until(pilot, lambda: "Models on this machine" in screen_text(app))
        await pilot.press("t")
        await wait_until(pilot, lambda: "org/tiny" in screen_text(app))
        await wait_until(pilot, lambda: isinstance(app.plans.get("org/tiny"), dict))
        await pilot.press("enter")
        job = app.jobs.all[0]
        await wait_until(pilot, lambda: 0.1 < job.share < 0.9)
        await pilot.press("p")
        await wait_until(pilot, lambda: job.state == "paused")
        assert "paused at" in screen_text(app)
        asked = hub.asked.count("model.safetensors")
        hub.release.set()
        await pilot.press("p")
        await wait_until(pilot, lambda: job.state == "done")
        assert hub.asked.count("model.safetensors") == asked, "it goes on where it was"
        assert "download org/tiny: done" in toasts(app)
        await wait_until(pilot, lambda: "is here" in screen_text(app))
        await pilot.press("enter")
        await wait_until(pilot, lambda: app.model.state == "ready")
        assert app.model.name == "org/tiny"
        app.chat.composer.fill("/set max_tokens 8")
        await pilot.press("enter")
        await ask(pilot, "Hello")
        assert app.chat.conversation.path()[-1].state == "done"


async def test_a_cancelled_download_leaves_nothing(tmp_path: Path, hub: Hub) -> None:
    app = app_on_the_hub(tmp_path)
    async with app.run_test(size=(120, 30)) as pilot:
        await pilot.press("f3")
        await pilot.press("t")
        await wait_until(pilot, lambda: "org/tiny" in screen_text(app))
        await pilot.press("enter")
        job = app.jobs.all[0]
        await wait_until(pilot, lambda: 0.1 < job.share < 0.9)
        await pilot.press("x")
        await wait_until(pilot, lambda: "Cancel: download org/tiny?" in screen_text(app))
        await pilot.press("y")
        await wait_until(pilot, lambda: job.state == "cancelled")
        assert not list((tmp_path / "hf").rglob("*.incomplete"))
        assert not list((tmp_path / "hf").rglob("model.safetensors"))
