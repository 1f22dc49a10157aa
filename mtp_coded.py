"""Phase 6: multi-token prediction (MTP), learning and drafting more than the next token.

A language model learns from one target a position. The simple idea is to add heads that guess
the tokens after the next, all from the same hidden state; but the second token depends on which
first one came, and such a head cannot know. DeepSeek-V3 chains small modules instead: module k
takes the hidden state of the module before, joins the embedding of the token that really came,
and passes one block. Embedding and output head are the main model's own. After training the
modules can be thrown away, or kept to draft tokens that the main model then checks: speculative
decoding, which changes the speed and neither a greedy token nor the odds of a sampled one.

    h_k,i = Block_k( W_k [ RMSNorm(Emb(t_{i+k})) ; RMSNorm(h_{k−1,i}) ] ),    h_0 = main model
    P_k(t_{i+k+1}) = softmax(Head(RMSNorm(h_k,i)))
    L = L_main + λ/depths · Σ_k L_k
    a draft x drawn from q holds with probability min(1, p(x)/q(x)), else draw from max(0, p − q)

The embedding comes first as in the released weights; equation 21 has the hidden state first.

Papers: DeepSeek-V3 (2024), section 2.2, equations 21–25, and 5.4.3; Gloeckle et al. (2024) for
the independent heads; Leviathan et al. (2023) for speculative decoding.
Simplified: each loss is a mean over the targets that count, where equation 24 divides by the
sequence length.

Dimensions: B batch · T query positions · S key positions · D model width · W vocabulary.

Run:  python mtp_coded.py [--steps 100] [--depth 2]
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lesson import Demonstration, demonstration_parser, one_line_errors, parse_arguments
from mla_coded import MultiHeadLatentAttention
from moe_coded import SwiGLU, TransformerBlock
from multihead_attention_coded import GrowingBuffer, Linear, RMSNorm


# %% The simple idea: independent heads on the same hidden state
class IndependentHead(nn.Module):
    """Guesses the token k + 1 ahead from the main hidden state alone (Gloeckle et al., 2024)."""

    def __init__(self, block, head):
        super().__init__()
        self.block, self.head = block, head
        self.norm = RMSNorm(head.in_features, eps=1e-6)

    def forward(self, hidden, future_ids=None, **options):
        """(B, T, D) → (B, T, D), to be passed to `head`; the future tokens are not looked at."""
        return self.norm(self.block(hidden, **options))


# %% V3's module: the next depth continues from the last one and sees the token in between
class MultiTokenPredictor(nn.Module):
    """One MTP depth around a `TransformerBlock`; `embedding` and `head` are the main model's own.

    Names as in the released checkpoints, where the module is stored as one more layer and
    `norm` as `shared_head.norm`.
    """

    def __init__(self, block, embedding, head, norm_eps=1e-6):
        super().__init__()
        hidden_size = embedding.embedding_dim
        self.embedding, self.head = embedding, head
        self.enorm = RMSNorm(hidden_size, eps=norm_eps)
        self.hnorm = RMSNorm(hidden_size, eps=norm_eps)
        self.eh_proj = Linear(2 * hidden_size, hidden_size, bias=False)
        self.block = block
        self.norm = RMSNorm(hidden_size, eps=norm_eps)

    def forward(self, hidden, future_ids, **options):
        """Hidden states of the depth before, normed, and the tokens k ahead → those of this depth.

        hidden (B, T, D), future_ids (B, T): future_ids[:, i] is t_{i+k}. Returns (B, T, D), normed:
        `head` turns it into logits for t_{i+k+1}, and the next depth takes it as it is.
        `options` go to the block.
        """
        joined = torch.cat([self.enorm(self.embedding(future_ids)), self.hnorm(hidden)], dim=-1)
        # Under autocast the product is BF16; the residual stream keeps its own precision.
        return self.norm(self.block(self.eh_proj(joined).to(hidden.dtype), **options))


# %% The smallest complete language model: what phases 9 and 10 build on
class CausalLM(nn.Module):
    """Embedding, blocks with latent attention, final norm, untied head, and MTP modules.

    `blocks`: `TransformerBlock`s. `mtp_blocks`: one for each MTP depth. `max_positions`: longest
    context, None = no limit. `mtp_class`: `MultiTokenPredictor` or `IndependentHead`.
    """

    def __init__(
        self, vocab_size, hidden_size, blocks, mtp_blocks=(), norm_eps=1e-6, max_positions=None,
        mtp_class=MultiTokenPredictor,
    ):  # fmt: skip
        super().__init__()
        self.max_positions = max_positions
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(hidden_size, eps=norm_eps)
        self.lm_head = Linear(hidden_size, vocab_size, bias=False)
        if mtp_class is IndependentHead:
            self.mtp = nn.ModuleList(IndependentHead(block, self.lm_head) for block in mtp_blocks)
        else:
            self.mtp = nn.ModuleList(
                mtp_class(block, self.embed_tokens, self.lm_head, norm_eps) for block in mtp_blocks
            )

    @torch.no_grad()
    def init_weights(self, std=0.02):
        """Matrices from a normal distribution, biases zero: the first loss is about ln(W)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def new_caches(self, blocks=None, capacity=0):
        """An empty cache for each of the blocks (default: the main model's).

        `capacity`: room for so many tokens is set aside at the first append.
        """
        blocks = self.layers if blocks is None else blocks
        return [block.self_attn.new_cache(capacity) for block in blocks]

    def hidden_states(self, input_ids, attention_mask=None, caches=None, path="expanded"):
        """Token ids (B, T) → hidden states after the final norm (B, T, D).

        attention_mask: (B, S) over everything attended to, cached tokens included; 0 = padding,
            which is attended by nobody and takes no position. caches: from `new_caches`, appended
            to. path: how attention is computed, see `MultiHeadLatentAttention`.
        """
        past = caches[0].length if caches else 0
        self._check_tokens(input_ids, past)
        options = self._padding(input_ids, attention_mask, past)
        return self._run(input_ids, caches, path=path, **options)

    def _run(self, input_ids, caches=None, last=None, **options):
        """`hidden_states` without its checks; `options` go to every block.

        last: only the states of the last so many tokens. The last layer then works out just those;
        of the others it fills its cache, which is all that later tokens need (a prompt of 1,024:
        74 → 58 ms).
        """
        hidden = self.embed_tokens(input_ids)
        for i, layer in enumerate(self.layers):
            if last is not None and i == len(self.layers) - 1:
                options["last"] = last
            hidden = layer(hidden, cache=caches[i] if caches else None, **options)
        return self.norm(hidden)

    def _check_tokens(self, input_ids, past):
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids must be (B, T) with T ≥ 1, got {tuple(input_ids.shape)}")
        if input_ids.is_floating_point():
            raise ValueError(f"input_ids must be integers, got {input_ids.dtype}")
        length = past + input_ids.shape[1]
        if self.max_positions is not None and length > self.max_positions:
            raise ValueError(f"{length} tokens exceed the context of {self.max_positions}")
        vocab_size = self.embed_tokens.num_embeddings
        if not input_ids.is_meta and input_ids.numel():
            low, high = input_ids.aminmax()
            if low < 0 or high >= vocab_size:
                wrong = low.item() if low < 0 else high.item()
                raise ValueError(f"token id {wrong} is not within the vocabulary of {vocab_size}")

    def _padding(self, input_ids, attention_mask, past):
        """The options for the blocks that keep padding out, or none."""
        if attention_mask is None:
            return {}
        wanted = (input_ids.shape[0], past + input_ids.shape[1])
        if attention_mask.shape != wanted:
            raise ValueError(f"attention_mask must be {wanted}, got {tuple(attention_mask.shape)}")
        real_BS = attention_mask.bool()
        positions_BT = (real_BS.long().cumsum(dim=1) - 1).clamp(min=0)[:, past:]
        return dict(
            mask=real_BS[:, None, None, :], positions=positions_BT, token_mask=real_BS[:, past:]
        )

    def forward(self, input_ids, attention_mask=None, caches=None, path="expanded"):
        """Token ids (B, T) → logits of the next token (B, T, W). Options: `hidden_states`."""
        return self.lm_head(self.hidden_states(input_ids, attention_mask, caches, path))

    def mtp_logits(self, hidden, input_ids, attention_mask=None, path="expanded"):
        """Logits of every MTP depth while the future is known, as in training.

        hidden: from `hidden_states` (B, T, D) of the same input_ids (B, T). Returns: a list; entry
        k − 1 is (B, T − k, W), whose row i predicts token i + k + 1.
        """
        states = self.mtp_hidden_states(hidden, input_ids, attention_mask, path)
        return [self.lm_head(state) for state in states]

    def mtp_hidden_states(self, hidden, input_ids, attention_mask=None, path="expanded"):
        """What `mtp_logits` puts through the head: entry k − 1 is (B, T − k, D)."""
        options = dict(path=path, **self._padding(input_ids, attention_mask, 0))
        states = []
        for k, predictor in enumerate(self.mtp, start=1):
            hidden, future_ids = hidden[:, :-1], input_ids[:, k:]
            cut = {name: value[..., : hidden.shape[1]] if torch.is_tensor(value) else value
                   for name, value in options.items()}  # fmt: skip
            states.append(predictor(hidden, future_ids, **cut))
            if not isinstance(predictor, IndependentHead):
                hidden = states[-1]
        return states

    def head_loss(self, hidden, input_ids, shift, document_ids=None, token_mask=None):
        """Mean cross-entropy in nats of the head's guess at token i + shift, from hidden states.

        hidden (B, ≤ T, D), input_ids, document_ids and token_mask (B, T). The same number as
        `next_token_loss` (shift 1) and `mtp_loss` (of depth k alone, shift k + 1, weight 1) give.
        """
        targets = shifted_targets(
            input_ids, hidden.shape[1], shift, document_ids, token_mask
        ).flatten()
        weight, device = self.lm_head.weight, hidden.device.type
        precision = hidden.dtype
        if torch.is_autocast_enabled(device):
            precision = torch.get_autocast_dtype(device)
        rows = hidden.flatten(0, 1).to(precision)
        total = ChunkedHeadLoss.apply(rows, weight.to(precision), targets)
        return total / (targets != -100).sum().clamp(min=1)

    @torch.inference_mode()
    def _generate(self, prompts, lengths, new_tokens, sampling, eos_token_id, pad_token_id, stream,
                  prefill_chunk, figures, logprobs=None):  # fmt: skip
        """Token by token. prompts (B, T) at the left of their rows, lengths (B,) → (B, new)."""
        head = decoding_head(self.lm_head, new_tokens)
        caches = self.new_caches(capacity=prompts.shape[1] + new_tokens - 1)
        # Rows of one length share their place in the caches, which then need no mask.
        even = bool((lengths == prompts.shape[1]).all())
        start = prompts.shape[1] if even else lengths
        hidden = read_prompts(self, prompts, caches, prefill_chunk, 1 if even else None)
        hidden = hidden[:, -1:] if even else take(hidden, lengths - 1, 1)
        output = prompts.new_full((len(prompts), new_tokens), pad_token_id)
        finished = torch.zeros_like(lengths, dtype=torch.bool)
        for i in range(new_tokens):
            logits = head(hidden[:, 0])
            fresh = sampling.choose(logits)
            if logprobs is not None:
                logprobs.append(sampling.logprobs(logits, fresh))
            output[:, i] = fresh.masked_fill(finished, pad_token_id)
            if stream is not None:
                stream([[] if done else [token] for done, token in
                        zip(finished.tolist(), fresh.tolist(), strict=True)])  # fmt: skip
            if eos_token_id is not None:
                finished |= fresh == eos_token_id
                if finished.all():
                    break
            if i + 1 < new_tokens:
                places = slots(start + i, 1, fresh.device)
                hidden = self._run(output[:, i : i + 1], caches, **places)
        figures.update(forwards=i + 1, tokens=i + 1, cache_bytes=used_bytes(caches))
        return output

    def generate(
        self, input_ids, max_new_tokens, temperature=0.0, speculative=False, attention_mask=None,
        eos_token_id=None, pad_token_id=0, generator=None, top_k=None, top_p=None, depth=None,
        prefill_chunk=None, stream=None, figures=None, logprobs=None,
    ):  # fmt: skip
        """Continues each prompt with the latent cache: (B, T) → (B, T + new).

        Args:
            temperature, top_k, top_p, generator: see `Sampling`. Temperature 0 is greedy.
            speculative: draft with the MTP modules; greedy text stays the same (in FP32, up to
                ties), sampled text keeps its distribution. `depth`: see `speculative_generate`.
            attention_mask: (B, T), 0 = padding, for prompts of unequal length: pad on the left.
                Greedily and in FP32, each gives what it gives alone.
            eos_token_id: a sequence stops after it and is filled with `pad_token_id`; None: never.
            prefill_chunk: the main model reads prompts so many tokens at a time, which bounds the
                memory its layers take; None: at once. (With drafts or prompts of unequal length all
                last hidden states are kept, and the modules read a prompt at once.)
            stream: called after each pass with the new tokens, one list a sequence.
            figures: a dict to be filled: `forwards` passes of the main model (the prompts are one),
                `tokens` of the longest continuation, `cache_bytes` of the latent caches; see
                `speculative_generate`.
            logprobs: a list to be filled with each pass's (B,) log-probabilities of the tokens it
                chose (after a row's end they mean nothing). Not with drafts.

        Raises: ValueError if prompt and new tokens exceed the context, before any work is done.
        """
        sampling = Sampling(temperature, top_k, top_p, generator)
        self._check_generation(input_ids, max_new_tokens, attention_mask, prefill_chunk)
        if not 0 <= pad_token_id < self.embed_tokens.num_embeddings:
            raise ValueError(f"pad_token_id={pad_token_id} is not within the vocabulary")
        if depth is not None and not speculative:
            raise ValueError(f"depth={depth} is for speculative=True")
        if logprobs is not None and speculative:
            raise ValueError("logprobs are those of plain decoding: not with speculative=True")
        figures = {} if figures is None else figures
        figures.update(forwards=0, drafted=0, accepted=0, tokens=0, cache_bytes=0)
        input_ids = input_ids.long()
        if max_new_tokens == 0 or len(input_ids) == 0:
            return F.pad(input_ids, (0, max_new_tokens), value=pad_token_id)
        prompts, lengths = left_aligned(input_ids, attention_mask)
        options = dict(
            eos_token_id=eos_token_id, pad_token_id=pad_token_id, stream=stream,
            prefill_chunk=prefill_chunk, figures=figures,
        )  # fmt: skip
        if speculative:
            new = _speculate(self, prompts, lengths, max_new_tokens, sampling, depth, **options)
        else:
            new = self._generate(
                prompts, lengths, max_new_tokens, sampling, logprobs=logprobs, **options
            )
        return torch.cat([input_ids, new.clone()], dim=1)  # a clone may enter later training

    def _check_generation(self, input_ids, max_new_tokens, attention_mask, prefill_chunk=None):
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 0")
        if prefill_chunk is not None and prefill_chunk < 1:
            raise ValueError(f"prefill_chunk={prefill_chunk} must be at least 1")
        self._check_tokens(input_ids, past=0)
        length = input_ids.shape[1] + max_new_tokens
        if self.max_positions is not None and length > self.max_positions:
            raise ValueError(
                f"prompt of {input_ids.shape[1]} and {max_new_tokens} new tokens exceed the "
                f"context of {self.max_positions}"
            )
        if attention_mask is not None:
            self._padding(input_ids, attention_mask, past=0)  # checks the shape
            if not attention_mask[:, -1].all():
                raise ValueError("prompts must be padded on the left: the last token is padding")


# %% Decoding: how a token is chosen, and where it goes
@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from logits.

    `temperature` 0: the most likely token. Above 0: drawn (`generator`: for a seed) from
    softmax(logits / temperature), cut to the `top_k` most likely tokens and to the fewest tokens
    that hold `top_p` of the probability; None cuts nothing.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    generator: torch.Generator | None = None

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be a number of at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")

    @property
    def greedy(self):
        return self.temperature == 0

    def probabilities(self, logits):
        """(..., W) → (..., W), in FP32: the distribution that a token is drawn from."""
        logits = logits.float()
        logits = logits - logits.amax(dim=-1, keepdim=True)  # a tiny temperature cannot overflow
        probabilities = (logits / self.temperature).softmax(dim=-1)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            kept, places = probabilities.topk(self.top_k, dim=-1)
            probabilities = torch.zeros_like(probabilities).scatter(-1, places, kept)
        if self.top_p is not None and self.top_p < 1:
            ranked, order = probabilities.sort(dim=-1, descending=True)
            before = ranked.cumsum(dim=-1) - ranked  # what the more likely tokens hold
            cut = before >= self.top_p * ranked.sum(dim=-1, keepdim=True)
            probabilities = probabilities.scatter(-1, order, ranked.masked_fill(cut, 0.0))
        return probabilities / probabilities.sum(dim=-1, keepdim=True)

    def draw(self, probabilities):
        """(B, W), which need not sum to 1 → (B,), by where a uniform number falls in running sums.

        One number a row: `torch.multinomial` draws one an entry (256 rows of 8,192: 29 ms of a
        pass of 70).
        """
        sums = probabilities.cumsum(dim=-1)
        total = sums[:, -1:]
        if not (total.isfinite() & (total > 0)).all():
            raise ValueError("no token can be drawn: the model's probabilities are not finite")
        place = torch.rand(total.shape, device=sums.device, generator=self.generator) * total
        place = torch.minimum(place, torch.nextafter(total, torch.zeros_like(total)))
        return torch.searchsorted(sums, place, right=True).squeeze(1)

    def logprobs(self, logits, tokens):
        """(B, W), (B,) → (B,): how likely `tokens` were to be drawn; 0 where there is no choice."""
        if self.greedy:
            return torch.zeros_like(logits[:, 0], dtype=torch.float32)
        return self.probabilities(logits).gather(1, tokens[:, None]).squeeze(1).log()

    def choose(self, logits):
        """(B, W) → (B,)."""
        return logits.argmax(dim=-1) if self.greedy else self.draw(self.probabilities(logits))


def left_aligned(input_ids, attention_mask):
    """Prompts (B, T) with padding behind them, where nobody looks, and their lengths (B,)."""
    if attention_mask is None:
        return input_ids, torch.full_like(input_ids[:, 0], input_ids.shape[1])
    real_BT = attention_mask.bool()
    order_BT = (~real_BT).long().argsort(dim=1, stable=True)
    return input_ids.gather(1, order_BT), real_BT.sum(dim=1)


def take(rows, start, count):
    """Rows start … start + count − 1 of (B, n, ...): start a number, or (B,) one a sequence."""
    if not torch.is_tensor(start):
        return rows[:, start : start + count]
    places = start[:, None] + torch.arange(count, device=rows.device)
    return rows[torch.arange(len(rows), device=rows.device)[:, None], places]


def slots(start, count, device):
    """The options that put `count` tokens a sequence at position `start` and there in the caches.

    start: a number, or (B,) where sequences have different lengths: then a mask hides from each
    what lies behind its own tokens (left from a longer prompt or from a rejected draft).
    """
    steps = torch.arange(count, device=device)
    path = "absorbed" if count < EXPAND_FROM else "expanded"
    if not torch.is_tensor(start):
        return dict(start=start, positions=start + steps, path=path)
    positions_BT = start[:, None] + steps
    keys_S = torch.arange(int(start.max()) + count, device=device)
    mask = (keys_S <= positions_BT[..., None]).unsqueeze(1)
    return dict(start=start, positions=positions_BT, mask=mask, path=path)


def read_prompts(model, prompts, caches, chunk=None, last=None):
    """Hidden states (B, T, D) of prompts (B, T), read `chunk` tokens at a time (None: at once).

    last: only those of the last so many tokens of each chunk.
    """
    pieces, start = [], 0
    for piece in prompts.split(chunk or prompts.shape[1], dim=1):
        count = piece.shape[1]
        pieces.append(model._run(piece, caches, last, **slots(start, count, prompts.device)))
        start += count
    return torch.cat(pieces, dim=1)


# Queries from which rebuilding keys and values is faster than absorbing: after 1,024 tokens, 24
# take 7.3 ms absorbed and 8.4 expanded, 64 take 12.9 and 12.5 (benchmarks/scaling.py).
EXPAND_FROM = 48


def decoding_head(head, tokens):
    """`head` for the few rows of a decoding pass.

    oneDNN's packed product reads a large matrix once for up to four rows and uses all threads:
    60 µs for 1 to 4 rows of 8,192 × 256, where `F.linear` takes 117 for one and 222 for two.
    Packing costs 0.4 ms, saved again after seven passes: texts of fewer than 16 tokens, and small
    heads, do without.
    """
    if type(head) not in (nn.Linear, Linear):  # a wrapped or quantised one has ways of its own
        return head
    weight = head.weight
    fits = weight.device.type == "cpu" and weight.dtype == torch.float32 and head.bias is None
    pays = tokens >= 16 and weight.numel() >= 2**20
    if not (fits and pays and torch.backends.mkldnn.is_available()):
        return head
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 4)  # for about 4 rows
    no_bias, nothing_after = None, ("none", [], "")
    return lambda rows: torch.ops.mkldnn._linear_pointwise(rows, packed, no_bias, *nothing_after)


def used_bytes(caches):
    return sum(cache.used_bytes() for cache in caches)


# %% The losses
def next_token_loss(logits, input_ids, token_mask=None):
    """Mean cross-entropy of logits (B, T, W) against the next tokens of input_ids (B, T), in nats.

    token_mask (B, T): False = padding, never a target.
    """
    return _shifted_loss(logits, shifted_targets(input_ids, logits.shape[1], 1, None, token_mask))


def mtp_loss(depth_logits, input_ids, weight=0.3, document_ids=None, token_mask=None):
    """λ/depths · Σ_k L_k (V3, equations 24–25), in nats.

    Args:
        depth_logits: from `CausalLM.mtp_logits`; entry k − 1 predicts token i + k + 1 at row i.
        input_ids: (B, T). weight: λ.
        document_ids: (B, T), which document a token belongs to; a target in another document than
            its position is left out. token_mask: (B, T), False = padding.
    Returns: a scalar; 0 where no target is left. With no depths: 0.
    """
    losses = [
        _shifted_loss(
            logits,
            shifted_targets(input_ids, logits.shape[1], k + 1, document_ids, token_mask),
        )
        for k, logits in enumerate(depth_logits, start=1)
    ]
    return weight * torch.stack(losses).mean() if losses else torch.zeros((), dtype=torch.float32)


def shifted_targets(input_ids, rows, shift, document_ids=None, token_mask=None):
    """(B, rows): token i + shift at row i, and −100, which no loss counts, where there is none.

    No target either: a token of another document than token i, and padding.
    """

    def ahead(values, fill):
        return F.pad(values[:, shift:], (0, shift), value=fill)[:, :rows]

    targets = ahead(input_ids, -100)
    if document_ids is not None:
        targets = targets.masked_fill(ahead(document_ids, -1) != document_ids[:, :rows], -100)
    if token_mask is not None:
        real = token_mask.bool()
        targets = targets.masked_fill(~(ahead(real, False) & real[:, :rows]), -100)
    return targets


def _shifted_loss(logits, targets):
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
    return total / (targets != -100).sum().clamp(min=1)


class ChunkedHeadLoss(torch.autograd.Function):
    """Σ cross-entropy of `F.linear(hidden, weight)`, the softmax taken in chunks of rows.

    hidden (M, D), weight (W, D), targets (M,) with −100 = none → a scalar, at least in FP32. A
    large vocabulary makes logits the biggest tensors of a training step. In chunks, with each
    chunk's gradient, softmax − one-hot, worked out at once, their FP32 form stays in the
    processor's cache, and only the gradient is kept whole, in the precision of `hidden`. Two heads
    of 1,024 rows by 8,192 tokens in BF16: 350 → 228 ms for the whole training step.
    """

    ROWS = 256

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        total, wanted = 0.0, any(ctx.needs_input_grad)
        gradients = hidden.new_empty(len(hidden), len(weight)) if wanted else None
        for start in range(0, len(hidden), ChunkedHeadLoss.ROWS):
            rows = slice(start, start + ChunkedHeadLoss.ROWS)
            logits = F.linear(hidden[rows], weight)
            exact = torch.promote_types(logits.dtype, torch.float32)
            log_p = logits.log_softmax(dim=-1, dtype=exact)
            counted, target = (targets[rows] != -100)[:, None], targets[rows].clamp(min=0)[:, None]
            total = total - (log_p.gather(1, target) * counted).sum()
            if wanted:
                minus_one = -torch.ones_like(target, dtype=log_p.dtype)
                gradients[rows] = log_p.exp_().scatter_add_(1, target, minus_one)
        if wanted:
            gradients[targets == -100] = 0.0
            ctx.save_for_backward(gradients @ weight, gradients.T @ hidden)
        return torch.as_tensor(total, device=hidden.device)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale):
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return hidden_gradient * scale, weight_gradient * scale, None


# %% Speculative decoding: the modules draft, the main model checks all drafts in one pass
def speculative_generate(
    model, input_ids, max_new_tokens, eos_token_id=None, temperature=0.0, depth=None, **options
):  # fmt: skip
    """`CausalLM.generate` with drafts: (B, T) → (ids (B, T + new), figures).

    In FP32, greedy text is the same, token for token (up to ties in the last bit, where a pass over
    several tokens may round differently than one over one; in BF16 such ties are common). Sampled
    text has the same distribution.

    A round: the main model reads the last confirmed token and the drafts after it. `verify`
    confirms drafts from the left until the first that fails, and puts one token of its own after
    them. Then the modules draft again, module k the k-th token; where `depth` asks for more tokens
    than there are modules, the last one is applied again to its own hidden states.

    Args: as `CausalLM.generate`. depth: tokens drafted a round; default: as `Depth` says
        (independent heads: at most one each).
    Returns: ids and figures: `forwards` passes of the main model, `drafted` and `accepted` tokens,
        `tokens` of the longest continuation, `cache_bytes` of main and draft caches (without the
        D numbers a token of hidden states that drafting keeps besides).
    """
    figures = {}
    ids = model.generate(
        input_ids, max_new_tokens, temperature, True, eos_token_id=eos_token_id, depth=depth,
        figures=figures, **options,
    )  # fmt: skip
    return ids, figures


def verify(logits, drafts, draft_chances, sampling):
    """How many drafts hold, from the left, and the model's own token after them: (B,), (B,).

    logits (B, d + 1, W): the model's, at the token before the drafts and at each draft. drafts
    (B, d), drawn from draft_chances (B, d, W); None if greedy or if nothing was drafted.

    Greedy: a draft holds if it is the model's choice. Sampling (Leviathan et al., 2023, section
    2.3): a draft x drawn from q holds with probability min(1, p(x)/q(x)); where it fails, the
    token is drawn from max(0, p − q), normalised. Together that is a token drawn from p, whatever
    q is. Accepting by confidence, q(x) or p(x) above some bound, is another distribution.
    """
    if sampling.greedy:
        choices = logits.argmax(dim=-1)
        accepted = (choices[:, :-1] == drafts).long().cumprod(dim=1).sum(dim=1)
        return accepted, choices.gather(1, accepted[:, None]).squeeze(1)
    chances = sampling.probabilities(logits)
    if draft_chances is None:  # nothing drafted
        return torch.zeros_like(logits[:, 0, 0], dtype=torch.long), sampling.draw(chances[:, 0])
    p, q = (c.gather(2, drafts[..., None]).squeeze(2) for c in (chances[:, :-1], draft_chances))
    uniform = torch.rand(p.shape, device=p.device, generator=sampling.generator)
    accepted = (uniform * q < p).long().cumprod(dim=1).sum(dim=1)
    # After the last draft nothing was drafted: there q = 0, and the rest is p itself.
    at = accepted[:, None, None].expand(-1, 1, chances.shape[2])
    rest = (chances - F.pad(draft_chances, (0, 0, 0, 1))).gather(1, at).squeeze(1).clamp(min=0)
    equal = rest.sum(dim=-1, keepdim=True) <= 0  # p = q up to rounding
    return accepted, sampling.draw(torch.where(equal, chances.gather(1, at).squeeze(1), rest))


class Depth:
    """How many tokens to draft in the next round, where the caller does not say.

    One more than held in the last. When none held, a pause, each time twice as long as before, at
    most `LONGEST_PAUSE` rounds: text that the modules guess badly costs little more than without.
    """

    DEEPEST, LONGEST_PAUSE = 12, 16

    def __init__(self, deepest=DEEPEST):
        self.deepest, self.pause, self.waiting = deepest, 0, 0

    def next(self, drafted, held):
        """Tokens to draft now.

        drafted: how many the last round drafted, 0 = none. held: how many of them held, in a batch
        in the sequence where most did.

        None of some held: pause for 1, then 2, 4, 8, 16 rounds; a success resets that.
        """
        if drafted and not held:
            self.pause = self.waiting = min(max(1, 2 * self.pause), self.LONGEST_PAUSE)
        elif drafted:
            self.pause = 0
        if self.waiting:
            self.waiting -= 1
            return 0
        return min(held + 1, self.deepest)


class Drafter:
    """The MTP modules, their caches, and the main model's hidden states that they start from.

    A place in a cache is a position in the text, as in the main model's: what a rejected draft left
    is overwritten.
    """

    def __init__(self, model, capacity, sampling, head):
        self.model, self.sampling, self.head = model, sampling, head
        self.unread = None  # (B,): from where on states are new to the modules; None: nowhere
        self.caches = model.new_caches([predictor.block for predictor in model.mtp], capacity)
        self.hidden = GrowingBuffer(capacity)  # the main model's, at every token read so far

    def observe(self, hidden, start):
        """The main model's states (B, n, D) from position `start` (B,) on, new or once more."""
        self.hidden.append(hidden, one_or_each(start))
        self.unread = start if self.unread is None else self.unread

    def draft(self, tokens, lengths, depth):
        """Writes `depth` drafts into tokens (B, ·) behind each row's `lengths`.

        Returns: (B, depth, W) the distributions they were drawn from; greedy: None.

        Module k at position i needs token i + k: for the last positions a draft, which may prove
        wrong, so they are gone through again next time. With 2 modules, tokens 0–6 confirmed and
        states 0–5 observed: module 1 reads up to position 5 (with token 6) and drafts token 7;
        module 2 reads up to position 5 (with that draft) and drafts token 8. Next time both begin
        one position earlier than what is new. All rows read `count` positions, the most that any
        needs. What a row reads past its own last position means nothing; masks hide it until it is
        overwritten.
        """
        modules, newest_at = len(self.model.mtp), lengths - 2
        first = (self.unread - modules + 1).clamp(min=0)
        count = int((newest_at - first).max()) + 1
        state, chances, draft = take(self.hidden.storage, one_or_each(first), count), [], None
        self.unread = None
        for k in range(1, max(depth, modules) + 1):
            predictor, cache = self.model.mtp[min(k, modules) - 1], self.caches[min(k, modules) - 1]
            if k <= modules:
                places = slots(one_or_each(first), count, tokens.device)
                future = take(tokens, one_or_each(first + k), count)
                if k == modules and len(tokens) == 1:  # of the others, it needs the cache entry
                    output = predictor(state, future, cache=cache, last=1, **places)
                    newest = output
                else:
                    output = predictor(state, future, cache=cache, **places)
                    newest = take(output, one_or_each(newest_at - first), 1)
                if not isinstance(predictor, IndependentHead):
                    state = output
            else:  # the last module again, one position on, after its own state and draft
                places = slots(one_or_each(newest_at + k - modules), 1, tokens.device)
                newest = predictor(newest, draft[:, None], cache=cache, **places)
            if k > depth:  # read along, so that its cache has no gaps
                continue
            logits = self.head(newest[:, 0])
            if self.sampling.greedy:
                draft = logits.argmax(dim=-1)
            else:
                chances.append(self.sampling.probabilities(logits))
                draft = self.sampling.draw(chances[-1])
            tokens.scatter_(1, (lengths + k - 1)[:, None], draft[:, None])
        return torch.stack(chances, dim=1) if chances else None


def one_or_each(start):
    """A (B,) tensor of places as a number where there is one sequence: slices instead of masks."""
    return int(start) if len(start) == 1 else start


class Continuation:
    """Tokens (B, ·), row by row from the left: prompt, what is confirmed, then drafts.

    `room`: extra places, so that what is drafted past a row's end has one. `end` (B,): the length
    at which a row is full.
    """

    def __init__(self, prompts, lengths, new_tokens, room, eos_token_id, pad_token_id):
        self.tokens = F.pad(prompts, (0, new_tokens + room), value=pad_token_id)
        self.lengths, self.prompt_lengths = lengths, lengths
        self.end, self.new_tokens = lengths + new_tokens, new_tokens
        self.eos_token_id, self.pad_token_id = eos_token_id, pad_token_id
        self.active = torch.ones_like(lengths, dtype=torch.bool)

    def confirm(self, drafts, accepted, own):
        """Each row's accepted drafts (B, d) stay; the model's `own` token (B,) goes behind them.

        Nothing counts past the end or an end-of-text, nothing in finished rows.
        Returns: what was appended, a list a row.
        """
        self.tokens.scatter_(1, (self.lengths + accepted)[:, None], own[:, None])
        left, active = (self.end - self.lengths).tolist(), self.active.tolist()
        rows = zip(drafts.tolist(), accepted.tolist(), own.tolist(), strict=True)
        appended = []
        for row, (draft, count, token) in enumerate(rows):
            new = [*draft[:count], token][: left[row]] if active[row] else []
            if self.eos_token_id in new:
                new = new[: new.index(self.eos_token_id) + 1]
                self.active[row] = False
            appended.append(new)
        self.lengths = self.lengths + torch.tensor(list(map(len, appended))).to(self.lengths)
        self.active = self.active & (self.lengths < self.end)
        return appended

    def drafts_wanted(self, depth):
        """(B,): how many of `depth` drafts each row can still use."""
        return (self.end - self.lengths - 1).clamp(max=depth) * self.active

    def new(self):
        """(B, new): what was appended, then padding."""
        ids = take(self.tokens, self.prompt_lengths, self.new_tokens)
        places = torch.arange(self.new_tokens, device=ids.device)
        written = places < (self.lengths - self.prompt_lengths)[:, None]
        return ids.masked_fill(~written, self.pad_token_id)


@torch.inference_mode()
def _speculate(model, prompts, lengths, new_tokens, sampling, depth, eos_token_id, pad_token_id,
               stream, prefill_chunk, figures):  # fmt: skip
    """prompts (B, T) at the left of their rows, lengths (B,) → new tokens (B, new)."""
    if not model.mtp:
        raise ValueError("speculative decoding needs MTP modules, and this model has none")
    independent = isinstance(model.mtp[-1], IndependentHead)
    if depth is not None and depth < 1:
        raise ValueError(f"depth={depth} must be at least 1")
    if depth is not None and depth > len(model.mtp) and independent:
        raise ValueError(f"depth={depth}: {len(model.mtp)} independent heads guess no further")
    deepest = depth or (len(model.mtp) if independent else Depth.DEEPEST)
    adaptive = Depth(deepest)
    # Finished rows are read along, as far past their end as another row drafts or pauses.
    room = max(deepest, Depth.LONGEST_PAUSE) + 2 * len(model.mtp)
    text = Continuation(prompts, lengths, new_tokens, room, eos_token_id, pad_token_id)
    capacity = text.tokens.shape[1]
    caches, head = model.new_caches(capacity=capacity), decoding_head(model.lm_head, new_tokens)
    drafter = Drafter(model, capacity, sampling, head)
    # `start` (B,): where the states in `hidden` begin. `judging` (B, drafted + 1, D): those from
    # the last confirmed token on; at first only the state of the prompt's last token.
    start, drafted, chances = torch.zeros_like(lengths), 0, None
    hidden = read_prompts(model, prompts, caches, prefill_chunk)
    judging = take(hidden, lengths - 1, 1)
    while True:  # check the drafts, confirm, draft anew, one pass over last token and drafts
        drafts = take(text.tokens, one_or_each(text.lengths), drafted)
        wanted = text.drafts_wanted(drafted)
        accepted, own = verify(head(judging), drafts, chances, sampling)
        appended = text.confirm(drafts, accepted, own)
        figures["forwards"] += 1
        figures["drafted"] += int(wanted.sum())
        figures["accepted"] += sum(map(min, accepted.tolist(), wanted.tolist(), map(len, appended)))
        if stream is not None:
            stream(appended)
        if not text.active.any():
            break
        # As many as asked for or as seem to pay; one past the end would be thrown away.
        held = max(map(len, appended)) - 1
        drafted = int(text.drafts_wanted(depth or adaptive.next(drafted, held)).max())
        drafter.observe(hidden, start)
        chances = drafter.draft(text.tokens, text.lengths, drafted) if drafted else None
        # The main model reads the last confirmed token and the drafts after it.
        start = text.lengths - 1
        fed = take(text.tokens, one_or_each(start), drafted + 1)
        places = slots(one_or_each(start), drafted + 1, fed.device)
        hidden = judging = model._run(fed, caches, **places)
    figures["tokens"] = int((text.lengths - lengths).max())
    figures["cache_bytes"] = used_bytes(caches) + used_bytes(drafter.caches)
    return text.new()


# %% A tiny language to learn, and three ways to learn it
def small_language(tokens, seed):
    """(tokens,) ids 0–31: a token is followed by one of three of its own, at 80, 15 and 5 %."""
    followers = torch.randint(32, (32, 3), generator=torch.Generator().manual_seed(1234)).tolist()
    choices = torch.multinomial(torch.tensor([0.8, 0.15, 0.05]), tokens, replacement=True,
                                generator=torch.Generator().manual_seed(seed)).tolist()  # fmt: skip
    text = [0]
    for choice in choices[1:]:
        text.append(followers[text[-1]][choice])
    return torch.tensor(text)


def small_model(mtp_class=MultiTokenPredictor, depth=0, width=48):
    def block():
        attention = MultiHeadLatentAttention(width, 4, 24, 12, 4, 12)
        return TransformerBlock(attention, SwiGLU(width, 96))

    model = CausalLM(
        32, width, [block(), block()], [block() for _ in range(depth)], mtp_class=mtp_class
    )
    model.init_weights(std=0.02)
    return model


def train_small(model, steps, weight, device, seed=0, rate=4e-3, precision=torch.float32):
    """Trains on the small language; returns the held-out (main loss, loss of depth 1 or None)."""
    training_text = small_language(40_000, seed=1)
    held_out = small_language(8_192, seed=2).view(-1, 64).to(device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        starts = torch.randint(len(training_text) - 64, (16,), generator=generator)
        ids = torch.stack([training_text[start : start + 64] for start in starts]).to(device)
        with torch.autocast(ids.device.type, precision, enabled=precision != torch.float32):
            hidden = model.hidden_states(ids)
            loss = next_token_loss(model.lm_head(hidden), ids)
            loss = loss + mtp_loss(model.mtp_logits(hidden, ids), ids, weight).to(device)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        hidden = model.hidden_states(held_out)
        main = next_token_loss(model.lm_head(hidden), held_out).item()
        depth_1 = model.mtp_logits(hidden, held_out)[:1]
        return main, mtp_loss(depth_1, held_out, 1.0).item() if depth_1 else None


def cost_of(model, ids):
    """(parameters, forward FLOPs of main model and MTP modules); attention counted in full."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hidden = model.hidden_states(ids, path="naive")
        model.lm_head(hidden)
        model.mtp_logits(hidden, ids, path="naive")
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops()


# %% The demonstration
def check_drawn_drafts(demo, device, draws=100_000):
    """Drafts from q, put through `verify`, come out as tokens from p, however p and q differ."""
    p_logits, q_logits = torch.randn(2, 8, device=device) * 1.5
    q = q_logits.softmax(dim=-1)
    drafts = torch.multinomial(q, draws, replacement=True)[:, None]
    logits = p_logits.expand(draws, 2, 8)
    accepted, own = verify(logits, drafts, q.expand(draws, 1, 8), Sampling(1.0))
    first = torch.where(accepted > 0, drafts[:, 0], own)
    p, shares = p_logits.softmax(dim=-1), torch.bincount(first, minlength=8) / draws
    off = (shares - p).abs().max().item()
    unchecked = (torch.bincount(drafts[:, 0], minlength=8) / draws - p).abs().max().item()
    demo.check("drafts from q, verified, are tokens from p", f"{draws:,} draws",
               f"off by {off:.4f}, unverified {unchecked:.4f}",
               off < 0.007 < unchecked)  # fmt: skip


def compare_heads(demo, ids_BT, arguments):
    """Trains without MTP, with an independent head and with a module; prints costs and losses."""
    models = {}
    kinds = {
        "no MTP": dict(depth=0),
        "independent head": dict(depth=1, mtp_class=IndependentHead),
        "MTP module": dict(depth=1),
    }
    demo.note("held-out loss in nats after equal tokens; FLOPs and parameters beside no MTP:")
    for name, options in kinds.items():
        torch.manual_seed(arguments.seed)
        model = small_model(**options).to(arguments.device)
        parameters, flops = cost_of(model, ids_BT)
        main_loss, second_loss = train_small(
            model, arguments.steps, 0.3, ids_BT.device, arguments.seed
        )
        models[name] = (main_loss, second_loss, parameters, flops)
        base = models["no MTP"]
        second = "" if second_loss is None else f", token after next {second_loss:.3f}"
        demo.note(f"    {name:<17} next token {main_loss:.3f}{second}, FLOPs × "
                  f"{flops / base[3]:.2f}, parameters × {parameters / base[2]:.2f}")  # fmt: skip
    guess, chained = models["independent head"][1], models["MTP module"][1]
    demo.check(
        "seeing the token in between helps", "token after next",
        f"{guess:.3f} → {chained:.3f} nats",
        chained < guess or arguments.steps < 60,
    )  # fmt: skip


@one_line_errors
def main(argv=None):
    parser = demonstration_parser(__doc__)
    parser.add_argument("--steps", type=int, default=100, help="training steps of each model")
    parser.add_argument("--depth", type=int, default=2, help="MTP modules of the decoded model")
    arguments = parse_arguments(parser, argv)
    if arguments.steps < 1 or arguments.depth < 1:
        raise ValueError(
            f"--steps={arguments.steps} and --depth={arguments.depth} must be 1 or more"
        )
    demo, device = Demonstration("mtp_coded.py", arguments.device, arguments.seed), arguments.device

    ids_BT = small_language(64, seed=3).view(2, 32).to(device)
    model = small_model(depth=2).to(device)
    hidden_BTD = model.hidden_states(ids_BT)
    shapes = [tuple(logits.shape) for logits in model.mtp_logits(hidden_BTD, ids_BT)]
    demo.check("row i of depth k predicts token i + k + 1", "(B, T − k, W)", f"{shapes}",
               shapes == [(2, 31, 32), (2, 30, 32)])  # fmt: skip
    first = mtp_loss(model.mtp_logits(hidden_BTD, ids_BT), ids_BT, weight=1.0).item()
    demo.check("untrained loss is about ln(W)", "nats", f"{first:.3f}, ln 32 = 3.466",
               abs(first - 3.466) < 0.3)  # fmt: skip

    check_drawn_drafts(demo, device)
    compare_heads(demo, ids_BT, arguments)
    torch.manual_seed(arguments.seed)
    model = small_model(depth=arguments.depth).to(device)
    train_small(model, arguments.steps, 0.3, device, arguments.seed)
    prompt = small_language(8, seed=4)[None].to(device)
    plain = model.generate(prompt, 64)
    for name in ("trained", "spoilt"):
        drafted, figures = speculative_generate(model, prompt, 64, depth=arguments.depth)
        taken = f"{figures['accepted']} of {figures['drafted']} drafts taken"
        demo.check(
            f"speculation with {name} modules = plain greedy", "(1, T + new)",
            f"{taken}, {64 / figures['forwards']:.2f} tokens a pass", torch.equal(plain, drafted),
        )  # fmt: skip
        for predictor in model.mtp:  # drafts that are wrong change the speed, not the text
            torch.nn.init.normal_(predictor.eh_proj.weight, std=0.3)
    demo.finish(
        "--depth 4: do later drafts get accepted?", "--steps 400: does MTP help the next token?"
    )


if __name__ == "__main__":
    main()
