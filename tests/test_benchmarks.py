"""The benchmarks run, print and save; what they time is theirs: no test looks at a clock."""

import json

import pytest

from benchmarks import measure


@pytest.mark.integration
@pytest.mark.parametrize("name", ["against_transformers", "scaling"])
def test_quick_run_prints_and_saves(name, run_script, trained, tmp_path):
    more = ["--checkpoint", trained] if name == "against_transformers" else []
    result = run_script(f"benchmarks/{name}.py", "--quick", *more, timeout=180)
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
