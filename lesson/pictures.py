"""Drawings for lessons and reports: curves, panels of curves, and stacked bands."""

import contextlib
import pathlib


@contextlib.contextmanager
def picture(path, rows=1, columns=1, size=(8, 4.5), **options):
    """Yields one axis or an array of axes to draw on; then saves the picture to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", **options)
    try:
        yield axes
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    finally:
        pyplot.close(figure)


def curves(axis, x, series, window=1, colors=None, **labels):
    """Draws {label: values} against x; each curve is a mean over the last `window` values.

    With a window above 1, pale curves of the values stand behind. `labels`: title, xlabel, ylabel.
    """
    for number, (label, values) in enumerate(series.items()):
        color = f"C{number}" if colors is None else colors[number]
        recent = [values[max(0, i - window + 1) : i + 1] for i in range(len(values))]
        if window > 1:
            axis.plot(x, values, color=color, alpha=0.25, linewidth=0.8)
        axis.plot(x, [sum(part) / len(part) for part in recent], color=color, label=label)
    axis.set(**labels)
    axis.grid(alpha=0.3)


def draw_bands(path, shares_by_title, ylabel, **labels):
    """Draws `bands` side by side, for each entry of {title: shares (steps, parts)}."""
    count = len(shares_by_title)
    with picture(path, columns=count, size=(13, 3.6), sharey=True) as axes:
        for axis, (title, shares) in zip(axes, shares_by_title.items(), strict=True):
            bands(axis, shares, title=title, **labels)
        axes[0].set_ylabel(ylabel)


def panels(path, history, titles, x="step", xlabel=None, window=5, free=()):
    """Draws a panel for each of {name: title}, in two columns, from a list of {name: value}.

    A panel has the values against those of `x`, and in front their mean over `window` values. The
    y axis starts at 0, except for the names in `free`.
    """
    rows = (len(titles) + 1) // 2
    with picture(path, rows=rows, columns=2, size=(9, 3 * rows), sharex=True) as axes:
        for axis, (name, title) in zip(axes.flat, titles.items(), strict=False):
            values = {title: [line[name] for line in history]}
            steps = [line[x] for line in history]
            curves(axis, steps, values, window=window, title=title, xlabel=xlabel or x)
            if name not in free:
                axis.set_ylim(bottom=0)


def bands(axis, shares, **labels):
    """Draws shares (steps, parts) as bands on top of each other."""
    axis.stackplot(range(len(shares)), shares.T, edgecolor="white", linewidth=0.3)
    axis.set(**labels)
    axis.margins(0)
