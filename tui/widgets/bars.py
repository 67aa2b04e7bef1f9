"""The one-line bars of the screens: the title above, the meters and the key hints below."""

from __future__ import annotations

from dataclasses import dataclass

from mlxtx.tui.actions import ACTIONS, key_name, keys_of
from mlxtx.tui.clean import duration, one_line, size
from rich.cells import cell_len
from textual.content import Content
from textual.style import Style
from textual.widget import Widget

_GAP = " · "
_HINT_GAP = "   "


class Bar(Widget):
    """One line with a left and a right part; the left one is cut when both do not fit."""

    left = Content("")
    right = Content("")

    def __init__(self) -> None:
        super().__init__()
        # A key that can be clicked is coloured already; underlining all of them is noise.
        self.auto_links = False

    def show(self, left: Content | None = None, right: Content | None = None) -> None:
        changed = False
        if left is not None and not left.is_same(self.left):
            self.left, changed = left, True
        if right is not None and not right.is_same(self.right):
            self.right, changed = right, True
        if changed:
            self.refresh()

    def render(self) -> Content:
        width = self.content_size.width
        right = self.right.truncate(width, ellipsis=True)
        room = max(0, width - cell_len(right.plain) - (2 if right.plain else 0))
        left = self.left.truncate(room, ellipsis=True)
        space = width - cell_len(left.plain) - cell_len(right.plain)
        return left + Content(" " * max(0, space)) + right


class TitleBar(Bar):
    """Where you are, left, and which model answers, right."""

    def __init__(self, title: str = "") -> None:
        super().__init__()
        if title:
            self.set(title)

    def set(self, title: str, model: str = "") -> None:
        left = Content.assemble(
            ("mlxtx", "$text-primary bold"), "  ", (one_line(title, 120), "$foreground")
        )
        self.show(left, Content.styled(one_line(model, 60), "$foreground"))


@dataclass
class Figures:
    """What the meters show; None and 0 are left out."""

    status: str = ""
    prefill_done: int = 0
    prefill_total: int = 0
    prefill_seconds: float = 0.0
    speed: float = 0.0
    first_token: float = 0.0
    context_used: int = 0
    context_size: int | None = None
    cache_bytes: int = 0
    cache_setting: str = ""
    memory: int = 0
    memory_limit: int | None = None
    failed: bool = False


class Meters(Bar):
    """Status and speed on the left; context, cache and memory on the right. A narrow terminal
    has shorter forms, and the least important figures are left out, whole."""

    figures = Figures()

    def set(self, figures: Figures) -> None:
        self.figures = figures
        self._arrange()

    def on_resize(self) -> None:
        self._arrange()

    def _arrange(self) -> None:
        left, right = arrange(self.figures, self.content_size.width)
        style = "$text-error" if self.figures.failed else ""
        self.show(Content.styled(left, style), Content(right))


def arrange(f: Figures, width: int) -> tuple[str, str]:
    """The left and the right text of the meters for a line of ``width`` cells."""
    speed = f"{f.speed:.1f} tok/s" if f.speed else ""
    first = f"first {duration(f.first_token)}" if f.first_token else ""
    # Side, the short form, the long form; the most important first.
    parts = [
        ("left", f.status, f.status),
        ("left", *_reading(f)),
        ("left", speed, speed),
        ("right", *_context(f)),
        ("right", *_memory(f)),
        ("left", first, first),
        ("right", *_cache(f)),
    ]
    room = width + len(_GAP) - 2
    kept: list[tuple[str, str, str]] = []
    for side, short, long in parts:
        if short and (cell_len(short) + len(_GAP) <= room or not kept):
            room -= cell_len(short) + len(_GAP)
            kept.append((side, short, long))
    shown: dict[str, list[str]] = {"left": [], "right": []}
    for side, short, long in kept:
        fits = cell_len(long) - cell_len(short) <= room
        room -= cell_len(long) - cell_len(short) if fits else 0
        shown[side].append(long if fits else short)
    return _GAP.join(shown["left"]), _GAP.join(shown["right"])


def _reading(f: Figures) -> tuple[str, str]:
    if not f.prefill_total or f.prefill_done >= f.prefill_total:
        return "", ""
    text = f"reading {f.prefill_done / f.prefill_total:.0%}"
    left = ""
    if f.prefill_done and f.prefill_seconds:
        seconds = f.prefill_seconds * (f.prefill_total - f.prefill_done) / f.prefill_done
        left = f", {duration(seconds)} left"
    return text + left, f"reading {f.prefill_done:,} of {f.prefill_total:,} tokens{left}"


def _context(f: Figures) -> tuple[str, str]:
    if not f.context_used:
        return "", ""
    text = f"context {f.context_used:,}"
    if not f.context_size:
        return text, text
    share = f.context_used / f.context_size
    return f"context {share:.0%}", f"{text} / {f.context_size:,} ({share:.0%})"


def _memory(f: Figures) -> tuple[str, str]:
    if not f.memory:
        return "", ""
    text = f"memory {size(f.memory)}"
    return text, f"{text} / {size(f.memory_limit)}" if f.memory_limit else text


def _cache(f: Figures) -> tuple[str, str]:
    if not f.cache_bytes:
        return "", ""
    text = f"cache {size(f.cache_bytes)}"
    return text, f"{text} {f.cache_setting}".rstrip()


class Hints(Bar):
    """The keys of the screen, from the table of actions; each can be clicked. Those that have no
    room are left out whole."""

    def __init__(self, *areas: str, extra: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__()
        self._areas, self._extra = areas, extra
        self._parts: list[Content] = []

    def on_mount(self) -> None:
        self.choose(*self._areas, extra=self._extra)

    def choose(self, *areas: str, extra: tuple[tuple[str, str], ...] = ()) -> None:
        """Show the keys of ``areas``, after those of ``extra``."""
        chosen = getattr(self.app, "settings").keys  # noqa: B009
        self._parts = [_hint(key, word) for key, word in extra]
        for action in (a for area in areas for a in ACTIONS if a.area == area and a.hint):
            name = action.name.removeprefix("screen.")
            target = "app" if action.area == "app" else "screen"
            click = Style.from_meta({"@click": f"{target}.{name}"})
            keys = key_name(keys_of(action, chosen))
            self._parts.append(_hint(keys, action.hint).stylize(click))
        self.refresh()

    def render(self) -> Content:
        room = self.content_size.width
        shown = []
        for part in self._parts:
            room -= part.cell_length + len(_HINT_GAP)
            if room + len(_HINT_GAP) < 0:
                break
            shown.append(part)
        return Content(_HINT_GAP).join(shown)


def _hint(key: str, word: str) -> Content:
    return Content.assemble((key, "$text-primary"), f" {word}")
