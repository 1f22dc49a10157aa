"""Drawings that lessons and reports need: curves, panels of them, and bands that add up."""

import contextlib
import pathlib


@contextlib.contextmanager
def picture(path, rows=1, columns=1, size=(8, 4.5), **options):
    """Yields axes to draw on, one or an array; at the end the picture is in `path`."""
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
    """Draws {label: values} against x, each as a mean over the last `window` values.

    With a window above 1 the values themselves stand behind, pale. `labels`: title, xlabel, ylabel.
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
    """A picture of `bands` side by side, one for each {title: shares (steps, parts)}."""
    count = len(shares_by_title)
    with picture(path, columns=count, size=(13, 3.6), sharey=True) as axes:
        for axis, (title, shares) in zip(axes, shares_by_title.items(), strict=True):
            bands(axis, shares, title=title, **labels)
        axes[0].set_ylabel(ylabel)


def panels(path, history, titles, x="step", xlabel=None, window=5, free=()):
    """Draws {name: title} from a list of {name: value}: a picture for each, in two columns.

    Each is a curve against the values of `x`, its mean over `window` values in front. The y axis
    starts at 0, but for the names in `free`.
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
    """Draws shares (steps, parts), which add up at every step, as bands on top of each other."""
    axis.stackplot(range(len(shares)), shares.T, edgecolor="white", linewidth=0.3)
    axis.set(**labels)
    axis.margins(0)
