"""Train an adapter: look at the data, start, watch the loss, chat with what came out."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mlxtx.tui.actions import bindings
from mlxtx.tui.clean import clean, duration, one_line, path_of, size
from mlxtx.tui.jobs import LongJob
from mlxtx.tui.training import TrainRun, read_run
from mlxtx.tui.widgets.bars import Hints, TitleBar
from mlxtx.tui.widgets.choice import Choice
from mlxtx.tui.widgets.loss_plot import LossPlot
from textual.app import ComposeResult
from textual.containers import Horizontal, VerticalScroll
from textual.content import Content
from textual.screen import Screen
from textual.widgets import Input, Static

from mlxtx.engine import Preview, Train
from mlxtx.events import Done, Event, Failed

if TYPE_CHECKING:
    from mlxtx.tui.app import MlxtxApp

# Name of the option, its kind, what stands in the field at first.
_NUMBERS: tuple[tuple[str, type, str], ...] = (
    ("rank", int, "8"),
    ("iters", int, "200"),
    ("batch_size", int, "4"),
    ("learning_rate", float, "1e-4"),
    ("max_length", int, "1024"),
    ("validation_part", float, "0.1"),
    ("seed", int, "0"),
)
_METHODS = ("lora", "dora", "rslora", "qlora", "full")
# What stands in the field for the learning rate where the method needs smaller steps.
_RATES = {"full": "1e-5"}
_RATE = next(value for name, _, value in _NUMBERS if name == "learning_rate")


class TrainScreen(Screen[None]):
    app: MlxtxApp
    BINDINGS = bindings("train")
    AUTO_FOCUS = "#data"

    def __init__(self, data: str = "") -> None:
        super().__init__()
        self._given = data
        self._asked = 0
        self._rate = _RATE

    def compose(self) -> ComposeResult:
        self._make_widgets()
        yield self.title_bar
        with self.setup:
            with VerticalScroll(id="form", can_focus=False):
                yield Static("Data", classes="label")
                yield self.data
                yield Static("Run", classes="label")
                yield self.run_name
                yield from _field("model", self.model)
                yield from _field("method", self.method)
                for name, field in self.numbers.items():
                    yield from _field(name, field)
                yield Static("Prompt to try while it trains", classes="label", id="prompt-label")
                yield self.prompt
            with VerticalScroll(id="side"):
                yield self.preview
        with self.run_view:
            yield self.plot
            with self.samples:
                yield self.said
        yield self.figures
        yield Hints("train")

    def _make_widgets(self) -> None:
        self.title_bar = TitleBar()
        self.setup, self.run_view = Horizontal(id="setup"), Horizontal(id="run")
        place = "a JSONL file, a folder, a dataset"
        self.data = Input(self._given, placeholder=place, id="data")
        self.run_name = Input("", placeholder="its name", id="name")
        self.model = Input(self.app.model.name, id="model", compact=True, select_on_focus=False)
        self.method = Choice(*_METHODS, id="method")
        self.numbers = {name: Input(value, id=name, compact=True) for name, _, value in _NUMBERS}
        self.prompt = Input("", placeholder="none", id="prompt")
        self.preview = Static(_EMPTY, id="preview")
        self.samples = VerticalScroll(id="samples", can_focus=True)
        self.plot, self.said, self.figures = LossPlot(), Static(id="said"), Static(id="figures")

    def on_mount(self) -> None:
        self.app.jobs_listeners.append(self.job_changed)
        self.run_name.value = self._free_name()
        self._show()

    def on_unmount(self) -> None:
        self.app.jobs_listeners.remove(self.job_changed)
        self.app.bridge.forget(self._asked)

    def _free_name(self) -> str:
        words = re.sub(r"[^a-z0-9]+", "-", self.app.model.label.lower()).strip("-") or "run"
        number = 1
        while (self.app.runs_folder / f"{words}-{number}").exists():
            number += 1
        return f"{words}-{number}"

    # What is shown

    @property
    def _job(self) -> LongJob | None:
        jobs = [job for job in self.app.jobs.all if job.kind == "train"]
        return jobs[-1] if jobs else None

    def _show(self) -> None:
        """The form, or the run when there is one that is not over."""
        job, run = self._job, self.app.training
        watching = job is not None and run is not None and job.state != "failed"
        self.setup.display = not watching
        self.run_view.display = watching
        self.title_bar.set(
            f"Train: {run.out.name}" if watching and run else "Train an adapter",
            self.app.model.label,
        )
        if watching and run is not None and job is not None:
            self.plot.show(run.losses, run.validation)
            self.samples.display = bool(run.samples or _tries(job))
            said = [_sample(*sample) for sample in reversed(run.samples)]
            waiting = Content.styled("What the adapter says is shown here.", "$foreground 60%")
            self.said.update(Content("\n\n").join(said) if said else waiting)
            self.figures.update(Content(f"{job.state} · {run.figures()}"))
        else:
            text = one_line(job.message) if job is not None and job.state == "failed" else ""
            self.figures.update(Content.styled(text, "$text-error"))

    def job_changed(self, job: LongJob) -> None:
        if job.kind == "train":
            self._show()

    # The form

    def on_choice_changed(self) -> None:
        """Show the rate that suits the method, unless somebody has written another."""
        field, rate = self.numbers["learning_rate"], _RATES.get(self.method.value, _RATE)
        if field.value.strip() == self._rate:
            field.value = rate
        self._rate = rate

    def _options(self) -> dict[str, Any] | None:
        """What the fields say; None, with a word to the reader, when one of them is wrong."""
        options: dict[str, Any] = {"method": self.method.value}
        for name, kind, _ in _NUMBERS:
            field = self.numbers[name]
            try:
                options[name] = kind(field.value)
                field.remove_class("-wrong")
            except ValueError:
                field.add_class("-wrong")
                word = "a whole number" if kind is int else "a number"
                self.app.tell(f"{name} must be {word}.", "warning")
                field.focus()
                return None
        return options

    @property
    def _model(self) -> str:
        """What is trained: the model of the field, else the one that answers."""
        return self.model.value.strip() or self.app.model.name

    def _data_path(self) -> str | None:
        text = self.data.value.strip()
        if not text:
            self.app.tell("Name the data first: a JSONL file, or a folder with them.", "warning")
            self.data.focus()
            return None
        path = path_of(text)
        return str(path) if os.path.exists(path) else text

    def action_preview(self) -> None:
        data, options = self._data_path(), self._options()
        if data is None or options is None:
            return
        self.preview.update("Reading the data…")
        self.app.bridge.forget(self._asked)
        job = Preview(model=self._model, data=data, options=options)
        self._asked = self.app.bridge.ask(job, self._take_preview)

    def _take_preview(self, event: Event) -> None:
        widget = self.preview
        if isinstance(event, Failed):
            widget.update(Content.styled(clean(event.message), "$text-error"))
        elif isinstance(event, Done):
            widget.update(preview_text(event.details))

    # The run

    def action_start(self) -> None:
        job = self._job
        if job is not None and job.open:
            self.app.jobs.pause(job)
            return
        data, options = self._data_path(), self._options()
        name = self.run_name.value.strip()
        if data is None or options is None:
            return
        if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
            self.app.tell("The name of a run has letters, digits, - and _.", "warning")
            return
        out = self.app.runs_folder / name
        old = read_run(self._model, out)
        if old is not None:
            options["resume"] = True
            self.app.tell(f"{name} was begun before and goes on.")
        options["validate_every"] = max(1, options["iters"] // 10)
        prompt = self.prompt.value.strip()
        if prompt:
            options |= {"sample_prompt": prompt, "sample_every": options["validate_every"]}
        options["report_every"] = max(1, min(10, options["iters"] // 50))
        run = self.app.training = old or TrainRun(self._model, out)
        train = Train(model=self._model, data=data, out=str(out), options=options)
        started = self.app.jobs.start("train", name, train, lambda job, event: run.take(event))
        started.again = replace(train, options={**options, "resume": True})

    def action_try(self) -> None:
        run = self.app.training
        if run is not None and (run.out / "adapter_config.json").exists():
            self.app.load_model(run.model, str(run.out))
        elif run is not None and (run.out / "config.json").exists():  # the method was full
            self.app.load_model(str(run.out))
        else:
            self.app.tell(
                "There is no adapter yet: it is saved at the end and on pause.", "warning"
            )
            return
        self.app.action_chat()

    def action_back(self) -> None:
        job = self._job
        ended = job is not None and (job.state == "paused" or not job.open)
        if job is not None and ended and self.run_view.display:
            # Nothing runs: back to the form for the next one.
            if job.state == "paused":
                self.app.jobs.cancel(job)
                self.app.tell(f"{job.title} is kept: a run of that name goes on with it.")
            self.app.jobs.all.remove(job)
            self.run_name.value = self._free_name()
            self._show()
        else:
            self.dismiss()


_EMPTY = Content.styled(
    "ctrl+r reads the data and shows, without training:\n\n"
    "how many samples and tokens there are, which lines are bad,\n"
    "which words are learned and which are only read,\n"
    "how much memory it takes and how long a step.\n\n"
    "Each line of a JSONL file is one sample:\n"
    '{"messages": [{"role": "user", ...}, ...]}\n'
    '{"prompt": "...", "completion": "..."}\n'
    '{"text": "..."}',
    "$foreground 60%",
)


def _field(name: str, widget: Any) -> ComposeResult:
    with Horizontal(classes="field"):
        yield Static(name, classes="name")
        yield widget


def _tries(job: LongJob) -> bool:
    """Whether a prompt was given to try meanwhile."""
    return isinstance(job.job, Train) and "sample_prompt" in job.job.options


def _sample(step: int, prompt: str, text: str) -> Content:
    return Content.assemble(
        (f"step {step:,}  {one_line(prompt)}\n", "$foreground 60%"), clean(text).strip()
    )


def preview_text(found: dict[str, Any]) -> Content:
    """The dry run: figures, then samples with the learned words coloured."""
    lengths, memory = found["lengths"], found["memory"]
    rows = [
        f"{found['count']:,} samples, {found['validation_count']:,} for validation",
        f"{found['tokens']:,} tokens, {found['tokens_in_loss']:,} of them learned",
        f"lengths {lengths['shortest']:,} to {lengths['longest']:,}, median {lengths['median']:,}",
        f"{found['trained_parameters']:,} numbers are trained",
        f"memory {size(memory['total'])} of {size(memory['available'])}",
    ]
    if found.get("seconds_per_step"):
        rows.append(f"{duration(found['seconds_per_step'])} a step, first loss {found['loss']:.3f}")
    if found["cut"]:
        rows.append(f"{found['cut']:,} samples were longer and are cut")
    parts: list[Content] = [Content("\n".join(rows))]
    if not found["fits"]:
        parts.append(Content.styled("It does not fit: less batch or length.", "$text-error"))
    for line in found["bad_lines"][:5]:
        parts.append(Content.styled(clean(line), "$text-warning"))
    parts.append(
        Content.assemble(("learned", "$text-success"), " and ", ("read", "$foreground 50%"), ":")
    )
    for sample in found["samples"]:
        pieces = (
            (clean(text), "$text-success" if learned else "$foreground 50%")
            for text, learned in sample
        )
        parts.append(Content.assemble(*pieces))
    return Content("\n\n").join(parts)
