"""The benchmarks run, print and save; what they time is theirs: no test looks at a clock."""

import json
import pathlib
import sys

import pytest
import torch

from benchmarks import measure

ROOT = pathlib.Path(measure.__file__).parent.parent


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
        assert saved["ratios"].keys() >= TIMED
        assert len(saved["ratios"]) == 9 and min(saved["ratios"].values()) > 0


@pytest.mark.integration
def test_quick_run_of_the_quantisation_benchmark(run_script, tmp_path):
    result = run_script("benchmarks/quantization.py", "--quick", "--parts", "kernels", timeout=180)
    assert result.returncode == 0, result.stderr
    saved = json.loads((tmp_path / "benchmark_results/quantization.json").read_text())
    assert saved["quick"] and set(saved["results"]) == {"kernels"}
    assert len(saved["results"]["kernels"]["ratios"]) == 4 and "256 rows times" in result.stdout


@pytest.mark.integration
@pytest.mark.parametrize("name", ["against_transformers", "scaling", "quantization", "everything"])
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
    assert model.get_input_embeddings().weight.shape == (50, 128)


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


# %% Everything
FACTS = {"processor": "one", "mode": "AVX2"}


def record_of(part, **more):
    return {part: {"date": "2026-01-02", "machine": FACTS, "failed": None, **more}}


def main_job_record():
    test, worse = {"bits_per_byte": 1.5}, {"bits_per_byte": 1.53}
    return record_of(
        "main_job", seconds=570.0, peak_mb=900, all_mb=None,
        results={"bits_per_byte": {"this model": 1.5, "lzma -9": 1.7, "zlib -9": 2.0},
                 "training": {"seconds": 276.0, "tokens": 552_000}},
        aligned={"before": {"valid": 0.1, "distinct": 1.0, "test": test}, "steps": 50,
                 "after": {"valid": 0.2, "distinct": 0.6, "test": worse}},
    )


def test_each_row_stands_beside_its_aim(beside):
    import everything

    text = everything.section("AVX2", main_job_record())
    for line in (
        "| main job, minutes | 9.5 | ≤ 10 | reached |",
        "| bits per byte, test part | 1.5000 |  |  |",
        "| bits per byte over those of lzma -9 | 0.882 | < 1 | reached |",
        "| training, tokens a second | 2,000 |  |  |",
        "| alignment: valid completions, % | 20.0 | ≥ 25 | falls short |",
        "| alignment: valid completions, after over before | 2.0 | ≥ 3 | falls short |",
        "| alignment: distinct completions, % | 60.0 | ≥ 50 | reached |",
        "| alignment: more bits per byte, % | 2.00 | ≤ 5 | reached |",
        "| main job, peak memory of largest process, MB | 900 |  |  |",
    ):
        assert line in text.splitlines()
    assert text.startswith("## AVX2\n\n2026-01-02: processor one, mode AVX2.\n")
    assert "Not run: machine, grpo, against_transformers, scaling, dense, suite." in text
    faster = everything.section(measure.FAST_BF16, main_job_record())
    assert "| bits per byte, test part | 1.5000 | ≤ 1.45 | falls short |" in faster.splitlines()


KINDS = ("training", "prefill", "decode", "speculative")
TIMED = {name for name in measure.AIMS if name.startswith(KINDS)}


def test_every_aim_has_a_row(beside):
    import everything

    seed = {"seconds": 60, "before": 0.3, "after": 0.9, "failed": None}
    ratios = {measure.FEWER.format(name): 12.0 for name in measure.DENSE}
    records = (main_job_record() | record_of("grpo", seeds={"1": seed})
               | record_of("dense", saved={"ratios": ratios}))
    rows = [row["work"].replace(", seed 1", "") for name, record in records.items()
            for row in everything.rows_of(name, record, measure.FAST_BF16)]
    assert set(measure.AIMS) - TIMED <= set(rows)


def test_a_failed_part_has_a_row_and_keeps_what_it_measured(beside):
    import everything

    failed = record_of("suite", returncode=1, seconds=60.0, peak_mb=500, all_mb=900,
                       counts={"failed": 1, "passed": 9}) | record_of("scaling")
    failed["suite"]["failed"] = failed["scaling"]["failed"] = "1 failed | 9 passed"
    lines = everything.section("AVX2", failed).splitlines()
    assert "| suite | failed: 1 failed \\| 9 passed |  |  |" in lines
    assert "| tests passed | 9 |  |  |" in lines
    assert "| scaling | failed: 1 failed \\| 9 passed |  |  |" in lines
    (row,) = everything.rows_of("main_job", {"results": None}, "AVX2")
    assert row["figure"] == "its figures are incomplete"


def test_a_part_that_raises_does_not_stop_the_others(beside, tmp_path):
    import everything

    place = everything.Place(tmp_path, quick=True, checkpoint=None, grid_seconds=1.0)
    record = everything.run_part("dense", place, FACTS)
    assert record["failed"].startswith("ValueError: there is no run") and record["date"]


def test_a_script_that_fails_is_reported_by_its_last_line(beside, tmp_path):
    import everything

    place = everything.Place(tmp_path, quick=False, checkpoint=None, grid_seconds=1.0)
    code = "print('one'); raise SystemExit('it broke')"
    record = place.script("part", ["-c"], code)
    assert record["returncode"] == 1 and record["failed"] == "it broke"
    assert "one" in (tmp_path / "part.log").read_text()


def test_what_phase_9_prints_is_read(beside):
    import everything

    line = "  held-out sums right, sampled (1,234)   T = 1   26.5% → 94.4% (greedy 98.1%)   ok"
    assert everything.learnt(f"before\n{line}\n") == {
        "before": pytest.approx(0.265), "after": pytest.approx(0.944)
    }
    assert everything.learnt("nothing") == {}
    assert "held-out sums right, sampled (" in (ROOT / "grpo_coded.py").read_text()


def test_sections_of_other_modes_stay(beside, tmp_path):
    import everything

    path = tmp_path / "docs" / "results.md"
    everything.write_results(path, {"B": "## B\n\nold\n\n### a table\n", "A": "## A\n\na\n"})
    everything.write_results(path, {"B": "## B\n\nnew\n"})
    assert path.read_text() == everything.HEAD + "\n## A\n\na\n\n## B\n\nnew\n"


@pytest.mark.integration
def test_quick_run_of_everything_writes_tables(run_script, tmp_path):
    result = run_script("benchmarks/everything.py", "--quick", "--only", "machine", "dense")
    assert result.returncode == 0, result.stderr
    assert "failed: ValueError: there is no run of the main job" in result.stderr
    text = (tmp_path / "benchmark_results/results.md").read_text()
    assert "FP32 matrix products, GFLOP/s" in text and "| dense | failed: ValueError" in text
    (file,) = (tmp_path / "benchmark_results").glob("*-quick/everything.json")
    assert set(json.loads(file.read_text())["parts"]) == {"machine", "dense"}
