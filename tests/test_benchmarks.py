"""The benchmarks run, print and save; what they time is theirs: no test looks at a clock."""

import json
import pathlib
import sys

import pytest
import torch

from benchmarks import measure


@pytest.fixture
def beside(monkeypatch):
    """The benchmarks can be imported as their scripts import each other."""
    monkeypatch.syspath_prepend(pathlib.Path(measure.__file__).parent)


@pytest.mark.integration
@pytest.mark.parametrize("name", ["against_transformers", "scaling"])
def test_quick_run_prints_and_saves(name, run_script, trained, tmp_path):
    more = ["--checkpoint", trained] if name == "against_transformers" else []
    result = run_script(f"benchmarks/{name}.py", "--quick", *more, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{name}.py · processor") and "repeats 2" in result.stdout
    saved = json.loads((tmp_path / f"benchmark_results/{name}.json").read_text())
    assert saved["quick"] and saved["machine"]["threads"] >= 1 and saved["config"]["hidden_size"]
    assert (tmp_path / f"benchmark_results/{name}.png").stat().st_size > 10_000
    if name == "against_transformers":
        assert "smoke test, no figures" in result.stdout
        assert "1 of 1 texts the same as plain" in result.stdout
        assert len(saved["ratios"]) == 9 and min(saved["ratios"].values()) > 0


@pytest.mark.integration
def test_quick_run_of_the_quantisation_benchmark(run_script, tmp_path):
    result = run_script("benchmarks/quantization.py", "--quick", "--parts", "kernels", timeout=180)
    assert result.returncode == 0, result.stderr
    saved = json.loads((tmp_path / "benchmark_results/quantization.json").read_text())
    assert saved["quick"] and set(saved["results"]) == {"kernels"}
    assert len(saved["results"]["kernels"]["ratios"]) == 4 and "256 rows times" in result.stdout


@pytest.mark.integration
@pytest.mark.parametrize("name", ["against_transformers", "scaling", "quantization"])
def test_a_wrong_flag_is_one_line(name, run_script):
    result = run_script(f"benchmarks/{name}.py", "--repeats", "0")
    assert result.returncode == 2
    assert result.stderr == "error: --repeats=0 must be at least 1\n"


def test_medians_come_from_interleaved_calls_after_a_warm_up(monkeypatch):
    calls, now = [], [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    lasts = {"a": iter([100.0, 1.0, 5.0, 2.0]), "b": iter([100.0, 8.0, 7.0, 6.0])}

    def work(name):
        calls.append(name)
        now[0] += next(lasts[name])

    medians = measure.interleaved({name: lambda name=name: work(name) for name in "ab"}, 3)
    assert calls == ["a", "b"] * 4 and medians == {"a": 2.0, "b": 7.0}


@pytest.mark.integration
def test_quick_run_beside_dense_models(run_script, trained, tmp_path):
    result = run_script("benchmarks/dense.py", "--quick", "--checkpoint", trained, timeout=180)
    assert result.returncode == 0, result.stderr
    saved = json.loads((tmp_path / "benchmark_results/dense.json").read_text())
    assert [row["model"] for row in saved["rows"]] == [*measure.DENSE, "this model"]
    assert all(row["tokens"] > 0 and row["bits per byte"] > 0 for row in saved["rows"])
    for rows in saved["grid"].values():
        assert len({(row["size"], row["rate"], row["batch"]) for row in rows}) == 12
        assert len({row["batch"] for row in rows if row["size"] != "middle"}) == 1
    assert list(saved["ratios"]) == [measure.FEWER.format(name) for name in measure.DENSE]


def test_turns_give_every_contender_its_seconds(beside, monkeypatch):
    import dense

    now, order = [0.0], []
    monkeypatch.setattr(dense.time, "perf_counter", lambda: now[0])

    class Contender:
        def __init__(self, name, lasts):
            self.name, self.lasts, self.seconds, self.tokens, self.used = name, lasts, 0.0, 0, []

        def step(self, used):
            self.used.append(used)
            order.append(self.name)
            now[0] += self.lasts
            return 10

    fast, slow = Contender("fast", 1.0), Contender("slow", 4.0)
    dense.by_turns([fast, slow], 16.0, "")
    assert "".join(name[0] for name in order) == "fffffssssfffffffffff"
    assert (fast.tokens, slow.tokens) == (160, 40) and slow.used == [0, 0.25, 0.5, 0.75]


@pytest.mark.comparison
def test_dense_models_are_scored_as_this_one(beside, trained):
    import dense
    from transformers import DeepseekV3ForCausalLM

    from deepseek_full_model import DeepSeekModel
    from pipeline import corpus
    from pipeline.scoring import score

    model = DeepSeekModel.from_pretrained(trained / "checkpoint")
    theirs = DeepseekV3ForCausalLM.from_pretrained(trained / "checkpoint")
    tokenizer = corpus.load_tokenizer(trained / "checkpoint" / "tokenizer.json")
    documents = [corpus.Document(str(n), f"def f_{n}(x):\n    return {n}\n" * n) for n in (1, 9)]
    rate = dense.bits_per_byte(theirs, tokenizer, documents, model.config.max_position_embeddings)
    assert rate == pytest.approx(score(model, tokenizer, documents)["bits_per_byte"], rel=1e-5)


@pytest.mark.parametrize("kind", measure.DENSE)
def test_dense_models_have_their_size_and_no_dropout(beside, kind):
    import dense

    model = dense.dense_model(kind, "small", vocabulary=50, context=16).train()
    ids = torch.randint(50, (1, 16))
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert model.get_input_embeddings().weight.shape == (50, 192)


# %% Aims
def test_aims_depend_on_the_mode():
    row = "training step"
    assert measure.judged(row, 1.3, "AVX2")[""] == "reached"
    assert measure.judged(row, 1.3, measure.FAST_BF16)[""] == "falls short"
    assert measure.judged(row, 1.3, "AVX-512") == {
        "work": row, "figure": "1.30", "aim": "≥ 1.25", "": "reached",
    }
    assert "AVX2" in measure.note_on_aims("AVX-512") and not measure.note_on_aims("AVX2")
    at_most, below = "main job, minutes", measure.LZMA
    assert measure.judged(at_most, 10.0, "AVX2")[""] == "reached"
    assert measure.judged(below, 1.0, "AVX2")[""] == "falls short"


def test_a_row_without_an_aim_is_a_figure():
    row = measure.judged("bits per byte, test part", 1.7, "AVX2", digits=4)
    assert row == {"work": "bits per byte, test part", "figure": "1.7000", "aim": "", "": ""}
    assert measure.judged("tokens a second", 1448, "AVX2", digits=0)["figure"] == "1,448"


@pytest.mark.parametrize(("capability", "fastest", "mode"), [
    ("AVX2", "float32", "AVX2"), ("AVX512", "float32", "AVX-512"),
    ("AVX512", "bfloat16", measure.FAST_BF16), ("AVX2", "bfloat16", "AVX2 with BF16"),
    ("DEFAULT", "float32", "DEFAULT"),
])
def test_the_mode_has_a_name(monkeypatch, capability, fastest, mode):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr("pipeline.run.fastest_precision", lambda device: fastest)
    assert measure.mode() == mode


@pytest.mark.integration
def test_a_process_is_measured_with_its_children(tmp_path):
    code = ("import subprocess, sys, time; x = bytearray(60_000_000); print('kept');"
            "subprocess.run([sys.executable, '-c', 'import time; x = bytearray(60_000_000);"
            "time.sleep(1)']); sys.exit(3)")
    log = tmp_path / "log"
    result = measure.measured_process([sys.executable, "-c", code], log, every=0.05)
    assert result["returncode"] == 3 and log.read_text() == "kept\n"
    if result["peak_mb"] is not None:
        assert result["peak_mb"] >= 60
    if result["all_mb"] is not None:
        assert result["all_mb"] >= 120
    peak = measure.own_peak()
    assert peak is None or peak > 50
