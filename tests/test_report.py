"""Pictures of a run."""

from pipeline import report


def test_pictures_are_drawn(tmp_path):
    metrics = [
        {"tokens": 1000 * i, "loss": 5.0 / i, "mtp_loss": 6.0 / i, "max_load": {"layer 1": 1.5}}
        for i in range(1, 40)
    ]
    report.draw_losses(metrics, tmp_path / "loss.png")
    report.draw_expert_load(metrics, tmp_path / "load.png")
    for line in metrics:
        line["mtp_loss"], line["max_load"] = None, {}
    report.draw_losses(metrics, tmp_path / "dense_loss.png")
    report.draw_expert_load(metrics, tmp_path / "dense_load.png")
    assert all(
        (tmp_path / n).read_bytes()[:4] == b"\x89PNG" for n in ("loss.png", "dense_load.png")
    )
