"""Quantising a checkpoint from the command line, and the texts it calibrates on."""

import shutil

import pytest
import torch

import deepseek_full_model as full
from deepseek_full_model import RunOptions, TrainingRun
from pipeline import corpus
from pipeline.quantizing import calibration_ids


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


@pytest.mark.integration
def test_quantize_from_the_command_line(trained, tmp_path, capsys, monkeypatch):
    trained.rename(tmp_path / "run")
    monkeypatch.chdir(tmp_path)

    def main(*arguments):
        full.main([*map(str, arguments), "--device", "cpu"])
        return capsys.readouterr().out

    def refused(*arguments):
        with pytest.raises(SystemExit) as exit_info:
            main(*arguments)
        error = capsys.readouterr().err
        assert exit_info.value.code == 2 and error.count("\n") == 1
        return error

    capsys.readouterr()
    exact = main("evaluate", "--checkpoint", "run")
    quantize = ("quantize", "--checkpoint", "run", "--scheme")
    printed = main(*quantize, "gptq4", "--out", "small", "--cache-bits", 6,
                   "--calibration-sequences", 4)
    assert "method gptq" in printed and "latent cache in 6 bits" in printed
    assert {path.name for path in (tmp_path / "small").iterdir()} == {
        "config.json", "quantized.safetensors", "tokenizer.json", "run.json",
    }
    scored = main("evaluate", "--checkpoint", "small")
    assert scored.startswith("quantised (layer weights, bits 4") and "note" not in scored
    rates = [float(text.split("this model")[1].split()[0]) for text in (exact, scored)]
    assert rates[0] != rates[1] and abs(rates[1] / rates[0] - 1) < 0.02
    text = main("generate", "--checkpoint", "small", "--prompt", "def f", "--speculative")
    assert text.startswith("def f")
    main(*quantize, "int8", "--out", "eight")
    assert "--out eight exists already" in refused(*quantize, "int4", "--out", "eight")
    again = ("quantize", "--checkpoint", "small", "--scheme", "int8", "--out", "x")
    assert "quantised already" in refused(*again)
    assert "invalid choice: 'int5'" in refused(*quantize, "int5", "--out", "x")
    assert "bits=1 must be from 2 to 8" in refused(
        *quantize, "int8", "--out", "x", "--cache-bits", 1
    )
    assert "--calibration-sequences=0 must be at least 1" in refused(
        *quantize, "awq4", "--out", "x", "--calibration-sequences", 0
    )
    assert "--data is for schemes that calibrate" in refused(
        *quantize, "int8", "--out", "x", "--data", "nowhere.txt"
    )
    cached = main("evaluate", "--checkpoint", "small", "--cache-bits", 2)
    assert float(cached.split("this model")[1].split()[0]) != rates[1]
    for command in (("evaluate", "--checkpoint", "small"), ("generate", "--checkpoint", "small")):
        assert "bits=1 must be from 2 to 8" in refused(*command, "--cache-bits", 1)
    (tmp_path / "run").rename("x.old")  # no other directory is touched
    main("quantize", "--checkpoint", "x.old", "--scheme", "int8", "--out", "x")
    assert (tmp_path / "x.old" / "checkpoint" / "run.json").is_file()
    (tmp_path / "x.old").rename("run")
    shutil.rmtree("x")
    shutil.copytree("small", "resumed/checkpoint")
    assert "is quantised: it cannot be trained" in refused("train", "--resume", "resumed")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "small", "eight", "resumed"}
