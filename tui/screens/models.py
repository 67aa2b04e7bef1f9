"""Models on this machine and on the Hub: what fits, download, convert, adapters, delete."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxtx.tui.actions import bindings
from mlxtx.tui.clean import one_line, size
from mlxtx.tui.jobs import LongJob
from mlxtx.tui.library import LocalModel, delete_model, local_models
from mlxtx.tui.screens.dialogs import Confirm
from mlxtx.tui.widgets.bars import Hints, TitleBar
from mlxtx.tui.widgets.rows import Column, Row, Rows
from textual.app import ComposeResult
from textual.content import Content
from textual.screen import Screen
from textual.widgets import Input, Static

from mlxtx.engine import Download, Plan, Search
from mlxtx.events import Done, Event, Failed

if TYPE_CHECKING:
    from mlxtx.tui.app import MlxtxApp

_HERE = (
    Column("Model"),
    Column("Family", 14, drop=2),
    Column("Weights", 9, drop=1),
    Column("Size", 9, right=True),
    Column("Fits", 12),
)
_HUB = (
    Column("Model on the Hub"),
    Column("Format", 6, drop=1),
    Column("Downloads", 10, right=True, drop=2),
    Column("Likes", 6, right=True, drop=4),
    Column("Changed", 10, drop=3),
    Column("Size", 9, right=True),
    Column("Fits", 12),
)
_SORTS = ("downloads", "likes", "last_modified")
# Weights alone are not all that is needed; the plan says it exactly.
_ROOM = 1.2
_SEARCH_DELAY = 0.5
_BAR = 20


class ModelsScreen(Screen[None]):
    app: MlxtxApp
    BINDINGS = bindings("models")
    AUTO_FOCUS = "Rows"

    def __init__(self, words: str = "") -> None:
        super().__init__()
        self._words = words
        self._on_hub = bool(words)
        self._local: list[LocalModel] = []
        self._found: list[dict[str, Any]] = []
        self._mlx_only = True
        self._sort = 0
        self._search = 0
        self._searched: tuple[Any, ...] = ()

    def compose(self) -> ComposeResult:
        # Named, not looked up: a screen that is closed loses its widgets before its last event.
        self.title_bar, self.rows = TitleBar(), Rows()
        self.search = Input(self._words, classes="search")
        self.jobs, self.detail = Static(id="jobs"), Static(id="detail")
        yield from (self.title_bar, self.search, self.rows, self.jobs, self.detail)
        yield Hints("models")

    def on_mount(self) -> None:
        self.app.jobs_listeners.append(self.job_changed)
        # A plan that failed is asked for again: there may be a network now.
        plans = self.app.plans.items()
        self.app.plans = {k: plan for k, plan in plans if isinstance(plan, dict) or plan == "…"}
        self._show()
        self._show_jobs()

    def on_unmount(self) -> None:
        self.app.jobs_listeners.remove(self.job_changed)
        self.app.bridge.forget(self._search)

    # The two lists

    def _show(self) -> None:
        where = "on the Hub" if self._on_hub else "on this machine"
        self.title_bar.set(f"Models {where}", self.app.model.label)
        self.search.placeholder = "Search the Hub" if self._on_hub else "Filter by name"
        self.rows.columns = _HUB if self._on_hub else _HERE
        self._local = local_models(self.app.model_folders)
        if self._on_hub:
            self._fill_hub()
            self._search_hub()
        else:
            self._fill_here()

    def _fill_here(self) -> None:
        words = self.search.value.lower().split()
        models = [m for m in self._local if all(word in m.name.lower() for word in words)]
        empty = "No model here yet. t looks on the Hub." if not words else "None of that name."
        self.rows.show([self._local_row(model) for model in models], empty)

    def _local_row(self, model: LocalModel) -> Row:
        used = model.source == self.app.model.name
        name = Content.styled(one_line(model.name), "$text-primary" if used else "")
        fits = Content.styled(one_line(model.problem), "$text-warning")
        return Row(
            model.source,
            (
                name,
                Content(one_line(model.family)),
                Content(one_line(model.precision, 20)),
                Content(size(model.bytes)),
                fits if model.problem else self._fits(model.source, model.bytes),
            ),
        )

    def _fits(self, source: str, weights: int) -> Content:
        """From the plan where there is one, else from the size alone."""
        plan = self.app.plans.get(source)
        if isinstance(plan, dict):
            word = "yes" if plan["fits"] else "no"
            return Content.styled(word, "$text-success" if plan["fits"] else "$text-error")
        limit = self.app.model.memory_limit
        if not limit or not weights:
            return Content("")
        fits = weights * _ROOM < limit
        return Content.styled("likely" if fits else "no", "" if fits else "$text-error")

    def _fill_hub(self, empty: str = "Searching…") -> None:
        self.rows.show([self._hub_row(info) for info in self._found], empty)

    def _hub_row(self, info: dict[str, Any]) -> Row:
        name = one_line(info["id"]) + ("  gated" if info["gated"] else "")
        here = any(model.source == info["id"] and not model.problem for model in self._local)
        cells = (
            name,
            "mlx" if info["mlx"] else "",
            f"{info['downloads']:,}",
            f"{info['likes']:,}",
            info["modified"],
            size(info["bytes"]) if info["bytes"] else "?",
        )
        fits = Content("is here") if here else self._fits(info["id"], info["bytes"])
        return Row(info["id"], (*map(Content, cells), fits))

    def _search_hub(self) -> None:
        query = self.search.value.strip()
        wanted = (query, self._mlx_only, _SORTS[self._sort])
        if wanted == self._searched:
            return
        self._searched = wanted
        self.app.bridge.forget(self._search)
        job = Search(query=query, mlx_only=self._mlx_only, sort=_SORTS[self._sort])
        self._search = self.app.bridge.ask(job, self._take_search)

    def _take_search(self, event: Event) -> None:
        if isinstance(event, Done):
            self._found = event.details["models"]
            self._fill_hub("Nothing found." + (" m also shows other formats." * self._mlx_only))
        elif isinstance(event, Failed):
            self._searched = ()
            self._found = []
            self._fill_hub(one_line(event.message))

    def on_input_changed(self) -> None:
        if self._on_hub:
            self.set_timer(_SEARCH_DELAY, self._search_later)
        else:
            self._fill_here()

    def _search_later(self) -> None:
        if self._on_hub and self.is_current:
            self._search_hub()

    def on_input_submitted(self) -> None:
        self.rows.focus()

    # The chosen model

    def on_rows_highlighted(self, event: Rows.Highlighted) -> None:
        if event.row is not None:
            source = event.row.key
            self.set_timer(_SEARCH_DELAY, lambda: self._plan(source))
        self._show_detail()

    def _plan(self, source: str) -> None:
        """Ask for the plan of a model the reader has stayed on."""
        chosen = self.rows.chosen
        if chosen is None or chosen.key != source or source in self.app.plans:
            return
        self.app.plans[source] = "…"

        def take(event: Event) -> None:
            if isinstance(event, Done):
                self.app.plans[source] = event.details
            elif isinstance(event, Failed):
                self.app.plans[source] = event.message
            self._redraw()

        self.app.bridge.ask(Plan(model=source), take)
        self._show_detail()

    def _redraw(self) -> None:
        self._fill_hub() if self._on_hub else self._fill_here()
        self._show_detail()

    def _show_detail(self) -> None:
        row = self.rows.chosen
        if row is None:
            self.detail.update("")
            return
        model = self._model(row.key)
        where = _place(model) if model else f"{row.key} on the Hub"
        plan = self.app.plans.get(row.key, "")
        words = plan_words(plan) if isinstance(plan, dict) else one_line(plan)
        if plan == "…":
            words = "reading its headers…"
        self.detail.update(Content(f"{where}\n{words}"))

    def _model(self, source: str) -> LocalModel | None:
        return next((model for model in self._local if model.source == source), None)

    def on_rows_chosen(self) -> None:
        self.action_use()

    def action_use(self) -> None:
        row = self.rows.chosen
        if row is None:
            return
        model = self._model(row.key)
        if model is not None and not model.problem:
            self.app.load_model(model.source)
            self.app.action_chat()
        elif self._on_hub or (model is not None and model.in_hub_cache):
            self._download(row.key)
        elif model is not None:
            self.app.tell(f"{model.name}: {model.problem}", "warning")

    def _download(self, repo: str) -> None:
        paused = self.app.jobs.open_of("download", repo)
        if paused is not None and paused.state == "paused":
            self.app.jobs.pause(paused)
        elif paused is None:
            self.app.jobs.start("download", repo, Download(repo=repo))

    # Actions

    def action_search(self) -> None:
        self.search.focus()

    def action_switch(self) -> None:
        self._on_hub = not self._on_hub
        self._show()

    def action_filter(self) -> None:
        self._mlx_only = not self._mlx_only
        self.app.tell("Only models in MLX format" if self._mlx_only else "Models in any format")
        if self._on_hub:
            self._search_hub()

    def action_sort(self) -> None:
        if self._on_hub:
            self._sort = (self._sort + 1) % len(_SORTS)
            self.app.tell(f"Sorted by {_SORTS[self._sort].replace('_', ' ')}")
            self._search_hub()

    def action_back(self) -> None:
        if self.search.has_focus:
            self.rows.focus()
        else:
            self.dismiss()

    def _chosen_local(self) -> LocalModel | None:
        row = self.rows.chosen
        model = self._model(row.key) if row else None
        if row is not None and model is None:
            self.app.tell("Download it first: enter does.", "warning")
        return model

    def action_delete(self) -> None:
        model = self._chosen_local()
        if model is None:
            return
        detail = f"{size(model.bytes)} in {model.folder}"
        if model.source == self.app.model.name:
            detail += "\nIt is the model that answers now."

        def done(yes: bool | None) -> None:
            if yes:
                try:
                    freed = delete_model(model)
                except OSError as error:
                    self.app.tell(f"{model.name} was not deleted: {error.strerror}", "error")
                else:
                    self.app.tell(f"Deleted {model.name}, {size(freed)} are free.")
                self._local = local_models(self.app.model_folders)
                self._redraw()

        self.app.push_screen(Confirm(f"Delete {model.name}?", detail), done)

    def action_convert(self) -> None:
        from mlxtx.tui.screens.convert import ConvertScreen

        model = self._chosen_local()
        if model is not None and model.problem:
            self.app.tell(f"{model.name}: {model.problem}", "warning")
        elif model is not None:
            self.app.push_screen(ConvertScreen(model))

    def action_adapters(self) -> None:
        from mlxtx.tui.screens.adapters import AdaptersScreen

        if (model := self._chosen_local()) is not None:
            self.app.push_screen(AdaptersScreen(model))

    # Jobs

    def _job(self) -> LongJob | None:
        """The open job of the chosen row, else the last one."""
        row = self.rows.chosen
        jobs = [job for job in self.app.jobs.all if job.open and job.kind != "train"]
        mine = [job for job in jobs if row is not None and job.title == row.key]
        found = mine or jobs
        return found[-1] if found else None

    def action_pause(self) -> None:
        if job := self._job():
            self.app.jobs.pause(job)

    def action_cancel(self) -> None:
        job = self._job()
        if job is None:
            return

        def done(yes: bool | None) -> None:
            if yes:
                self.app.jobs.cancel(job)

        self.app.push_screen(Confirm(f"Cancel: {job.label}?"), done)

    def job_changed(self, job: LongJob) -> None:
        if not job.open:
            self._local = local_models(self.app.model_folders)
            self._redraw()
        self._show_jobs()

    def _show_jobs(self) -> None:
        jobs = [job for job in self.app.jobs.all if job.kind != "train"][-4:]
        self.jobs.display = bool(jobs)
        lines = [job_line(job) for job in jobs]
        if any(job.open for job in jobs):
            lines.append(Content.styled("p pauses and goes on, x cancels", "$foreground 60%"))
        self.jobs.update(Content("\n").join(lines))


def _place(model: LocalModel) -> str:
    """Where a model lies, short: of the Hub cache the repository's folder."""
    folder = model.folder.parent.parent if model.in_hub_cache else model.folder
    if folder.is_relative_to(Path.home()):
        folder = "~" / folder.relative_to(Path.home())
    return one_line(str(folder))


def job_line(job: LongJob) -> Content:
    done = round(job.share * _BAR)
    style = "$text-error" if job.state == "failed" else "$text-primary"
    return Content.assemble(
        (f"{job.label}  ", "$foreground"),
        ("━" * done, style),
        ("━" * (_BAR - done), "$foreground 20%"),
        f"  {job.line()}",
    )


def plan_words(plan: dict[str, Any]) -> str:
    """A memory plan in two lines."""
    fit = f" · {plan['largest_context']:,} tokens fit" if plan["largest_context"] else ""
    return (
        f"weights {size(plan['weights'])} · cache {size(plan['cache_per_1k'])} for 1,000 tokens\n"
        f"{size(plan['total'])} of {size(plan['limit'])} at {plan['context']:,} tokens{fit}"
    )
