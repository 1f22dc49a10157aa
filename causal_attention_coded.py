"""Phase 2: causal attention, where no token sees a later one.

A language model predicts the next token. In training it reads a whole text at once, and the answer
for token t is token t + 1. So the output of token t must not depend on any later token; otherwise
the model would copy the answer. A mask removes the keys of later tokens before the softmax.
With a cache (phase 3), some keys come from earlier calls, so there are more keys than queries. The
queries are then the newest tokens: the *last* query belongs to the *last* key, and the triangle of
the mask moves S − T columns to the right.

    M_ij = True  if  j ≤ i + (S − T),  else False
    A_ij = q_i · k_j / √d_k  if M_ij,  else −∞
    CausalAttention(Q, K, V) = softmax(A) V

The mask makes one call for all queries possible. The price: this code computes all T · S
scores, and of a whole text (S = T) it throws almost half of them away.
In training, dropout sets each weight to 0 with probability p and multiplies the others by
1 / (1 − p). Their mean stays, and the model learns not to rely on a single key.

Paper: Vaswani et al., "Attention Is All You Need" (2017, arXiv:1706.03762), section 3.2.3
(masking). Section 5.4 applies dropout to sub-layer outputs and embeddings. The authors' code also
applies it to the attention weights.
Simplified: one head, no output projection.
Before: phase 1. Reading 7 minutes, running 2 seconds.

Dimensions: B batch · T query positions · S key positions · D model width · K query/key width (d_k
in the equation) · V value width.

Run:  python causal_attention_coded.py [--length 6] [--dropout 0.5]
"""

import torch

from lesson import check_dropout, demonstration, flag, require
from self_attention_coded import SelfAttention, scaled_dot_product_attention


# %% The naive reference: each query gets its own list of keys
def causal_attention_loops(query, key, value):
    """Causal attention without a mask: query i, from 0, attends to the first i + 1 + (S − T) keys.

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

    ValueError for fewer keys than queries: the first queries could attend to no key.
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

        `mask`: boolean, True = may attend, broadcastable to (..., T, T). It can only remove
        more keys: padding, for instance, with (B, 1, T).
        """
        query, key, value = self.project(x)
        allowed = causal_mask(x.shape[-2], device=x.device)
        allowed = allowed if mask is None else allowed & mask
        dropout = self.dropout if self.training else 0.0
        output, _ = scaled_dot_product_attention(query, key, value, allowed, dropout_p=dropout)
        return output


# %% Two tests that no token sees a later one
def largest_leak_by_perturbation(attention, x):
    """Adds 1 to each token but the first, in turn. x: (T, D).

    Returns the largest change of an output before the changed token: exactly 0 without a leak
    (and without dropout).
    """
    before = attention(x)
    leak = 0.0
    for position in range(1, x.shape[0]):
        changed = x.clone()
        changed[position] += 1.0
        difference = (attention(changed) - before)[:position]
        leak = max(leak, difference.abs().max().item())
    return leak


def gradient_reach(attention, x):
    """Returns a table (T, T): entry i, j is the size of output i's gradient at input j. x: (T, D).

    We differentiate the sum of output i's numbers.
    """
    x = x.detach().requires_grad_()
    output = attention(x)
    rows = [torch.autograd.grad(row.sum(), x, retain_graph=True)[0] for row in output]
    return torch.stack([row.norm(dim=-1) for row in rows])


# %% The demonstration
@demonstration(__doc__, flag("length", 6, "tokens of the example", at_least=3),
               flag("dropout", 0.5, "share of weights dropped", at_least=0, at_most=0.99))
def main(demo, arguments):
    T = arguments.length
    attention = CausalSelfAttention(16, 8).to(demo.device)
    x_TD = torch.randn(T, 16, device=demo.device)

    demo.note(f"mask of {T} queries over {T} keys, True where a query may attend:")
    for row in causal_mask(T).tolist():
        demo.note("  " + " ".join("·T"[allowed] for allowed in row))
    query_TK, key_TK, value_TV = attention.project(x_TD)
    loops_TV = causal_attention_loops(query_TK, key_TK, value_TV)
    demo.same("a key list for each query = mask", "(T, V)", attention(x_TD), loops_TV)
    last_query_2K, mask_2T = query_TK[-2:], causal_mask(2, T, device=demo.device)
    last_2V, _ = scaled_dot_product_attention(last_query_2K, key_TK, value_TV, mask_2T)
    demo.same("the last 2 queries alone = the last 2 rows", "(2, V)", last_2V, loops_TV[-2:])
    lists_2V = causal_attention_loops(last_query_2K, key_TK, value_TV)
    demo.same("the last 2 queries, each with its key list", "(2, V)", lists_2V, loops_TV[-2:])

    leak = largest_leak_by_perturbation(attention, x_TD)
    demo.check("changing a token changes no earlier output", "(T, V)", f"leak {leak}", leak == 0)
    reach_TT = gradient_reach(attention, x_TD)
    later, own = reach_TT.triu(1).max(), reach_TT.diagonal().min()
    demo.check("gradient: zero at later tokens, not at its own", "(T, T)",
               f"later {later:.1e}, own at least {own:.1e}", later == 0 and own > 0)
    unmasked = SelfAttention(16, 8).to(demo.device)  # both tests must find phase 1's leak
    leak = largest_leak_by_perturbation(unmasked, x_TD)
    later = gradient_reach(unmasked, x_TD).triu(1)
    demo.check("without a mask, both tests find a leak", "(T, V), (T, T)",
               f"leak {leak:.2f}, later {later.max():.1e}", leak > 0 and later.max() > 0)

    nothing_TT = torch.zeros(T, T, dtype=torch.bool, device=demo.device)
    masked_TV = attention(x_TD, mask=nothing_TT)
    demo.check("fully masked rows give zeros, not NaN", "(T, V)",
               f"largest {masked_TV.abs().max()}", bool((masked_TV == 0).all()))

    # Equal scores: each of 4 values, all 1, has weight 1/4. Without dropout every output is 1.
    query, key, value = torch.zeros(20000, 1, 8), torch.zeros(20000, 4, 8), torch.ones(20000, 4, 1)
    dropped, _ = scaled_dot_product_attention(query, key, value, dropout_p=arguments.dropout)
    share = arguments.dropout
    error = 5 * (share / (1 - share) / 4 / 20000) ** 0.5  # five standard errors of the mean
    demo.check("dropout keeps the mean of the output", "(20000, 1, 1)",
               f"mean {dropped.mean():.3f}, want 1 ± {error:.3f}, spread {dropped.std():.2f}",
               abs(dropped.mean() - 1) <= error)
    demo.finish("--length 12: a larger triangle, and still no leak",
                "--dropout 0.9: the spread grows from 0.5 to 1.5, the mean stays near 1")


if __name__ == "__main__":
    main()
