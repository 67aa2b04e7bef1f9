"""Draws the losses of a training run, in the terminal or as a PNG.

mlxtx plot my-adapter
mlxtx plot my-adapter another-run --out losses.png
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import zlib
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from mlxtx.command_line import Parser, at_least, in_colour
from mlxtx.errors import MlxtxError

if TYPE_CHECKING:
    import numpy as np

Curve = tuple[list[float], list[float]]
SMALLEST = (120, 80)  # pixels of a picture
# Okabe and Ito's colours, which people with other colour vision can tell apart.
COLOURS = (
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (230, 159, 0),
    (86, 180, 233),
)


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="mlxtx plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("runs", nargs="+", metavar="RUN", help="folders with a metrics.jsonl")
    made.add_argument("--out", "-o", metavar="FILE.png", help="write a picture instead")
    made.add_argument(
        "--width", type=at_least(1), default=0, help="columns, or pixels of the picture"
    )
    made.add_argument("--height", type=at_least(1), default=0)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    curves: dict[str, Curve] = {}
    for run in args.runs:
        for name, curve in read_run(run).items():
            curves[f"{run}: {name.split(': ')[-1]}" if name in curves else name] = curve
    if args.out:
        from mlxtx.files import write_bytes_atomic

        width, height = args.width or 960, args.height or 540
        if width < SMALLEST[0] or height < SMALLEST[1]:
            raise MlxtxError(
                "a picture has room for its numbers from {} by {} on".format(*SMALLEST)
            )
        write_bytes_atomic(args.out, png(draw(curves, width, height)))
        for number, name in enumerate(curves):
            print(f"{_hex(number)}  {name}")
        print(args.out)
        return 0
    print(terminal(curves, args.width or None, args.height or None))
    return 0


def read_run(folder: str) -> dict[str, Curve]:
    """The curves of a run: its training loss and, where there is one, its validation loss."""
    path = Path(folder)
    path = path / "metrics.jsonl" if path.is_dir() else path
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError:
        raise MlxtxError(f"{folder} has no metrics.jsonl: is it the folder of a run?") from None
    except UnicodeDecodeError:
        raise MlxtxError(f"{path} is not UTF-8 text: is it the metrics.jsonl of a run?") from None
    curves: dict[str, Curve] = {}
    name = path.parent.name or str(path)
    for stage, about in (("train", "training loss"), ("validate", "validation loss")):
        steps, losses = [], []
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the last line of a run that is being written
            if not isinstance(entry, dict) or entry.get("stage") != stage:
                continue
            step, loss = entry.get("step"), entry.get("loss")
            # A validation loss that is no number has no place in the picture.
            if isinstance(step, int | float) and isinstance(loss, int | float) and isfinite(loss):
                steps.append(float(step))
                losses.append(float(loss))
        if steps:
            curves[f"{name}: {about}"] = (steps, losses)
    if not curves:
        raise MlxtxError(f"{path} holds no losses yet")
    return curves


def terminal(curves: dict[str, Curve], width: int | None = None, height: int | None = None) -> str:
    """The curves drawn with characters."""
    import plotext

    from mlxtx.text.inert import inert

    plotext.clear_figure()
    plotext.plotsize(width or min(100, plotext.terminal_width() or 100), height or 24)
    plotext.theme("pro")
    for name, (steps, losses) in curves.items():
        plotext.plot(steps, losses, label=inert(name))
    plotext.xlabel("step")
    drawn = plotext.build()
    return drawn if in_colour(sys.stdout) else plotext.uncolorize(drawn)


# A picture without a plotting library: lines on a white page.


def _hex(number: int) -> str:
    return "#{:02x}{:02x}{:02x}".format(*COLOURS[number % len(COLOURS)])


def draw(curves: dict[str, Curve], width: int, height: int) -> np.ndarray:
    """Pixels [height, width, 3] of all curves over the same axes, with ticks and their numbers."""
    import numpy as np

    page = np.full((height, width, 3), 255, np.uint8)
    left, right, top, bottom = 70, 20, 20, 40
    steps = [s for xs, _ in curves.values() for s in xs]
    losses = [v for _, ys in curves.values() for v in ys]
    x0, x1 = min(steps), max(max(steps), min(steps) + 1)
    y0, y1 = min(losses), max(losses)
    pad = (y1 - y0) * 0.05 or 0.5
    y0, y1 = y0 - pad, y1 + pad

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (x - x0) / (x1 - x0) * (width - left - right)
        return across, top + (y1 - y) / (y1 - y0) * (height - top - bottom)

    for part in range(6):
        value = y0 + (y1 - y0) * part / 5
        _, row = place(x0, value)
        page[round(row), left : width - right] = 225
        write(page, f"{value:.3g}", 8, round(row) - 5)
        step = x0 + (x1 - x0) * part / 5
        column, _ = place(step, y0)
        page[top : height - bottom, round(column)] = 240
        write(page, f"{step:.0f}", round(column) - 12, height - bottom + 12)
    for number, (xs, ys) in enumerate(curves.values()):
        points = [place(x, y) for x, y in zip(xs, ys, strict=True)]
        colour = COLOURS[number % len(COLOURS)]
        for a, b in zip(points, points[1:] or points, strict=False):
            line(page, a, b, colour)
    return page


def line(page, a, b, colour) -> None:
    """A line two pixels thick."""
    import numpy as np

    count = int(max(abs(b[0] - a[0]), abs(b[1] - a[1]))) + 2
    columns = np.linspace(a[0], b[0], count).round().astype(int)
    rows = np.linspace(a[1], b[1], count).round().astype(int)
    for down in (0, 1):
        for across in (0, 1):
            page[
                np.clip(rows + down, 0, len(page) - 1),
                np.clip(columns + across, 0, page.shape[1] - 1),
            ] = colour


# Digits of 3 by 5 pixels, one row after the other.
_FONT = {
    "0": "111101101101111", "1": "010110010010111", "2": "111001111100111",
    "3": "111001111001111", "4": "101101111001001", "5": "111100111001111",
    "6": "111100111101111", "7": "111001001001001", "8": "111101111101111",
    "9": "111101111001111", ".": "000000000000010", "-": "000000111000000",
    "+": "000010111010000", "e": "000111111100111",
}  # fmt: skip


def write(page, text: str, column: int, row: int, size: int = 2) -> None:
    """Numbers, in pixels."""
    import numpy as np

    for character in text:
        bits = np.array([int(c) for c in _FONT.get(character, "0" * 15)]).reshape(5, 3)
        big = np.kron(bits, np.ones((size, size), int)).astype(bool)
        area = page[row : row + 5 * size, column : column + 3 * size]
        if area.shape[:2] == big.shape:
            area[big] = 60
        column += 4 * size


def png(page: np.ndarray) -> bytes:
    """A PNG file (https://www.w3.org/TR/png-3/) of pixels [height, width, 3]."""
    height, width, _ = page.shape
    rows = b"".join(b"\0" + page[row].tobytes() for row in range(height))

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    )


if __name__ == "__main__":
    from mlxtx.cli import run

    raise SystemExit(run(lambda rest: main(rest), sys.argv[1:]))
