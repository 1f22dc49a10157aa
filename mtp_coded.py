"""Phase 6: multi-token prediction (MTP), learning and drafting more than the next token.

A language model learns from one target a position. The simple idea is to add heads that guess
the tokens after the next, all from the same hidden state; but the second token depends on which
first one came, and such a head cannot know. DeepSeek-V3 chains small modules instead: module k
takes the hidden state of the module before, joins the embedding of the token that really came,
and passes one block. Embedding and output head are the main model's own. After training the
modules can be thrown away, or kept to draft tokens that the main model then checks: speculative
decoding, which changes the speed and not one token of the output.

    h_k,i = Block_k( W_k [ RMSNorm(Emb(t_{i+k})) ; RMSNorm(h_{k−1,i}) ] ),    h_0 = main model
    P_k(t_{i+k+1}) = softmax(Head(RMSNorm(h_k,i)))
    L = L_main + λ/depths · Σ_k L_k

The embedding comes first as in the released weights; equation 21 has the hidden state first.

Papers: DeepSeek-V3 (2024), section 2.2, equations 21–25, and 5.4.3; Gloeckle et al. (2024) for
the independent heads; Leviathan et al. (2023) for speculative decoding.
Simplified: greedy speculation of one sequence at a time; each loss is a mean over the targets that
count, where equation 24 divides by the sequence length.

Dimensions: B batch · T query positions · D model width · W vocabulary.

Run:  python mtp_coded.py [--steps 100] [--depth 2]
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mla_coded import MultiHeadLatentAttention
from moe_coded import SwiGLU, TransformerBlock
from self_attention_coded import (
    Demonstration,
    demonstration_parser,
    one_line_errors,
    parse_arguments,
)


# %% The simple idea: independent heads on the same hidden state
class IndependentHead(nn.Module):
    """Guesses the token k + 1 ahead from the main hidden state alone (Gloeckle et al., 2024)."""

    def __init__(self, block, head):
        super().__init__()
        self.block, self.head = block, head
        self.norm = nn.RMSNorm(head.in_features)

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
        self.enorm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.hnorm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.eh_proj = nn.Linear(2 * hidden_size, hidden_size, bias=False)
        self.block = block
        self.norm = nn.RMSNorm(hidden_size, eps=norm_eps)

    def forward(self, hidden, future_ids, **options):
        """Hidden states of the depth before, normed, and the tokens k ahead → those of this depth.

        hidden (B, T, D), future_ids (B, T): future_ids[:, i] is t_{i+k}. Returns (B, T, D), normed:
        `head` turns it into logits for t_{i+k+1}, and the next depth takes it as it is.
        `options` go to the block.
        """
        joined = torch.cat([self.enorm(self.embedding(future_ids)), self.hnorm(hidden)], dim=-1)
        return self.norm(self.block(self.eh_proj(joined), **options))


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
        self.norm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)
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

    def new_caches(self, blocks=None):
        """An empty cache for each of the blocks (default: the main model's)."""
        return [
            block.self_attn.new_cache() for block in (self.layers if blocks is None else blocks)
        ]

    def hidden_states(self, input_ids, attention_mask=None, caches=None, path="expanded"):
        """Token ids (B, T) → hidden states after the final norm (B, T, D).

        attention_mask: (B, S) over everything attended to, cached tokens included; 0 = padding,
            which is attended by nobody and takes no position. caches: from `new_caches`, appended
            to. path: how attention is computed, see `MultiHeadLatentAttention`.
        """
        past = caches[0].length if caches else 0
        self._check_tokens(input_ids, past)
        options = dict(path=path, **self._padding(input_ids, attention_mask, past))
        hidden = self.embed_tokens(input_ids)
        for layer, cache in zip(self.layers, caches or [None] * len(self.layers), strict=True):
            hidden = layer(hidden, cache=cache, **options)
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
        options = dict(path=path, **self._padding(input_ids, attention_mask, 0))
        logits = []
        for k, predictor in enumerate(self.mtp, start=1):
            hidden, future_ids = hidden[:, :-1], input_ids[:, k:]
            cut = {name: value[..., : hidden.shape[1]] if torch.is_tensor(value) else value
                   for name, value in options.items()}  # fmt: skip
            output = predictor(hidden, future_ids, **cut)
            logits.append(self.lm_head(output))
            if not isinstance(predictor, IndependentHead):
                hidden = output
        return logits

    @torch.no_grad()
    def generate(
        self, input_ids, max_new_tokens, temperature=0.0, speculative=False, attention_mask=None,
        eos_token_id=None, pad_token_id=0, generator=None,
    ):  # fmt: skip
        """Continues each prompt with the latent cache: (B, T) → (B, T + new).

        Args:
            temperature: 0 takes the most likely token, above 0 samples (`generator`: for a seed).
            speculative: draft with the MTP modules; greedy only, same tokens.
            attention_mask: (B, T), 0 = padding, for prompts of unequal length: pad on the left.
            eos_token_id: a sequence stops after it and is filled with `pad_token_id`; None: never.

        Raises: ValueError if prompt and new tokens exceed the context, before any work is done.
        """
        self._check_generation(input_ids, max_new_tokens, temperature, attention_mask)
        if speculative:
            if temperature > 0:
                raise ValueError(
                    f"speculative decoding is greedy: temperature={temperature}, not 0"
                )
            return self._speculate_rows(
                input_ids, max_new_tokens, attention_mask, eos_token_id, pad_token_id
            )
        tokens, caches = input_ids, self.new_caches()
        finished = torch.zeros_like(input_ids[:, :1], dtype=torch.bool)
        fresh, path = input_ids, "expanded"
        for _ in range(max_new_tokens):
            hidden = self.hidden_states(fresh, attention_mask, caches, path)[:, -1]
            fresh = choose_token(self.lm_head(hidden), temperature, generator)
            if eos_token_id is not None:
                fresh = fresh.masked_fill(finished, pad_token_id)
                finished = finished | (fresh == eos_token_id)
            tokens = torch.cat([tokens, fresh], dim=1)
            if attention_mask is not None:
                attention_mask = F.pad(attention_mask, (0, 1), value=1)
            if finished.all():
                missing = input_ids.shape[1] + max_new_tokens - tokens.shape[1]
                return F.pad(tokens, (0, missing), value=pad_token_id)
            path = "absorbed"
        return tokens

    def _check_generation(self, input_ids, max_new_tokens, temperature, attention_mask):
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 0")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature={temperature} must be a number of at least 0")
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

    def _speculate_rows(self, input_ids, new_tokens, attention_mask, eos_token_id, pad_token_id):
        rows = []
        for i, row in enumerate(input_ids):
            prompt = row if attention_mask is None else row[attention_mask[i].bool()]
            output, _ = speculative_generate(self, prompt[None], new_tokens, eos_token_id)
            completion = output[0, len(prompt) :]
            completion = F.pad(completion, (0, new_tokens - len(completion)), value=pad_token_id)
            rows.append(torch.cat([row, completion]))
        return torch.stack(rows)


def choose_token(logits, temperature=0.0, generator=None):
    """(B, W) → (B, 1): the most likely token, or one drawn from softmax(logits / temperature)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    return torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)


# %% The losses
def next_token_loss(logits, input_ids, token_mask=None):
    """Mean cross-entropy of logits (B, T, W) against the next tokens of input_ids (B, T), in nats.

    token_mask (B, T): False = padding, never a target.
    """
    return _shifted_loss(logits, input_ids, 1, None, token_mask)


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
        _shifted_loss(logits, input_ids, k + 1, document_ids, token_mask)
        for k, logits in enumerate(depth_logits, start=1)
    ]
    return weight * torch.stack(losses).mean() if losses else torch.zeros((), dtype=torch.float32)


def _shifted_loss(logits, input_ids, shift, document_ids, token_mask):
    """Row i against token i + shift, averaged over the targets that count."""
    targets = input_ids[:, shift:]
    rows = targets.shape[1]
    if rows < 1:
        return logits.sum() * 0.0
    counts = torch.ones_like(targets, dtype=torch.bool)
    if document_ids is not None:
        counts &= document_ids[:, shift:] == document_ids[:, :rows]
    if token_mask is not None:
        counts &= token_mask[:, shift:].bool() & token_mask[:, :rows].bool()
    targets = targets.masked_fill(~counts, -100)
    total = F.cross_entropy(logits[:, :rows].flatten(0, 1).float(), targets.flatten(),
                            ignore_index=-100, reduction="sum")  # fmt: skip
    return total / counts.sum().clamp(min=1)


# %% Speculative decoding: the modules draft, the main model checks all drafts in one pass
@torch.no_grad()
def speculative_generate(model, input_ids, max_new_tokens, eos_token_id=None):
    """Greedy decoding of one sequence, (1, T) → (1, T + new), token for token as without drafts.

    (Up to ties: a pass over several tokens rounds differently in the last bit than one over one.)

    A round: the main model reads the last confirmed token and the drafts after it. Its own choices
    confirm drafts from the left until the first that differs; there its own choice stands. Both
    caches are rolled back to what is confirmed. Then the MTP modules draft one token each.

    Returns: (ids, figures); ids may end early after `eos_token_id`. figures: `forwards` passes of
    the main model, `drafted` and `accepted` tokens.
    """
    if not model.mtp:
        raise ValueError("speculative decoding needs MTP modules, and this model has none")
    if input_ids.shape[0] != 1:
        got = tuple(input_ids.shape)
        raise ValueError(f"one sequence at a time: input_ids must be (1, T), got {got}")
    model._check_generation(input_ids, max_new_tokens, 0.0, None)
    depth = len(model.mtp)
    caches = model.new_caches()
    draft_caches = model.new_caches([predictor.block for predictor in model.mtp])
    figures = dict(forwards=0, drafted=0, accepted=0)
    tokens, end = input_ids, input_ids.shape[1] + max_new_tokens
    unread, drafts = input_ids, input_ids[:, :0]
    hidden_tail = None  # hidden states that the draft caches do not hold yet
    while tokens.shape[1] < end:
        # A draft past the end would be thrown away, and might not fit the context.
        drafts = drafts[:, : end - tokens.shape[1] - 1]
        path = "expanded" if figures["forwards"] == 0 else "absorbed"
        fed = torch.cat([unread, drafts], dim=1)
        hidden = model.hidden_states(fed, caches=caches, path=path)
        choices = model.lm_head(hidden[:, unread.shape[1] - 1 :]).argmax(dim=-1)
        accepted = int((choices[:, :-1] == drafts).long().cumprod(dim=1).sum())
        figures["forwards"] += 1
        figures["drafted"] += drafts.shape[1]
        figures["accepted"] += accepted
        confirmed = choices[:, : accepted + 1]
        if eos_token_id is not None and (confirmed == eos_token_id).any():
            stop = int((confirmed == eos_token_id)[0].nonzero()[0])
            return torch.cat([tokens, confirmed[:, : stop + 1]], dim=1), figures
        tokens = torch.cat([tokens, confirmed], dim=1)
        for cache in caches:
            cache.truncate(tokens.shape[1] - 1)  # all but the last confirmed token are read
        hidden = hidden[:, : unread.shape[1] + accepted]
        hidden_tail = hidden if hidden_tail is None else torch.cat([hidden_tail, hidden], dim=1)
        unread = tokens[:, -1:]
        if tokens.shape[1] < end:
            drafts, hidden_tail = _draft(model, tokens, hidden_tail, draft_caches, depth)
    return tokens, figures


def _draft(model, tokens, hidden, draft_caches, depth):
    """One token from each MTP module, after `tokens` (1, n).

    hidden: main hidden states from where the draft caches end up to the last token but one. Module
    k at position i needs token i + k; for the last positions that is a draft, which may prove
    wrong, so these positions are forgotten again and their hidden states returned for next time.
    """
    start = draft_caches[0].length
    future_ids, drafts, state = tokens[:, start + 1 :], [], hidden
    for predictor, cache in zip(model.mtp, draft_caches, strict=True):
        output = predictor(state, future_ids, cache=cache)
        drafts.append(model.lm_head(output[:, -1:]).argmax(dim=-1))
        if not isinstance(predictor, IndependentHead):
            state = output
        future_ids = torch.cat([future_ids[:, 1:], drafts[-1]], dim=1)
    certain = max(start, tokens.shape[1] - depth)
    for cache in draft_caches:
        cache.truncate(certain)
    return torch.cat(drafts, dim=1), hidden[:, certain - start :]


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


def train_small(model, steps, weight, device, seed=0):
    """Trains on the small language; returns the held-out (main loss, loss of depth 1 or None)."""
    training_text = small_language(40_000, seed=1)
    held_out = small_language(8_192, seed=2).view(-1, 64).to(device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        starts = torch.randint(len(training_text) - 64, (16,), generator=generator)
        ids = torch.stack([training_text[start : start + 64] for start in starts]).to(device)
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

    compare_heads(demo, ids_BT, arguments)
    torch.manual_seed(arguments.seed)
    model = small_model(depth=arguments.depth).to(device)
    train_small(model, arguments.steps, 0.3, device, arguments.seed)
    prompt = small_language(8, seed=4)[None].to(device)
    plain = model.generate(prompt, 64)
    for name in ("trained", "spoilt"):
        drafted, figures = speculative_generate(model, prompt, 64)
        taken = f"{figures['accepted']} of {figures['drafted']} drafts taken"
        demo.check(
            f"speculation with {name} modules = plain greedy", "(1, T + new)",
            f"{taken}, {figures['forwards']} passes for 64", torch.equal(plain, drafted),
        )  # fmt: skip
        for predictor in model.mtp:  # drafts that are wrong change the speed, not the text
            torch.nn.init.normal_(predictor.eh_proj.weight, std=0.3)
    demo.finish(
        "--depth 4: do later drafts get accepted?", "--steps 400: does MTP help the next token?"
    )


if __name__ == "__main__":
    main()
