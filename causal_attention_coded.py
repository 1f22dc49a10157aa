"""Phase 2: causal attention, where no token sees a later one.

A language model predicts the next token. In training it reads a whole text, so token t must not
look at token t + 1: it would read the answer. A mask removes the later keys before the softmax.
With a cache (phase 3), some keys come from earlier calls, so there are more keys than queries. The
*last* query then lines up with the *last* key: the triangle of the mask moves to the right.

    M_ij = 1  if  j ≤ i + (S − T),  else 0
    CausalAttention(Q, K, V) = softmax(Q Kᵀ / √d_k  where M = 1,  −∞ elsewhere) V

Paper: Vaswani et al., "Attention Is All You Need" (2017, arXiv:1706.03762), section 3.2.3
(masking). Section 5.4 has dropout on sub-layer outputs and embeddings; only the authors' code has
it on the attention weights.
Simplified: one head, no output projection.
Before: phase 1. Reading 7 minutes, running 5 seconds.

Dimensions: B batch · T query positions · S key positions · D model width · K query/key width ·
V value width.

Run:  python causal_attention_coded.py [--length 6] [--dropout 0.5]
"""

import torch

from lesson import check_dropout, demonstration, flag, require
from self_attention_coded import SelfAttention, scaled_dot_product_attention


# %% The naive reference: each query gets its own list of keys
def causal_attention_loops(query, key, value):
    """Causal attention without a mask: query i attends to the first i + 1 + (S − T) keys.

    Args: query (T, K), key (S, K), value (S, V), S ≥ T. Returns: output (T, V).
    """
    offset = key.shape[0] - query.shape[0]
    rows = []
    for i in range(query.shape[0]):
        visible = i + 1 + offset
        row, _ = scaled_dot_product_attention(query[i : i + 1], key[:visible], value[:visible])
        rows.append(row)
    return torch.cat(rows)


# %% The mask
def causal_mask(query_length, key_length=None, device=None):
    """Boolean mask (T, S), True = may attend. The last query lines up with the last key.

    `key_length` defaults to `query_length`. With 2 queries and 4 keys:

        1 1 1 0
        1 1 1 1

    ValueError for fewer keys than queries: the first query could attend to no key.
    """
    T, S = query_length, query_length if key_length is None else key_length
    require(S >= T, f"key_length={S} must be at least query_length={T}")
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(diagonal=S - T)


# %% The module
class CausalSelfAttention(SelfAttention):
    """One causal head: phase 1's projections, a mask, and dropout on the weights in training."""

    def __init__(self, d_in, d_out, dropout=0.0, bias=False):
        super().__init__(d_in, d_out, bias)
        check_dropout(dropout)
        self.dropout = dropout

    def forward(self, x, mask=None):
        """(B, T, d_in) or (T, d_in) → (..., T, d_out).

        `mask`: boolean, broadcastable to (..., T, T). It can remove more keys, such as padding.
        """
        query, key, value = self.project(x)
        allowed = causal_mask(x.shape[-2], device=x.device)
        allowed = allowed if mask is None else allowed & mask
        dropout = self.dropout if self.training else 0.0
        output, _ = scaled_dot_product_attention(query, key, value, allowed, dropout_p=dropout)
        return output


# %% Two tests that no token sees a later one
def largest_leak_by_perturbation(attention, x):
    """Changes each token in turn; returns the largest change of an earlier output. x: (T, D)."""
    before = attention(x)
    leak = 0.0
    for position in range(1, x.shape[0]):
        changed = x.clone()
        changed[position] += 1.0
        difference = (attention(changed) - before)[:position]
        leak = max(leak, difference.abs().max().item())
    return leak


def gradient_reach(attention, x):
    """Returns (T, T): the size of the gradient of output i with respect to input j. x: (T, D)."""
    x = x.detach().requires_grad_()
    output = attention(x)
    rows = [torch.autograd.grad(row.sum(), x, retain_graph=True)[0] for row in output]
    return torch.stack([row.norm(dim=-1) for row in rows])


# %% The demonstration
@demonstration(__doc__, flag("length", 6, "tokens of the example", at_least=3),
               flag("dropout", 0.5, "share of weights dropped"))
def main(demo, arguments):
    length, device = arguments.length, demo.device
    attention = CausalSelfAttention(16, 8, dropout=arguments.dropout).to(device).eval()
    x_TD = torch.randn(length, 16, device=device)

    for row in causal_mask(2, 4).int().tolist():
        demo.note(f"mask of 2 queries over 4 keys: {row}")
    query_TK, key_SK, value_SV = attention.project(x_TD)
    loops_TV = causal_attention_loops(query_TK, key_SK, value_SV)
    demo.same("a key list for each query = mask", "(T, V)", attention(x_TD), loops_TV)
    mask_2S = causal_mask(2, length, device=device)
    last_two_2V, _ = scaled_dot_product_attention(query_TK[-2:], key_SK, value_SV, mask_2S)
    demo.same("the last 2 queries alone = the last 2 rows", "(2, V)", last_two_2V, loops_TV[-2:])

    leak = largest_leak_by_perturbation(attention, x_TD)
    demo.check("changing a token changes no earlier output", "(T, D)", f"leak {leak}", leak == 0)
    reach_TS = gradient_reach(attention, x_TD)
    future, past = reach_TS.triu(1).max(), reach_TS.diagonal().min()
    demo.check("gradient: none at later tokens, some at the own one", "(T, T)",
               f"later {future:.1e}, own at least {past:.1e}", future == 0 and past > 0)

    nothing_TS = torch.zeros(length, length, dtype=torch.bool, device=device)
    masked_TV = attention(x_TD, mask=nothing_TS)
    demo.check("a fully masked row gives zeros, not NaN", "(T, V)", f"sum {masked_TV.sum()}",
               bool((masked_TV == 0).all()))

    query, key, value = torch.zeros(20000, 1, 8), torch.zeros(20000, 4, 8), torch.ones(20000, 4, 1)
    dropped, _ = scaled_dot_product_attention(query, key, value, dropout_p=arguments.dropout)
    demo.check("dropout keeps the mean of the output", "(20000, 1, 1)",
               f"mean {dropped.mean():.3f}, want 1 within 0.05", abs(dropped.mean() - 1) < 0.05)
    demo.finish("--length 12: a longer text, and still no leak",
                "--dropout 0.9: single outputs differ more, their mean stays near 1")


if __name__ == "__main__":
    main()
