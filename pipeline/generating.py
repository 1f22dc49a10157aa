"""Generation: a command continues a prompt, and the main job shows a sample after training."""

import functools
import sys
import time
from dataclasses import dataclass

import torch

from lesson import require, setting
from mtp_coded import Sampling
from pipeline import corpus
from pipeline.quantizing import CACHE_HELP
from quantization_coded import quantize_cache


def print_marked(mark, text):
    for line in text.splitlines():
        print(f"  {mark} {line}")


def show_continuation(model, tokenizer, documents, prompt_tokens=96, new_tokens=96):
    """Prints a continuation of a held-out file, then the passes and drafts of four such files."""
    model.eval()
    documents = [d for d in documents if d.size > 4000][:4] or documents[:1]
    separator, half_context = tokenizer.token_to_id(corpus.SEPARATOR), model.max_positions // 2
    prompt_tokens, new_tokens = min(prompt_tokens, half_context), min(new_tokens, half_context)
    prompts = [
        [separator, *corpus.encode(tokenizer, document.text)][:prompt_tokens]
        for document in documents
    ]
    device = model.lm_head.weight.device
    generator = torch.Generator(device=device).manual_seed(0)
    prompt = torch.tensor([prompts[0]], device=device)
    sampled = model.generate(prompt, new_tokens, temperature=0.6, generator=generator)[0]
    print(f"continuation of {documents[0].name}, temperature 0.6 (│ prompt, ▌ model):")
    print_marked("│", tokenizer.decode(prompts[0]))
    print_marked("▌", tokenizer.decode(sampled[len(prompts[0]) :].tolist()))
    if not len(model.mtp):
        return
    prompts = [torch.tensor([ids], device=device) for ids in prompts]
    texts = [model.complete(ids, new_tokens, Sampling(), speculative=True) for ids in prompts]
    same = all(
        torch.equal(text.ids, model.generate(ids, new_tokens))
        for text, ids in zip(texts, prompts, strict=True)
    )
    passes, drafted, accepted = (
        sum(getattr(text, name) for text in texts) for name in ("forwards", "drafted", "accepted")
    )
    print(f"speculative decoding of {len(prompts)} files: {new_tokens * len(prompts)} tokens in "
          f"{passes} passes, {accepted} of {drafted} drafts accepted, "
          f"{'the same text as' if same else 'NOT the same text as'} plain greedy decoding")


# %% The command
@dataclass
class GenerateOptions:
    checkpoint: str = setting(metavar="DIR")
    prompt: str = setting("", "text to continue (default: begin a new file)")
    max_new_tokens: int | None = setting(None, "tokens to write (default: 128, or what fits)")
    temperature: float = setting(0.0, "0 always takes the most likely token")
    top_k: int | None = setting(None, "draw only from the K most likely tokens")
    top_p: float | None = setting(None, "draw from the fewest tokens with this total probability")
    speculative: bool = setting(False, "draft with the MTP module")
    depth: int | None = setting(None, "drafts for a pass (default: adapts to the text)")
    prefill_chunk: int | None = setting(None, "read the prompt this many tokens at a time")
    seed: int = setting(0, "seed of the sampling")
    cache_bits: int | None = setting(None, CACHE_HELP, metavar="N")

    def __post_init__(self):
        require(self.depth is None or self.speculative, "--depth needs --speculative")
        cut = self.top_k is not None or self.top_p is not None
        require(not cut or self.temperature != 0,
                "--top-k and --top-p need a --temperature above 0")


def generate(loaded, options):
    """Prints --prompt, and its continuation while it is written. The cost goes to stderr."""
    model, tokenizer, _ = loaded
    device = model.lm_head.weight.device
    separator = tokenizer.token_to_id(corpus.SEPARATOR)
    prompt = [separator, *corpus.encode(tokenizer, options.prompt)]
    if options.cache_bits is not None:
        quantize_cache(model, options.cache_bits)
    new_tokens = options.max_new_tokens
    if new_tokens is None:  # as many as fit
        new_tokens = max(1, min(128, model.max_positions - len(prompt)))
    text = corpus.TextStream(tokenizer, functools.partial(print, end="", flush=True))
    started = False

    def show(new):  # nothing is printed before `complete` has checked its arguments
        nonlocal started
        if not started:
            print(options.prompt, end="")
        started = True
        text.add([token for token in new[0] if token != separator])

    start = time.perf_counter()
    generator = torch.Generator(device=device).manual_seed(options.seed)
    result = model.complete(
        torch.tensor([prompt], device=device), new_tokens,
        Sampling(options.temperature, options.top_k, options.top_p, generator),
        eos_token_id=separator, pad_token_id=separator, speculative=options.speculative,
        depth=options.depth, prefill_chunk=options.prefill_chunk, stream=show,
    )
    seconds = time.perf_counter() - start
    text.finish()
    print("" if started else options.prompt)
    print_cost(result, seconds, options.speculative)


def print_cost(result, seconds, speculative):
    """Prints the cost of a generation to stderr, so that stdout has only the text."""
    tokens, accepted, drafted = result.tokens, result.accepted, result.drafted
    line = f"{tokens} tokens, {tokens / seconds:.1f} tokens/s"
    if speculative:
        share, each = accepted / max(1, drafted), tokens / max(1, result.forwards)
        line += f"; {accepted} of {drafted} drafts accepted ({share:.0%}), "
        line += f"{each:.2f} tokens a pass"
    print(f"{line}; cache {result.cache_bytes:,} bytes", file=sys.stderr)
