"""Phase 3: multi-head attention, with a KV cache and shared key/value heads.

One head can follow one relation between tokens at a time. Multi-head attention runs H small heads
side by side and mixes their outputs with one matrix. When text is generated token by token, the
keys and values of the past do not change, so they are kept in a cache: that cache, not the
arithmetic, is what makes decoding after a long context expensive. Grouped-query attention (GQA)
shrinks it by letting several query heads share a key/value head; multi-query attention (MQA) keeps
just one. Phase 4 shows DeepSeek's better bargain.

    head_h = Attention(X W_Q^h, X W_K^g, X W_V^g)   with g = ⌊h · groups / H⌋
    MultiHead(X) = [head_0; …; head_{H−1}] W_O

Papers: Vaswani et al. (2017), section 3.2.2; Shazeer (2019), multi-query attention; Ainslie et
al. (2023), grouped-query attention. Cache sizes: DeepSeek-V2, Table 1.
Simplified: no positions (phase 7); query, key and value heads have equal widths.

Dimensions: B batch · T query positions · S key positions · D model width · H heads · K head
width · V value width.

Run:  python multihead_attention_coded.py [--heads 8] [--kv-heads 2]
"""

import torch
import torch.nn.functional as F
from torch import nn

from causal_attention_coded import causal_mask
from lesson import check_divides, check_input, demonstration, expanded_mask, flag, require
from self_attention_coded import scaled_dot_product_attention


# %% The naive reference: one head after another
def attention_by_heads(query, key, value, mask=None, dropout_p=0.0):
    """Each query head attends by itself, to the key/value head of its group.

    query (B, H, T, K), key and value (B, groups, S, K); H is a multiple of groups. mask: boolean,
    broadcastable to (B, H, T, S). Returns: (B, H, T, K).
    """
    H, groups = query.shape[1], key.shape[1]
    if mask is not None:
        mask = mask.expand(*query.shape[:-1], key.shape[-2])
    heads = []
    for h in range(H):
        g = h * groups // H
        allowed = None if mask is None else mask[:, h]
        head_BTK, _ = scaled_dot_product_attention(
            query[:, h], key[:, g], value[:, g], mask=allowed, dropout_p=dropout_p
        )
        heads.append(head_BTK)
    return torch.stack(heads, dim=1)


# %% All heads at once: H is one more batch dimension
def attention_at_once(query, key, value, mask=None, dropout_p=0.0):
    """`attention_by_heads` as one batch of products; a shared key/value head is repeated."""
    shared_by = query.shape[1] // key.shape[1]
    k_BHSK = key.repeat_interleave(shared_by, dim=1)
    v_BHSK = value.repeat_interleave(shared_by, dim=1)
    output_BHTK, _ = scaled_dot_product_attention(
        query, k_BHSK, v_BHSK, mask=mask, dropout_p=dropout_p
    )
    return output_BHTK


# %% The cache: keys and values of the past are kept, not computed again
class RowStore:
    """Rows (..., length, width) that grow by `torch.cat`. For inference: no gradient flows in."""

    def __init__(self):
        self.rows = None

    @property
    def length(self):
        return 0 if self.rows is None else self.rows.shape[-2]

    def append(self, rows):
        """Adds rows (..., new, width) behind the others; returns all of them."""
        rows = rows.detach()
        self.rows = rows if self.rows is None else torch.cat([self.rows, rows], dim=-2)
        return self.rows

    def truncate(self, length):
        """Forgets all rows after the first `length`: rolls the cache back."""
        message = f"cannot truncate a cache of length {self.length} to {length}"
        require(0 <= length <= self.length, message)
        self.rows = self.rows[..., :length, :] if self.length else None

    def used_bytes(self):
        return 0 if self.rows is None else self.rows.numel() * self.rows.element_size()


class KVCache:
    """Keys and values of one layer, (B, groups, length, K) each: 2 · groups · K numbers a token.

    `store`: what keeps the rows; decoding at speed passes one with room set aside.
    """

    def __init__(self, store=RowStore):
        self.keys, self.values = store(), store()

    @property
    def length(self):
        return self.keys.length

    def append(self, key, value):
        """Stores one or more tokens; returns all keys and all values so far."""
        return self.keys.append(key), self.values.append(value)

    def truncate(self, length):
        self.keys.truncate(length)
        self.values.truncate(length)

    def used_bytes(self):
        return self.keys.used_bytes() + self.values.used_bytes()


# %% The fused kernel: the same function without ever storing the weights
def fused_attention(query, key, value, mask=None, scale=None, dropout_p=0.0, causal=False):
    """`attention_at_once` by PyTorch's fused kernel.

    query (B, H, T, K), key (B, groups, S, K), value (B, groups, S, V) → (B, H, T, V). `causal` adds
    the causal mask; the last query sees the last key. `scale`: default 1/√K.
    """
    T, S, value_width = query.shape[-2], key.shape[-2], value.shape[-1]
    if mask is not None:
        mask = expanded_mask(mask, (*query.shape[:-1], S))
    # The kernel's own is_causal flag aligns the *first* query with the first key.
    use_flag = causal and mask is None and T == S
    if causal and not use_flag and T > 1:
        triangle_TS = causal_mask(T, S, device=query.device)
        mask = triangle_TS if mask is None else mask & triangle_TS
    if value_width < query.shape[-1]:
        # The CPU kernel needs equal widths; otherwise PyTorch falls back to a slower composition.
        value = F.pad(value, (0, query.shape[-1] - value_width))
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=use_flag,
        scale=scale,
        enable_gqa=key.shape[-3] != query.shape[-3],
    )
    return output[..., :value_width]


# %% The module: projections, heads, and the matrix that mixes them
PATHS = {"loop": attention_by_heads, "explicit": attention_at_once, "fused": fused_attention}


class MultiHeadAttention(nn.Module):
    """H query heads over `num_kv_heads` key/value heads (H: MHA; 1: MQA; between: GQA).

    `d_model` is D; heads have width K = D / H.
    """

    def __init__(self, d_model, num_heads, num_kv_heads=None, dropout=0.0, bias=False):
        super().__init__()
        groups = num_heads if num_kv_heads is None else num_kv_heads
        check_divides(d_model=d_model, num_heads=num_heads)
        check_divides(num_heads=num_heads, num_kv_heads=groups)
        require(0.0 <= dropout < 1.0, f"dropout={dropout} must be at least 0 and below 1")
        self.num_heads, self.head_width, self.dropout = num_heads, d_model // num_heads, dropout
        self.q_proj = nn.Linear(d_model, d_model, bias=bias)
        self.k_proj = nn.Linear(d_model, groups * self.head_width, bias=bias)
        self.v_proj = nn.Linear(d_model, groups * self.head_width, bias=bias)
        self.o_proj = nn.Linear(d_model, d_model, bias=bias)

    def split_heads(self, x_BTD):
        """(B, T, heads · K) → (B, heads, T, K)."""
        return x_BTD.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

    def forward(self, x, mask=None, cache=None, causal=True, path="fused"):
        """(B, T, D) → (B, T, D).

        Args:
            mask: boolean, broadcastable to (B, H, T, S), on top of the causal one.
            cache: a `KVCache`; the T tokens are appended and attend to all that it stores. For
                inference: no gradient flows through what is cached.
            causal: False lets every token see every other.
            path: "loop" (the naive reference), "explicit" (all heads at once) or "fused".
        """
        check_input(x, self.q_proj.in_features, batch="B")
        (B, T), H = x.shape[:2], self.num_heads
        S = T if cache is None else cache.length + T
        require(path in PATHS, f"path={path!r} must be one of {', '.join(PATHS)}")
        if mask is not None:  # before the cache changes
            mask = expanded_mask(mask, (B, H, T, S))
        if causal and path != "fused":
            triangle_TS = causal_mask(T, S, device=x.device)
            mask = triangle_TS if mask is None else mask & triangle_TS
        q_BHTK, keys, values = (
            self.split_heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is not None:
            keys, values = cache.append(keys, values)
        options = dict(causal=causal) if path == "fused" else {}
        dropout = self.dropout if self.training else 0.0
        heads_BHTK = PATHS[path](q_BHTK, keys, values, mask=mask, dropout_p=dropout, **options)
        return self.o_proj(heads_BHTK.transpose(1, 2).flatten(2))


# %% The demonstration
@demonstration(__doc__, flag("heads", 8, "query heads; must divide 64", at_least=1),
               flag("kv-heads", 2, "key/value heads of the GQA example", at_least=1))
def main(demo, arguments):
    d_model, length = 64, 10
    x_BTD = torch.randn(2, length, d_model, device=demo.device)
    kinds = {"MHA": arguments.heads, "GQA": arguments.kv_heads, "MQA": 1}
    cache_bytes = {}
    for kind, kv_heads in kinds.items():
        attention = MultiHeadAttention(d_model, arguments.heads, kv_heads).to(demo.device).eval()
        cache = KVCache()
        with torch.no_grad():
            loop = attention(x_BTD, path="loop")
            at_once, fused = attention(x_BTD, path="explicit"), attention(x_BTD, path="fused")
            chunks = x_BTD.split([1, 1, 4, 1, 3], dim=1)
            pieces = torch.cat([attention(chunk, cache=cache) for chunk in chunks], dim=1)
        demo.same(f"{kind}: a loop of heads = all heads at once", "(B, T, D)", at_once, loop)
        demo.same(f"{kind}: fused kernel = loop", "(B, T, D)", fused, loop)
        demo.same(f"{kind}: appends of 1, 1, 4, 1, 3 = one pass", "(B, T, D)", pieces, loop)
        cache_bytes[kind] = cache.used_bytes() // (2 * length)
    figures = ", ".join(f"{kind} {size}" for kind, size in cache_bytes.items())
    expected = {kind: 2 * heads * d_model // arguments.heads * 4 for kind, heads in kinds.items()}
    same = cache_bytes == expected
    demo.check("cache: 2 · groups · K numbers of 4 bytes", "bytes per token", figures, same)
    demo.finish("--heads 16 --kv-heads 4", "--heads 4 --kv-heads 3: what does the error say?")


if __name__ == "__main__":
    main()
