"""The training screen: dry run, start, pause, go on, plot, samples, chat with the result."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from mlxtx.tui.library import local_models
from mlxtx.tui.training import TrainRun, read_run

from mlxtx.engine import Load, Preview, Train, Unload
from mlxtx.events import Done, Event, Progress
from tests.tui.fakes import Script, fails, make_app, screen_text, toasts, until, wait_until

FOUND = {
    "samples": [[["<user>Who?<assistant>", False], ["A helper.", True], ["\x1b[2J", False]]],
    "count": 120, "validation_count": 12, "tokens": 34000, "tokens_in_loss": 12000,
    "lengths": {"shortest": 12, "median": 80, "longest": 900}, "cut": 2,
    "bad_lines": ["data.jsonl line 7: no messages"], "fits": True, "seconds_per_step": 0.42,
    "memory": {"total": 900e6, "available": 12e9}, "loss": 3.21, "trained_parameters": 120000,
}  # fmt: skip


def preview(job: Preview) -> Any:
    return [Done(reason="done", details=FOUND)]


def point(step: int, loss: float, stage: str = "train") -> Progress:
    figures = {"tokens_per_second": 1234.0, "peak_memory_bytes": 1_300_000_000}
    details = {"loss": loss, **(figures if stage == "train" else {})}
    return Progress(
        stage=stage, done=step, total=200, unit="steps", seconds=step * 0.5, details=details
    )


def training(gate: asyncio.Event) -> Any:
    def play(job: Train) -> Any:
        out = Path(job.out)
        out.mkdir(parents=True, exist_ok=True)
        for step in range(10, 101, 10):
            yield point(step, 3.0 - step / 50)
        yield point(100, 1.4, "validate")
        said = {"prompt": "Who?", "text": "I am\x1b]0;x\x07 a helper."}
        yield Progress(stage="sample", done=100, total=200, unit="steps", details=said)
        (out / "metrics.jsonl").write_text(
            json.dumps({"step": 100, "stage": "train", "loss": 1.0}) + "\nbroken\n"
        )
        (out / "adapter_config.json").write_text("{}")
        yield gate
        yield Done(reason="done", details={"path": job.out})

    return play


async def open_form(pilot: Any, data: str = "data.jsonl") -> None:
    await pilot.press("f4")
    await wait_until(pilot, lambda: "Train an adapter" in screen_text(pilot.app))
    pilot.app.screen.query_one("#data").value = data


async def test_the_dry_run_shows_figures_masks_and_bad_lines(tmp_path: Path) -> None:
    script = Script(Preview=preview)
    app = make_app(tmp_path, script)
    async with app.run_test(size=(110, 34)) as pilot:
        await open_form(pilot)
        await pilot.press("ctrl+r")
        await wait_until(pilot, lambda: "120 samples, 12 for validation" in screen_text(app))
        text = screen_text(app)
        for part in (
            "34,000 tokens, 12,000 of them learned", "lengths 12 to 900, median 80",
            "120,000 numbers are trained", "memory 900 MB of 12.0 GB", "0.4 s a step",
            "2 samples were longer and are cut", "data.jsonl line 7: no messages",
            "<user>Who?<assistant>A helper.␛[2J",
        ):  # fmt: skip
            assert part in text, part
        shown = app.screen.query_one("#preview").content
        styles = {shown.plain[s.start : s.end]: str(s.style) for s in shown.spans}
        assert styles["A helper."] == "$text-success"
        assert styles["<user>Who?<assistant>"] == "$foreground 50%"
    job = script.submitted(Preview)[0]
    assert job.data == "data.jsonl" and job.options["rank"] == 8
    assert job.options["learning_rate"] == 1e-4 and job.options["method"] == "lora"


async def test_a_dry_run_that_fails_says_why(tmp_path: Path) -> None:
    app = make_app(tmp_path, Script(Preview=fails("there is no file data.jsonl")))
    async with app.run_test(size=(110, 34)) as pilot:
        await open_form(pilot)
        await pilot.press("ctrl+r")
        await wait_until(pilot, lambda: "there is no file data.jsonl" in screen_text(app))


async def test_leaving_says_that_it_waits_for_the_state_of_a_run(tmp_path: Path) -> None:
    script, saved = Script(Train=training(asyncio.Event())), asyncio.Event()
    app = make_app(tmp_path, script)
    async with app.run_test(size=(110, 34)) as pilot:
        await open_form(pilot)
        await pilot.press("ctrl+s")
        await wait_until(pilot, lambda: "step 100/200" in screen_text(app))
        engine = script.engines[-1]
        close = engine.close

        async def slowly(timeout: float = 1.0) -> None:
            await saved.wait()
            await close(timeout)

        engine.close = slowly  # type: ignore[method-assign]
        await pilot.press("ctrl+q")
        await wait_until(pilot, lambda: any("saves its state" in toast for toast in toasts(app)))
        assert not app._exit
        saved.set()
        await until(lambda: app._exit)


async def test_start_plot_pause_resume_and_chat(tmp_path: Path) -> None:
    gate = asyncio.Event()
    script = Script(Train=training(gate))
    app = make_app(tmp_path, script)
    async with app.run_test(size=(110, 34)) as pilot:
        await open_form(pilot)
        app.screen.query_one("#prompt").value = "Who?"
        await pilot.press("ctrl+s")
        await wait_until(pilot, lambda: "I am␛]0;x␇ a helper." in screen_text(app))
        text = screen_text(app)
        assert "running · step 100/200 · loss 1.000 · validation 1.400" in text
        assert "1,234 tok/s · peak 1.3 GB · 50 s left" in text
        assert "validation" in text and "┤" in text, "the plot has axes and a legend"
        options = script.submitted(Train)[0].options
        assert options["sample_prompt"] == "Who?" and "resume" not in options
        # Elsewhere meanwhile, and back: the run is still there.
        await pilot.press("escape")
        await pilot.pause()
        await pilot.press("f4")
        await wait_until(pilot, lambda: "step 100/200" in screen_text(app))
        await pilot.press("ctrl+s")
        await wait_until(pilot, lambda: "paused · step 100" in screen_text(app))
        await pilot.press("ctrl+s")
        await wait_until(pilot, lambda: len(script.submitted(Train)) == 2)
        assert script.submitted(Train)[1].options["resume"] is True
        gate.set()
        await wait_until(pilot, lambda: "done · step 100" in screen_text(app))
        await pilot.press("ctrl+t")
        await wait_until(pilot, lambda: len(app.screen_stack) == 1)
        load = script.submitted(Load)[-1]
        assert load.model == "bundled" and load.adapter == str(app.runs_folder / "bundled-1")


async def test_a_run_that_was_begun_before_goes_on(tmp_path: Path) -> None:
    script = Script(Train=training(asyncio.Event()))
    app = make_app(tmp_path, script)
    out = app.runs_folder / "mine"
    out.mkdir(parents=True)
    (out / "metrics.jsonl").write_text('{"step": 10, "stage": "train", "loss": 2.5}\n')
    async with app.run_test(size=(110, 34)) as pilot:
        await open_form(pilot)
        app.screen.query_one("#name").value = "mine"
        await pilot.press("ctrl+s")
        await wait_until(pilot, lambda: script.submitted(Train))
        assert script.submitted(Train)[0].options["resume"] is True
        assert any("mine was begun before" in toast for toast in toasts(app))


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        ("rank", "eight", "rank must be a whole number"),
        ("learning_rate", "fast", "learning_rate must be a number"),
        ("name", "../up", "The name of a run has letters"),
        ("name", "", "The name of a run has letters"),
        ("data", " ", "Name the data first"),
    ],
)
async def test_wrong_fields_are_told_and_nothing_starts(
    tmp_path: Path, field: str, value: str, line: str
) -> None:
    script = Script()
    app = make_app(tmp_path, script)
    async with app.run_test(size=(110, 34)) as pilot:
        await open_form(pilot)
        app.screen.query_one(f"#{field}").value = value
        await pilot.press("ctrl+s")
        assert any(line in toast for toast in toasts(app)) and not script.submitted(Train)


async def test_a_run_that_fails_shows_the_form_and_why(tmp_path: Path) -> None:
    line = "training needs 40 GB and 12 GB are free: use a smaller batch_size"
    app = make_app(tmp_path, Script(Train=fails(line)))
    async with app.run_test(size=(110, 34)) as pilot:
        await open_form(pilot)
        await pilot.press("ctrl+s")
        await wait_until(pilot, lambda: "use a smaller batch_size" in screen_text(app))
        assert "learning_rate" in screen_text(app)
        await pilot.press("ctrl+t")
        assert any("no adapter yet" in toast for toast in toasts(app))


async def test_unload_frees_the_model_and_the_next_message_loads_it(tmp_path: Path) -> None:
    script = Script()
    app = make_app(tmp_path, script)
    async with app.run_test() as pilot:
        await wait_until(pilot, lambda: app.model.state == "ready")
        app.chat.composer.fill("/unload")
        await pilot.press("enter")
        assert app.model.state == "none" and script.submitted(Unload)
        app.chat.composer.fill("hi")
        await pilot.press("enter")
        await wait_until(pilot, lambda: "Hello there." in screen_text(app))


def test_a_resumed_run_replaces_the_points_it_goes_over() -> None:
    run = TrainRun("m", Path("o"))
    events: list[Event] = [point(10, 3.0), point(20, 2.0), point(30, float("nan")), point(20, 1.9)]
    for event in events:
        run.take(event)
    assert run.losses == [(10, 3.0), (20, 1.9)]


def test_reading_a_run_skips_lines_that_are_broken(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 1, "stage": "train", "loss": 2}\n\xff{\n[]\n{"step": "x", "stage": "train"}\n'
        b'{"step": 2, "stage": "validate", "loss": 1.5}\n'
    )
    run = read_run("m", tmp_path)
    assert run is not None and run.losses == [(1, 2.0)] and run.validation == [(2, 1.5)]
    assert read_run("m", tmp_path / "none") is None


@pytest.mark.parametrize("size", [(80, 24), (200, 50)])
async def test_both_sizes(tmp_path: Path, size: tuple[int, int]) -> None:
    app = make_app(tmp_path, Script(Train=training(asyncio.Event()), Preview=preview))
    async with app.run_test(size=size) as pilot:
        await open_form(pilot)
        await pilot.press("ctrl+r")
        await wait_until(pilot, lambda: "120 samples" in screen_text(app))
        assert "learning_rate" in screen_text(app)
        await pilot.press("ctrl+s")
        await wait_until(pilot, lambda: "step 100/200" in screen_text(app))
        assert all(len(row) <= size[0] for row in screen_text(app).split("\n"))


async def test_another_model_than_the_one_that_answers_is_trained(tmp_path: Path) -> None:
    script = Script(Train=training(asyncio.Event()), Preview=preview)
    app = make_app(tmp_path, script)
    async with app.run_test(size=(110, 34)) as pilot:
        await open_form(pilot)
        assert app.screen.query_one("#model").value == "bundled"
        app.screen.query_one("#model").value = "org/other"
        await pilot.press("ctrl+r")
        await wait_until(pilot, lambda: script.submitted(Preview))
        await pilot.press("ctrl+s")
        await wait_until(pilot, lambda: script.submitted(Train))
    assert script.submitted(Preview)[0].model == script.submitted(Train)[0].model == "org/other"
    assert app.training.model == "org/other" and app.model.name == "bundled"


async def test_a_model_trained_in_full_answers_without_an_adapter(tmp_path: Path) -> None:
    def play(job: Train) -> Any:
        out = Path(job.out)
        out.mkdir(parents=True)
        (out / "config.json").write_text("{}")
        yield Done(reason="done", details={"path": job.out})

    script = Script(Train=play)
    app = make_app(tmp_path, script)
    async with app.run_test(size=(110, 34)) as pilot:
        await open_form(pilot)
        await pilot.press("ctrl+s")
        await wait_until(pilot, lambda: app.training and app.jobs.all[0].state == "done")
        out = app.training.out
        await pilot.press("ctrl+t")
        await wait_until(pilot, lambda: len(app.screen_stack) == 1)
        load = script.submitted(Load)[-1]
        assert load.model == str(out) and load.adapter is None
        assert str(out) in [model.source for model in local_models(app.model_folders)]


async def test_a_paused_run_is_left_for_another_and_goes_on_under_its_name(tmp_path: Path) -> None:
    script = Script(Train=training(asyncio.Event()))
    app = make_app(tmp_path, script)
    async with app.run_test(size=(110, 34)) as pilot:
        await open_form(pilot)
        await pilot.press("ctrl+s")
        await wait_until(pilot, lambda: "running · step 100/200" in screen_text(app))
        await pilot.press("ctrl+s")
        await wait_until(pilot, lambda: "paused · step 100" in screen_text(app))
        await pilot.press("escape")
        await wait_until(pilot, lambda: "Train an adapter" in screen_text(app))
        assert "bundled-1 is kept: a run of that name goes on with it." in toasts(app)
        assert app.screen.query_one("#name").value == "bundled-2"
        app.screen.query_one("#name").value = "bundled-1"
        await pilot.press("ctrl+s")
        await wait_until(pilot, lambda: len(script.submitted(Train)) == 2)
        assert script.submitted(Train)[1].options["resume"] is True


async def test_training_in_full_has_a_rate_of_its_own(tmp_path: Path) -> None:
    script = Script(Preview=preview)
    app = make_app(tmp_path, script)
    async with app.run_test(size=(110, 34)) as pilot:
        await open_form(pilot)
        app.screen.query_one("#method").focus()
        rate = app.screen.query_one("#learning_rate")
        await pilot.press("left")
        await wait_until(pilot, lambda: rate.value == "1e-5")
        await pilot.press("ctrl+r")
        await wait_until(pilot, lambda: script.submitted(Preview))
        await pilot.press("right")
        await wait_until(pilot, lambda: rate.value == "1e-4")
        rate.value = "3e-4"
        await pilot.press("left")
        assert rate.value == "3e-4", "what somebody chose stays"
    options = script.submitted(Preview)[0].options
    assert (options["method"], options["learning_rate"]) == ("full", 1e-5)
