"""Phase 5: mixture of experts (MoE), many small feed-forward networks of which few run.

A dense feed-forward layer spends the same arithmetic on every token. An MoE layer holds E experts
and lets a router send each token to A of them: parameters grow with E, arithmetic with A. The
danger is collapse: experts that are chosen more learn more and are chosen still more. Switch
answers with one expert a token, a capacity and a balance loss. DeepSeekMoE cuts experts finer,
adds shared experts that every token passes, and ends (V3) with a bias that steers the *choice* of
experts and leaves their weights alone.

    y = Σ_shared FFN(x) + Σ_{i chosen} g_i FFN_i(x)
    FFN(x) = W_down (SiLU(W_gate x) ⊙ W_up x)
    V2:  s = softmax(W x),  top A of s in the best groups,      g_i = c · s_i
    V3:  s = sigmoid(W x),  top A of s + b in the best groups,  g_i = c · s_i / Σ_chosen s
    after each step (V3):    b_i ← b_i − γ if expert i was overloaded, b_i + γ if underloaded

Papers: Switch Transformer (2021), section 2; DeepSeek-V2 (2024), section 2.2, equations 20–31;
DeepSeek-V3 (2024), section 2.1.2, equations 12–20. Names follow the released checkpoints.
Simplified: all experts on one device; V2's device-level token dropping is left out.

Dimensions: B batch · T query positions · D model width · M tokens (B·T) · E routed experts · A
active experts per token · F expert hidden width.

Run:  python moe_coded.py [--steps 120] [--gamma 0.02] [--picture pictures/moe_load.png]
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from lesson import check_divides, check_input, check_sizes, demonstration, draw_bands, flag, require
from multihead_attention_coded import MultiHeadAttention


# %% One expert
class SwiGLU(nn.Module):
    """W_down (SiLU(W_gate x) ⊙ W_up x): (..., D) → (..., D)."""

    def __init__(self, hidden_size, intermediate_size):
        super().__init__()
        check_sizes(hidden_size=hidden_size, intermediate_size=intermediate_size)
        # [W_gate; W_up] in one matrix, one product: released files store them apart.
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


# %% Routing: what a router decides
class Routing(NamedTuple):
    """weights (M, A) of the chosen experts, their indices (M, A), all affinities (M, E).

    `kept` (M, A) is False where an expert had no room left; None where nothing is dropped.
    """

    weights: torch.Tensor
    indices: torch.Tensor
    scores: torch.Tensor
    kept: torch.Tensor | None = None

    def dropped(self):
        """How many choices got no expert: there was no room, or the token is padding."""
        return 0 if self.kept is None else int((~self.kept).sum())


def expert_counts(indices, num_experts, token_mask=None):
    """(E,) how often each expert was chosen. indices (M, A); token_mask (M,), False = padding."""
    if token_mask is not None:
        indices = indices[token_mask.bool()]
    return torch.bincount(indices.flatten(), minlength=num_experts)


def fp32_logits(x_MD, weight_ED):
    """W x in FP32 whatever the input is: a rounded affinity may choose another expert."""
    with torch.autocast(x_MD.device.type, enabled=False):
        return F.linear(x_MD.float(), weight_ED.float())


# %% Switch: one expert a token, and a capacity
class SwitchRouter(nn.Module):
    """Top-1 routing: g = softmax(W x) of the best expert; an expert takes so many tokens at most.

    Capacity = capacity_factor · M / E (section 2.2), here rounded down and at least 1. First come,
    first served; a dropped token gets no expert: the residual connection around the layer passes
    it through. So an output depends on the other tokens of the batch, unlike the routers below.
    """

    num_experts_per_tok = 1

    def __init__(self, hidden_size, n_routed_experts, capacity_factor=1.25):
        super().__init__()
        check_sizes(n_routed_experts=n_routed_experts)
        require(capacity_factor > 0, f"capacity_factor={capacity_factor} must be above 0")
        self.num_experts, self.capacity_factor = n_routed_experts, capacity_factor
        self.weight = nn.Parameter(torch.empty(n_routed_experts, hidden_size))
        nn.init.normal_(self.weight, std=0.02)

    def capacity(self, tokens):
        return max(1, int(self.capacity_factor * tokens / self.num_experts))

    def forward(self, x_MD, token_mask=None):
        """(M, D) → `Routing` with A = 1; weights of dropped tokens are there but unused.

        token_mask (M,): False = padding, which takes no place in a queue.
        """
        scores_ME = fp32_logits(x_MD, self.weight).softmax(dim=-1)
        weights_M1, indices_M1 = scores_ME.max(dim=-1, keepdim=True)
        real_M1 = torch.ones_like(indices_M1, dtype=torch.bool)
        if token_mask is not None:
            real_M1 = token_mask.bool().unsqueeze(1)
        arrivals_ME = F.one_hot(indices_M1.squeeze(1), self.num_experts) * real_M1
        place_M1 = arrivals_ME.cumsum(dim=0).gather(1, indices_M1)  # 1 = first in the queue
        has_room_M1 = place_M1 <= self.capacity(int(real_M1.sum()))
        return Routing(weights_M1, indices_M1, scores_ME, has_room_M1 & real_M1)


# %% DeepSeekMoE: the top A of many fine-grained experts, chosen within the best groups
class TopKRouter(nn.Module):
    """V2's and V3's routers, by the names in config.json.

    `scoring_func`: "softmax" (V2) or "sigmoid" (V3). `topk_method`: "greedy" (V2-Lite),
    "group_limited_greedy" (V2: a group counts as much as its best expert) or "noaux_tc" (V3: with
    the bias `e_score_correction_bias`; a group counts as much as its two best biased scores).
    Only the experts of the best `topk_group` of `n_group` groups can be chosen. `norm_topk_prob`:
    the chosen weights are divided by their sum (V3). `routed_scaling_factor`: c above.

    Two tokens, four experts in two groups, the best group counts, one expert a token (V3):

        s         (.9 .1 | .6 .7)   (.2 .4 | .3 .1)     affinities
        s + b     (.9 .1 | .6 .5)   (.2 .4 | .3 −.1)    with b = (0, 0, 0, −.2)
        groups    1.0     1.1        .6     .2           sum of the two best: right, left
        chosen    expert 2           expert 1            the best of s + b within the group
        weights   .6 / .6 = 1        .4 / .4 = 1         from s: the bias selects, it does not weigh
    """

    def __init__(
        self,
        hidden_size,
        n_routed_experts,
        num_experts_per_tok,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
    ):
        super().__init__()
        if topk_method == "greedy":
            n_group = topk_group = 1
        self.num_experts, self.num_experts_per_tok = n_routed_experts, num_experts_per_tok
        self.scoring_func, self.topk_method = scoring_func, topk_method
        self.n_group, self.topk_group = n_group, topk_group
        self.norm_topk_prob, self.routed_scaling_factor = norm_topk_prob, routed_scaling_factor
        check_router(self)
        self.weight = nn.Parameter(torch.empty(n_routed_experts, hidden_size))
        nn.init.normal_(self.weight, std=0.02)
        if topk_method == "noaux_tc":
            self.register_buffer("e_score_correction_bias", torch.zeros(n_routed_experts))

    def forward(self, x_MD, token_mask=None):
        """(M, D) → `Routing`, in FP32. `token_mask` is without effect: tokens do not compete."""
        logits_ME = fp32_logits(x_MD, self.weight)
        softmax = self.scoring_func == "softmax"
        scores_ME = logits_ME.softmax(dim=-1) if softmax else logits_ME.sigmoid()
        choice_ME = scores_ME.detach()
        if self.topk_method == "noaux_tc":
            choice_ME = choice_ME + self.e_score_correction_bias
        if self.n_group > 1:
            choice_ME = choice_ME.masked_fill(~self.in_best_groups(choice_ME), float("-inf"))
        indices_MA = choice_ME.topk(self.num_experts_per_tok, dim=-1).indices
        weights_MA = scores_ME.gather(1, indices_MA)  # the bias selects, it does not weigh
        if self.norm_topk_prob:
            weights_MA = weights_MA / (weights_MA.sum(dim=-1, keepdim=True) + 1e-20)
        return Routing(weights_MA * self.routed_scaling_factor, indices_MA, scores_ME)

    def in_best_groups(self, choice_ME):
        """(M, E) boolean: whether the expert's group is among the best `topk_group`."""
        by_group = choice_ME.unflatten(1, (self.n_group, -1))
        best = 2 if self.topk_method == "noaux_tc" else 1
        group_scores = by_group.topk(best, dim=-1).values.sum(dim=-1)
        best_groups = group_scores.topk(self.topk_group, dim=-1).indices
        kept = torch.zeros_like(group_scores, dtype=torch.bool).scatter(1, best_groups, True)
        return kept.unsqueeze(-1).expand_as(by_group).flatten(1)

    @torch.no_grad()
    def update_bias(self, load_E, gamma):
        """One step of V3's balancing (section 2.1.2): how often each expert was chosen, γ.

        An expert above the mean load loses `gamma`, one below gains it. A load of zeros, or a
        router without bias, changes nothing.
        """
        if self.topk_method == "noaux_tc":
            load_E = load_E.float()
            self.e_score_correction_bias += gamma * torch.sign(load_E.mean() - load_E)

    def _apply(self, fn, recurse=True):
        """Moves like any module, but keeps the bias in FP32: BF16 would swallow steps of γ."""
        bias = self._buffers.get("e_score_correction_bias")
        super()._apply(fn, recurse)
        if bias is not None and not bias.is_meta:
            self.e_score_correction_bias = bias.to(self.weight.device)
        return self


def check_router(router):
    """ValueError for a router whose experts, groups and choices do not fit together."""
    E, A, groups, best = (
        router.num_experts, router.num_experts_per_tok, router.n_group, router.topk_group
    )
    scoring, method, scorings = router.scoring_func, router.topk_method, ("softmax", "sigmoid")
    methods = ("greedy", "group_limited_greedy", "noaux_tc")
    require(scoring in scorings, f"scoring_func={scoring!r} must be one of {scorings}")
    require(method in methods, f"topk_method={method!r} must be one of {methods}")
    check_sizes(n_routed_experts=E)
    check_divides(n_routed_experts=E, n_group=groups)
    require(1 <= best <= groups, f"topk_group={best} must be from 1 to n_group={groups}")
    size = E // groups
    can = f"num_experts_per_tok={A} must be from 1 to the {best * size} experts that can be chosen"
    require(1 <= A <= best * size, can)
    pairs = method != "noaux_tc" or groups == 1 or size >= 2
    require(pairs, f"n_group={groups} leaves {size} expert a group, want 2 or more")


# %% The experts, and three ways to run them
class Experts(nn.Module):
    """E SwiGLU networks in two tensors, `gate_up_proj` (E, 2F, D) and `down_proj` (E, D, F)."""

    def __init__(self, num_experts, hidden_size, intermediate_size):
        super().__init__()
        self.gate_up_proj = nn.Parameter(
            torch.empty(num_experts, 2 * intermediate_size, hidden_size)
        )
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        for weight in (self.gate_up_proj, self.down_proj):
            nn.init.uniform_(weight, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)

    def expert(self, e, x):
        """Expert e on any rows, (..., D) → (..., D): what `SwiGLU` does."""
        gate, up = F.linear(x, self.gate_up_proj[e]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down_proj[e])

    def dense(self, x_MD, routing):
        """The naive reference: every expert on every token, most of it weighed with zero."""
        used_MA = routing.weights if routing.kept is None else routing.weights * routing.kept
        weights_ME = torch.zeros_like(routing.scores).scatter(1, routing.indices, used_MA)
        outputs = [
            self.expert(e, x_MD) * weights_ME[:, e, None].to(x_MD.dtype)
            for e in range(len(self.down_proj))
        ]
        return torch.stack(outputs).sum(dim=0)

    def loop(self, x_MD, routing):
        """Expert by expert, each on its own tokens."""
        output_MD = torch.zeros_like(x_MD)
        for e in range(len(self.down_proj)):
            mine_MA = routing.indices == e
            if routing.kept is not None:
                mine_MA = mine_MA & routing.kept
            tokens, places = mine_MA.nonzero(as_tuple=True)
            weights = routing.weights[tokens, places, None].to(x_MD.dtype)
            output_MD = output_MD.index_add(0, tokens, self.expert(e, x_MD[tokens]) * weights)
        return output_MD

    def grouped(self, x_MD, routing):
        """Tokens sorted by expert, then two grouped matrix products for all experts at once."""
        active = routing.indices.shape[1]
        tokens = torch.arange(len(x_MD), device=x_MD.device).repeat_interleave(active)
        experts, weights = routing.indices.flatten(), routing.weights.flatten()
        if routing.kept is not None:
            kept = routing.kept.flatten()
            tokens, experts, weights = tokens[kept], experts[kept], weights[kept]
        order = experts.argsort(stable=True)
        tokens, weights = tokens[order], weights[order].to(x_MD.dtype)
        ends_E = expert_counts(experts, len(self.down_proj)).cumsum(0).to(torch.int32)
        # index_select, not x_MD[tokens]: its backward is 5 times faster.
        rows = x_MD.index_select(0, tokens)
        gate, up = grouped_linear(rows, self.gate_up_proj, ends_E).chunk(2, dim=-1)
        outputs = grouped_linear(F.silu(gate) * up, self.down_proj, ends_E)
        return torch.zeros_like(x_MD).index_add(0, tokens, outputs * weights.unsqueeze(1))


def grouped_linear(rows, weights, ends):
    """`F.linear` of each expert on its own rows: (rows, in), (E, out, in), (E,) → (rows, out).

    `ends` (int32): where each expert's run ends. PyTorch's kernel takes them all in one call; it
    wants one dtype and rows of a multiple of 16 bytes. Elsewhere: a product per expert.
    """
    if torch.is_autocast_enabled(rows.device.type):  # the kernel is not on autocast's list
        precision = torch.get_autocast_dtype(rows.device.type)
        rows, weights = rows.to(precision), weights.to(precision)
    size, narrow = rows.element_size(), rows.element_size() <= 4 and not rows.is_mps
    whole = all(width * size % 16 == 0 for width in weights.shape[1:])
    if narrow and whole and rows.dtype == weights.dtype:
        return F.grouped_mm(rows, weights.transpose(-2, -1), offs=ends)
    runs = rows.tensor_split(ends.tolist()[:-1])
    return torch.cat([F.linear(run, weight) for run, weight in zip(runs, weights, strict=True)])


# %% The layer
class Routed(NamedTuple):
    """What one MoE layer decided in one pass: what balance losses and biases are made from."""

    layer: nn.Module
    routing: Routing
    batch_shape: tuple
    token_mask: torch.Tensor | None

    def balance_loss(self):
        """The layer's own loss, a scalar; 0 if it has none."""
        if self.layer.balance_loss is None:
            return self.routing.scores.new_zeros(())
        return self.layer.balance_loss(self.routing, self.batch_shape, self.token_mask)

    def load(self):
        """(E,) how often each expert was chosen; padding is left out."""
        real_M = None if self.token_mask is None else self.token_mask.flatten()
        return expert_counts(self.routing.indices, self.layer.gate.num_experts, real_M)


class MixtureOfExperts(nn.Module):
    """Router, routed experts, and shared experts that see every token. No residual inside.

    `n_shared_experts` of width F are one SwiGLU of width n · F, as in the released checkpoints.
    `balance_loss(routing, batch_shape, token_mask)` → scalar, or None: see `Routed`.
    """

    def __init__(
        self, hidden_size, moe_intermediate_size, router, n_shared_experts=0, balance_loss=None
    ):
        super().__init__()
        check_sizes(moe_intermediate_size=moe_intermediate_size)
        D = router.weight.shape[1]
        require(hidden_size == D, f"the router reads width {D}, want hidden_size={hidden_size}")
        self.gate = router
        self.experts = Experts(router.num_experts, hidden_size, moe_intermediate_size)
        self.shared_experts = None
        if n_shared_experts:
            self.shared_experts = SwiGLU(hidden_size, n_shared_experts * moe_intermediate_size)
        self.balance_loss = balance_loss

    def forward(self, x, token_mask=None, routed=None, dispatch="grouped"):
        """(..., D) → (..., D).

        token_mask: (...), False = padding, which enters neither balance loss nor load. routed: a
        list that gets this pass's `Routed`. dispatch: "dense", "loop" or "grouped", all the same.
        """
        ways = ("dense", "loop", "grouped")
        require(dispatch in ways, f"dispatch={dispatch!r} must be one of {ways}")
        check_input(x, self.gate.weight.shape[1])
        mask_M = None
        if token_mask is not None:
            got, want = tuple(token_mask.shape), tuple(x.shape[:-1])
            require(got == want, f"token_mask must be {want}, got {got}")
            mask_M = token_mask.flatten()
        x_MD = x.flatten(0, -2)
        routing = self.gate(x_MD, mask_M)
        output_MD = getattr(self.experts, dispatch)(x_MD, routing)
        if self.shared_experts is not None:
            output_MD = output_MD + self.shared_experts(x_MD)
        if routed is not None:
            routed.append(Routed(self, routing, x.shape[:-1], token_mask))
        return output_MD.view_as(x)


# %% The block: attention, then a feed-forward, each with a norm before and a residual around
class TransformerBlock(nn.Module):
    """h += attention(norm(h)); h += feed_forward(norm(h)); names as in the released checkpoints.

    `attention`: `MultiHeadLatentAttention` or `MultiHeadAttention`. `feed_forward`: `SwiGLU` or
    `MixtureOfExperts`.
    """

    def __init__(self, attention, feed_forward, norm_eps=1e-6):
        super().__init__()
        hidden_size = attention.o_proj.out_features
        self.input_layernorm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.self_attn = attention
        self.post_attention_layernorm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.mlp = feed_forward

    def forward(self, hidden, token_mask=None, routed=None, **attention_options):
        """(B, T, D) → (B, T, D). `attention_options` (mask, cache, ...) go to the attention.

        token_mask (B, T) and the list `routed` go to the experts, if the block has any.
        """
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), **attention_options)
        normed = self.post_attention_layernorm(hidden)
        if isinstance(self.mlp, MixtureOfExperts):
            return hidden + self.mlp(normed, token_mask, routed)
        return hidden + self.mlp(normed)


# %% Balance losses: what training adds so that experts are used alike
# Each is α when what it counts is even. As a rule, uneven use costs more, since the
# scores P favour the experts that are chosen more often; but not always. Two experts, top 1, scores
# (.51, .49), (.51, .49), (0, 1): f = (4/3, 2/3), P = (.34, .66), and the loss is 0.893 α.
def switch_balance_loss(scores_ME, indices_MA, alpha, token_mask=None):
    """α E Σ_i f_i P_i (Switch, equation 4); f share of the tokens sent to i, P mean score of i."""
    return expert_balance_loss(scores_ME, indices_MA[:, :1], alpha, token_mask)


def _fractions_and_scores(scores_ME, indices_MA, token_mask):
    """f (E,): E/(A M) · tokens choosing each expert. P (E,): mean score. Padding left out."""
    if token_mask is not None:
        scores_ME, indices_MA = scores_ME[token_mask.bool()], indices_MA[token_mask.bool()]
    tokens, num_experts = scores_ME.shape
    counts_E = expert_counts(indices_MA, num_experts)
    fractions_E = counts_E * (num_experts / max(1, indices_MA.numel()))
    return fractions_E, scores_ME.sum(dim=0) / max(1, tokens)


def expert_balance_loss(scores_ME, indices_MA, alpha, token_mask=None):
    """α Σ_i f_i P_i over all experts (V2, equations 23–25). Scores must sum to 1 over experts."""
    fractions_E, mean_scores_E = _fractions_and_scores(scores_ME, indices_MA, token_mask)
    return alpha * (fractions_E * mean_scores_E).sum()


def device_balance_loss(scores_ME, indices_MA, alpha, devices, token_mask=None):
    """α Σ_d f'_d P'_d (V2, equations 26–28): f' mean of f, P' sum of P over a device's experts."""
    fractions_E, mean_scores_E = _fractions_and_scores(scores_ME, indices_MA, token_mask)
    per_device = _experts_of_devices(fractions_E, devices).mean(dim=-1)
    return alpha * (per_device * _experts_of_devices(mean_scores_E, devices).sum(dim=-1)).sum()


def communication_balance_loss(
    scores_ME, indices_MA, alpha, devices, max_devices, token_mask=None
):
    """α Σ_d f''_d P''_d (V2, equations 29–31), over devices d.

    f''_d = devices / (max_devices · M) · tokens sent to d, where `max_devices` is how many devices
    a token may be sent to; P''_d is the sum of P over the device's experts.
    """
    if token_mask is not None:
        scores_ME, indices_MA = scores_ME[token_mask.bool()], indices_MA[token_mask.bool()]
    tokens, num_experts = scores_ME.shape
    chosen_ME = torch.zeros_like(scores_ME, dtype=torch.bool).scatter(1, indices_MA, True)
    sent = _experts_of_devices(chosen_ME, devices).any(dim=-1).sum(dim=0)
    fractions = sent * devices / (max_devices * max(1, tokens))
    mean_scores = _experts_of_devices(scores_ME.sum(dim=0) / max(1, tokens), devices).sum(dim=-1)
    return alpha * (fractions * mean_scores).sum()


def _experts_of_devices(per_expert, devices):
    """(..., E) → (..., devices, E / devices): neighbours share a device."""
    check_divides(experts=per_expert.shape[-1], devices=devices)
    return per_expert.unflatten(-1, (devices, -1))


def sequence_balance_loss(scores_BTE, experts_per_token, alpha, token_mask=None):
    """α Σ_i f_i P_i within each sequence, averaged over sequences (V3, equations 17–20).

    f counts the top A of the plain scores: neither bias nor groups enter. P is the mean of the
    scores after they are normalised over all experts. token_mask (B, T): False = padding.
    """
    shares_BTE = scores_BTE / (scores_BTE.sum(dim=-1, keepdim=True) + 1e-20)
    top_BTA = scores_BTE.topk(experts_per_token, dim=-1).indices
    chosen_BTE = torch.zeros_like(scores_BTE).scatter(2, top_BTA, 1.0)
    if token_mask is None:
        token_mask = torch.ones_like(scores_BTE[..., 0], dtype=torch.bool)
    real_BT1 = token_mask.bool().unsqueeze(-1)
    lengths_B1 = real_BT1.sum(dim=1).clamp(min=1)
    num_experts = scores_BTE.shape[-1]
    fractions_BE = (chosen_BTE * real_BT1).sum(dim=1) * num_experts / experts_per_token / lengths_B1
    mean_shares_BE = (shares_BTE * real_BT1).sum(dim=1) / lengths_B1
    has_tokens_B = real_BT1.any(dim=1).squeeze(-1)
    per_sequence_B = (fractions_BE * mean_shares_BE).sum(dim=-1)
    return alpha * per_sequence_B.sum() / has_tokens_B.sum().clamp(min=1)


def balance_within_sequences(alpha, routing, batch_shape, token_mask):
    """`sequence_balance_loss` in the form that `MixtureOfExperts` calls (bind `alpha` first)."""
    got = (*batch_shape, "D")
    require(len(batch_shape) == 2, f"a loss within sequences needs input (B, T, D), got {got}")
    scores_BTE = routing.scores.unflatten(0, batch_shape)
    return sequence_balance_loss(scores_BTE, routing.indices.shape[1], alpha, token_mask)


def balance_over_batch(alpha, routing, batch_shape, token_mask):
    """`expert_balance_loss` in the form that `MixtureOfExperts` calls (bind `alpha` first)."""
    flat_mask = None if token_mask is None else token_mask.flatten()
    return expert_balance_loss(routing.scores, routing.indices, alpha, flat_mask)


# %% The cost
def expert_parameters(hidden_size, moe_intermediate_size, routed, active, shared):
    """(parameters that exist, parameters that a token uses) in one layer's experts."""
    one = 3 * hidden_size * moe_intermediate_size
    return (routed + shared) * one, (active + shared) * one


# %% Load over training, with and without balancing
def train_on_clusters(balancing, steps, gamma, seed, device="cpu"):
    """Trains one MoE layer on tokens of 8 unequal clusters, each with a map of its own to learn.

    `balancing`: "none", "bias" (V3's update) or "loss" (V2's, α = 1). Returns: (steps, E) share
    of the choices that went to each expert, and the last mean squared error.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    D, E, M = 16, 8, 512
    centers = torch.randn(8, D, generator=generator) * 2
    maps = torch.randn(8, D, D, generator=generator) / D**0.5
    popularity = 1.0 / torch.arange(1, 9)
    if balancing == "loss":
        router = TopKRouter(D, E, 2, "softmax", "greedy", norm_topk_prob=False)
        loss_function = functools.partial(balance_over_batch, 1.0)
    else:
        router, loss_function = TopKRouter(D, E, 2), None
    layer = MixtureOfExperts(D, 16, router, balance_loss=loss_function).to(device)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    shares = []
    for _ in range(steps):
        routed = []
        cluster_M = torch.multinomial(popularity, M, replacement=True, generator=generator)
        x_MD = centers[cluster_M] + torch.randn(M, D, generator=generator)
        target_MD = torch.einsum("md,mde->me", x_MD, maps[cluster_M]).to(device)
        error = F.mse_loss(layer(x_MD.to(device), routed=routed), target_MD)
        optimizer.zero_grad()
        (error + routed[0].balance_loss()).backward()
        optimizer.step()
        load_E = routed[0].load()
        router.update_bias(load_E, gamma if balancing == "bias" else 0.0)
        shares.append(load_E / load_E.sum())
    return torch.stack(shares).cpu(), error.item()


# %% The demonstration
def check_dispatches(demo):
    """Loop and grouped products equal the dense reference, for every router."""
    v2 = dict(scoring_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False)
    routers = {
        "V2 (softmax, best group)": TopKRouter(
            32, 8, 3, n_group=4, topk_group=2, routed_scaling_factor=16.0, **v2
        ),
        "V3 (sigmoid, biased)": TopKRouter(32, 8, 3, n_group=4, topk_group=2),
        "Switch (capacity 0.5)": SwitchRouter(32, 8, capacity_factor=0.5),
    }
    routers["V3 (sigmoid, biased)"].e_score_correction_bias.uniform_(-0.5, 0.5)
    x_BTD = torch.randn(2, 20, 32, device=demo.device)
    for name, router in routers.items():
        layer = MixtureOfExperts(32, 16, router, n_shared_experts=1).to(demo.device)
        dense = layer(x_BTD, dispatch="dense")
        for kind in ("loop", "grouped"):
            output = layer(x_BTD, dispatch=kind)
            demo.same(f"{name}: {kind} = dense", "(B, T, D)", output, dense)
    check_dropped_tokens(demo, layer, x_BTD)


def check_dropped_tokens(demo, layer, x_BTD):
    """In a block, a token without an expert keeps what attention and shared experts gave it."""
    block, routed = TransformerBlock(MultiHeadAttention(32, 4), layer).to(demo.device), []
    output_BTD = block(x_BTD, routed=routed)
    hidden_BTD = x_BTD + block.self_attn(block.input_layernorm(x_BTD))
    shared_BTD = layer.shared_experts(block.post_attention_layernorm(hidden_BTD))
    kept_BT = routed[0].routing.kept.view(2, 20)
    change_BT = (output_BTD - hidden_BTD - shared_BTD).abs().amax(dim=-1)
    untouched = change_BT[~kept_BT].max() < 1e-5 < change_BT[kept_BT].min()
    dropped = routed[0].routing.dropped()
    ok = bool(dropped > 0 and untouched)
    demo.check("Switch: dropped tokens are passed through", "M 40", f"{dropped} dropped", ok)


def check_balance_losses(demo):
    """Every loss is its α when experts, devices and sequences are used alike."""
    even_ME, turns_MA = torch.full((64, 8), 1 / 8), torch.arange(128).view(64, 2) % 8
    # each token's best two experts are one further than the last token's
    turning_BTE = torch.stack([torch.linspace(1, 2, 8).roll(t) for t in range(8)])[None]
    losses = {
        "Switch": (switch_balance_loss(even_ME, torch.arange(64)[:, None] % 8, 0.01), 0.01),
        "expert": (expert_balance_loss(even_ME, turns_MA, 0.003), 0.003),
        "device": (device_balance_loss(even_ME, turns_MA, 0.05, 4), 0.05),
        "communication": (communication_balance_loss(even_ME, turns_MA, 0.02, 4, 1), 0.02),
        "sequence": (sequence_balance_loss(turning_BTE, 2, 1e-4), 1e-4),
    }
    for name, (loss, alpha) in losses.items():
        ok = abs(loss - alpha) < 1e-6
        demo.check(f"{name} balance loss is α at balance", "", f"{loss:.4f}, α {alpha}", ok)


def check_balancing(demo, steps, gamma, path):
    """Trains with each way of balancing, draws the load, and compares the busiest experts."""
    shares, busiest = {}, {}
    for name, balancing in {"no balancing": "none", "V3 bias": "bias", "V2 loss": "loss"}.items():
        shares[name], error = train_on_clusters(balancing, steps, gamma, demo.seed, demo.device)
        busiest[name] = shares[name][-20:].mean(dim=0).max().item() * 8
        demo.note(f"{name}: busiest expert {busiest[name]:.2f}× the mean load, error {error:.3f}")
    titles = {f"{n}: busiest expert {busiest[n]:.2f}× the mean": shares[n] for n in shares}
    draw_bands(path, titles, xlabel="training step", ylabel="share of the choices, by expert")
    before, after = busiest["no balancing"], busiest["V3 bias"]
    better = after < before or gamma == 0
    figure = f"{before:.2f} → {after:.2f}"
    demo.check("V3's bias spreads the load", "max/mean load", figure, better)
    demo.note(f"picture: {path}")


@demonstration(__doc__, flag("steps", 120, "training steps of the picture", at_least=20),
               flag("gamma", 0.02, "speed of the bias update"),
               flag("picture", "pictures/moe_load.png", "where to draw it"))
def main(demo, arguments):
    check_dispatches(demo)
    check_balance_losses(demo)
    exist, used = expert_parameters(7168, 2048, routed=256, active=8, shared=1)
    figure = f"{exist / 1e9:.2f}B exist, {used / 1e9:.2f}B used a token"
    demo.check("V3, experts of one layer", "parameters", figure, used * 28 < exist)
    experts = MixtureOfExperts(32, 16, TopKRouter(32, 8, 2), n_shared_experts=1)
    block = TransformerBlock(MultiHeadAttention(32, 4), experts).to(demo.device)
    x_BTD = torch.randn(2, 6, 32, device=demo.device)
    shape = tuple(block(x_BTD).shape)
    figure = f"{tuple(x_BTD.shape)} → {shape}"
    demo.check("a block: attention, then experts", "(B, T, D) → (B, T, D)", figure,
               shape == x_BTD.shape)
    check_balancing(demo, arguments.steps, arguments.gamma, arguments.picture)
    demo.finish("--gamma 0: the bias stays at zero", "--steps 400", "--gamma 0.2: does it settle?")


if __name__ == "__main__":
    main()
