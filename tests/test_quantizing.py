"""Quantising a checkpoint from the command line, and the texts it calibrates on."""

import pathlib
import shutil

import pytest
import torch

import deepseek_full_model as full
from deepseek_full_model import RunOptions, TrainingRun
from pipeline import corpus, quantizing
from pipeline.quantizing import calibration_documents, calibration_ids
from pipeline.run import training_record


def test_calibration_texts_are_drawn_from_all_of_the_text_by_a_seed(small_run, tmp_path):
    _, options = small_run
    run = TrainingRun(tmp_path / "run", RunOptions(**options, steps=1), "cpu")

    def draw(sequences, length, seed):
        return calibration_ids(run.tokenizer, run.corpus.train, sequences, length, seed)

    assert torch.equal(draw(5, 16, 0), draw(5, 16, 0)) and draw(5, 16, 0).shape == (5, 16)
    assert not torch.equal(draw(5, 16, 0), draw(5, 16, 1))
    everything = draw(10**9, 16, 0)
    ids, _ = corpus.token_stream(run.tokenizer, run.corpus.train)
    assert torch.equal(everything.flatten().sort()[0], ids[: everything.numel()].sort()[0])
    assert torch.equal(draw(5, 10**9, 0), ids[None])  # a text shorter than one piece


def test_calibration_texts_are_those_given_or_those_of_the_training(
    trained, tmp_path, monkeypatch, capsys
):
    asked = []
    monkeypatch.setattr(corpus, "load_corpus", lambda data: asked.append(data) or corpus.Corpus(
        ["training part"], ["validation"], ["test"], ""))
    (data,) = training_record(trained / "checkpoint")["options"]["data"]
    for directory, given, wanted, noted in (
        (trained / "checkpoint", None, [data], False),
        (trained / "checkpoint", ["mine.txt"], ["mine.txt"], False),
        (tmp_path, ["mine.txt"], ["mine.txt"], False),
        (tmp_path, None, None, True),  # no record: the standard library
    ):
        assert calibration_documents(directory, given) == ["training part"]
        assert asked[-1] == wanted
        assert ("standard library" in capsys.readouterr().err) == noted


@pytest.fixture
def main(trained, tmp_path, capsys, monkeypatch):
    """main(*arguments) → what it prints; the trained run is in `run`, beside nothing else."""
    trained.rename(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()

    def run(*arguments):
        full.main([*map(str, arguments), "--device", "cpu"])
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(main, capsys):
    """refused(*arguments) → the line that the command ends with."""

    def run(*arguments):
        with pytest.raises(SystemExit) as exit_info:
            main(*arguments)
        error = capsys.readouterr().err
        assert exit_info.value.code == 2 and error.count("\n") == 1
        return error

    return run


QUANTIZE = ("quantize", "--checkpoint", "run", "--scheme")


def rate_in(printed):
    return float(printed.split("this model")[1].split()[0])


@pytest.mark.integration
def test_a_quantised_checkpoint_scores_and_writes(main, tmp_path):
    printed = main(*QUANTIZE, "gptq4", "--out", "small", "--cache-bits", 6,
                   "--calibration-sequences", 4)
    assert "method gptq" in printed and "latent cache in 6 bits" in printed
    before, after = (
        (tmp_path / path).stat().st_size
        for path in ("run/checkpoint/model.safetensors", "small/quantized.safetensors")
    )
    assert f"{before:,} → {after:,} bytes" in printed
    assert {path.name for path in (tmp_path / "small").iterdir()} == {
        "config.json", "quantized.safetensors", "tokenizer.json", "run.json",
    }
    scored = main("evaluate", "--checkpoint", "small")
    assert scored.startswith("quantised (layer weights, bits 4") and "note" not in scored
    exact, rounded = rate_in(main("evaluate", "--checkpoint", "run")), rate_in(scored)
    assert exact != rounded and abs(rounded / exact - 1) < 0.02
    assert rate_in(main("evaluate", "--checkpoint", "small", "--cache-bits", 2)) != rounded
    text = main("generate", "--checkpoint", "small", "--prompt", "def f", "--speculative")
    assert text.startswith("def f")


@pytest.mark.integration
def test_calibration_is_by_the_settings_that_are_given(main, monkeypatch):
    drawn = []
    monkeypatch.setattr(quantizing, "calibration_ids", lambda *given, **settings: drawn.append(
        (*given[1:], settings)) or calibration_ids(*given, **settings))
    (data,) = training_record(pathlib.Path("run/checkpoint"))["options"]["data"]
    settings = ("--calibration-sequences", 1, "--seed", 3)
    printed = main(*QUANTIZE, "awq4", "--out", "small", *settings)
    documents = corpus.load_corpus([data]).train
    assert drawn == [(documents, 1, dict(length=64, seed=3))]
    assert "latent cache" not in printed  # it stays as it is


@pytest.mark.integration
def test_mistakes_of_quantize_are_one_line_and_write_nothing(main, refused, tmp_path):
    main(*QUANTIZE, "int8", "--out", "eight")
    for arguments, message in (
        ((*QUANTIZE, "int4", "--out", "eight"), "--out eight exists already"),
        (("quantize", "--checkpoint", "eight", "--scheme", "int8", "--out", "x"),
         "quantised already"),
        ((*QUANTIZE, "int5", "--out", "x"), "invalid choice: 'int5'"),
        ((*QUANTIZE, "int8", "--out", "x", "--cache-bits", 1), "bits=1 must be from 2 to 8"),
        ((*QUANTIZE, "awq4", "--out", "x", "--calibration-sequences", 0),
         "--calibration-sequences=0 must be at least 1"),
        ((*QUANTIZE, "int8", "--out", "x", "--data", "nowhere.txt"),
         "--data is for schemes that calibrate"),
        (("evaluate", "--checkpoint", "eight", "--cache-bits", 1), "bits=1 must be from 2 to 8"),
        (("generate", "--checkpoint", "eight", "--cache-bits", 1), "bits=1 must be from 2 to 8"),
    ):
        assert message in refused(*arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "eight"}


@pytest.mark.integration
def test_quantize_touches_no_other_directory(main, tmp_path):
    (tmp_path / "run").rename("x.old")
    main("quantize", "--checkpoint", "x.old", "--scheme", "int8", "--out", "x")
    assert (tmp_path / "x.old" / "checkpoint" / "run.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"x", "x.old"}


@pytest.mark.integration
def test_a_quantised_run_is_not_trained(main, refused):
    main(*QUANTIZE, "int8", "--out", "eight")
    shutil.copytree("eight", "resumed/checkpoint")
    assert "is quantised: it cannot be trained" in refused("train", "--resume", "resumed")
