"""Phase 10: the complete model. It joins the parts of all phases; we train, score and align it.

Each layer is the block of phase 5 with the attention of phase 7. This attention caches one small
latent vector for each token, and positions rotate a separate part of queries and keys. The first
layers have a dense feed-forward. The others have shared and routed experts. In V3, a bias for each
routed expert balances how many tokens the experts get. A multi-token prediction (MTP) module
predicts one token further ahead, and drafts tokens for speculative decoding. A model is described
by the fields of the released config.json, and its files have the released layout. So this script
and transformers read each other's checkpoints.

    h = Emb(t);   per layer: h += RotaryMLA(RMSNorm(h)), h += MoE(RMSNorm(h));   Head(RMSNorm(h))
    L = L_next + λ L_mtp + L_balance;   after each step of a V3 model  b_i ± γ  for the routing bias

t are the token ids, h the hidden states, and b_i is the bias of expert i. The three losses are for
the next token, for the tokens after it, and for an uneven use of the experts.

Papers: DeepSeek-V2 (2024, arXiv:2405.04434), section 2; DeepSeek-V3 (2024, arXiv:2412.19437),
sections 2 and 4.2. Phases 4 to 7 explain attention, MoE, MTP and RoPE. For the optimizer: Muon at
scale (2025, arXiv:2502.16982); Polar Express (2025, arXiv:2505.16932), section 4.
Simplified: everything runs on one device. Five choices are our own: Muon beside AdamW, a β₂ of
0.99, blocks that add nothing at first, MTP that starts late in a run, and a learning rate that
falls along a cosine right after its warm-up. V3 used AdamW alone with a β₂ of 0.95, trained MTP
from the start, and kept the learning rate constant for most of the training before it fell. As in
V3, documents follow each other in one sequence, and no attention mask separates them.
Before: phases 4 to 7 (8 for `quantize`, 9 for `align`). Reading 28 minutes, running 9 minutes.

Dimensions: B batch · T query positions · D model width · E routed experts · A active experts per
token · W vocabulary.

Run:  python deepseek_full_model.py                    train, score, draw, generate, align: ~9 min
      python deepseek_full_model.py check              the proof: V3's sizes, equal paths, a step
      python deepseek_full_model.py --steps 20         the main job as a smoke test, under a minute
      python deepseek_full_model.py train --data my.txt --minutes 10 --out runs/mine
      python deepseek_full_model.py train --resume runs/mine
      python deepseek_full_model.py evaluate --checkpoint runs/mine/checkpoint
      python deepseek_full_model.py generate --checkpoint runs/mine/checkpoint --prompt "def "
      python deepseek_full_model.py quantize --checkpoint runs/mine --scheme int4 --out runs/int4
      python deepseek_full_model.py align --checkpoint runs/mine --out runs/aligned
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import nn

import moe_coded as moe
from lesson import one_line_errors, setting
from mla_coded import cache_elements_per_token
from mtp_coded import CausalLM
from pipeline import aligning, generating, report, scoring, training
from pipeline.commands import OF_A_CHECKPOINT, CheckOptions, Command, run_command
from pipeline.fast import head_loss
from pipeline.released import ReleasedConfig, ReleasedModel
from pipeline.run import learning_rate
from pipeline.training import RunOptions
from rope_coded import RotaryEmbedding, RotaryLatentAttention


# %% One layer: phases 4, 5 and 7 put together
def build_block(config, rotary, sparse):
    """One layer: rotary latent attention, then experts (`sparse`) or a dense feed-forward."""
    attention = RotaryLatentAttention(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=config.qk_nope_head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
        q_lora_rank=config.q_lora_rank,
        attention_bias=config.attention_bias,
        rotary=rotary,
    )
    if sparse:
        feed_forward = build_experts(config)
    else:
        feed_forward = moe.SwiGLU(config.hidden_size, config.intermediate_size)
    return moe.TransformerBlock(attention, feed_forward, config.rms_norm_eps)


def build_experts(config):
    """Shared and routed experts. `config.seq_aux`: balance each sequence, not the whole batch."""
    router = moe.TopKRouter(
        config.hidden_size,
        config.n_routed_experts,
        config.num_experts_per_tok,
        scoring_func=config.scoring_func,
        topk_method=config.topk_method,
        n_group=config.n_group,
        topk_group=config.topk_group,
        norm_topk_prob=config.norm_topk_prob,
        routed_scaling_factor=config.routed_scaling_factor,
    )
    balance = moe.sequence_balance_loss if config.seq_aux else moe.expert_balance_loss
    return moe.MixtureOfExperts(
        config.hidden_size,
        config.moe_intermediate_size,
        router,
        n_shared_experts=config.n_shared_experts,
        balance_loss=functools.partial(balance, alpha=config.aux_loss_alpha),
    )


# %% The configuration: the fields of config.json
@dataclass(kw_only=True)
class DeepSeekConfig(ReleasedConfig):
    """The fields of the released config.json. `model_type` says whether a model is a V2 or a V3.

    `from_file` and `from_dict` read rotary settings as released or as transformers writes them, and
    fill in fields that transformers leaves out. They raise ValueError for a combination that no
    released model has.
    """

    model_type: str = "deepseek_v3"
    vocab_size: int = setting(at_least=1)
    hidden_size: int = setting(at_least=1)
    num_hidden_layers: int = setting(at_least=1)
    initializer_range: float = setting(0.02, at_least=0)
    rms_norm_eps: float = setting(1e-6, above=0)
    # Latent attention (phase 4)
    num_attention_heads: int = setting(at_least=1)
    num_key_value_heads: int | None = setting(None, at_least=1)  # no effect: MLA has no KV heads
    q_lora_rank: int | None = setting(None, at_least=1)  # None: queries are not compressed
    kv_lora_rank: int = setting(at_least=1)
    qk_nope_head_dim: int = setting(at_least=1)
    qk_rope_head_dim: int = setting(at_least=1)
    v_head_dim: int = setting(at_least=1)
    attention_bias: bool = False
    attention_dropout: float = setting(0.0, at_least=0)
    # Dense layers and experts (phase 5). None: the usual value for the `model_type`
    first_k_dense_replace: int = setting(0, at_least=0)  # number of dense layers
    moe_layer_freq: int = setting(1, at_least=1)
    intermediate_size: int = setting(at_least=1)  # of a dense layer
    moe_intermediate_size: int = setting(at_least=1)  # of one expert
    hidden_act: str = "silu"
    n_shared_experts: int = setting(1, at_least=0)
    n_routed_experts: int = setting(at_least=1)
    num_experts_per_tok: int = setting(at_least=1)
    n_group: int = setting(1, at_least=1)  # groups of experts; a token uses `topk_group` of them
    topk_group: int = setting(1, at_least=1)
    topk_method: str | None = None
    scoring_func: str | None = None
    norm_topk_prob: bool | None = None
    routed_scaling_factor: float = setting(1.0, above=0)
    aux_loss_alpha: float = setting(0.001, at_least=0)  # of the balance loss
    seq_aux: bool = True  # balance each sequence, not the batch
    # Multi-token prediction (phase 6)
    num_nextn_predict_layers: int = setting(0, at_least=0)
    # Rotary positions (phase 7)
    max_position_embeddings: int = setting(4096, at_least=1)
    rope_theta: float = setting(10000.0, above=1)
    rope_scaling: dict | None = None  # YaRN
    # Tokens, and how the files are stored
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    quantization_config: dict | None = None

    def is_moe_layer(self, index):
        return index >= self.first_k_dense_replace and index % self.moe_layer_freq == 0


# %% The model
class DeepSeekModel(ReleasedModel, CausalLM):
    """A DeepSeek-V2 or V3 model: a `CausalLM` with rotary MLA, experts and MTP modules.

    `model(input_ids)` (B, T) → logits (B, T, W). `CausalLM` has `hidden_states` and `mtp_logits`.
    `ReleasedModel` has `from_pretrained`, `save_pretrained` and the fast `generate`. Build the
    model under `torch.device("meta")` to count its parameters without using memory.
    """

    config_class = DeepSeekConfig

    def __init__(self, config):
        rotary = RotaryEmbedding(config.qk_rope_head_dim, config.rope_theta, config.yarn)
        layers = range(config.num_hidden_layers)
        depths = range(config.num_nextn_predict_layers)
        super().__init__(
            config.vocab_size,
            config.hidden_size,
            blocks=[build_block(config, rotary, config.is_moe_layer(i)) for i in layers],
            mtp_blocks=[build_block(config, rotary, sparse=True) for _ in depths],
            norm_eps=config.rms_norm_eps,
            max_positions=config.max_position_embeddings,
        )
        self.config = config
        self.init_weights(config.initializer_range)
        self.prepared()  # faster layers with the same results: pipeline/fast


# %% The cost of a configuration
def parameter_counts(model):
    """Counts the parameters of the main model and of MTP. A token uses only the active ones.

    Returns: dict with `total`, `active`, `active_without_embedding` and
        `active_without_embedding_and_head` of the main model, and `mtp`, which leaves out the
        shared embedding and head (0 without MTP). Routing biases are buffers: they do not count.
    """

    def size(module):
        return sum(parameter.numel() for parameter in module.parameters())

    embedding, head = model.embed_tokens.weight.numel(), model.lm_head.weight.numel()
    total = embedding + head + size(model.norm) + size(model.layers)
    share = 1 - model.config.num_experts_per_tok / model.config.n_routed_experts
    idle = sum(
        round(size(block.mlp.experts) * share) for block in model.layers
        if isinstance(block.mlp, moe.MixtureOfExperts)
    )
    return {
        "total": total,
        "active": total - idle,
        "active_without_embedding": total - idle - embedding,
        "active_without_embedding_and_head": total - idle - embedding - head,
        "mtp": size(model.mtp) - embedding - head if len(model.mtp) else 0,
    }


def cache_elements(config):
    """Numbers that one token leaves in the latent caches of all layers."""
    return cache_elements_per_token(
        "MLA", config.num_hidden_layers, latent=config.kv_lora_rank, rotary=config.qk_rope_head_dim
    )


def training_flops_per_token(model, context):
    """6 · active parameters without the embedding, plus causal attention at `context` tokens.

    A parameter takes 2 FLOPs forward and 4 backward. The sum covers only the main model, as the
    published figures do. An MTP module costs extra.
    """
    config = model.config
    head_widths = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    attention = config.num_hidden_layers * config.num_attention_heads * head_widths * context * 3
    return 6 * parameter_counts(model)["active_without_embedding"] + attention


# %% Muon: every direction of a matrix learns at the same pace
# Each row a, b, c is one step: X ← aX + bAX + cA²X with A = X Xᵀ. It maps each singular value s of
# X to as + bs³ + cs⁵ and keeps the singular vectors. The three steps bring all s from 0.01 to 1
# into 0.73 … 1.27. Each row is the best choice for the values that the row before it leaves
# (Polar Express).
NEWTON_SCHULZ = (
    (8.0934, -23.6204, 17.4461), (3.6366, -2.7219, 0.5365), (2.6613, -1.9771, 0.4526),
)


def orthogonalized(G, precision=torch.float32):
    """Roughly U Vᵀ for each matrix U S Vᵀ (..., rows, columns): directions get about length 1."""
    X = (G / (G.norm(dim=(-2, -1), keepdim=True) + 1e-20)).to(precision)  # now no s is above 1
    tall = X.shape[-2] > X.shape[-1]
    X = X.mT if tall else X  # X Xᵀ is the smaller of the two possible products
    for a, b, c in NEWTON_SCHULZ:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return (X.mT if tall else X).to(G.dtype)


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonalised momentum (Jordan, 2024; at scale: 2025, arXiv:2502.16982).

    A few strong directions make up most of a gradient. AdamW leaves the many weak ones behind. Muon
    makes all directions learn equally fast. The entries of U Vᵀ have the mean square 1/n, where n
    is the larger of rows and columns. So 0.2 √n U Vᵀ is about as long a step as AdamW takes, and
    one learning rate serves both. `torch.optim.Muon` does the same with five steps in BF16, one
    matrix after another. Here all matrices of one shape share one product.
    """

    def __init__(self, parameters, lr, weight_decay=0.1, momentum=0.95, precision=torch.float32):
        super().__init__(parameters, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.precision = precision

    @torch.no_grad()
    def step(self):
        (group,), by_shape = self.param_groups, {}
        rate, keep = group["lr"], group["momentum"]
        for matrix in group["params"]:
            if matrix.grad is not None:
                state = self.state[matrix]
                mean = state.setdefault("momentum_buffer", torch.zeros_like(matrix))
                mean.lerp_(matrix.grad, 1 - keep)
                ahead = matrix.grad.lerp(mean, keep)  # Nesterov: the gradient counts once more
                by_shape.setdefault(matrix.shape, []).append((matrix, ahead))
        for shape, pairs in by_shape.items():
            matrices, ahead = zip(*pairs, strict=True)
            updates = orthogonalized(torch.stack(ahead), self.precision)
            torch._foreach_mul_(matrices, 1 - rate * group["weight_decay"])
            torch._foreach_add_(matrices, list(updates), alpha=-rate * 0.2 * max(shape) ** 0.5)


# %% Optimizers and the training step
def build_optimizers(model, peak_rate, muon=True, precision=torch.float32, beta2=0.99):
    """[AdamW], or with `muon` [AdamW, Muon]: Muon takes the matrices between hidden states.

    These are the matrices of attention, of dense and shared feed-forwards (gate and up are one
    matrix), and MTP's `eh_proj`. AdamW keeps four kinds: embedding and head, which lead from and to
    tokens; the router, which has only a few rows; the experts, whose many matrices would cost more
    time than they gain; norms and biases. Norms, biases and the router have no weight decay.

    AdamW divides each step by the root mean square of about the last 1/(1 − β₂) gradients. V3 has
    β₂ = 0.95: 20 gradients, each from millions of tokens. Ours come from 2,048 tokens, so rare
    tokens are missing and an expert sees few tokens. With β₂ = 0.99, 100 gradients count.
    """
    named = dict(model.named_parameters())
    spared = (".gate.", "embed_tokens", "lm_head", ".experts.")
    matrices = {
        name: p for name, p in named.items()
        if muon and p.dim() == 2 and not any(part in name for part in spared)
    }
    rest = {name: p for name, p in named.items() if name not in matrices}
    decayed = [p for name, p in rest.items() if p.dim() >= 2 and ".gate." not in name]
    others = [p for name, p in rest.items() if p.dim() < 2 or ".gate." in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, lr=peak_rate, betas=(0.9, beta2), fused=True)]
    if matrices:
        optimizers.append(Muon(matrices.values(), peak_rate, precision=precision))
    return optimizers


def training_step(
    model, optimizers, ids, document_ids, rate, mtp_weight, gamma, precision=torch.float32
):
    """Trains on one batch of tokens (B, T) and returns figures. Losses are in nats per token.

    L = L_next + λ/depths · Σ_k L_k + Σ_layers L_balance, then b_i ± γ (V3, equations 24–25 and
    section 2.1.2). λ is `mtp_weight`; at 0, the MTP modules do not run. γ is `gamma`. All
    optimizers use the learning rate `rate`. Matrix products are in `precision`. document_ids (B, T)
    tell the document of each token: an MTP target must be in the same document. A V2 model has no
    bias, only its balance loss.
    """
    model.train()
    for optimizer in optimizers:
        optimizer.zero_grad()
    routed = []  # collects the decisions of each layer's router
    # Autocast: matrix products are in `precision`; weights, norms, router and losses are in FP32.
    # `head_loss` equals phase 6's `shifted_loss` of the head's logits, but never stores them all.
    with torch.autocast(ids.device.type, precision, enabled=precision != torch.float32):
        hidden_BTD = model.hidden_states(ids, routed=routed)
        # The next token may be the separator that opens a new document, so the model learns where
        # a document ends. MTP has no targets in another document.
        next_loss = head_loss(model.lm_head, hidden_BTD, ids, shift=1)
        depths = model.mtp_hidden_states(hidden_BTD, ids, routed=routed) if mtp_weight else []
        further_losses = [
            head_loss(model.lm_head, states_BTD, ids, shift=k + 1, document_ids=document_ids)
            for k, states_BTD in enumerate(depths, start=1)
        ]
    further_loss = torch.stack(further_losses).mean() if further_losses else torch.zeros(())
    balance_loss = sum((layer_pass.balance_loss() for layer_pass in routed), torch.zeros(()))

    loss = next_loss + mtp_weight * further_loss + balance_loss
    gradient_norm = descend(model, optimizers, loss, rate)
    max_load = move_routing_biases(model, routed, gamma)
    return {
        "loss": next_loss.item(),
        "mtp_loss": further_loss.item() if further_losses else None,
        "balance_loss": balance_loss.item(),
        "gradient_norm": gradient_norm.item(),
        "learning_rate": rate,
        "max_load": max_load,
        "tokens": ids.numel(),
    }


def descend(model, optimizers, loss, rate):
    """Clips the gradient to length 1, steps all optimizers, and returns the length before."""
    loss.backward()
    gradient_norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    return gradient_norm


def move_routing_biases(model, routed, gamma):
    """Moves each b_i by γ against its load. Returns {layer: busiest expert's load / mean load}."""
    max_load = {}
    # The MTP modules come last. They may be missing in `routed`.
    for name, layer_pass in zip(model.moe_layers(), routed, strict=False):
        load_E = layer_pass.load().float()
        layer_pass.layer.gate.update_bias(load_E, gamma)
        max_load[name] = round((load_E.max() / load_E.mean()).item(), 4)
    return max_load


@torch.no_grad()
def silence_blocks(model):
    """Zeroes the last matrix of each attention and feed-forward, so that new blocks add nothing.

    The first gradients then reach embedding and head directly. Each block grows from zero as it
    learns something to add. Otherwise it would add noise, which the others must learn to undo.
    """
    for name, parameter in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            parameter.zero_()
    return model


# %% The run: such a step for each batch of the text, with V3's schedules of λ and γ
class TrainingRun(training.TrainingRun):
    """λ falls to a third after two thirds of the run, and γ is 0 at its end, nearly as in V3.

    V3 trains its MTP module from the start. In a model this small, the module makes a step take
    almost twice the time. So a run of a few minutes learns more if MTP starts late, at `mtp_from`,
    but then it drafts worse.
    """

    model_class = DeepSeekModel

    def build_optimizers(self):
        o = self.options
        precision = getattr(torch, o.precision)
        muon = o.optimizer == "muon"
        return build_optimizers(self.model, o.learning_rate, muon, precision, o.beta2)

    def fresh(self):
        tokenizer, model = super().fresh()
        return tokenizer, silence_blocks(model)

    def costs(self):
        return parameter_counts(self.model), cache_elements(self.model.config)

    def step(self, number, used):
        """Takes step `number` when the share `used` of the budget is spent."""
        options, (ids, document_ids) = self.options, self.batch(number)
        return training_step(
            self.model, self.optimizers, ids, document_ids,
            rate=learning_rate(used, options.learning_rate),
            mtp_weight=self.mtp_weight(used),
            gamma=options.gamma if used < 0.95 else 0.0,
            precision=getattr(torch, options.precision),
        )

    def mtp_weight(self, used):
        weight = self.options.mtp_weight if used >= self.options.mtp_from else 0.0
        return weight if used < 2 / 3 else weight / 3


class AlignmentRun(aligning.AlignmentRun):
    """Phase 9's steps on the trained model."""

    model_class = DeepSeekModel


# %% The proof
def check_published_sizes(demo):
    """Builds V3 from its own config.json, without memory, and compares it with published numbers.

    Published: 671 billion parameters, 37 active, 70.272 KB and 250 GFLOPs. We count 36.6 billion
    active parameters without the input embedding and 37.6 with it. So we assume that the 37 leave
    it out. The exact size of the MTP module is our own sum. V3's README_WEIGHTS.md says 11.5
    billion without embedding and head. Its README says 14 with copies of both; we count 13.5.
    """
    config = DeepSeekConfig.from_file(training.SMALL_CONFIG.with_name("deepseek_v3.json"))
    with torch.device("meta"):
        model = DeepSeekModel(config)
    counts, billion = parameter_counts(model), 10**9
    flops = round(training_flops_per_token(model, context=4096))
    for what, published, unit, ours in (
        ("parameters of the main model", 671, billion, counts["total"]),
        ("active, without the input embedding", 37, billion, counts["active_without_embedding"]),
        ("parameters of the MTP module, by our own sum", 11_610_067_968, 1, counts["mtp"]),
        ("bytes of BF16 cache a token", 70_272, 1, 2 * cache_elements(config)),
        ("FLOPs to train on a token, context 4,096", 250, billion, flops),
    ):
        ok = round(ours / unit) == published
        demo.check(f"V3: {what}", f"{published:,}{' · 10⁹' * (unit > 1)}", f"{ours:,}", ok)


def check_paths(demo, model, ids_BT):
    """The absorbed path and drafts must not change the result. They only change the speed."""
    absorbed_BTW, expanded_BTW = (model(ids_BT, path=path) for path in ("absorbed", "expanded"))
    demo.same("absorbed = expanded", "(B, T, W)", absorbed_BTW, expanded_BTW, tolerance=1e-4)
    greedy, drafted = (model.generate(ids_BT, 20, speculative=each) for each in (False, True))
    same = torch.equal(greedy, drafted)
    demo.check("a text with drafts = without", "(B, T + 20)", "the same tokens", same)


def check_orthogonalized(demo):
    """Muon's update of a gradient with strong and weak directions: all get about length 1."""
    U, _, Vh = torch.linalg.svd(torch.randn(96, 256, device=demo.device), full_matrices=False)
    values = torch.logspace(0, -1.3, 96, device=demo.device)  # the strongest is 20 × the weakest
    update = orthogonalized(U * values @ Vh)
    lengths = (U.mT @ update @ Vh.mT).diagonal()
    figure = f"lengths {lengths.min():.2f} … {lengths.max():.2f}"
    fits = 0.72 < lengths.min() < lengths.max() < 1.28
    demo.check("Muon: all directions get about length 1", "(96, 256)", figure, fits)


def check_training_step(demo, model, ids_BT, gamma=0.01):
    """The first loss must be that of guessing. Each bias must move by γ against its load."""
    routed = []
    model.mtp_hidden_states(model.hidden_states(ids_BT, routed=routed), ids_BT, routed=routed)
    loads_E = [layer_pass.load().float() for layer_pass in routed]
    figures = training_step(
        model, build_optimizers(model, 1e-3, muon=False), ids_BT, torch.zeros_like(ids_BT),
        rate=1e-3, mtp_weight=0.3, gamma=gamma,
    )
    guess, loss = math.log(model.config.vocab_size), figures["loss"]
    demo.check("first loss is about ln W", "scalar", f"{loss:.3f}, ln W {guess:.3f}",
               abs(loss - guess) < 0.2)
    moved = [layer.gate.e_score_correction_bias for layer in model.moe_layers().values()]
    wanted = [gamma * torch.sign(load_E.mean() - load_E) for load_E in loads_E]
    demo.same("biases move by γ against the load", "(layers, E)", torch.stack(moved),
              torch.stack(wanted), tolerance=0.0)


def check(demo):
    """Runs the check command, which takes a few seconds."""
    check_published_sizes(demo)
    check_orthogonalized(demo)
    model = DeepSeekModel(DeepSeekConfig.from_file(training.SMALL_CONFIG)).to(demo.device)
    ids_BT = torch.randint(model.config.vocab_size, (2, 64), device=demo.device)
    check_training_step(demo, model, ids_BT)
    model.init_weights(std=0.1)  # large enough for attention to differ between tokens
    with torch.no_grad():
        check_paths(demo, model.eval(), ids_BT)
    demo.finish("check --seed 1: other weights, the same verdicts",
                "--steps 20: the whole main job, from a text to an aligned model")


# %% The commands
def whole_pipeline(run):
    """The main job: trains, reads the checkpoint back, scores it, draws, generates and aligns."""
    run.go()
    model = DeepSeekModel.from_pretrained(run.checkpoint).to(run.device)
    test = run.corpus.test
    scores = scoring.score(model, run.tokenizer, test)
    rates = scoring.print_scores(scores, test, run.tokenizer, "test part")
    pictures = report.save_results(run, scores, rates)
    generating.show_continuation(model, run.tokenizer, test)
    print(f"checkpoint: {run.checkpoint}   pictures: {', '.join(map(str, pictures))}")
    aligning.align_after_training(run, scores, AlignmentRun)


WHOLE = Command("the main job", RunOptions, whole_pipeline, TrainingRun)
COMMANDS = {  # name: help, flags, work and, for a run, its class
    "check": Command("prove sizes, equal paths and a training step", CheckOptions, check),
    "train": Command(
        "only train, or go on with a stopped run", RunOptions, training.train, TrainingRun
    ),
    "align": Command(
        "train with GRPO; the reward is for Python that parses", aligning.AlignOptions,
        aligning.align, AlignmentRun
    ),
    **OF_A_CHECKPOINT,  # evaluate, generate, quantize
}


@one_line_errors
def main(argv=None):
    run_command(argv, __doc__, DeepSeekModel, WHOLE, COMMANDS)


if __name__ == "__main__":
    main()
