"""Scoring: every byte once, beside a plain sum; what the evaluate command scores."""

import json

import numpy as np
import pytest
import torch
from small_deepseek import build

import deepseek_full_model as full
from deepseek_full_model import RunOptions, TrainingRun, build_optimizers, training_step
from pipeline import checkpoint, corpus
from pipeline.scoring import score
from quantization_coded import quantize_cache


def test_score_is_the_plain_sum_over_every_byte():
    documents = [corpus.Document("a", "def f(x):\n    return x\n" * 9), corpus.Document("b", "y")]
    tokenizer = corpus.train_tokenizer(documents, 280)
    model = build("v3", vocab_size=tokenizer.get_vocab_size(), num_nextn_predict_layers=1,
                  max_position_embeddings=16, std=0.1)
    optimizers = build_optimizers(model, 1e-2)
    ids = torch.tensor([[0, *corpus.encode(tokenizer, documents[0].text)][:16]])
    for _ in range(4):  # so that drafts are right sometimes
        training_step(model, optimizers, ids, torch.zeros_like(ids), 1e-2, 1.0, 0.0)
    scores = score(model, tokenizer, documents, batch_size=3)
    nats, tokens, agreed, drafted, right = 0.0, 0, 0, 0, 0
    loads = {"layer 1": 0, "layer 2": 0}
    for document in documents:
        ids = [0, *corpus.encode(tokenizer, document.text), 0]
        for start, first, end in corpus.scoring_windows(len(ids), 16):
            window = torch.tensor([ids[start:end]])
            routed = []
            log_probs = model(window, routed=routed).log_softmax(-1)[0]
            for name, each in zip(loads, routed, strict=True):
                chosen = each.routing.indices.flatten()
                loads[name] = loads[name] + torch.bincount(chosen, minlength=8)
            for target in range(first, end):
                nats -= log_probs[target - start - 1, ids[target]].item()
                tokens += 1
            choices = log_probs.argmax(-1).tolist()
            if end - start > 2:
                drafts = model.mtp_logits(model.hidden_states(window), window)[0][0].argmax(-1)
                for target in range(max(first, start + 2), end):
                    agreed += drafts[target - start - 2] == choices[target - start - 1]
                    right += drafts[target - start - 2] == ids[target]
                    drafted += 1
    size = sum(document.size for document in documents)
    assert scores["bits_per_byte"] == pytest.approx(nats / np.log(2) / size, rel=1e-5)
    assert scores["tokens"] == tokens and scores["bytes"] == size
    assert scores["mtp_acceptance"] == pytest.approx(agreed.item() / drafted)
    assert 0 < agreed < drafted and agreed != right
    busiest = {name: (load.max() / load.float().mean()).item() for name, load in loads.items()}
    assert scores["max_load"] == pytest.approx(busiest)
    json.dumps(scores)  # plain numbers, which a file can hold


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uniform_model_scores_the_uniform_rate(dtype):
    documents = [corpus.Document("a", "def f(x):\n    return x\n" * 9)]
    tokenizer = corpus.train_tokenizer(documents, 280)
    model = build("v3", vocab_size=tokenizer.get_vocab_size(), first_k_dense_replace=3)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    scores = score(model.to(dtype), tokenizer, documents)
    assert scores["mtp_acceptance"] is None and scores["max_load"] == {}  # it has neither
    uniform = corpus.uniform_rate(scores["tokens"], scores["bytes"], tokenizer.get_vocab_size())
    assert scores["bits_per_byte"] == pytest.approx(uniform, rel=1e-6)


def test_scores_have_no_dropout_and_no_gradients():
    documents = [corpus.Document("a", "def f(x):\n    return x\n")]
    tokenizer = corpus.train_tokenizer(documents, 280)
    model = build("v3", vocab_size=tokenizer.get_vocab_size())
    plain = score(model, tokenizer, documents)
    model.norm = torch.nn.Sequential(model.norm, torch.nn.Dropout(0.5))
    assert score(model.train(), tokenizer, documents) == plain


def test_a_document_of_one_token_has_no_drafts():
    documents = [corpus.Document("a", "y"), corpus.Document("b", "")]
    tokenizer = corpus.train_tokenizer(documents, 280)
    model = build("v3", vocab_size=tokenizer.get_vocab_size(), num_nextn_predict_layers=1)
    scores = score(model, tokenizer, documents[1:] * 2 + documents, batch_size=3)
    assert (scores["tokens"], scores["bytes"]) == (5, 1)  # separators are scored as well
    assert scores["mtp_acceptance"] in (0, 1)  # one draft: of the separator behind y


def test_the_score_goes_through_a_quantised_cache(small_run, tmp_path):
    _, options = small_run
    run = TrainingRun(tmp_path / "run", RunOptions(**options, steps=1), "cpu")
    model, documents = run.model, run.corpus.validation
    model.init_weights(std=0.02)  # a new run's blocks add nothing
    exact = score(model, run.tokenizer, documents)["bits_per_byte"]
    rates = []
    for bits in (8, 2):
        quantize_cache(model, bits)
        rates.append(score(model, run.tokenizer, documents)["bits_per_byte"])
    assert rates[0] != exact and abs(rates[0] - exact) < abs(rates[1] - exact)


@pytest.mark.integration
def test_evaluate_scores_all_of_a_users_file(trained, tmp_path, capsys):
    mine = tmp_path / "mine.py"
    mine.write_text("x = 1\n" * 30)
    full.main(["evaluate", "--checkpoint", str(trained), "--data", str(mine)])
    assert "180 bytes" in capsys.readouterr().out


@pytest.mark.integration
def test_evaluate_scores_a_part_of_the_training_text_and_says_if_it_has_changed(trained, capsys):
    record = checkpoint.read_json(trained / "checkpoint" / "run.json")
    text = corpus.load_corpus(record["options"]["data"])

    def printed(*arguments):
        capsys.readouterr()
        full.main(["evaluate", "--checkpoint", str(trained), *arguments])
        return capsys.readouterr()

    for arguments, part in (((), "test"), (("--part", "validation"), "validation")):
        out, err = printed(*arguments)
        size = sum(document.size for document in text.part(part))
        assert f"bits per byte, {part} part" in out and f"{size:,} bytes" in out
        assert "note" not in err and "latent cache" not in out
    assert "latent cache in 4 bits" in printed("--cache-bits", "4").out
    checkpoint.write_json(trained / "checkpoint" / "run.json", {**record, "corpus": "of old"})
    assert f"(hash {text.fingerprint}, was of old)" in printed().err
