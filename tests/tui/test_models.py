"""Models here and on the Hub: lists, fit, downloads, deletion, conversion, adapters."""

from __future__ import annotations

import asyncio
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from mlxtx.tui.library import delete_model, local_models, tidy_download
from mlxtx.tui.screens.models import ModelsScreen, plan_words

from mlxtx.engine import Convert, Download, Load, Plan, Search
from mlxtx.events import Done, Failed, Progress
from tests.tui.fakes import (
    Script,
    fails,
    make_app,
    screen_text,
    toasts,
    wait_until,
)

PLAN = {
    "weights": 4_300_000_000, "cache_per_1k": 131_000_000, "total": 5_600_000_000,
    "limit": 12_000_000_000, "context": 8192, "fits": True, "largest_context": 52000,
}  # fmt: skip


def plan(job: Plan) -> Any:
    fits = "large" not in job.model
    return [Done(reason="done", details={**PLAN, "fits": fits})]


def found(job: Search) -> Any:
    models = [
        {
            "id": f"org/{name}-{job.query or 'any'}", "downloads": 1000, "likes": 5,
            "modified": "2026-10-01", "gated": name == "large", "mlx": True,
            "bytes": 2_000_000_000 if name == "small" else 30_000_000_000,
        }
        for name in ("small", "large")
    ]  # fmt: skip
    return [Done(reason="done", details={"models": models})]


def make_model(folder: Path, *, bits: int = 0, family: str = "llama", size: int = 5000) -> Path:
    """A folder that looks like a model to a reader of headers."""
    folder.mkdir(parents=True)
    config: dict[str, Any] = {"model_type": family}
    if bits:
        config["quantization"] = {"bits": bits, "group_size": 64}
    (folder / "config.json").write_text(json.dumps(config))
    header = json.dumps({"a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    data = struct.pack("<Q", len(header)) + header
    (folder / "model.safetensors").write_bytes(data.ljust(size, b"\0"))
    return folder


def make_cached(name: str, **options: Any) -> Path:
    """The same in the Hub cache."""
    repo = Path(os.environ["HF_HUB_CACHE"]) / ("models--" + name.replace("/", "--"))
    make_model(repo / "snapshots" / "abc", **options)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    (repo / "blobs").mkdir()
    return repo


def app_with(tmp_path: Path, script: Script) -> Any:
    (tmp_path / "settings.toml").write_text(f"model_folders = [{json.dumps(str(tmp_path / 'm'))}]")
    return make_app(tmp_path, script)


def screen_of(app: Any) -> ModelsScreen:
    assert isinstance(app.screen, ModelsScreen)
    return app.screen


def test_the_library_reads_headers_and_names_problems(tmp_path: Path) -> None:
    make_cached("org/one", bits=4, family="qwen3")
    partial = make_cached("org/half")
    (partial / "blobs" / "x.incomplete").write_bytes(b"")
    make_model(tmp_path / "m" / "two")
    (tmp_path / "m" / "broken").mkdir()
    (tmp_path / "m" / "broken" / "config.json").write_text("[1]")
    (tmp_path / "m" / "empty").mkdir()
    (tmp_path / "m" / "empty" / "config.json").write_text("{}")
    models = {model.name: model for model in local_models([str(tmp_path / "m"), "/no/such"])}
    assert list(models) == ["broken", "empty", "org/half", "org/one", "two"]
    one, two = models["org/one"], models["two"]
    assert (one.family, one.precision, one.bytes, one.source) == (
        "qwen3", "4-bit", 5000, "org/one",
    )  # fmt: skip
    assert two.precision == "bf16" and two.source == str(tmp_path / "m" / "two")
    assert models["broken"].problem == "config.json can't be read"
    assert models["empty"].problem == "no safetensors weights"
    assert "not complete" in models["org/half"].problem


def test_deleting_a_cached_model_takes_the_whole_repository(tmp_path: Path) -> None:
    repo = make_cached("org/one")
    (model,) = local_models()
    assert delete_model(model) >= 5000
    assert not repo.exists() and local_models() == []


async def test_local_models_with_their_fit_and_choosing_one(tmp_path: Path) -> None:
    make_model(tmp_path / "m" / "alpha", bits=4)
    make_model(tmp_path / "m" / "large")
    script = Script(Plan=plan)
    app = app_with(tmp_path, script)
    async with app.run_test(size=(100, 30)) as pilot:
        await wait_until(pilot, lambda: app.model.state == "ready")
        await pilot.press("f3")
        await wait_until(pilot, lambda: "52,000 tokens fit" in screen_text(app))
        text = screen_text(app)
        assert "alpha" in text and "4-bit" in text and "5.0 kB" in text and "yes" in text
        assert "5.6 GB of 12.0 GB at 8,192 tokens" in text
        await pilot.press("down")
        await wait_until(pilot, lambda: str(tmp_path / "m" / "large") in app.plans)
        await wait_until(pilot, lambda: " no" in screen_text(app))
        await pilot.press("slash", *"alp", "enter")
        assert "large" not in "".join(row.cells[0].plain for row in screen_of(app).rows.rows)
        await pilot.press("enter")
        await wait_until(pilot, lambda: len(app.screen_stack) == 1)
        assert app.model.name == str(tmp_path / "m" / "alpha") and app.model.label == "alpha"
    assert script.submitted(Load)[-1].model == app.model.name


async def test_an_empty_library_says_what_to_do(tmp_path: Path) -> None:
    app = make_app(tmp_path, Script())
    async with app.run_test() as pilot:
        await pilot.press("f3")
        await wait_until(
            pilot, lambda: "No model here yet. t looks on the Hub." in screen_text(app)
        )


async def test_the_hub_is_searched_with_filters_and_shows_what_fits(tmp_path: Path) -> None:
    script = Script(Search=found, Plan=plan)
    app = make_app(tmp_path, script)
    async with app.run_test(size=(120, 30)) as pilot:
        await wait_until(pilot, lambda: app.model.state == "ready")
        app.chat.composer.fill("/models qwen")
        await pilot.press("enter")
        await wait_until(pilot, lambda: "org/small-qwen" in screen_text(app))
        text = screen_text(app)
        assert "2.0 GB" in text and "org/large-qwen  gated" in text
        # Before any plan: from the size alone.
        rows = {row.key: row.cells[-1].plain for row in screen_of(app).rows.rows}
        assert rows["org/large-qwen"] == "no" and rows["org/small-qwen"] in ("likely", "yes")
        await wait_until(pilot, lambda: "up" not in app.plans and "org/small-qwen" in app.plans)
        await pilot.press("m")
        await pilot.press("s")
        await wait_until(pilot, lambda: len(script.submitted(Search)) == 3)
        first, second, third = script.submitted(Search)
        assert (first.query, first.mlx_only, first.sort) == ("qwen", True, "downloads")
        assert second.mlx_only is False and third.sort == "likes"


async def test_a_retyped_search_drops_the_old_answer(tmp_path: Path) -> None:
    def slow(job: Search) -> Any:
        if not job.query:
            yield 0.8
        yield from found(job)

    app = make_app(tmp_path, Script(Search=slow, Plan=plan))
    async with app.run_test(size=(120, 30)) as pilot:
        await pilot.press("f3")
        await pilot.pause()
        await pilot.press("t", "slash", *"new")
        await wait_until(pilot, lambda: "org/small-new" in screen_text(app))
        await pilot.pause(1.0)
        assert "org/small-any" not in screen_text(app)


async def test_no_network_is_one_line_and_local_models_still_work(tmp_path: Path) -> None:
    make_model(tmp_path / "m" / "alpha")
    line = "The Hub can't be searched (no route). Models on this machine work without it."
    app = app_with(tmp_path, Script(Search=fails(line), Plan=fails("no")))
    async with app.run_test(size=(100, 30)) as pilot:
        await pilot.press("f3")
        await wait_until(pilot, lambda: "alpha" in screen_text(app))
        await pilot.press("t")
        await wait_until(pilot, lambda: "The Hub can't be searched (no route)" in screen_text(app))
        await pilot.press("t")
        await wait_until(pilot, lambda: "alpha" in screen_text(app))


async def test_a_download_is_shown_paused_resumed_and_done(tmp_path: Path) -> None:
    gate = asyncio.Event()

    def download(job: Download) -> Any:
        yield Progress(stage="download", done=250e6, total=1e9, unit="bytes", seconds=10.0)
        yield gate
        make_cached("org/small-any")
        yield Done(reason="done", details={"path": "/somewhere"})

    script = Script(Search=found, Plan=plan, Download=download)
    app = make_app(tmp_path, script)
    async with app.run_test(size=(120, 30)) as pilot:
        await pilot.press("f3")
        await pilot.pause()
        await pilot.press("t")
        await wait_until(pilot, lambda: "org/small-any" in screen_text(app))
        await pilot.press("enter")
        await wait_until(
            pilot, lambda: "250 MB of 1.0 GB, 25.0 MB/s, 30 s left" in screen_text(app)
        )
        await pilot.press("enter")
        assert len(script.submitted(Download)) == 1, "one download of a model at a time"
        await pilot.press("p")
        await wait_until(pilot, lambda: "paused at 250 MB of 1.0 GB" in screen_text(app))
        gate.set()
        await pilot.pause(0.1)
        assert app.jobs.all[0].state == "paused"
        await pilot.press("p")
        await wait_until(pilot, lambda: "is here" in screen_text(app))
        assert "download org/small-any: done" in toasts(app)
        # Now Enter chats with it.
        await pilot.press("enter")
        await wait_until(pilot, lambda: app.model.name == "org/small-any")


async def test_a_download_is_cancelled_after_a_question(tmp_path: Path) -> None:
    script = Script(Search=found, Plan=plan, Download=lambda job: [asyncio.Event()])
    app = make_app(tmp_path, script)
    blobs = Path(os.environ["HF_HUB_CACHE"]) / "models--org--small-any" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "abc.incomplete").write_bytes(b"half")
    async with app.run_test(size=(120, 30)) as pilot:
        await pilot.press("f3")
        await pilot.pause()
        await pilot.press("t")
        await wait_until(pilot, lambda: "org/small-any" in screen_text(app))
        await pilot.press("enter", "x")
        await wait_until(pilot, lambda: "Cancel: download" in screen_text(app))
        await pilot.press("n")
        await pilot.pause()
        assert app.jobs.all[0].state == "running"
        await pilot.press("x")
        await pilot.pause()
        await pilot.press("y")
        await wait_until(pilot, lambda: app.jobs.all[0].state == "cancelled")
        assert not blobs.parent.exists(), "half a model is of no use"


async def test_a_download_is_tidied_up_after_wherever_one_is(tmp_path: Path) -> None:
    app = make_app(tmp_path, Script(Download=lambda job: [asyncio.Event()]))
    blobs = Path(os.environ["HF_HUB_CACHE"]) / "models--org--small" / "blobs"
    blobs.mkdir(parents=True)
    async with app.run_test() as pilot:
        job = app.jobs.start("download", "org/small", Download(repo="org/small"))
        app.jobs.cancel(job)
        await wait_until(pilot, lambda: job.state == "cancelled")
        assert not blobs.parent.exists()


@pytest.mark.parametrize("weights", ["a.gguf", "pytorch_model.bin", "4bit/model.safetensors"])
def test_a_cancelled_download_keeps_weights_that_were_there(tmp_path: Path, weights: str) -> None:
    repo = Path(os.environ["HF_HUB_CACHE"]) / "models--org--one"
    file = repo / "snapshots" / "abc" / weights
    half = repo / "blobs" / "x.incomplete"
    for path in (file, half):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"1")
    tidy_download("org/one", "paused")
    assert half.exists()
    tidy_download("org/one", "cancelled")
    assert file.exists() and not half.exists()


async def test_a_plan_that_failed_is_asked_for_again_when_one_comes_back(tmp_path: Path) -> None:
    make_model(tmp_path / "m" / "alpha")
    script = Script(Plan=fails("no route"))
    app = app_with(tmp_path, script)
    async with app.run_test(size=(100, 30)) as pilot:
        await pilot.press("f3")
        await wait_until(pilot, lambda: "no route" in screen_text(app))
        await pilot.press("escape")
        script.answers["Plan"] = plan
        await pilot.press("f3")
        await wait_until(pilot, lambda: "52,000 tokens fit" in screen_text(app))
        assert len(script.submitted(Plan)) == 2


async def test_a_failed_download_says_why(tmp_path: Path) -> None:
    line = "org/small-any is gated: accept its terms on its Hub page"
    app = make_app(tmp_path, Script(Search=found, Plan=plan, Download=fails(line)))
    async with app.run_test(size=(120, 30)) as pilot:
        await pilot.press("f3")
        await pilot.pause()
        await pilot.press("t")
        await wait_until(pilot, lambda: "org/small-any" in screen_text(app))
        await pilot.press("enter")
        await wait_until(pilot, lambda: line[:40] in screen_text(app))


async def test_deleting_asks_first(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m" / "alpha")
    app = app_with(tmp_path, Script(Plan=plan))
    async with app.run_test(size=(100, 30)) as pilot:
        await pilot.press("f3")
        await wait_until(pilot, lambda: "alpha" in screen_text(app))
        await pilot.press("d")
        await wait_until(pilot, lambda: "Delete alpha?" in screen_text(app))
        await pilot.press("escape")
        await pilot.pause()
        assert model.exists()
        await pilot.press("d")
        await pilot.pause()
        await pilot.press("y")
        await wait_until(pilot, lambda: not model.exists())
        await wait_until(pilot, lambda: "No model here yet" in screen_text(app))


async def test_a_quick_conversion(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m" / "alpha")

    def convert(job: Convert) -> Any:
        yield Progress(stage="convert", done=1e9, total=4e9, unit="bytes", seconds=2.0)
        make_model(Path(job.out), bits=4)
        yield Done(reason="done", details={"path": job.out})

    script = Script(Plan=plan, Convert=convert)
    app = app_with(tmp_path, script)
    async with app.run_test(size=(100, 34)) as pilot:
        await pilot.press("f3")
        await wait_until(pilot, lambda: "alpha" in screen_text(app))
        await pilot.press("c")
        await wait_until(pilot, lambda: "Convert alpha" in screen_text(app))
        await pilot.press("right", "tab", "tab", "right", "enter")
        await wait_until(pilot, lambda: script.submitted(Convert))
        job = script.submitted(Convert)[0]
        assert job.source == str(model) and job.options == {"bits": 8, "group_size": 32}
        assert Path(job.out) == app.converted_folder / "alpha-8bit"
        await wait_until(pilot, lambda: "alpha-8bit" in screen_text(app))
        # The same again would overwrite it.
        await pilot.press("c")
        await pilot.pause()
        await pilot.press("right", "enter")
        assert any("exists already" in toast for toast in toasts(app))


async def test_adapters_are_switched_in_place(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m" / "alpha")
    script = Script(Plan=plan)
    app = app_with(tmp_path, script)
    for name, base in (("mine", str(model)), ("other", "org/other")):
        folder = app.runs_folder / name
        folder.mkdir(parents=True)
        (folder / "adapters.safetensors").write_bytes(b"")
        (folder / "adapter_config.json").write_text(json.dumps({"model": base}))
    async with app.run_test(size=(100, 30)) as pilot:
        await pilot.press("f3")
        await wait_until(pilot, lambda: "alpha" in screen_text(app))
        await pilot.press("a")
        await wait_until(pilot, lambda: "mine" in screen_text(app))
        assert "org/other" in screen_text(app)
        await pilot.press("down", "enter")
        await wait_until(pilot, lambda: script.submitted(Load)[-1].adapter is not None)
        job = script.submitted(Load)[-1]
        assert job.model == str(model) and job.adapter == str(app.runs_folder / "mine")
        assert "alpha + mine" in screen_text(app) or "mine" in screen_text(app)
        app.chat.composer.fill("/adapter")
        await pilot.press("enter")
        assert script.submitted(Load)[-1].adapter is None
        app.chat.composer.fill("/adapter /no/folder")
        await pilot.press("enter")
        assert any("There is no folder" in toast for toast in toasts(app))


def test_a_plan_in_words() -> None:
    assert plan_words(PLAN) == (
        "weights 4.3 GB · cache 131 MB for 1,000 tokens\n"
        "5.6 GB of 12.0 GB at 8,192 tokens · 52,000 tokens fit"
    )


@pytest.mark.parametrize("size", [(80, 24), (200, 50)])
async def test_both_sizes(tmp_path: Path, size: tuple[int, int]) -> None:
    make_model(tmp_path / "m" / ("a-model-with-a-name-that-is-long-" * 3))
    app = app_with(tmp_path, Script(Search=found, Plan=plan))
    async with app.run_test(size=size) as pilot:
        await pilot.press("f3")
        await wait_until(pilot, lambda: "a-model-with" in screen_text(app))
        text = screen_text(app)
        assert "Fits" in text and "Size" in text
        await pilot.press("t")
        await wait_until(pilot, lambda: "org/small-any" in screen_text(app))
        assert all(len(row) <= size[0] for row in screen_text(app).split("\n"))


def test_what_a_conversion_has_not_finished_is_no_model(tmp_path: Path) -> None:
    for name in ("done", "begun.partial", "old.replaced"):
        make_model(tmp_path / "m" / name)
    assert [model.name for model in local_models([str(tmp_path / "m")])] == ["done"]


async def test_a_model_that_is_here_is_known_in_a_search_of_the_hub(tmp_path: Path) -> None:
    make_cached("org/one")
    info = {"id": "org/one", "downloads": 1, "likes": 1, "modified": "", "gated": False}
    found = [{**info, "mlx": True, "bytes": 5000}]
    search = lambda job: [Done(reason="done", details={"models": found})]  # noqa: E731
    script = Script(Search=search, Plan=lambda job: [Failed(message="no plan")])
    app = make_app(tmp_path, script)
    async with app.run_test(size=(100, 30)) as pilot:
        app.action_models("one")
        await wait_until(pilot, lambda: "is here" in screen_text(app))
        await pilot.press("enter")
        await wait_until(pilot, lambda: app.model.name == "org/one")
