"""Phase 3: multi-head attention, with a KV cache and shared key/value heads.

One head gives each token one set of weights, so it can follow one relation at a time. Multi-head
attention runs H small heads side by side and mixes their outputs with one matrix. When a model
generates token by token, the keys and values of past tokens do not change, so a cache keeps them.
After a long context, decoding spends more time on reading this cache than on arithmetic. In
grouped-query attention (GQA), several query heads share one key/value head, so the cache is
smaller. Multi-query attention (MQA) has a single key/value head. Phase 4 shows DeepSeek's way.

    head_h = Attention(X W_Q^h, X W_K^g, X W_V^g)   with g = ⌊h · groups / H⌋
    MultiHead(X) = [head_0; …; head_{H−1}] W_O

Papers: heads: Vaswani et al. (2017, arXiv:1706.03762), section 3.2.2; MQA: Shazeer (2019,
arXiv:1911.02150), section 3; GQA: Ainslie et al. (2023, arXiv:2305.13245), section 2.2; cache
sizes: DeepSeek-V2 (2024, arXiv:2405.04434), Table 1; the fused kernel: FlashAttention, Dao et al.
(2022, arXiv:2205.14135), section 3.1.
Simplified: no positions (phase 7); query, key and value heads have equal widths.
Before: phases 1 and 2. Reading 12 minutes, running 2 seconds.

Dimensions: B batch · T query positions · S key positions · D model width · H heads · K head
width · V value width.

Run:  python multihead_attention_coded.py [--heads 8] [--kv-heads 2]
"""

import torch
from torch import nn

from causal_attention_coded import causal_mask
from lesson import caches, check_forward, check_heads, checks, demonstration, flag
from self_attention_coded import scaled_dot_product_attention


# %% The naive reference: one head after another
def attention_by_heads(query, key, value, mask=None, dropout_p=0.0, causal=False):
    """Each query head h attends by itself, to the key/value head g of its group.

    Neighbouring heads share. With 8 query heads and 2 key/value heads, g = ⌊h · 2 / 8⌋:

        h    0 1 2 3 4 5 6 7
        g    0 0 0 0 1 1 1 1

    query (B, H, T, K), key and value (B, groups, S, K); H is a multiple of groups. mask: boolean,
    broadcastable to (B, H, T, S), True = may attend. `causal` adds the causal mask to it. Returns:
    (B, H, T, K).
    """
    H, groups = query.shape[1], key.shape[1]
    mask = allowed_keys(query, key, mask, causal)
    heads = []
    for h in range(H):
        g = h * groups // H
        allowed_BTS = None if mask is None else mask.expand(-1, H, -1, -1)[:, h]
        head_BTK, _ = scaled_dot_product_attention(
            query[:, h], key[:, g], value[:, g], allowed_BTS, dropout_p=dropout_p
        )
        heads.append(head_BTK)
    return torch.stack(heads, dim=1)


def allowed_keys(query, key, mask=None, causal=True):
    """The mask that is True where a query may attend to a key; None if all may attend to all.

    Its shape is (B, H, T, S). A dimension that makes no difference is 1: the causal mask alone is
    (1, 1, T, S).
    """
    T, S = query.shape[-2], key.shape[-2]
    if causal:
        triangle_TS = causal_mask(T, S, query.device)
        mask = triangle_TS if mask is None else triangle_TS & mask
    return checks.boolean_mask(mask, (*query.shape[:-1], S))


# %% All heads at once: H is one more batch dimension
def attention_at_once(query, key, value, mask=None, dropout_p=0.0, causal=False):
    """Computes `attention_by_heads` as one batch of products; repeats shared key/value heads.

    `repeat_interleave` puts the copies of a head side by side: 0 0 0 0 1 1 1 1, as above. `repeat`
    would give 0 1 0 1 0 1 0 1: the wrong heads would share.
    """
    shared_by = query.shape[1] // key.shape[1]
    k_BHSK = key.repeat_interleave(shared_by, dim=1)
    v_BHSK = value.repeat_interleave(shared_by, dim=1)
    mask = allowed_keys(query, key, mask, causal)
    output_BHTK, _ = scaled_dot_product_attention(query, k_BHSK, v_BHSK, mask, dropout_p=dropout_p)
    return output_BHTK


# %% The cache keeps keys and values of the past, so that they are not computed again
class RowStore(caches.Rows):
    """Rows (..., length, width) that grow by `torch.cat`. For inference: it passes no gradient."""

    def append(self, rows):
        """Adds rows (..., new, width) after the others; returns all rows."""
        rows = rows.detach()
        self.rows = rows if self.rows is None else torch.cat([self.rows, rows], dim=-2)
        return self.rows


class KVCache(caches.Cache):
    """Keys and values of one layer, (B, groups, length, K) each: 2 · groups · K numbers a token.

    A query is used only once, when its token is new, so it is not kept. Take the sizes of
    DeepSeek-V2: 60 layers, 128 heads of width 128, 2 bytes a number, 131,072 tokens of context. The
    first column of numbers counts one layer and one token; the others count all layers:

                          numbers a layer   bytes a token   full context
        MHA                 2 · 128 · 128       3,932,160       515.4 GB
        GQA, 8 groups         2 · 8 · 128         245,760        32.2 GB
        MQA                   2 · 1 · 128          30,720         4.0 GB
        MLA (phase 4)            512 + 64          69,120         9.1 GB
    """

    def __init__(self, store=RowStore):
        super().__init__(keys=store(), values=store())

    def append(self, key, value):
        """Stores keys and values of one or more tokens; returns all keys and values so far."""
        return self.keys.append(key), self.values.append(value)


# %% The fused kernel: the same function, but never all weights in memory at once
def fused_attention(query, key, value, mask=None, scale=None, dropout_p=0.0, causal=False):
    """Computes `attention_at_once` by PyTorch's fused kernel, which never stores all T × S weights.

    It goes through the keys block by block. For each query it keeps three running results: the
    maximum m of the scores s_j, the sum l of their exponentials, and the sum o of the values v_j,
    weighted by the exponentials. If a block raises the maximum to m', exp(m − m') corrects the old
    sums. This is called *online softmax*:

        m' = max(m, s_j …)                        j: the keys of the block
        l' = l · exp(m − m') + Σ_j exp(s_j − m')
        o' = o · exp(m − m') + Σ_j exp(s_j − m') v_j          at the end: o / l

    Take three keys in blocks of one, with the scores 0, ln 2, 0 and the values 1, 4, 1:

        m     0    ln 2           ln 2
        l     1    1/2 + 1        3/2 + 1/2 = 2
        o     1    1/2 + 4        9/2 + 1/2 = 5        o / l = 5/2 = (1 · 1 + 2 · 4 + 1 · 1) / 4

    With 4,096 tokens, 128 heads have 128 · 4096² weights: 4.3 GB a layer at 2 bytes a number. The
    running numbers are 2 + V for each query and head, which is 0.1 GB at V = 128.

    The kernel's own causal flag lines up the *first* query with the first key: with 4 keys, 2
    queries would see 1 and 2 keys, not 3 and 4. So we pass a mask instead. Where no fused
    kernel fits, PyTorch stores all weights: on a CPU with dropout, for example.

    query (B, H, T, K), key (B, groups, S, K), value (B, groups, S, V) → (B, H, T, V).
    `scale`: default 1/√K.
    """
    mask = allowed_keys(query, key, mask, causal)
    missing = max(query.shape[-1] - value.shape[-1], 0)  # the CPU kernel needs V = K: add zeros
    output = nn.functional.scaled_dot_product_attention(
        query, key, nn.functional.pad(value, (0, missing)), mask, dropout_p, scale=scale,
        enable_gqa=True,
    )
    return output[..., : value.shape[-1]]


# %% The module: projections, heads, and the matrix that mixes them
class MultiHeadAttention(nn.Module):
    """H query heads share `num_kv_heads` key/value heads. H of them: MHA; 1: MQA; between: GQA.

    `d_model` is D; each head has width K = D / H.
    """

    paths = {"loop": attention_by_heads, "explicit": attention_at_once, "fused": fused_attention}

    def __init__(self, d_model, num_heads, num_kv_heads=None, dropout=0.0, bias=False):
        super().__init__()
        groups = num_heads if num_kv_heads is None else num_kv_heads
        check_heads(d_model, num_heads, groups, dropout)
        self.num_heads, self.head_width, self.dropout = num_heads, d_model // num_heads, dropout
        self.q_proj = nn.Linear(d_model, d_model, bias=bias)
        self.k_proj = nn.Linear(d_model, groups * self.head_width, bias=bias)
        self.v_proj = nn.Linear(d_model, groups * self.head_width, bias=bias)
        self.o_proj = nn.Linear(d_model, d_model, bias=bias)

    def split_heads(self, x_BTD):
        """(B, T, heads · K) → (B, heads, T, K): head h gets the columns h·K … h·K + K − 1."""
        return x_BTD.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

    def forward(self, x, mask=None, cache=None, causal=True, path="fused"):
        """(B, T, D) → (B, T, D).

        Args:
            mask: boolean, broadcastable to (B, H, T, S). It can remove more keys, such as padding.
            cache: a `KVCache`. The T tokens are appended to it and attend to all its tokens. For
                inference: no gradient flows through the cache.
            causal: False lets every token attend to every token.
            path: "loop" (the naive reference), "explicit" (all heads at once) or "fused".
        """
        check_forward(x, self.q_proj.in_features, self.num_heads, mask, cache, path, self.paths)
        query, key, value = (
            self.split_heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is not None:
            key, value = cache.append(key, value)
        dropout = self.dropout if self.training else 0.0
        heads_BHTK = self.paths[path](query, key, value, mask, dropout_p=dropout, causal=causal)
        return self.o_proj(heads_BHTK.transpose(1, 2).flatten(2))


# %% The demonstration
def check_paths(demo, attention, x_BTD, kind):
    """Checks that all paths agree, with and without a cache; returns the cached bytes per token."""
    cache = KVCache()
    with torch.no_grad():
        loop = attention(x_BTD, path="loop")
        at_once, fused = attention(x_BTD, path="explicit"), attention(x_BTD, path="fused")
        chunks = x_BTD.split([1, 1, 4, 1, 3], dim=1)
        pieces = torch.cat([attention(chunk, cache=cache) for chunk in chunks], dim=1)
    demo.same(f"{kind}: a loop of heads = all heads at once", "(B, T, D)", at_once, loop)
    demo.same(f"{kind}: fused kernel = loop", "(B, T, D)", fused, loop)
    demo.same(f"{kind}: cached 1, 1, 4, 1, 3 at a time = one pass", "(B, T, D)", pieces, loop)
    return cache.used_bytes() // x_BTD[..., 0].numel()


def heads_read(attend, heads, groups):
    """The key/value head that each query head reads. To see it, all values of head g are g."""
    number = torch.arange(float(groups)).reshape(1, groups, 1, 1)
    read = attend(torch.ones(1, heads, 1, 1), torch.ones_like(number), number)
    return read.flatten().int().tolist()


@demonstration(__doc__, flag("heads", 8, "query heads; must divide 64", at_least=1),
               flag("kv-heads", 2, "key/value heads of the GQA example", at_least=1))
def main(demo, arguments):
    d_model, heads, groups = 64, arguments.heads, arguments.kv_heads
    x_BTD = torch.randn(2, 10, d_model, device=demo.device)
    sizes, wanted = {}, {}
    for kind, kv_heads in (("MHA", heads), ("GQA", groups), ("MQA", 1)):
        attention = MultiHeadAttention(d_model, heads, kv_heads).to(demo.device)
        sizes[kind] = check_paths(demo, attention, x_BTD, kind)
        wanted[kind] = 2 * kv_heads * (d_model // heads) * 4
    figures = ", ".join(f"{kind} {size}" for kind, size in sizes.items())
    demo.check("cache: 2 · groups · K numbers of 4 bytes", "bytes per token", figures,
               sizes == wanted)
    neighbours_share = [g for g in range(groups) for _ in range(heads // groups)]
    paths = MultiHeadAttention.paths.values()
    read = [heads_read(attend, heads, groups) for attend in paths]
    demo.check("GQA: the key/value head that each query head reads", "(H,)",
               " ".join(map(str, read[0])), read == [neighbours_share] * len(paths))
    demo.finish("--heads 16 --kv-heads 4: narrower heads; GQA's cache stays, MQA's is halved",
                "--heads 4 --kv-heads 3: an error, since 4 heads cannot form 3 equal groups")


if __name__ == "__main__":
    main()
