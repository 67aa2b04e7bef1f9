"""What the commands share: progress on a terminal, Ctrl-C, the model that answers by default."""

from __future__ import annotations

import io
import json
import os
import signal
import struct

import pytest

from mlxtx.cli import main
from mlxtx.command_line import ProgressLine, in_colour, stats_line, stop_on_interrupt, to_json
from mlxtx.default_model import default_model
from mlxtx.events import Loaded, Prefill, Progress, Stats
from mlxtx.language_model import load
from tests.tiny_model import tiny_folder


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


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals on this system")
@pytest.mark.parametrize(("columns", "shown"), [(20, 19), (0, 38), (80, 38)])
def test_progress_fits_the_terminal(columns, shown):
    """A longer line would be broken in two, of which only the second is overwritten."""
    import fcntl
    import termios

    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(slave, "w") as screen:
        line = ProgressLine(screen)
        line.show(Prefill(done=10, total=2000))
        drawn = os.read(master, 100).decode()
        assert line.width == shown
    os.close(master)
    assert drawn == "\r" + "reading the prompt: 10 of 2,000 tokens"[:shown]


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "dumb"}, False),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "xterm", "NO_COLOR": ""}, True),
    ],
)
def test_colours_are_for_terminals_that_want_them(variables, wanted, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert in_colour(Terminal()) is wanted
    assert in_colour(io.StringIO()) is False


def test_json_has_no_infinity_and_no_nan():
    figures = {"loss": float("nan"), "parts": [(1.5, float("inf")), {"a": -float("inf")}], "n": 3}
    found = json.loads(to_json(figures), parse_constant=pytest.fail)
    assert found == {"loss": None, "parts": [[1.5, None], {"a": None}], "n": 3}


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


def test_the_model_of_the_package_answers_by_default():
    folder, notice = default_model()
    assert (folder / "config.json").is_file()
    assert "built-in guide" in notice and "--model" in notice
    guide = load(folder)
    answer = guide.generate([{"role": "user", "content": "What is mlxtx?"}], max_tokens=64)
    assert answer.finish_reason == "stop" and "mlxtx" in answer.text


@pytest.mark.parametrize(
    "line",
    [
        ["evaluate", "-m", "MODEL", "--data", "DATA"],
        ["kv-check", "MODEL", "--tokens", "40", "--kv", "k8v8g32"],
        ["cache", "--folder", "KEPT", "build", "MODEL", "--text", "DATA"],
        ["lora", "-m", "MODEL", "--data", "DATA", "--dry-run"],
    ],
)
def test_who_waits_for_a_model_sees_why(line, tmp_path, monkeypatch, capsys):
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b c"}\n')
    names = {"MODEL": tiny_folder(), "DATA": tmp_path / "data.jsonl", "KEPT": tmp_path / "kept"}
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    assert main([str(names.get(word, word)) for word in line]) == 0
    drawn = seen(screen.getvalue())
    assert any(part.startswith("load ") for part in drawn), drawn
    assert drawn[-1] == "" and "\r" not in capsys.readouterr().out
