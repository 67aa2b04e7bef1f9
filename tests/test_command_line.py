"""What the commands share: progress on a terminal, Ctrl-C, the model that answers by default."""

from __future__ import annotations

import io
import signal

import pytest

from mlxtx import default_model as default
from mlxtx.command_line import ProgressLine, stats_line, stop_on_interrupt
from mlxtx.events import Loaded, Prefill, Progress, Stats
from mlxtx.language_model import load


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def seen(text: str) -> list[str]:
    """What stood on the line, one entry a drawing."""
    return [part.rstrip() for part in text.split("\r")]


def test_progress_overwrites_one_line_and_cleans_up():
    screen = Terminal()
    with ProgressLine(screen) as line:
        line.show(Progress(stage="download", done=5e6, total=2e7, unit="bytes", seconds=10))
        line.show(Progress(stage="train", done=1, total=4, unit="steps"))
        line.show(Prefill(done=10, total=2000))
        line.show(Prefill(done=2000, total=2000))
        line.show(Prefill(done=1, total=2))
        line.show(Loaded(model="m", seconds=1.0, bytes=1))
    drawn = seen(screen.getvalue())
    assert drawn == [
        "",
        "download 5 of 20 MB, 30 s left",
        "train 1 of 4 steps",
        "reading the prompt: 10 of 2,000 tokens",
        "",
        "",
        "reading the prompt: 1 of 2 tokens",
        "",
        "",
    ]
    # A shorter line covers all of a longer one before it.
    widths = [len(part) for part in screen.getvalue().split("\r")]
    assert widths[2] >= widths[1] and "\n" not in screen.getvalue()


def test_progress_is_silent_where_there_is_no_terminal():
    file = io.StringIO()
    with ProgressLine(file) as line:
        line.show(Progress(stage="load", done=1, total=2, unit="bytes"))
    assert file.getvalue() == ""


def test_the_first_interrupt_sets_the_flag_and_the_second_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop_on_interrupt() as flag:
        assert not flag()
        signal.raise_signal(signal.SIGINT)
        assert flag()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_stats_line_says_what_was_reused():
    stats = Stats(prompt_tokens=10, reused_tokens=4, generated_tokens=3)
    assert stats_line(stats, "stop_string").startswith("10 prompt tokens (4 from the cache) at")
    assert stats_line(stats, "stop_string").endswith("ended by: stop string")


@pytest.fixture
def no_bundled_model(tmp_path, monkeypatch):
    """A user's cache folder, and a package without a model."""
    monkeypatch.setattr(default, "BUNDLED", tmp_path / "bundled")
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / "cache" / name))
    return tmp_path


def test_the_stand_in_is_written_once_and_says_what_it_is(no_bundled_model):
    folder, notice = default.default_model()
    assert "random weights" in notice and "mean nothing" in notice and "--model" in notice
    assert folder.is_relative_to(no_bundled_model / "cache" / "mlxtx")
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert default.default_model()[0] == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert load(folder).generate("Hello", max_tokens=3).text


def test_a_bundled_model_comes_first(no_bundled_model):
    (no_bundled_model / "bundled").mkdir()
    (no_bundled_model / "bundled" / "config.json").write_text("{}")
    folder, notice = default.default_model()
    assert folder == no_bundled_model / "bundled" and "random" not in notice


def test_without_a_cache_folder_a_temporary_one_will_do(no_bundled_model):
    (no_bundled_model / "cache").write_text("a file where the folder should be")
    folder, _ = default.default_model()
    assert (folder / "config.json").is_file()
