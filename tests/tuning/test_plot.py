"""Plots of a run: the curves of its metrics, in characters and as a PNG that a reader can decode."""

from __future__ import annotations

import json
import struct
import zlib

import numpy as np
import pytest
from mlxtx.scripts import plot

from mlxtx.errors import MlxtxError


def write_run(folder, losses):
    folder.mkdir()
    lines = [{"step": n, "stage": "train", "loss": v} for n, v in enumerate(losses, 1)]
    lines += [{"step": 2, "stage": "validate", "loss": 1.5}, {"step": 3, "stage": "skip"}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 9, "st')


def decode(data):
    """Width, height and pixels of a PNG with plain 8-bit rows."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, pixels, size = 8, b"", (0, 0)
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        (check,) = struct.unpack(">I", data[at + 8 + length : at + 12 + length])
        assert check == zlib.crc32(kind + body)
        if kind == b"IHDR":
            size = struct.unpack(">II", body[:8])
        pixels += body if kind == b"IDAT" else b""
        at += 12 + length
    rows = np.frombuffer(zlib.decompress(pixels), np.uint8).reshape(size[1], -1)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(size[1], size[0], 3)


def test_the_picture_shows_each_curve_where_its_numbers_are(tmp_path, capsys):
    write_run(tmp_path / "run", [4.0, 3.0, 2.0, 1.0])
    out = tmp_path / "loss.png"
    assert plot.main([str(tmp_path / "run"), "--out", str(out), "--width", "400"]) == 0
    page = decode(out.read_bytes())
    assert page.shape == (540, 400, 3)
    drawn = np.argwhere((page == plot.COLOURS[0]).all(-1))
    first, last = drawn[drawn[:, 1].argmin()], drawn[drawn[:, 1].argmax()]
    assert first[0] < 60 and last[0] > 450  # falls from the top left to the bottom right
    assert drawn[:, 1].min() == 70 and drawn[:, 1].max() in (380, 381)
    assert "run: training loss" in capsys.readouterr().out


def test_the_terminal_shows_the_same(tmp_path, capsys):
    write_run(tmp_path / "run", [4.0, 3.0])
    plot.main([str(tmp_path / "run"), "--width", "60", "--height", "12"])
    out = capsys.readouterr().out
    assert "run: training loss" in out and "run: validation loss" in out


def test_runs_of_the_same_name_are_all_drawn(tmp_path, capsys):
    """``adapters`` is the name of every run that was given none."""
    for number, first in enumerate((4.0, 8.0)):
        (tmp_path / str(number)).mkdir()
        write_run(tmp_path / str(number) / "adapters", [first, 1.0])
    runs = [str(tmp_path / str(number) / "adapters") for number in range(2)]
    plot.main([*runs, "--out", str(tmp_path / "loss.png")])
    told = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1] for line in told[:-1]] == [
        "adapters: training loss", "adapters: validation loss",
        f"{runs[1]}: training loss", f"{runs[1]}: validation loss",
    ]  # fmt: skip


def test_losses_that_are_no_numbers_are_left_out(tmp_path, capsys):
    write_run(tmp_path / "run", [4.0, float("nan"), float("inf"), 1.0])
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('\n[1]\n"x"\n{"stage": "train", "loss": 1.0}\n')
    assert plot.read_run(str(tmp_path / "run"))["run: training loss"] == ([1.0, 4.0], [4.0, 1.0])
    plot.main([str(tmp_path / "run"), "--width", "60", "--height", "12"])
    assert "run: training loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "x.png", "--width", "10"], "from 120 by 80 on"),
        (["--height", "-3"], "must be 1 or more, not -3"),
        (["--height", "three"], "invalid int value: 'three'"),
        (["--out", "."], "names no file"),
    ],
)
def test_impossible_pictures_are_one_line(tmp_path, options, message):
    write_run(tmp_path / "run", [4.0, 3.0])
    with pytest.raises(MlxtxError, match=message):
        plot.main([str(tmp_path / "run"), *options])


def test_what_is_no_run(tmp_path):
    with pytest.raises(MlxtxError, match=r"has no metrics.jsonl"):
        plot.main([str(tmp_path)])
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(MlxtxError, match="holds no losses yet"):
        plot.main([str(tmp_path)])


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_no_colours_where_none_are_wanted(variable, value, tmp_path, monkeypatch):
    write_run(tmp_path / "run", [2.0, 1.0])
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    curves = plot.read_run(str(tmp_path / "run"))
    assert "\x1b[" in plot.terminal(curves, 60, 12)
    monkeypatch.setenv(variable, value)
    assert "\x1b[" not in plot.terminal(curves, 60, 12)


def test_metrics_that_are_no_text_are_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(MlxtxError, match="not UTF-8"):
        plot.read_run(str(tmp_path))
