"""Phase 6: multi-token prediction (MTP), where a model learns and drafts more than the next token.

A language model gets one target per position. A simple way to get more is to add heads that guess
the tokens after the next one, all from the same hidden state. But the second token depends on the
first, and such a head cannot know the first. DeepSeek-V3 chains small modules instead. Module k
takes the hidden state of the module before it, joins it with the embedding of the token that really
came, and passes both through one block. It uses the embedding and the output head of the main
model. After training, we can drop the modules. Or we keep them for speculative decoding: they draft
the next tokens, and the main model checks all drafts in one pass. This changes only speed: in exact
arithmetic, greedy text is identical and sampled text has the same distribution. In FP32, greedy
text differs only where rounding decides between two almost equal tokens.

    h_k,i = RMSNorm(Block_k( W_k [ RMSNorm(Emb(t_{i+k})) ; RMSNorm(h_{k−1,i}) ] ))
    P_k(t_{i+k+1}) = softmax(Head(h_k,i))
    L = L_main + λ/n · Σ_k L_k,    k = 1 … n
    accept a draft x, drawn from q, with probability min(1, p(x)/q(x)); else draw from max(0, p − q)

t_i is token i, and k is the depth of a module in a chain of n. h_0,i is the main model's state
after its final norm. h_k,i has seen the tokens up to t_{i+k}, k more than h_0,i. A module drafts
from its distribution q; that of the main model is p. Here the embedding comes first, as in the
released weights; in equation 21 the hidden state comes first.

Papers: DeepSeek-V3 (2024, arXiv:2412.19437), section 2.2, equations 21–25, and 5.4.3; Gloeckle et
al. (2024, arXiv:2404.19737), section 2, for the independent heads; Leviathan et al. (2023,
arXiv:2211.17192), sections 2.3 and 3.1, for speculative decoding.
Simplified: each loss is the mean over its targets, where equation 24 divides by the sequence
length. Drafting and checking have no caches: both read the whole text again in every round.
Before: phases 4 and 5. Reading 30 minutes, running 10 seconds.

Dimensions: B batch · T query positions · S key positions · D model width · W vocabulary.

Run:  python mtp_coded.py [--steps 100] [--depth 2]
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lesson import demonstration, flag, require, require_shapes
from lesson.batches import without_padding
from lesson.writing import Generation, LanguageModel, SamplingOptions  # noqa: F401
from mla_coded import MultiHeadLatentAttention
from moe_coded import SwiGLU, TransformerBlock


# %% The simple idea: independent heads on the same hidden state
class IndependentHead(nn.Module):
    """Guesses token i + k + 1 from the main model's state at i alone (Gloeckle et al., 2024)."""

    chained = False  # every head starts from the main model's hidden states

    def __init__(self, block, embedding, head, norm_eps=1e-6):
        super().__init__()
        self.block, self.head = block, head
        self.norm = nn.RMSNorm(embedding.embedding_dim, eps=norm_eps)

    def join(self, hidden, future_ids):
        """The input of the block, (B, T, D): the hidden states, without the future tokens."""
        return hidden

    def forward(self, hidden, future_ids, **options):
        """(B, T, D) → (B, T, D), normed, for `head`. `options` go to the block."""
        return self.norm(self.block(self.join(hidden, future_ids), **options))


# %% V3's module: it continues from the module before and sees the token in between
class MultiTokenPredictor(nn.Module):
    """An MTP module around a `TransformerBlock`. It shares `embedding` and `head` with the model.

    Rows of the main model and of two modules, in a text t0 t1 t2 …:

                               row 0   row 1   row 2      guesses (row 0, 1, 2)
        main model   reads     t0      t1      t2         t1  t2  t3
        module 1     joins     t1      t2      t3         t2  t3  t4
        module 2     joins     t2      t3      t4         t3  t4  t5

    The names are those of the released checkpoints. They store the module as one more layer, and
    `norm` as `shared_head.norm`.
    """

    chained = True  # a module starts from the hidden states of the module before

    def __init__(self, block, embedding, head, norm_eps=1e-6):
        super().__init__()
        hidden_size = embedding.embedding_dim
        self.embedding, self.head = embedding, head
        self.enorm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.hnorm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.eh_proj = nn.Linear(2 * hidden_size, hidden_size, bias=False)
        self.block = block
        self.norm = nn.RMSNorm(hidden_size, eps=norm_eps)

    def join(self, hidden, future_ids):
        """W_k [RMSNorm(Emb(t_{i+k})); RMSNorm(h_{k−1,i})]: the input of the block, (B, T, D)."""
        joined = torch.cat([self.enorm(self.embedding(future_ids)), self.hnorm(hidden)], dim=-1)
        # Under autocast the product is BF16; the residual stream keeps its own precision.
        return self.eh_proj(joined).to(hidden.dtype)

    def forward(self, hidden, future_ids, **options):
        """Normed states of the module before, and the tokens k ahead → normed states of this one.

        hidden (B, T, D), future_ids (B, T): future_ids[:, i] is t_{i+k}. Returns (B, T, D). `head`
        turns it into logits for t_{i+k+1}, and the next module reads it unchanged. `options` go
        to the block.
        """
        return self.norm(self.block(self.join(hidden, future_ids), **options))


def mtp_states(modules, hidden, input_ids, attention_mask=None, **options):
    """Hidden states of every module where the text is known, as in training.

    hidden: the main model's (B, T, D) of input_ids (B, T). attention_mask (B, T): 0 = padding.
    Returns: a list. Entry k − 1 is (B, T − k, D), since the last k positions have no token k ahead.
    """
    states = []
    for k, module in enumerate(modules, start=1):
        hidden, future_ids = hidden[:, :-1], input_ids[:, k:]
        padding = without_padding(attention_mask, 0, hidden.shape[1])
        states.append(module(hidden, future_ids, **options, **padding))
        hidden = states[-1] if module.chained else hidden
    return states


# %% The losses: which token is the target of which row
def shifted_targets(input_ids, rows, shift, document_ids=None, token_mask=None):
    """Targets (B, rows): row i gets token i + shift, or −100 where there is no target.

    The loss skips −100. A target must be in the text, and in the same document as token i; neither
    of the two tokens may be padding. Tokens 5 6 7 8, of which 8 begins a new document: shift 1
    gives 6 7 −100 −100, shift 2 gives 7 −100 −100 −100.
    """

    def ahead(values):
        return F.pad(values[:, shift:], (0, shift), value=-100)[:, :rows]

    targets = ahead(input_ids)
    if document_ids is not None:
        targets = targets.masked_fill(ahead(document_ids) != document_ids[:, :rows], -100)
    if token_mask is not None:
        real = token_mask.bool()
        targets = targets.masked_fill(~(ahead(real) & real[:, :rows]), -100)
    return targets


def shifted_loss(logits, input_ids, shift, document_ids=None, token_mask=None):
    """Mean cross-entropy, in nats, of row i of logits (B, ≤ T, W) against token i + shift.

    input_ids: (B, T). document_ids: (B, T), the document that a token belongs to. token_mask:
    (B, T), False = padding. Returns a scalar; 0 where no target is left.
    """
    targets = shifted_targets(input_ids, logits.shape[1], shift, document_ids, token_mask)
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
    return total / (targets != -100).sum().clamp(min=1)


def next_token_loss(logits, input_ids, token_mask=None):
    """The main model's loss: logits (B, T, W) against the next tokens of input_ids (B, T)."""
    return shifted_loss(logits, input_ids, shift=1, token_mask=token_mask)


def mtp_loss(depth_logits, input_ids, weight=0.3, document_ids=None, token_mask=None):
    """λ/n · Σ_k L_k of n modules (V3, equations 24–25), in nats; 0 without modules.

    depth_logits: from `CausalLM.mtp_logits`. Row i of entry k − 1 predicts token i + k + 1.
    weight: λ. Other arguments: see `shifted_loss`.
    """
    losses = [
        shifted_loss(logits, input_ids, k + 1, document_ids, token_mask)
        for k, logits in enumerate(depth_logits, start=1)
    ]
    return weight * torch.stack(losses).mean() if losses else torch.zeros(())


# %% Speculative decoding: the modules draft, the main model checks all drafts in one pass
@torch.no_grad()
def greedy_generate(model, input_ids, max_new_tokens):
    """Plain decoding, the reference. Each pass reads the whole text again and gives one token."""
    ids = input_ids
    for _ in range(max_new_tokens):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(dim=-1)], dim=1)
    return ids


@torch.no_grad()
def speculative_generate(model, input_ids, max_new_tokens, temperature=0.0, generator=None):
    """The same text in fewer passes of the main model: (1, T) → ids (1, T + new) and figures.

    In a round, module k drafts the k-th new token. The main model then reads the text and all
    drafts in one pass. `verify` accepts drafts from the left, up to the first wrong one, and adds
    one token of the main model's own. So a pass gives at least one token, and at most one more than
    there are modules. A greedy round in which one of three drafts is rejected:

        text and drafts            The cat sat | on  the  rug
        the main model's choices                 on  the  mat  .     "." follows a wrong draft
        new text                   The cat sat   on  the  mat        2 accepted, 1 of its own

    The first pass reads the prompt and checks no drafts. Later rounds draft from the hidden states
    of the pass before. No state depends on later tokens, so the states before a rejected draft are
    right. Nothing else is kept: each pass and each module reads the whole text again. This shows
    the idea but saves no time. `pipeline/decoding.py` saves time, with caches and for batches.

    In FP32 the greedy text is the same, token for token, up to ties in the last bit. Sampled text
    has the same distribution. Figures: `forwards` (passes), `drafted` and `accepted` tokens.
    """
    require(len(model.mtp) > 0, "speculative decoding needs MTP modules, and this model has none")
    require(len(input_ids) == 1, f"one sequence at a time, got {len(input_ids)}")
    sampling, ids = Sampling(temperature, generator=generator), input_ids
    figures = dict(forwards=0, drafted=0, accepted=0)
    end, hidden = ids.shape[1] + max_new_tokens, None
    while ids.shape[1] < end:
        count = 0 if hidden is None else min(len(model.mtp), end - ids.shape[1] - 1)
        drafts, draft_chances = draft(model, ids, hidden, count, sampling)
        hidden = model.hidden_states(torch.cat([ids, drafts], dim=1))
        logits = model.lm_head(hidden[:, ids.shape[1] - 1 :])
        accepted, own = verify(logits, drafts, draft_chances, sampling)
        ids = torch.cat([ids, drafts[:, : int(accepted)], own[:, None]], dim=1)
        hidden = hidden[:, : ids.shape[1] - 1]
        figures["forwards"] += 1
        figures["drafted"] += count
        figures["accepted"] += int(accepted)
    return ids, figures


def draft(model, ids, hidden, count, sampling):
    """Drafts of the tokens after ids (1, T): (1, count), and the distributions they come from.

    hidden: the main model's states (1, T − 1, D). The main model has not read the last token yet.
    Module k needs the token k ahead of each state. For tokens 0–6, the states are those of tokens
    0–5. Module 1 joins them with tokens 1–6, and its last state drafts token 7. Module 2 joins
    module 1's states with tokens 2–7, of which 7 is the draft, and drafts token 8.
    The distributions are (1, count, W). They are None if decoding is greedy or count is 0.
    """
    tokens, chances = ids, []
    for k, module in enumerate(model.mtp[:count], start=1):
        states = module(hidden, tokens[:, k:])
        logits = model.lm_head(states[:, -1])
        if not sampling.greedy:
            chances.append(sampling.probabilities(logits))
        token = logits.argmax(dim=-1) if sampling.greedy else sampling.draw(chances[-1])
        tokens = torch.cat([tokens, token[:, None]], dim=1)
        hidden = states if module.chained else hidden
    return tokens[:, ids.shape[1] :], torch.stack(chances, dim=1) if chances else None


def verify(logits, drafts, draft_chances, sampling):
    """How many drafts to accept from the left, (B,), and the main model's next token, (B,).

    logits (B, d + 1, W): the main model's, at the token before the drafts and at each draft.
    drafts (B, d). draft_chances (B, d, W): what they were drawn from; None if greedy or d = 0.

    Greedy: accept a draft if it is the main model's choice. Sampling (Leviathan et al., 2023,
    section 2.3): accept a draft x, drawn from q, with probability min(1, p(x)/q(x)). After a
    rejection, draw a token from max(0, p − q), divided by its sum. The result is a token drawn from
    p, whatever q is. An example with three tokens, where a draft is rejected with probability .4:

        main model's probability     p(x)                                       .5  .3  .2
        module's probability         q(x)                                       .2  .7  .1
        x as an accepted draft       q(x) · min(1, p(x)/q(x)) = min(p(x), q(x)) .2  .3  .1
        x after a rejection          max(0, p(x) − q(x))                        .3   0  .1
        x in either way              p(x)                                       .5  .3  .2

    Accepting every draft with q(x) or p(x) above some bound would give another distribution.
    """
    rows = torch.arange(len(logits), device=logits.device)
    if sampling.greedy:
        choices = logits.argmax(dim=-1)
        accepted = (choices[:, :-1] == drafts).long().cumprod(dim=1).sum(dim=1)
        return accepted, choices[rows, accepted]
    chances = sampling.probabilities(logits)
    draft_chances = chances[:, :0] if draft_chances is None else draft_chances  # nothing drafted
    p, q = (c.gather(2, drafts[..., None]).squeeze(2) for c in (chances[:, :-1], draft_chances))
    uniform = torch.rand(p.shape, device=p.device, generator=sampling.generator)
    accepted = (uniform * q < p).long().cumprod(dim=1).sum(dim=1)
    # There is no draft after the last one: q = 0, and the token is drawn from p itself.
    p_BW, q_BW = (c[rows, accepted] for c in (chances, F.pad(draft_chances, (0, 0, 0, 1))))
    rest_BW = (p_BW - q_BW).clamp(min=0)
    equal = rest_BW.sum(dim=-1, keepdim=True) <= 0  # p = q up to rounding
    return accepted, sampling.draw(torch.where(equal, p_BW, rest_BW))


def tokens_a_pass(acceptance, modules):
    """1 + a + a² + … + aⁿ: the average tokens per pass with n drafts (Leviathan, equation 1).

    Draft k is accepted with probability aᵏ: it and all drafts before it must pass, each with
    probability a = Σ min(p, q). With a = 0.5 and two modules, a pass gives 1.75 tokens.
    DeepSeek-V3 (section 5.4.3) reports a = 0.85–0.9 with one module, and 1.8 times the speed.
    """
    return sum(acceptance**k for k in range(modules + 1))


# %% Choosing a token
class Sampling(SamplingOptions):
    """Chooses the next token from logits.

    temperature: 0 takes the most likely token. Above 0, a token is drawn from
        softmax(logits / temperature), with `generator` if there is one.
    top_k, top_p: for later phases, see `SamplingOptions.limited`.
    """

    @property
    def greedy(self):
        return self.temperature == 0

    def probabilities(self, logits):
        """(..., W) → (..., W), in FP32: the distribution that a token is drawn from."""
        logits = logits.float()
        logits = logits - logits.amax(dim=-1, keepdim=True)  # a tiny temperature cannot overflow
        return self.limited((logits / self.temperature).softmax(dim=-1))

    def draw(self, probabilities):
        """One token for each row of (B, W), whose numbers need not sum to 1. Returns (B,).

        A uniform number falls between two running sums of the row, and so chooses a token. With
        .25 .5 .25 the sums are .25 .75 1: below .25 is token 0, from .25 to below .75 token 1.
        """
        sums = probabilities.cumsum(dim=-1)
        total = sums[:, -1:]
        require(((total > 0) & total.isfinite()).all(), "the model's probabilities are not finite")
        place = torch.rand(total.shape, device=sums.device, generator=self.generator) * total
        below = total.nextafter(torch.zeros_like(total))  # the product may round to total
        return torch.searchsorted(sums, place.minimum(below), right=True).squeeze(1)


# %% The smallest complete language model: phases 8 to 10 build on it
class CausalLM(LanguageModel):
    """Embedding, blocks with latent attention, final norm, untied head, and MTP modules.

    blocks: `TransformerBlock`s. mtp_blocks: one for each MTP module. max_positions: the longest
    context, None = no limit. mtp_class: `MultiTokenPredictor` or `IndependentHead`.

    `complete` and `generate` come from lesson/writing.py. They read the prompts in one pass and
    then only each new token, because caches keep the past.
    """

    sampling = Sampling  # `generate` chooses tokens by it

    def __init__(self, vocab_size, hidden_size, blocks, mtp_blocks=(), norm_eps=1e-6,
                 max_positions=None, mtp_class=MultiTokenPredictor):
        super().__init__()
        self.max_positions = max_positions
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        self.layers = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)
        self.mtp = nn.ModuleList(
            mtp_class(block, self.embed_tokens, self.lm_head, norm_eps) for block in mtp_blocks
        )

    @torch.no_grad()
    def init_weights(self, std=0.02):
        """Matrices from N(0, std²), biases 0. At std 0.02, the first loss is about ln(W)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden_states(
        self, input_ids, attention_mask=None, caches=None, path="expanded", routed=None
    ):
        """Token ids (B, T) → hidden states after the final norm (B, T, D).

        attention_mask (B, S), 0 = padding: see `places`. caches: from `new_caches`; they grow.
        path: see `MultiHeadLatentAttention`. routed: see `MixtureOfExperts`.
        """
        options = dict(path=path, routed=routed, **self.places(input_ids, attention_mask, caches))
        hidden = self.embed_tokens(input_ids)
        for layer, cache in zip(self.layers, caches or [None] * len(self.layers), strict=True):
            hidden = layer(hidden, cache=cache, **options)
        return self.norm(hidden)

    def forward(self, input_ids, attention_mask=None, caches=None, path="expanded", routed=None):
        """Token ids (B, T) → logits of the next token (B, T, W). Options: `hidden_states`."""
        return self.lm_head(self.hidden_states(input_ids, attention_mask, caches, path, routed))

    def mtp_hidden_states(self, hidden, input_ids, attention_mask=None, **options):
        """`mtp_states` of the model's modules. hidden, options (path, routed): `hidden_states`."""
        require_shapes(input_ids.shape, attention_mask=attention_mask)
        return mtp_states(self.mtp, hidden, input_ids, attention_mask, **options)

    def mtp_logits(self, hidden, input_ids, attention_mask=None, **options):
        """`mtp_hidden_states` through the head: row i of entry k − 1 predicts token i + k + 1."""
        states = self.mtp_hidden_states(hidden, input_ids, attention_mask, **options)
        return [self.lm_head(state) for state in states]


# %% A tiny language to learn, and the cost of learning it
def small_language(tokens, seed):
    """(tokens,) ids 0–31. Each token is followed by one of three, with odds of 80, 15 and 5 %.

    The three followers of each token are drawn at random, and are the same for every seed. Two of
    them may be the same token, and a token may follow several others.
    """
    followers = torch.randint(32, (32, 3), generator=torch.Generator().manual_seed(1234)).tolist()
    odds, generator = torch.tensor([0.8, 0.15, 0.05]), torch.Generator().manual_seed(seed)
    choices = torch.multinomial(odds, tokens, replacement=True, generator=generator).tolist()
    text = [0]
    for choice in choices[1:]:
        text.append(followers[text[-1]][choice])
    return torch.tensor(text)


def small_model(mtp_class=MultiTokenPredictor, depth=0, width=48):
    """Two layers and `depth` MTP modules, for `small_language`."""

    def block():
        attention = MultiHeadLatentAttention(
            width, num_attention_heads=4, kv_lora_rank=24, qk_nope_head_dim=12, qk_rope_head_dim=4,
            v_head_dim=12,
        )
        return TransformerBlock(attention, SwiGLU(width, 96))

    mtp_blocks = [block() for _ in range(depth)]
    model = CausalLM(32, width, [block(), block()], mtp_blocks, mtp_class=mtp_class)
    model.init_weights(std=0.02)
    return model


def train_small(model, steps, weight, device, seed=0, rate=4e-3, precision=torch.float32):
    """Trains on the small language. Returns held-out losses: (main, first module or None)."""
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
            further_loss = mtp_loss(model.mtp_logits(hidden, ids), ids, weight)
            loss = next_token_loss(model.lm_head(hidden), ids) + further_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        hidden = model.hidden_states(held_out)
        main = next_token_loss(model.lm_head(hidden), held_out).item()
        first = model.mtp_logits(hidden, held_out)[:1]
        return main, mtp_loss(first, held_out, 1.0).item() if first else None


def cost_of(model, ids):
    """(parameters, FLOPs of one forward pass, modules included). Masked scores count as well."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hidden = model.hidden_states(ids, path="naive")
        model.lm_head(hidden)
        model.mtp_logits(hidden, ids, path="naive")
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops()


# %% The demonstration
def check_untrained(demo, ids_BT):
    """Row i of module k predicts token i + k + 1. An untrained module only guesses."""
    model = small_model(depth=2).to(demo.device)
    logits = model.mtp_logits(model.hidden_states(ids_BT), ids_BT)
    shapes = [tuple(each.shape) for each in logits]
    fits = shapes == [(2, 31, 32), (2, 30, 32)]
    demo.check("row i of module k predicts token i + k + 1", "(B, T − k, W)", f"{shapes}", fits)
    loss = mtp_loss(logits, ids_BT, weight=1.0).item()
    figure, near = f"{loss:.3f}, ln 32 = 3.466", abs(loss - 3.466) < 0.3
    demo.check("untrained loss is about ln(W)", "nats", figure, near)


def check_sight(demo, ids_BT):
    """Token 9 is edited. The first row that changes shows how far ahead a row reads."""
    edited_BT = ids_BT.clone()
    edited_BT[:, 9] = (ids_BT[:, 9] + 1) % 32
    for mtp_class, what, wanted in (
        (IndependentHead, "row i of every independent head reads tokens 0 … i", [9, 9]),
        (MultiTokenPredictor, "row i of module k reads tokens 0 … i + k", [8, 7]),
    ):
        model, first_rows = small_model(mtp_class, depth=2).to(demo.device), []
        before, after = (model.mtp_logits(model.hidden_states(t), t) for t in (ids_BT, edited_BT))
        for old, new in zip(before, after, strict=True):
            differs_T = (new - old).abs().amax(dim=(0, 2)) > 1e-6
            first_rows.append(differs_T.nonzero().min().item())
        figure = f"token 9 changes rows from {first_rows} on"
        demo.check(what, "k = 1, 2", figure, first_rows == wanted)


def check_targets(demo):
    """A module learns nothing across the end of a document: here, token 8 begins a new one."""
    ids_BT, documents_BT = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 0, 0, 1]])
    next_T, second_T = (
        shifted_targets(ids_BT, rows=4, shift=shift, document_ids=documents_BT)[0].tolist()
        for shift in (1, 2)
    )
    right = next_T == [6, 7, -100, -100] and second_T == [7, -100, -100, -100]
    demo.check("targets of 5 6 7 | 8: next, second", "(T,)", f"{next_T}, {second_T}", right)


def compare_heads(demo, ids_BT, steps):
    """Trains without MTP, with an independent head and with a module; prints costs and losses.

    The module gets the true token in between, and the independent head does not. So the module's
    lower loss partly comes from that token, and not only from learning better.
    """
    demo.note("held-out loss in nats after equally many tokens; costs relative to no MTP:")
    kinds = {
        "no MTP": dict(depth=0),
        "independent head": dict(depth=1, mtp_class=IndependentHead),
        "MTP module": dict(depth=1),
    }
    costs, second_losses = {}, {}
    for name, options in kinds.items():
        torch.manual_seed(demo.seed)
        model = small_model(**options).to(demo.device)
        costs[name] = cost_of(model, ids_BT)
        main_loss, second_losses[name] = train_small(model, steps, 0.3, demo.device, demo.seed)
        parameters, flops = (x / y for x, y in zip(costs[name], costs["no MTP"], strict=True))
        losses = f"next token {main_loss:.3f}"
        if second_losses[name] is not None:
            losses += f", token after next {second_losses[name]:.3f}"
        demo.note(f"    {name:<17} {losses}, FLOPs × {flops:.2f}, parameters × {parameters:.2f}")
    guess, chained = second_losses["independent head"], second_losses["MTP module"]
    figure, better = f"{guess:.3f} → {chained:.3f} nats", chained < guess or steps < 60
    demo.check("knowing the token in between helps", "token after next", figure, better)


def check_drawn_drafts(demo, draws=100_000):
    """Drafts are drawn from q. After `verify`, the tokens have the distribution p."""
    p_logits, q_logits = torch.randn(2, 8, device=demo.device) * 1.5
    p, q = p_logits.softmax(dim=-1), q_logits.softmax(dim=-1)
    drafts = torch.multinomial(q, 3 * draws, replacement=True).view(draws, 3)
    logits, draft_chances = p_logits.expand(draws, 4, 8), q.expand(draws, 3, 8)
    accepted, own = verify(logits, drafts, draft_chances, Sampling(1.0))
    first = torch.where(accepted > 0, drafts[:, 0], own)
    off, unchecked = (
        (torch.bincount(tokens, minlength=8) / draws - p).abs().max().item()
        for tokens in (first, drafts[:, 0])
    )
    figure, right = f"off by {off:.4f}, unverified {unchecked:.4f}", off < 0.007 < unchecked
    demo.check("drafts from q, verified, are tokens from p", f"{draws:,} draws", figure, right)
    counted = accepted.double().mean().item() + 1
    expected = tokens_a_pass(torch.minimum(p, q).sum().item(), modules=3)
    figure, right = f"{counted:.3f}, by the formula {expected:.3f}", abs(counted - expected) < 0.03
    demo.check("tokens a pass with 3 drafts = Σ aᵏ", f"{draws:,} draws", figure, right)


def check_speculation(demo, steps, depth):
    """Caches and speculation leave the greedy text as it is; good drafts save passes.

    Then each `eh_proj` is made random: bad drafts cost speed but do not change the text.
    """
    torch.manual_seed(demo.seed)
    model = small_model(depth=depth).to(demo.device)
    train_small(model, steps, 0.3, demo.device, demo.seed)
    prompt = small_language(8, seed=4)[None].to(demo.device)
    plain = greedy_generate(model, prompt, 64)
    same = torch.equal(plain, model.generate(prompt, 64))
    demo.check("latent caches = reading the text anew", "(1, T + new)", "64 tokens", same)
    for name in ("trained", "random"):
        text, figures = speculative_generate(model, prompt, 64)
        figure = f"{figures['accepted']} of {figures['drafted']} accepted, "
        figure += f"{64 / figures['forwards']:.2f} tokens a pass"
        what = f"speculation with {name} modules = plain greedy"
        demo.check(what, "(1, T + new)", figure, torch.equal(plain, text))
        for module in model.mtp:
            nn.init.normal_(module.eh_proj.weight, std=0.3)


@demonstration(__doc__, flag("steps", 100, "training steps of each model", at_least=1),
               flag("depth", 2, "MTP modules of the decoded model", at_least=1))
def main(demo, arguments):
    ids_BT = small_language(64, seed=3).view(2, 32).to(demo.device)
    check_untrained(demo, ids_BT)
    check_sight(demo, ids_BT)
    check_targets(demo)
    compare_heads(demo, ids_BT, arguments.steps)
    check_drawn_drafts(demo)
    check_speculation(demo, arguments.steps, arguments.depth)
    demo.finish(
        "--depth 4: do later drafts get accepted?", "--steps 400: does MTP help the next token?"
    )


if __name__ == "__main__":
    main()
