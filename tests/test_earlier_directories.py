"""Directories that commit 7ed1d9e saved still load, score and go on: see tests/fixtures/earlier."""

import json
import pathlib
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from deepseek_full_model import DeepSeekModel, main

EARLIER = pathlib.Path(__file__).parent / "fixtures" / "earlier"
EXPECTED = load_file(EARLIER / "expected.safetensors")
FIGURES = json.loads((EARLIER / "expected.json").read_text())
# FP32 up to the order of sums; integer kernels up to BF16's 2⁻⁸ of logits that reach 11. What the
# rounding of the weights changes is 0.05 for INT8 and 0.5 for INT4.
TOLERANCES = {"trained": 1e-5, "aligned": 1e-5, "int8": 0.03, "gptq4": 0.1}


@pytest.fixture
def earlier(tmp_path):
    """A copy of the fixture whose stored paths are those of the copy."""
    root = tmp_path / "earlier"
    shutil.copytree(EARLIER, root)
    for file in [*root.rglob("run.json"), *root.rglob("align.json")]:
        content = json.loads(file.read_text())
        options = content["options"]
        if options.get("data"):
            options["data"] = [str(root / name) for name in options["data"]]
        for name in ("config", "source"):
            if name in options:
                options[name] = str(root / options[name])
        file.write_text(json.dumps(content))
    return root


def model_directory(root, name):
    return root / name if name in ("int8", "gptq4") else root / name / "checkpoint"


@pytest.mark.parametrize("name", TOLERANCES)
def test_logits_are_those_of_the_earlier_code(earlier, name):
    model = DeepSeekModel.from_pretrained(model_directory(earlier, name)).eval()
    assert (model.cache_bits, model.quantization is not None) == (
        (6, True) if name == "gptq4" else (None, name == "int8")
    )
    ids, rows = EXPECTED["ids"], EXPECTED["rows"]
    with torch.no_grad():
        hidden = model.hidden_states(ids, caches=model.new_caches() if model.cache_bits else None)
        logits = model.lm_head(hidden)[:, rows]
        mtp_logits = model.mtp_logits(hidden, ids)[0][:, rows[:-1]]
    tolerance = TOLERANCES[name]
    for got, part in ((logits, "logits"), (mtp_logits, "mtp_logits")):
        wanted = EXPECTED[f"{name}.{part}"]
        torch.testing.assert_close(got.float(), wanted, rtol=tolerance / 10, atol=tolerance)


@pytest.mark.parametrize("speculative", [False, True])
def test_greedy_text_is_that_of_the_earlier_code(earlier, speculative):
    model = DeepSeekModel.from_pretrained(earlier / "trained" / "checkpoint").eval()
    text = model.generate(EXPECTED["ids"][:, :10], 20, speculative=speculative)
    assert torch.equal(text, EXPECTED["trained.text"])


@pytest.mark.parametrize("name", TOLERANCES)
def test_scores_are_those_of_the_earlier_code(earlier, name, capsys):
    main(["evaluate", "--checkpoint", str(earlier / name), "--data", str(earlier / "text.txt")])
    rate = float(re.search(r"this model +([\d.]+)", capsys.readouterr().out)[1])
    # printed with four decimals; the kernels of INT8 and INT4 round on the way
    assert rate == pytest.approx(FIGURES[name], abs=1e-4 if TOLERANCES[name] < 0.01 else 0.01)


def metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.integration
def test_training_goes_on_as_it_would_have_with_the_earlier_code(earlier):
    run = earlier / "trained"
    main(["train", "--resume", str(run), "--steps", "404"])
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(398, 405))
    # weights, moments, order of the text and schedules all enter; Muon multiplies in BF16
    assert [line["loss"] for line in lines[3:]] == pytest.approx(FIGURES["losses"], rel=2e-3)


@pytest.mark.integration
def test_an_alignment_goes_on(earlier):
    run = earlier / "aligned"
    paid = json.loads((run / "checkpoint" / "align.json").read_text())["paid"]
    before = load_file(run / "checkpoint" / "model.safetensors")
    main(["align", "--resume", str(run), "--steps", "4"])
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4]
    stored = json.loads((run / "checkpoint" / "align.json").read_text())
    assert stored["state"]["step"] == 4
    assert set(paid) and set(paid) <= set(stored["paid"])  # a text is paid once, resumed or not
    after = load_file(run / "checkpoint" / "model.safetensors")
    assert after.keys() == before.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.integration
def test_changed_weights_of_the_reference_are_refused(earlier, capsys):
    shutil.copyfile(earlier / "aligned" / "checkpoint" / "model.safetensors",
                    earlier / "trained" / "checkpoint" / "model.safetensors")
    with pytest.raises(SystemExit):
        main(["align", "--resume", str(earlier / "aligned"), "--steps", "4"])
    assert "is not what it was when the alignment was started" in capsys.readouterr().err
