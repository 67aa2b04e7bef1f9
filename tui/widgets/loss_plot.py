"""The loss over the steps, drawn with plotext."""

from __future__ import annotations

from textual.color import Color
from textual_plotext import PlotextPlot

# More points than cells can't be seen; the last ones always are.
_MOST_POINTS = 400

Points = list[tuple[int, float]]


class LossPlot(PlotextPlot):
    """``show`` takes (step, loss) of training and of validation."""

    def show(self, losses: Points, validation: Points) -> None:
        plot = self.plt
        plot.clear_data()
        plot.clear_figure()
        variables = self.app.theme_variables
        for points, name, colour in (
            (losses, "loss", "primary"),
            (validation, "validation", "accent"),
        ):
            points = _thinned(points)
            if points:
                steps, values = zip(*points, strict=True)
                rgb = Color.parse(variables[colour]).rgb
                plot.plot(steps, values, label=name, color=rgb, marker="braille")
        plot.xlabel("step")
        self.refresh()


def _thinned(points: Points) -> Points:
    step = max(1, len(points) // _MOST_POINTS)
    return points[::-1][::step][::-1]
