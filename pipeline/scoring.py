"""Scoring: bits per byte of held-out text, compared with simple methods on the same bytes."""

import math
import sys
from dataclasses import dataclass

import torch
from torch import nn

from lesson import setting
from pipeline import corpus
from pipeline.quantizing import CACHE_HELP, describe_quantization
from pipeline.run import training_record
from quantization_coded import quantize_cache


@torch.no_grad()
def score(model, tokenizer, documents, batch_size=16):
    """Bits per byte of the documents. Also measures MTP acceptance and the load of experts.

    The windows of text overlap by half, and each byte counts once: see `corpus.scoring_batches`.

    Returns: dict with `bits_per_byte`, `tokens`, `bytes`, `mtp_acceptance` (the share of the
        MTP module's greedy drafts that are the main model's own greedy choice; None without MTP)
        and `max_load` ({layer: busiest expert's load over the mean}).
    """
    model.eval()
    device, context = model.lm_head.weight.device, model.config.max_position_embeddings
    nats, tokens, agreed, drafted, loads = 0.0, 0, 0, 0, {}
    for batch in corpus.scoring_batches(tokenizer, documents, context, batch_size):
        ids_BT, target_BT, real_BT = (part.to(device) for part in batch)
        # A quantised cache affects the score: each token attends to the cached values.
        caches = model.new_caches() if model.cache_bits else None
        hidden_BTD = model.hidden_states(ids_BT, caches=caches, routed=(routed := []))
        # The head, the widest matrix, runs only on the scored rows, about half of them.
        scored_BT, targets = target_BT[:, 1:], ids_BT[:, 1:][target_BT[:, 1:]]
        logits = model.lm_head(hidden_BTD[:, :-1][scored_BT])
        losses = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        nats += losses.cpu().double().sum().item()
        tokens += len(targets)
        for name, layer_pass in zip(model.moe_layers(), routed, strict=False):  # MTP is not run
            load_E = layer_pass._replace(token_mask=real_BT).load()
            loads[name] = loads.get(name, 0) + load_E
        if len(model.mtp):
            choice_BT = torch.zeros_like(ids_BT[:, 1:])
            choice_BT[scored_BT] = logits.argmax(dim=-1)
            same = agreement(model, hidden_BTD, ids_BT, target_BT, choice_BT)
            agreed, drafted = agreed + int(same.sum()), drafted + len(same)
    size = sum(document.size for document in documents)
    return {
        "bits_per_byte": nats / math.log(2) / size,
        "tokens": tokens,
        "bytes": size,
        "mtp_acceptance": agreed / drafted if drafted else None,
        "max_load": {
            name: (load.max() / load.float().mean()).item() for name, load in loads.items()
        },
    }


def agreement(model, hidden_BTD, ids_BT, target_BT, choice_BT):
    """Booleans (n,): True where the first MTP module's greedy draft is the main model's choice.

    choice_BT (B, T − 1): the main model's greedy token after each one. Only scored tokens count.
    """
    further_BTD = model.mtp[0](hidden_BTD[:, :-1], ids_BT[:, 1:])
    drafted_BT = target_BT[:, 2:]
    drafts = model.lm_head(further_BTD[:, :-1][drafted_BT]).argmax(dim=-1)
    return drafts == choice_BT[:, 1:][drafted_BT]


def print_scores(scores, documents, tokenizer, part):
    """Prints the scores, and rates of simple methods to compare them with. Returns all rates."""
    rates = {"this model": scores["bits_per_byte"], **corpus.compressor_rates(documents)}
    rates["uniform"] = corpus.uniform_rate(
        scores["tokens"], scores["bytes"], tokenizer.get_vocab_size()
    )
    print(f"bits per byte, {part}: {len(documents)} documents, {scores['bytes']:,} bytes, "
          f"{scores['tokens']:,} tokens")
    for name, rate in sorted(rates.items(), key=lambda item: item[1]):
        print(f"  {name:<12} {rate:.4f}")
    accepted = scores["mtp_acceptance"]
    if accepted is not None:
        print(f"MTP acceptance: {accepted:.1%} of the drafts are the model's choice")
    if scores["max_load"]:
        loads = ", ".join(f"{name} {value:.2f}" for name, value in scores["max_load"].items())
        print(f"busiest expert / mean load: {loads}")
    return rates


# %% The command
@dataclass
class EvaluateOptions:
    checkpoint: str = setting(metavar="DIR")
    data: list | None = setting(None, "score all of these files", metavar="FILE")
    part: str = setting("test", "without --data: which part of the training run's text",
                        choices=("train", "validation", "test"))
    cache_bits: int | None = setting(None, CACHE_HELP, metavar="N")


def evaluate(loaded, options):
    """Scores --data, or a part of the text that the checkpoint was trained on."""
    model = loaded.model
    if options.data:
        documents, part = corpus.read_files(options.data), "all of --data"
    else:
        trained = training_record(loaded.directory)
        text = corpus.load_corpus(trained.get("options", {}).get("data"))
        if trained and trained["corpus"] != text.fingerprint:
            print(f"note: the text has changed since training, held-out parts may have been seen "
                  f"(hash {text.fingerprint}, was {trained['corpus']})", file=sys.stderr)
        documents, part = text.part(options.part), f"{options.part} part"
    if options.cache_bits is not None:
        quantize_cache(model, options.cache_bits)
    if model.quantization is not None:
        print(describe_quantization(model))
    elif model.cache_bits:
        print(f"latent cache in {model.cache_bits} bits")
    print_scores(score(model, loaded.tokenizer, documents), documents, loaded.tokenizer, part)
