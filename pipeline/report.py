"""Pictures of a run, drawn from its metrics file."""

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402


def _smooth(values, window=20):
    """Mean over the last `window` values, so that a curve of single batches can be read."""
    return [
        sum(values[max(0, i - window + 1) : i + 1]) / len(values[max(0, i - window + 1) : i + 1])
        for i in range(len(values))
    ]


def draw_losses(metrics, path):
    """Training loss of the next token and of the MTP module against tokens seen."""
    tokens = [line["tokens"] / 1e6 for line in metrics]
    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    curves = {"next token": "loss", "token after next (MTP)": "mtp_loss"}
    for (label, key), color in zip(curves.items(), ("tab:blue", "tab:orange"), strict=True):
        values = [line[key] for line in metrics if line.get(key) is not None]
        if len(values) == len(tokens):
            axis.plot(tokens, values, color=color, alpha=0.2, linewidth=0.7)
            axis.plot(tokens, _smooth(values), color=color, label=label)
    axis.set(xlabel="training tokens (millions)", ylabel="cross-entropy (nats per token)")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_expert_load(metrics, path):
    """Busiest expert's load over the mean, layer by layer, against tokens seen."""
    tokens = [line["tokens"] / 1e6 for line in metrics]
    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    names = list(metrics[0]["max_load"])
    for i, name in enumerate(names):
        color = pyplot.cm.viridis(i / max(1, len(names)))
        axis.plot(tokens, _smooth([line["max_load"][name] for line in metrics]), color=color,
                  label=name)  # fmt: skip
    axis.axhline(1, color="gray", linewidth=0.8, linestyle="--")
    axis.set(xlabel="training tokens (millions)", ylabel="busiest expert / mean load")
    axis.set_ylim(bottom=0.9)
    axis.grid(alpha=0.3)
    if names:
        axis.legend(ncols=2, fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
