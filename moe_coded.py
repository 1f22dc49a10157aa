"""Phase 5: mixture of experts (MoE), many feed-forward networks of which each token uses a few.

In a dense feed-forward layer, every token uses every weight. An MoE layer holds E expert networks,
and a router sends each token to A of them: the number of parameters grows with E, but the
arithmetic per token grows only with A. The danger is collapse: an expert that is chosen often
learns more, and is then chosen even more often. Switch sends each token to one expert. It adds a
balance loss against collapse, and a capacity limits how many tokens an expert takes. DeepSeekMoE
uses more and smaller experts, and adds shared experts that process every token. V2 balances the
load (how many tokens each expert gets) by losses. V3 balances it by a bias that changes which
experts are chosen, but not the weights of their outputs. It keeps one very small loss, for the
load within each sequence.

    y = Σ_shared FFN(x) + Σ_{i chosen} g_i FFN_i(x)
    FFN(x) = W_down (SiLU(W_gate x) ⊙ W_up x),  SiLU(z) = z · sigmoid(z)
    V2:  s = softmax(W x),  top A of s in the best groups,      g_i = c · s_i
    V3:  s = sigmoid(W x),  top A of s + b in the best groups,  g_i = c · s_i / Σ_chosen s
    after each step (V3):    b_i ← b_i − γ if expert i was overloaded, b_i + γ if underloaded

s_i is the score of expert i for a token (its affinity, in the papers), g_i the weight of its
output, b_i its bias; c and γ are constants; ⊙ multiplies element by element.

Papers: Switch Transformer (2021, arXiv:2101.03961), section 2; DeepSeekMoE (2024,
arXiv:2401.06066), section 3; DeepSeek-V2 (2024, arXiv:2405.04434), section 2.2, equations 20–31;
DeepSeek-V3 (2024, arXiv:2412.19437), section 2.1.2, equations 12–20. Names follow the released
checkpoints.
Simplified: all experts are on one device, and V2's token dropping per device is left out.
Before: phase 3, for the attention in the block. Reading 30 minutes, running 5 seconds.

Dimensions: B batch · T query positions · D model width · M tokens (B·T) · E routed experts · A
active experts per token · F expert hidden width.

Run:  python moe_coded.py [--steps 120] [--gamma 0.02] [--picture pictures/moe_load.png]
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from lesson import batches, checks, demonstration, draw_bands, flag, precision, surgery
from multihead_attention_coded import MultiHeadAttention


# %% One expert
class SwiGLU(nn.Module):
    """W_down (SiLU(W_gate x) ⊙ W_up x): (..., D) → (..., D)."""

    def __init__(self, hidden_size, intermediate_size):
        super().__init__()
        checks.check_sizes(hidden_size=hidden_size, intermediate_size=intermediate_size)
        # One matrix [W_gate; W_up] allows one product. Released files store the two separately.
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


def swiglu(x, gate_up, down):
    """The function of `SwiGLU`, given its two matrices (2F, D) and (D, F)."""
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


# %% Routing: the decision of a router
class Routing(NamedTuple):
    """What M tokens chose, computed in FP32: with rounded scores, the choice could change.

    weights (M, A) of the chosen experts' outputs; indices (M, A) of the chosen experts; scores
    (M, E) of all experts. kept (M, A): False where an expert had no room for the token; None if
    the router never drops tokens.
    """

    weights: torch.Tensor
    indices: torch.Tensor
    scores: torch.Tensor
    kept: torch.Tensor | None = None


# %% Switch: one expert a token, and a capacity
class SwitchRouter(nn.Module):
    """Top-1 routing: each token goes to its best expert, with the weight g = max softmax(W x).

    An expert takes at most capacity_factor · M / E tokens (section 2.2), here rounded down and at
    least 1. Tokens are served in their order. If an expert is full, a token is dropped: it gets no
    expert, and only the residual connection around the layer carries it on. So the output of a
    token depends on the other tokens of the batch. With the routers below, it does not.

    Six tokens, two experts, capacity_factor 1: an expert takes 3 tokens.

        chosen expert        0  0  1  0  0  1
        place in its queue   1  2  1  3  4  2     the fifth token is dropped
    """

    num_experts_per_tok = 1

    def __init__(self, hidden_size, n_routed_experts, capacity_factor=1.25):
        super().__init__()
        checks.check_sizes(n_routed_experts=n_routed_experts)
        checks.require(capacity_factor > 0, f"capacity_factor={capacity_factor} must be above 0")
        self.num_experts, self.capacity_factor = n_routed_experts, capacity_factor
        self.weight = nn.Parameter(torch.empty(n_routed_experts, hidden_size))
        nn.init.normal_(self.weight, std=0.02)

    def capacity(self, tokens):
        return max(1, int(self.capacity_factor * tokens / self.num_experts))

    def forward(self, x_MD, token_mask=None):
        """(M, D) → `Routing` with A = 1. token_mask (M,): False = padding, which is not queued.

        A dropped token has a weight as well, but nothing uses it.
        """
        scores_ME = precision.linear_in_fp32(x_MD, self.weight).softmax(dim=-1)
        weights_M1, indices_M1 = scores_ME.max(dim=-1, keepdim=True)
        real_M1 = batches.real_rows(token_mask, x_MD).unsqueeze(1)
        arrivals_ME = F.one_hot(indices_M1.squeeze(1), self.num_experts) * real_M1
        place_M1 = arrivals_ME.cumsum(dim=0).gather(1, indices_M1)  # 1 = first in the queue
        has_room_M1 = place_M1 <= self.capacity(int(real_M1.sum()))
        return Routing(weights_M1, indices_M1, scores_ME, has_room_M1 & real_M1)


# %% DeepSeekMoE: the best A of many small experts, chosen within the best groups
SCORING = {"softmax": functools.partial(torch.softmax, dim=-1), "sigmoid": torch.sigmoid}
# A group's score is the sum of its best scores. This is how many of them are added.
BEST_OF_GROUP = {"greedy": 1, "group_limited_greedy": 1, "noaux_tc": 2}


class TopKRouter(surgery.TypesKept):
    """V2's and V3's routers. The arguments have the names of config.json.

    scoring_func: "softmax" (V2) or "sigmoid" (V3).
    topk_method: "greedy" (V2-Lite) chooses among all experts. The other two divide the experts into
        `n_group` groups and choose only within the best `topk_group` of them. A group's score is
        its best score for "group_limited_greedy" (V2). "noaux_tc" (V3) first adds the bias
        `e_score_correction_bias` to all scores; a group's score is then the sum of its best two.
    norm_topk_prob: divide the chosen weights by their sum (V3). routed_scaling_factor: c above.

    The bias stays in FP32 if the model is cast to BF16, where steps of γ would be rounded away.

    V3's routing of two tokens to four experts in two groups: the best group, two experts a token.

        s         (.9 .1 | .6 .7)   (.2 .3 | .4 .6)    scores
        s + b     (.9 .1 | .6 .3)   (.2 .3 | .4 .2)    with b = (0, 0, 0, −.4)
        groups    1.0     .9         .5     .6         sums of s + b: left, right
        chosen    experts 0 and 1   experts 2 and 3    without b, both tokens would go right
        weights   .9 and .1         .4 and .6          from s, divided by their sum: b is not in it
    """

    def __init__(
        self, hidden_size, n_routed_experts, num_experts_per_tok, scoring_func="sigmoid",
        topk_method="noaux_tc", n_group=1, topk_group=1, norm_topk_prob=True,
        routed_scaling_factor=1.0,
    ):
        super().__init__()
        checks.check_choice(SCORING, scoring_func=scoring_func)
        checks.check_choice(BEST_OF_GROUP, topk_method=topk_method)
        if topk_method == "greedy":
            n_group = topk_group = 1
        self.num_experts, self.num_experts_per_tok = n_routed_experts, num_experts_per_tok
        self.scoring_func, self.topk_method = scoring_func, topk_method
        self.n_group, self.topk_group = n_group, topk_group
        self.norm_topk_prob, self.routed_scaling_factor = norm_topk_prob, routed_scaling_factor
        self.best_of_group = best = BEST_OF_GROUP[topk_method]
        checks.check_groups(n_routed_experts, num_experts_per_tok, n_group, topk_group, best)
        self.weight = nn.Parameter(torch.empty(n_routed_experts, hidden_size))
        nn.init.normal_(self.weight, std=0.02)
        if topk_method == "noaux_tc":
            self.register_buffer("e_score_correction_bias", torch.zeros(n_routed_experts))

    def forward(self, x_MD, token_mask=None):
        """(M, D) → `Routing`, in FP32. `token_mask` changes nothing: tokens do not compete."""
        logits_ME = precision.linear_in_fp32(x_MD, self.weight)
        scores_ME = SCORING[self.scoring_func](logits_ME)
        choice_ME = scores_ME
        if self.topk_method == "noaux_tc":
            choice_ME = choice_ME + self.e_score_correction_bias
        if self.n_group > 1:
            choice_ME = choice_ME.masked_fill(~self.in_best_groups(choice_ME), float("-inf"))
        indices_MA = choice_ME.topk(self.num_experts_per_tok, dim=-1).indices
        weights_MA = scores_ME.gather(1, indices_MA)  # without the bias, which only selects
        if self.norm_topk_prob:
            weights_MA = weights_MA / (weights_MA.sum(dim=-1, keepdim=True) + 1e-20)
        return Routing(weights_MA * self.routed_scaling_factor, indices_MA, scores_ME)

    def in_best_groups(self, choice_ME):
        """(M, E) boolean: True where the expert's group is among the best `topk_group`."""
        by_group = choice_ME.unflatten(1, (self.n_group, -1))
        group_scores = by_group.topk(self.best_of_group, dim=-1).values.sum(dim=-1)
        best_groups = group_scores.topk(self.topk_group, dim=-1).indices
        kept = torch.zeros_like(group_scores, dtype=torch.bool).scatter(1, best_groups, True)
        return kept.unsqueeze(-1).expand_as(by_group).flatten(1)

    @torch.no_grad()
    def update_bias(self, load_E, gamma):
        """One step of V3's balancing (section 2.1.2).

        load_E (E,): how often each expert was chosen. An expert above the mean load loses `gamma`,
        one below it gains `gamma`: loads (6, 2, 4, 4) have the mean 4 and change b by
        (−γ, +γ, 0, 0). Loads that are all 0 change nothing; a router without bias ignores the call.
        """
        if self.topk_method == "noaux_tc":
            load_E = load_E.float()
            self.e_score_correction_bias += gamma * torch.sign(load_E.mean() - load_E)


# %% The experts, and three ways to run them
class Experts(nn.Module):
    """E SwiGLU networks in two tensors, `gate_up_proj` (E, 2F, D) and `down_proj` (E, D, F)."""

    dispatches = ("dense", "loop", "grouped")  # one method for each

    def __init__(self, num_experts, hidden_size, intermediate_size):
        super().__init__()
        self.gate_up_proj = nn.Parameter(
            torch.empty(num_experts, 2 * intermediate_size, hidden_size)
        )
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        for weight in (self.gate_up_proj, self.down_proj):
            nn.init.uniform_(weight, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)

    def expert(self, e, x):
        """Expert e on any rows, (..., D) → (..., D): see `SwiGLU`."""
        return swiglu(x, self.gate_up_proj[e], self.down_proj[e])

    def dense(self, x_MD, routing):
        """The naive reference: every expert processes every token; most weights are zero."""
        used_MA = routing.weights if routing.kept is None else routing.weights * routing.kept
        weights_ME = torch.zeros_like(routing.scores).scatter(1, routing.indices, used_MA)
        outputs = [
            self.expert(e, x_MD) * weights_ME[:, e, None].to(x_MD.dtype)
            for e in range(len(self.down_proj))
        ]
        return torch.stack(outputs).sum(dim=0)

    def loop(self, x_MD, routing):
        """One expert after another, each on the tokens that chose it."""
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
        """All choices are sorted by expert: the rows of each expert then lie together, in a run.

        Three tokens, A = 2, three experts:

            choices      token 0: experts 1 0    token 1: experts 2 1    token 2: experts 1 2
            experts      0  1  1  1  2  2
            tokens       0  0  1  2  1  2     runs of 1, 3 and 2 rows
        """
        experts = routing.indices.flatten()
        order = experts.argsort(stable=True)
        if routing.kept is not None:
            order = order[routing.kept.flatten()[order]]
        tokens = order // routing.indices.shape[1]  # each token has made A choices
        rows = x_MD.index_select(0, tokens)
        weights = routing.weights.flatten().index_select(0, order)
        lengths_E = torch.bincount(experts[order], minlength=len(self.down_proj))
        outputs = self.by_runs(rows, lengths_E) * weights.to(x_MD.dtype).unsqueeze(1)
        return torch.zeros_like(x_MD).index_add(0, tokens, outputs)

    def by_runs(self, rows, lengths_E):
        """(rows, D) → (rows, D): one expert after another, each on its own run of the rows."""
        runs = rows.split(lengths_E.tolist())
        experts = zip(runs, self.gate_up_proj, self.down_proj, strict=True)
        return torch.cat([swiglu(*run_and_weights) for run_and_weights in experts])


# %% The layer
class Routed(NamedTuple):
    """The decision of one MoE layer in one pass. Balance loss and bias update are made from it.

        error = F.mse_loss(layer(x, routed=routed), target)  # appends to the list `routed`
        (error + routed[0].balance_loss()).backward()
        layer.gate.update_bias(routed[0].load(), gamma)      # V3, after the optimizer's step
    """

    layer: nn.Module
    routing: Routing
    batch_shape: tuple
    token_mask: torch.Tensor | None

    def balance_loss(self):
        """The layer's balance loss of this pass, a scalar; 0 if the layer has none."""
        _, indices, scores, _ = self.routing
        if self.layer.balance_loss is None:
            return scores.new_zeros(())
        scores, indices = (rows.unflatten(0, self.batch_shape) for rows in (scores, indices))
        return self.layer.balance_loss(scores, indices, token_mask=self.token_mask)

    def load(self):
        """(E,): how often each expert was chosen, without padding."""
        indices = self.routing.indices[batches.real_rows(self.token_mask, self.routing.indices)]
        return torch.bincount(indices.flatten(), minlength=self.layer.gate.num_experts)


class MixtureOfExperts(nn.Module):
    """A router, its routed experts, and shared experts for every token. No residual inside.

    n_shared_experts: n shared experts of width F form one SwiGLU of width n · F, as in the
    released checkpoints. balance_loss: a function (scores, indices, token_mask=...) → scalar, or
    None. To bind α of a loss below: `functools.partial(expert_balance_loss, alpha=0.003)`.
    """

    def __init__(
        self, hidden_size, moe_intermediate_size, router, n_shared_experts=0, balance_loss=None
    ):
        super().__init__()
        D = router.weight.shape[1]
        checks.check_sizes(moe_intermediate_size=moe_intermediate_size)
        checks.require(hidden_size == D, f"the router reads width {D}, want {hidden_size=}")
        self.gate = router
        self.experts = Experts(router.num_experts, hidden_size, moe_intermediate_size)
        self.shared_experts = None
        if n_shared_experts:
            self.shared_experts = SwiGLU(hidden_size, n_shared_experts * moe_intermediate_size)
        self.balance_loss = balance_loss

    def forward(self, x, token_mask=None, routed=None, dispatch="grouped"):
        """(..., D) → (..., D).

        token_mask: (...), False = padding, which counts neither in the balance loss nor in the
        load. routed: a list, to which this pass's `Routed` is appended. dispatch: "dense", "loop"
        or "grouped"; all give the same output.
        """
        checks.check_tokens(x, self.gate.weight.shape[1], token_mask, dispatch, Experts.dispatches)
        x_MD = x.flatten(0, -2)
        routing = self.gate(x_MD, token_mask)
        output_MD = getattr(self.experts, dispatch)(x_MD, routing)
        if self.shared_experts is not None:
            output_MD = output_MD + self.shared_experts(x_MD)
        if routed is not None:
            routed.append(Routed(self, routing, x.shape[:-1], token_mask))
        return output_MD.view_as(x)


# %% The block: attention, then feed-forward, each after a norm and with a residual connection
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


# %% Balance losses: they train the router to use all experts equally
# Scores are (B, T, E) or (M, E), indices (B, T, A) or (M, A). Padding (token_mask False) is left
# out. Each loss is α if the load is even. (The communication loss is α if each token
# also goes to `max_devices` devices.) An uneven load usually costs more, because the mean
# score P is high for experts that are chosen often:
#
#     scores (.7 .1 .1 .1) and (.5 .3 .1 .1), both tokens choose experts 0 and 1
#     experts       f  = (2, 2, 0, 0), P  = (.6, .2, .1, .1), loss 1.6 α
#     two devices   f' = (2, 0),       P' = (.8, .2),         loss 1.6 α
#
# It does not always cost more. Two experts, one a token, scores (.51, .49), (.51, .49), (0, 1):
# f = (4/3, 2/3), P = (.34, .66), and the loss is 0.893 α.
def token_mean(values, token_mask=None, each_sequence=False):
    """(B, T, X) → (X,): the mean over real tokens. (B, X) if the mean is within each sequence."""
    over = 1 if each_sequence else tuple(range(values.dim() - 1))
    real = batches.real_rows(token_mask, values).unsqueeze(-1)
    return (values * real).sum(dim=over) / real.sum(dim=over).clamp(min=1)


def is_chosen(scores, indices):
    """(..., E): 1 where a token has chosen an expert, 0 elsewhere."""
    return torch.zeros_like(scores).scatter(-1, indices, 1.0)


def use_of_experts(scores, indices, token_mask=None, each_sequence=False):
    """f (E,): E/A · the share of tokens that chose an expert. P (E,): its mean score."""
    chosen = is_chosen(scores, indices) * (scores.shape[-1] / indices.shape[-1])
    return tuple(token_mean(each, token_mask, each_sequence) for each in (chosen, scores))


def switch_balance_loss(scores, indices, alpha, token_mask=None):
    """α E Σ_i f_i P_i (Switch, equation 4). f_i: share of tokens sent to i. P_i: its mean score.

    With A = 1, the loss of V2 is the same: its f_i contains the factor E.
    """
    return expert_balance_loss(scores, indices, alpha, token_mask)


def expert_balance_loss(scores, indices, alpha, token_mask=None):
    """α Σ_i f_i P_i over experts i (V2, equations 23–25). A token's scores must sum to 1."""
    f_E, P_E = use_of_experts(scores, indices, token_mask)
    return alpha * (f_E * P_E).sum()


def device_balance_loss(scores, indices, alpha, devices, token_mask=None):
    """α Σ_d f'_d P'_d over devices d (V2, equations 26–28).

    f'_d is the mean of f over the device's experts, P'_d is the sum of P over them.
    """
    f_E, P_E = use_of_experts(scores, indices, token_mask)
    f, P = by_devices(f_E, devices).mean(dim=-1), by_devices(P_E, devices).sum(dim=-1)
    return alpha * (f * P).sum()


def communication_balance_loss(scores, indices, alpha, devices, max_devices, token_mask=None):
    """α Σ_d f''_d P''_d over devices d (V2, equations 29–31).

    f''_d = devices / (max_devices · M) · number of tokens sent to d. A token may be sent to
    `max_devices` devices. P''_d is the sum of P over the device's experts.
    """
    sent = by_devices(is_chosen(scores, indices), devices).amax(dim=-1)
    f = token_mean(sent, token_mask) * devices / max_devices
    P = token_mean(by_devices(scores, devices).sum(dim=-1), token_mask)
    return alpha * (f * P).sum()


def by_devices(per_expert, devices):
    """(..., E) → (..., devices, E / devices): neighbouring experts share a device."""
    checks.check_divides(experts=per_expert.shape[-1], devices=devices)
    return per_expert.unflatten(-1, (devices, -1))


def sequence_balance_loss(scores_BTE, indices_BTA, alpha, token_mask=None):
    """α Σ_i f_i P_i within each sequence, averaged over sequences (V3, equations 17–20).

    f counts the top A scores, without bias and groups; `indices_BTA` only tells how large A is.
    P is the mean of the scores after division by their sum over all experts. A sequence that has
    only padding does not count.
    """
    checks.require_shape(scores_BTE, "scores within sequences must be", B=0, T=0, E=1)
    shares_BTE = scores_BTE / (scores_BTE.sum(dim=-1, keepdim=True) + 1e-20)
    top_BTA = scores_BTE.topk(indices_BTA.shape[-1], dim=-1).indices
    f_BE, P_BE = use_of_experts(shares_BTE, top_BTA, token_mask, each_sequence=True)
    has_tokens_B = batches.real_rows(token_mask, scores_BTE).any(dim=1)
    return alpha * token_mean((f_BE * P_BE).sum(dim=-1, keepdim=True), has_tokens_B).squeeze(0)


# %% The cost
def expert_parameters(hidden_size, moe_intermediate_size, routed, active, shared):
    """(all parameters, parameters that a token uses) of the experts in one layer.

    DeepSeek-V3, D = 7168, F = 2048: an expert has 3 · D · F = 44M. The layer has 256 routed experts
    and a shared one, 11.32B. A token uses 8 and the shared one, 0.40B: this sets its arithmetic.
    """
    one = 3 * hidden_size * moe_intermediate_size
    return (routed + shared) * one, (active + shared) * one


# %% Load over training, with and without balancing
def train_on_clusters(balancing, steps, gamma, seed, device="cpu"):
    """Trains one MoE layer on tokens of 8 clusters, common and rare; each has its own map to learn.

    balancing: "none", "bias" (V3's update) or "loss" (V2's, α = 1). Returns: (steps, E), the share
    of the choices that went to each expert, and the mean squared error of the last step.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    D, E, M = 16, 8, 512
    centers = torch.randn(8, D, generator=generator) * 2
    maps = torch.randn(8, D, D, generator=generator) / D**0.5
    popularity = 1.0 / torch.arange(1, 9)
    if balancing == "loss":
        router = TopKRouter(D, E, 2, "softmax", "greedy", norm_topk_prob=False)
        loss_function = functools.partial(expert_balance_loss, alpha=1.0)
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
    """`loop` and `grouped` equal the dense reference, with every router."""
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
    """In a block, a dropped token keeps the sum of its input, attention and shared experts."""
    block, routed = TransformerBlock(MultiHeadAttention(32, 4), layer).to(demo.device), []
    output_BTD = block(x_BTD, routed=routed)
    hidden_BTD = x_BTD + block.self_attn(block.input_layernorm(x_BTD))
    shared_BTD = layer.shared_experts(block.post_attention_layernorm(hidden_BTD))
    kept_BT = routed[0].routing.kept.view(2, 20)
    change_BT = (output_BTD - hidden_BTD - shared_BTD).abs().amax(dim=-1)
    untouched = change_BT[~kept_BT].max() < 1e-5 < change_BT[kept_BT].min()
    dropped = int((~kept_BT).sum())
    ok = bool(dropped > 0 and untouched)
    demo.check("Switch: dropped tokens are passed through", "(M, D)", f"{dropped} dropped", ok)


def check_balance_losses(demo):
    """Every loss equals its α if experts, devices and sequences are used evenly."""
    even_ME, turns_MA = torch.full((64, 8), 1 / 8), torch.arange(128).view(64, 2) % 8
    # From token to token, the best two experts move on by one.
    turning_BTE = torch.stack([torch.linspace(1, 2, 8).roll(t) for t in range(8)])[None]
    losses = {
        "Switch": (switch_balance_loss(even_ME, torch.arange(64)[:, None] % 8, 0.01), 0.01),
        "expert": (expert_balance_loss(even_ME, turns_MA, 0.003), 0.003),
        "device": (device_balance_loss(even_ME, turns_MA, 0.05, 4), 0.05),
        "communication": (communication_balance_loss(even_ME, turns_MA, 0.02, 4, 1), 0.02),
        "sequence": (sequence_balance_loss(turning_BTE, turning_BTE.topk(2).indices, 1e-4), 1e-4),
    }
    for name, (loss, alpha) in losses.items():
        ok = abs(loss - alpha) < 1e-6
        demo.check(f"{name} balance loss is α at balance", "", f"{loss:.4f}, α {alpha}", ok)


def check_balancing(demo, steps, gamma, path):
    """Trains with each way of balancing, draws the loads, and compares the busiest experts."""
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
    nine_of_257 = used * 257 == exist * 9  # a share of 3.5 %
    demo.check("V3, experts of one layer", "parameters", figure, nine_of_257)
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
