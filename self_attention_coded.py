"""Phase 1: self-attention, one head, no mask.

Every token asks a question (its query), offers a label (its key) and carries content (its
value). A token's output is a weighted average of all values; the weight of a value is high when
its key matches the token's query. The weights come from a softmax, so they are positive and sum
to one. Attention alone ignores the order of the tokens. Masks (phase 2) and rotary positions
(phase 7) bring it in.

    Q = X W_Q,  K = X W_K,  V = X W_V
    Attention(Q, K, V) = softmax(Q Kᵀ / √d_k) V

Paper: Vaswani et al., "Attention Is All You Need" (2017, arXiv:1706.03762), section 3.2.1,
equation 1.
Simplified: one head, no output projection. Phase 3 adds more heads and the projection.
Before: matrix products and PyTorch's `nn.Linear`. Reading 8 minutes, running 2 seconds.

Dimensions: B batch · T query positions · S key positions · D model width · K query/key width (d_k
in the equation) · V value width.

Run:  python self_attention_coded.py [--d-k 256] [--seed 0] [--device cpu]
"""

import math

import torch
from torch import nn

from lesson import check_attention, check_input, check_sizes, demonstration, expanded_mask, flag


# %% The naive reference: one sequence, explicit loops
def self_attention_loops(x, w_q, w_k, w_v):
    """Attention within one sequence, by a loop over the queries and a loop over the keys.

    Args: `x` (T, D); `w_q`, `w_k` (K, D) and `w_v` (V, D), laid out like `nn.Linear.weight`.
    Returns: output (T, V) and weights (T, T).
    """
    queries = [w_q @ token for token in x]
    keys = [w_k @ token for token in x]
    values = [w_v @ token for token in x]
    d_k = w_q.shape[0]
    outputs, all_weights = [], []
    for query in queries:
        scores = torch.stack([query.dot(key) / math.sqrt(d_k) for key in keys])
        exponentials = torch.exp(scores - scores.max())  # same result, no overflow
        weights = exponentials / exponentials.sum()
        outputs.append(sum(weight * value for weight, value in zip(weights, values, strict=True)))
        all_weights.append(weights)
    return torch.stack(outputs), torch.stack(all_weights)


# %% The same with matrices, for any number of leading dimensions
def scaled_dot_product_attention(query, key, value, mask=None, scale=None, dropout_p=0.0):
    """Computes softmax(Q Kᵀ · scale) V (equation 1) and also returns the weights.

    Args:
        query: (..., T, K). key: (..., S, K). value: (..., S, V). Leading dimensions broadcast.
        mask: boolean, broadcastable to (..., T, S). True = this query may attend to this key.
        scale: factor on the scores; default 1/√K.
        dropout_p: share of the weights that are set to zero. The others grow, so that the mean
            stays. Dropout always acts when this is above 0: pass 0.0 outside training.

    Returns: output (..., T, V) and weights (..., T, S). If a query may attend to no key, its
        weights and its output are zero. A plain softmax would give NaN.

    Raises: ValueError if widths, lengths or the mask do not fit, or the mask is not boolean.
    """
    check_attention(query, key, value)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = query @ key.transpose(-2, -1) * scale
    if mask is None:
        weights = torch.softmax(scores, dim=-1)
    else:
        weights = masked_softmax(scores, expanded_mask(mask, scores.shape))
    weights = nn.functional.dropout(weights, p=dropout_p)
    return weights @ value, weights


def masked_softmax(scores, mask):
    """Softmax over the keys where the mask is True. A query without such a key gets zeros."""
    weights = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1)
    return weights.masked_fill(~mask, 0.0)


# %% The module
class SelfAttention(nn.Module):
    """One head of self-attention: three projections and `scaled_dot_product_attention`.

    `d_in` is the model width D. `d_out` is the width of queries, keys and values (K = V).
    """

    def __init__(self, d_in, d_out, bias=False):
        super().__init__()
        check_sizes(d_in=d_in, d_out=d_out)
        self.q_proj = nn.Linear(d_in, d_out, bias=bias)
        self.k_proj = nn.Linear(d_in, d_out, bias=bias)
        self.v_proj = nn.Linear(d_in, d_out, bias=bias)

    def project(self, x):
        """(B, T, d_in) or (T, d_in) → queries, keys and values (..., T, d_out)."""
        check_input(x, self.q_proj.in_features)
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def forward(self, x, mask=None):
        """(B, T, d_in) or (T, d_in) → (..., T, d_out)."""
        output, _ = scaled_dot_product_attention(*self.project(x), mask=mask)
        return output


# %% Why the scale is √d_k
def softmax_health(d_k, scale, queries=256, keys=32, seed=0):
    """Measures how saturated the softmax is for random queries and keys.

    Their numbers are independent and have variance 1. A dot product of a query and a key is a sum
    of d_k products of variance 1, so its standard deviation is √d_k. Without the scale and with a
    large d_k, one key takes nearly all the weight. Such a softmax is *saturated*: almost no
    gradient reaches the scores. With the scale, the gradient stays the same size for every d_k.

    Returns: two means over the queries: of the largest weight, and of the gradient's norm at the
        scores, where a random gradient comes in at the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(queries, d_k, generator=generator)
    key = torch.randn(keys, d_k, generator=generator)
    scores = (query @ key.T * scale).requires_grad_()
    weights = torch.softmax(scores, dim=-1)
    upstream = torch.randn(weights.shape, generator=generator)
    (gradient,) = torch.autograd.grad(weights, scores, upstream)
    return weights.max(dim=-1).values.mean().item(), gradient.norm(dim=-1).mean().item()


# %% The demonstration
@demonstration(__doc__, flag("d-k", 256, "largest key width in the scale table", at_least=4))
def main(demo, arguments):
    attention = SelfAttention(d_in=16, d_out=8).to(demo.device)
    x_BTD = torch.randn(2, 5, 16, device=demo.device)
    output_BTV = attention(x_BTD)
    shapes = f"{tuple(x_BTD.shape)} → {tuple(output_BTV.shape)}"
    demo.check("one vector in, one vector out for each token", "(B, T, D) → (B, T, V)", shapes,
               output_BTV.shape == (2, 5, 8))

    projections = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
    loop_TV, loop_weights_TS = self_attention_loops(x_BTD[1], *projections)
    demo.same("explicit loops = batched matrices", "(T, V)", output_BTV[1], loop_TV)
    _, weights_BTS = scaled_dot_product_attention(*attention.project(x_BTD))
    demo.same("weights of the loops = batched weights", "(T, S)", weights_BTS[1], loop_weights_TS)
    row_sums_BT = weights_BTS.sum(dim=-1)
    demo.same("each row of weights sums to 1", "(B, T)", row_sums_BT, torch.ones_like(row_sums_BT))
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled_BTV = attention(x_BTD[:, order])
    demo.same("shuffled tokens give shuffled outputs", "(B, T, V)", shuffled_BTV,
              output_BTV[:, order])

    demo.note("why the scale is 1/√d_k: a row's largest weight, and the gradient at the scores")
    widths = [width for width in (4, 16, 64, 256, 1024) if width < arguments.d_k] + [arguments.d_k]
    for d_k in widths:
        weight, gradient = softmax_health(d_k, scale=1.0, seed=demo.seed)
        scaled_weight, scaled_gradient = softmax_health(d_k, scale=d_k**-0.5, seed=demo.seed)
        demo.note(f"  d_k {d_k:>4}:  unscaled {weight:.3f}, gradient {gradient:.4f}   "
                  f"scaled {scaled_weight:.3f}, gradient {scaled_gradient:.4f}")
    demo.check("the scale keeps the softmax soft", f"d_k {d_k}",
               f"largest weight {weight:.2f} → {scaled_weight:.2f}", scaled_weight < weight)
    demo.check("the scale keeps the gradient alive", f"d_k {d_k}",
               f"{gradient:.3f} → {scaled_gradient:.3f}", scaled_gradient > gradient or d_k < 64)
    demo.finish("--d-k 4096: the unscaled weight comes still nearer to 1, the scaled one stays",
                "--seed 1: the random numbers change, the conclusions do not")


if __name__ == "__main__":
    main()
