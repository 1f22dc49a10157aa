"""Prints a run's header, stores its results, and draws pictures from its metrics file."""

import platform
from dataclasses import asdict

import torch

from lesson import curves, picture
from pipeline.checkpoint import write_json
from pipeline.run import matrix_rates, read_metrics

WINDOW = 20  # the number of steps to average: curves of single batches are too noisy to read


def print_header(run, counts, cached):
    """Prints versions, corpus and model. `cached`: how many numbers a token leaves in caches."""
    o = run.options
    print(
        f"deepseek_full_model.py · Python {platform.python_version()} · torch {torch.__version__} "
        f"· {run.device} · {o.precision} · {o.optimizer} · {torch.get_num_threads()} threads "
        f"· seed {o.seed}"
    )
    rates = matrix_rates(run.device).items()
    print(f"matrix products, {torch.backends.cpu.get_cpu_capability()}: "
          + ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {name}" for name, rate in rates))
    parts = ("train", "validation", "test")
    sizes = [sum(document.size for document in run.corpus.part(part)) for part in parts]
    print(
        f"corpus {run.corpus.fingerprint}: {sizes[0]:,} bytes to train on, {sizes[1]:,} "
        f"validation, {sizes[2]:,} test; {len(run.batches.ids):,} training tokens of "
        f"{run.model.config.vocab_size}"
    )
    print(
        f"model: {counts['total']:,} parameters, {counts['active']:,} active a token, "
        f"{counts['mtp']:,} more in MTP; {cached} cached numbers a token"
    )


def save_results(run, scores, rates):
    """Writes pictures and results.json into the run's directory. Returns the pictures' paths.

    `score` and `print_scores` give `scores` and `rates` of the test part.
    """
    metrics, directory = read_metrics(run.metrics), run.directory
    pictures = [directory / "loss.png", directory / "expert_load.png"]
    draw_losses(metrics, pictures[0])
    draw_expert_load(metrics, pictures[1])
    write_json(
        directory / "results.json",
        {"bits_per_byte": rates, "test": scores, "training": asdict(run.state),
         "python": platform.python_version(), "corpus": run.corpus.fingerprint},
    )
    return pictures


def draw_losses(metrics, path):
    """Draws the training losses of the next token and of MTP against the tokens seen."""
    losses = {
        label: {line["tokens"]: line[key] for line in metrics if line.get(key) is not None}
        for label, key in (("next token", "loss"), ("token after next (MTP)", "mtp_loss"))
    }
    with picture(path) as axis:
        draw_curves(axis, losses, ylabel="cross-entropy (nats per token)")
        axis.legend()


def draw_expert_load(metrics, path):
    """Draws each layer's load of the busiest expert over the mean against the tokens seen."""
    names = {name: None for line in metrics for name in line["max_load"]}
    loads = {
        name: {m["tokens"]: m["max_load"][name] for m in metrics if name in m["max_load"]}
        for name in names
    }
    with picture(path) as axis:
        draw_curves(axis, loads, ylabel="busiest expert / mean load")
        axis.axhline(1, color="gray", linewidth=0.8, linestyle="--")
        axis.set_ylim(bottom=0.9)
        if names:
            axis.legend(ncols=2, fontsize=8)


def draw_curves(axis, series, ylabel):
    """Draws {label: {tokens: value}}. A curve may lack steps, as that of MTP does."""
    for number, (label, values) in enumerate(series.items()):
        curves(axis, [tokens / 1e6 for tokens in values], {label: list(values.values())}, WINDOW,
               colors=[f"C{number}"], xlabel="training tokens (millions)", ylabel=ylabel)
