"""Pictures and results of a run."""

import dataclasses
from types import SimpleNamespace

import pytest

from pipeline import report
from pipeline.checkpoint import read_json


@pytest.fixture
def drawn(monkeypatch):
    """The axis of each picture that was saved, instead of its file."""
    from matplotlib import figure

    axes = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: axes.extend(self.axes))
    return axes


def lines_of(axis):
    """{label: (x, y)} of the curves that have one."""
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for line in axis.lines if not line.get_label().startswith("_")
    }


def test_losses_are_means_over_the_last_steps_against_millions_of_tokens(
    tmp_path, drawn, monkeypatch
):
    monkeypatch.setattr(report, "WINDOW", 2)
    metrics = [{"tokens": 1_000_000, "loss": 5.0}, {"tokens": 2_000_000, "loss": 3.0},
               {"tokens": 4_000_000, "loss": 2.0, "mtp_loss": 6.0}]
    report.draw_losses(metrics, tmp_path / "loss.png")
    (axis,) = drawn
    assert lines_of(axis) == {
        "next token": ([1, 2, 4], [5, 4, 2.5]), "token after next (MTP)": ([4], [6])
    }
    assert [text.get_text() for text in axis.get_legend().get_texts()] == list(lines_of(axis))
    assert axis.get_xlabel() == "training tokens (millions)" and "nats" in axis.get_ylabel()
    colors = [line.get_color() for line in axis.lines]
    assert colors[0] == colors[1] != colors[2] == colors[3]  # values and means


def test_each_layers_load_has_a_curve_and_an_even_load_is_marked(tmp_path, drawn):
    loads = [{}, {"layer 1": 1.5}, {"layer 1": 2.5, "MTP 1": 3.0}]
    metrics = [{"tokens": 10**6 * i, "max_load": load} for i, load in enumerate(loads)]
    report.draw_expert_load(metrics, tmp_path / "load.png")
    report.draw_expert_load(metrics[:1], tmp_path / "dense.png")
    assert lines_of(drawn[0]) == {"layer 1": ([1, 2], [1.5, 2]), "MTP 1": ([2], [3])}
    assert list(drawn[0].lines[-1].get_ydata()) == [1, 1]
    assert all(0 < axis.get_ylim()[0] < 1 for axis in drawn)
    assert drawn[0].get_legend() and not lines_of(drawn[1]) and not drawn[1].get_legend()


def test_results_hold_scores_rates_and_state_beside_the_pictures(tmp_path):
    @dataclasses.dataclass
    class State:
        step: int = 2

    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "tokens": 5, "loss": 4.0, "mtp_loss": null, "max_load": {}}\n'
    )
    run = SimpleNamespace(
        directory=tmp_path, metrics=tmp_path / "metrics.jsonl", state=State(),
        corpus=SimpleNamespace(fingerprint="abc"),
    )
    pictures = report.save_results(run, {"loss": 1.5}, {"model": 2.5})
    assert len(pictures) == 2
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    results = read_json(tmp_path / "results.json")
    assert results.pop("python")
    assert results == {
        "bits_per_byte": {"model": 2.5}, "test": {"loss": 1.5}, "training": {"step": 2},
        "corpus": "abc",
    }
