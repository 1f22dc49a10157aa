"""Continues prompts, with any language model and any way to choose a token.

`LanguageModel` is the base class of models. It handles rows of unequal length, caches and the end
of a text, and it names the parts of a model. `SamplingOptions` is the base class of ways to choose
tokens. Neither knows a lesson: subclasses define how a model computes and how a token is drawn.
"""

from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lesson.batches import without_padding
from lesson.checks import check_prompts, check_token_ids, require, require_shapes
from lesson.settings import check_settings, setting


@dataclass
class Generation:
    """Prompts with their completions, and the cost of these."""

    ids: torch.Tensor  # (B, T + new): prompts and new tokens
    logprobs: torch.Tensor | None = None  # (B, new): one for each new token; None with drafts
    forwards: int = 0  # passes of the main model; reading the prompts is one
    drafted: int = 0  # tokens that the MTP modules drafted
    accepted: int = 0  # drafts that the main model accepted
    tokens: int = 0  # new tokens of the longest completion
    cache_bytes: int = 0  # bytes of all latent caches at the end


@dataclass(frozen=True)
class SamplingOptions:
    """The options of sampling, their bounds, and the steps that all ways of sampling share.

    A subclass defines `greedy`, `probabilities(logits)` and `draw(probabilities)`; temperature and
    generator are for these. top_k, top_p: see `limited`.
    """

    temperature: float = setting(0.0, at_least=0)
    top_k: int | None = setting(None, at_least=1)
    top_p: float | None = setting(None, above=0, at_most=1)
    generator: torch.Generator | None = None

    def __post_init__(self):
        check_settings(self)

    def limited(self, probabilities):
        """(..., W) → (..., W): unlikely tokens get probability 0, the others add up to 1 again.

        First, the `top_k` most likely tokens stay. Of these, the most likely stay until together
        they reach the share `top_p` of the probability that is left. None: no such limit.
        """
        if self.top_k is not None and self.top_k < probabilities.shape[-1]:
            kept, places = probabilities.topk(self.top_k, dim=-1)
            probabilities = torch.zeros_like(probabilities).scatter(-1, places, kept)
        if self.top_p is not None and self.top_p < 1:
            ranked, order = probabilities.sort(dim=-1, descending=True)
            before = ranked.cumsum(dim=-1) - ranked  # the share of the more likely tokens
            cut = before >= self.top_p * ranked.sum(dim=-1, keepdim=True)
            probabilities = probabilities.scatter(-1, order, ranked.masked_fill(cut, 0.0))
        return probabilities / probabilities.sum(dim=-1, keepdim=True)

    def choose(self, logits):
        """(B, W) → tokens (B,) and the log-probabilities (B,) of drawing them; 0 if greedy."""
        if self.greedy:
            return logits.argmax(dim=-1), torch.zeros_like(logits[:, 0], dtype=torch.float32)
        probabilities = self.probabilities(logits)
        tokens = self.draw(probabilities)
        return tokens, probabilities.gather(1, tokens[:, None]).squeeze(1).log()


def repeated(times, caches, *tensors):
    """Copies each row of tensors (B, ...) or None, one below the other; changes caches in place."""
    for cache in caches:
        cache.repeat(times)
    return [None if x is None else x.repeat_interleave(times, dim=0) for x in tensors]


class LanguageModel(nn.Module):
    """Adds to a model with `hidden_states`: generation, checks of its inputs, names of its parts.

    A subclass has `embed_tokens`, `layers`, `lm_head`, `mtp` (modules with a `block`) and
    `max_positions` (None: no limit). Its `sampling` is the class of the options of `generate`.
    """

    copy = deepcopy  # model.copy(): the same model again, with its own weights

    @torch.no_grad()
    def complete(self, input_ids, max_new_tokens, sampling, attention_mask=None,
                 eos_token_id=None, pad_token_id=0, copies=1):
        """Continues each prompt (B, T). Returns a `Generation` with ids (B · copies, T + new).

        The first pass reads the prompts. Each further pass reads one new token of each row, because
        the caches keep the past.

        sampling: `SamplingOptions`. attention_mask: (B, T), 0 = padding, for prompts of unequal
            length: pad on the left. A prompt then has the same logits as alone, up to rounding. So
            greedy text in FP32 is the same, unless two tokens (or experts) tie up to rounding.
        eos_token_id: a row stops after it and is filled with `pad_token_id`; None: it never stops.
        copies: completions of each prompt, one below the other. The prompt is read only once.

        Raises: ValueError if prompt and new tokens exceed the context, before any work is done.
        """
        check_prompts(input_ids, max_new_tokens, attention_mask, pad_token_id, **self.limits)
        require(copies >= 1, f"copies={copies} must be at least 1")
        unread_ids, path, caches, n = input_ids.long(), "expanded", self.new_caches(), 0
        ids = unread_ids.repeat_interleave(copies, dim=0)
        logprobs = torch.zeros(len(ids), max_new_tokens, device=ids.device)
        finished = torch.zeros_like(ids[:, 0], dtype=torch.bool)
        while n < max_new_tokens and not finished.all():
            hidden = self.hidden_states(unread_ids, attention_mask, caches, path)[:, -1]
            if n == 0 and copies > 1:
                hidden, attention_mask = repeated(copies, caches, hidden, attention_mask)
            chosen, logprobs[:, n] = sampling.choose(self.lm_head(hidden))
            ids = torch.cat([ids, chosen.masked_fill(finished, pad_token_id)[:, None]], dim=1)
            finished = finished | (chosen == eos_token_id)  # None equals no token
            if attention_mask is not None:  # the new tokens are no padding
                attention_mask = F.pad(attention_mask, (0, 1), value=1)
            unread_ids, path, n = ids[:, -1:], "absorbed", n + 1
        ids = F.pad(ids, (0, max_new_tokens - n), value=pad_token_id)
        used = sum(cache.used_bytes() for cache in caches)
        return Generation(ids, logprobs, forwards=n, tokens=n, cache_bytes=used)

    def generate(self, input_ids, max_new_tokens, temperature=0.0, *, generator=None, top_k=None,
                 top_p=None, **options):
        """The ids from `complete` with this sampling. options: other arguments of `complete`."""
        sampling = self.sampling(temperature, top_k, top_p, generator)
        return self.complete(input_ids, max_new_tokens, sampling, **options).ids

    @property
    def limits(self):
        """The limits of token ids and lengths: see `check_token_ids`."""
        return dict(vocabulary=self.embed_tokens.num_embeddings, longest=self.max_positions)

    def places(self, input_ids, attention_mask=None, caches=None):
        """Options for the blocks that read these token ids (B, T) after those in the caches.

        attention_mask: (B, S) over all keys, cached ones included; 0 = padding. No token attends to
        padding, and it takes no position. ValueError if anything does not fit.
        """
        past = caches[0].length if caches else 0
        check_token_ids(input_ids, past=past, **self.limits)
        B, end = len(input_ids), past + input_ids.shape[1]
        require_shapes((B, end), attention_mask=attention_mask)
        return without_padding(attention_mask, past, end)

    # The parts, for code that changes them
    def prepared(self):
        """Returns the model itself. A subclass may override this to make its layers faster."""
        return self

    def new_caches(self):
        """An empty cache for each block of the main model."""
        return [block.self_attn.new_cache() for block in self.layers]

    def blocks(self):
        """All blocks, those of the MTP modules last."""
        return [*self.layers, *(module.block for module in self.mtp)]

    def moe_layers(self):
        """{"layer i" or "MTP k": mixture of experts} for all blocks that have experts."""
        named = {f"layer {i}": block for i, block in enumerate(self.layers)}
        named |= {f"MTP {k}": module.block for k, module in enumerate(self.mtp, start=1)}
        return {name: block.mlp for name, block in named.items() if hasattr(block.mlp, "experts")}
