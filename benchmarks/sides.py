"""Two sides with the same weights: this model and transformers' DeepseekV3ForCausalLM."""

import dataclasses
import functools
import tempfile

import measure
import torch

import deepseek_full_model as full
from deepseek_full_model import DeepSeekConfig, DeepSeekModel
from pipeline.decoding import new_caches, read
from pipeline.fast import decoding_head
from pipeline.run import fastest_precision


def default_config(**changes):
    """The default model without its MTP module, which transformers' class does not have."""
    config = DeepSeekConfig.from_file(measure.ROOT / "configs" / "small.json")
    return dataclasses.replace(config, num_nextn_predict_layers=0, **changes)


def both_sides(config):
    """(ours, transformers') with the same random weights, through files."""
    from transformers import DeepseekV3ForCausalLM

    torch.manual_seed(0)
    model = DeepSeekModel(config).eval()
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return model, DeepseekV3ForCausalLM.from_pretrained(directory).eval()


# %% A training step
def our_step(model, ids, precision):
    """A function that makes one step of AdamW on the tokens ids (B, T); precision: a name."""
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)]
    documents = torch.zeros_like(ids)
    return functools.partial(
        full.training_step, model, optimizers, ids, documents, rate=1e-4, mtp_weight=0.0,
        gamma=0.0, precision=getattr(torch, precision),
    )


def their_step(model, ids, precision):
    """The same for a model of transformers."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    dtype = getattr(torch, precision)
    model.train()

    def step():
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()

    return step


def training_works(model, theirs, ids):
    """{"ours PRECISION" and "transformers PRECISION": step}: FP32, and BF16 where it is faster."""
    works = {}
    for name in sorted({"float32", fastest_precision("cpu")}):
        works[f"ours {name}"] = our_step(model, ids, name)
        works[f"transformers {name}"] = their_step(theirs, ids, name)
    return works


def best_of(seconds, side):
    """Seconds of a side's better precision."""
    return min(value for name, value in seconds.items() if name.startswith(side))


# %% Reading and writing
@torch.inference_mode()
def our_decoder(model, ids):
    """Reads the prompts; returns a function that writes `new` tokens as `generate` does.

    Caches and packed head are made beforehand, as transformers' cache is.
    """
    caches, past = new_caches(model, capacity=ids.shape[1] + 64), ids.shape[1]
    model.hidden_states(ids, caches=caches)
    head = decoding_head(model.lm_head, tokens=64)

    @torch.inference_mode()
    def write(new):
        fresh = ids[:, -1:]
        for i in range(new):
            hidden = read(model, fresh, caches, start=past + i)
            fresh = head(hidden[:, -1]).argmax(dim=-1, keepdim=True)

    return write


@torch.inference_mode()
def their_decoder(model, ids):
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return their_writer(model, ids, cache)


def their_writer(model, ids, cache):
    """A function that writes `new` tokens behind what the cache holds, and forgets them."""

    @torch.inference_mode()
    def write(new):
        fresh = ids[:, -1:]
        for _ in range(new):
            output = model(fresh, past_key_values=cache, use_cache=True, logits_to_keep=1)
            fresh = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        cache.crop(-new)

    return write


def our_prefill(model, ids):
    return lambda: model.generate(ids, 1)


def their_prefill(model, ids):
    @torch.inference_mode()
    def prefill():
        model(ids, use_cache=True, logits_to_keep=1)

    return prefill


def quiet_transformers():
    """Its version, with its progress bars and warnings switched off."""
    import warnings

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")  # in BF16
    return transformers.__version__
