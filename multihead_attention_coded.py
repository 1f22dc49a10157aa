"""Phase 3: multi-head attention, with a KV cache and shared key/value heads.

One head can follow one relation between tokens at a time. Multi-head attention runs H small heads
side by side and mixes their outputs with one matrix. When text is generated token by token, the
keys and values of the past do not change, so they are kept in a cache: that cache, not the
arithmetic, is what makes long contexts expensive. Grouped-query attention (GQA) shrinks it by
letting several query heads share a key/value head; multi-query attention (MQA) keeps just one.
Phase 4 shows DeepSeek's better bargain. Beside the fast paths stand `Linear` and `RMSNorm`,
PyTorch's own with a quicker way for the few rows of decoding, which the later phases use.

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
from self_attention_coded import (
    Demonstration,
    demonstration_parser,
    expanded_mask,
    one_line_errors,
    parse_arguments,
    scaled_dot_product_attention,
)


# %% The fused path: the same function without ever storing the weights
def fused_attention(query, key, value, mask=None, scale=None, dropout_p=0.0, causal=False):
    """`scaled_dot_product_attention` by PyTorch's fused kernel; returns the output only.

    Args: as phase 1, with heads: query (B, H, T, K), key (B, groups, S, K), value (B, groups, S,
        V), where H is a multiple of groups. `causal` adds the causal mask; the last query sees the
        last key.
    Returns: (B, H, T, V).
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
        query, key, value, attn_mask=mask, dropout_p=dropout_p, is_causal=use_flag, scale=scale,
        enable_gqa=key.shape[-3] != query.shape[-3],
    )  # fmt: skip
    return output[..., :value_width]


def product_attention(query, key, value, mask=None, scale=None, causal=False):
    """`fused_attention` as two batched matrix products with the scores in between.

    It stores all B·H·T·S scores, which the fused kernel avoids; for short texts they fit in the
    processor's cache, and its matrix units run at full rate: BF16, 32 heads of 256 × 48, forward
    and backward 3.6 ms against 9.5 (FP32: 7.9 against 8.6). Shapes as there, groups = H.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    shape = (*query.shape[:-1], key.shape[-2])
    allowed = causal_mask(*shape[-2:], device=query.device) if causal else None
    if mask is not None:
        mask = expanded_mask(mask, shape)
        allowed = mask if allowed is None else mask & allowed
    bias = query.new_zeros(1)  # nothing hidden
    if allowed is not None:  # finite, so that a row without any key gives no NaN
        hidden = torch.finfo(query.dtype).min / 2
        bias = query.new_zeros(allowed.shape).masked_fill(~allowed, hidden)
    scores = torch.baddbmm(
        bias.expand(shape).flatten(0, 1), query.flatten(0, 1), key.flatten(0, 1).mT, alpha=scale
    )
    output = torch.bmm(scores.softmax(dim=-1), value.flatten(0, 1)).unflatten(0, shape[:2])
    return output if mask is None else output * allowed.any(dim=-1, keepdim=True)


# %% Projections and norms of a few rows, as in decoding
class Linear(nn.Linear):
    """`nn.Linear`, shared out among the processor's cores when a few rows are decoded.

    A token that is decoded reads every weight once and hardly computes. `F.linear` reads with one
    core; as a batch of products, one a core, each core reads its own part. 512 × 256 from memory,
    two cores: 1 row 39 → 22 µs, 4 rows 48 → 26; a round of speculative decoding 3.7 → 3.0 ms. Up to
    8 rows, and matrices of 2¹⁶ numbers and more (several rows: 2¹⁴).
    """

    def forward(self, x):
        few = x.numel() <= 8 * x.shape[-1] and not torch.is_grad_enabled()
        if few and self.bias is None and x.device.type == "cpu":
            return shared_linear(x, self.weight)
        return F.linear(x, self.weight, self.bias)


def shared_linear(x, weight):
    """`F.linear(x, weight)` as one product a core: (..., in), (out, in) → (..., out)."""
    cores, (out, width) = torch.get_num_threads(), weight.shape
    large = weight.numel() >= (2**16 if x.numel() == width else 2**14)
    fits = out % cores == 0 and x.shape[-1] == width and x.dtype == weight.dtype
    if cores == 1 or not large or not fits:
        return F.linear(x, weight)
    rows = x.reshape(1, -1, width).expand(cores, -1, -1)
    parts = torch.bmm(rows, weight.view(cores, out // cores, width).transpose(1, 2))
    return parts.transpose(0, 1).reshape(*x.shape[:-1], out)


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` in the precision of its weight: under autocast x comes in a lower one.

    A single row on a CPU goes by one dot product instead of seven small operations: a token that
    is decoded passes 17 norms in the default model, 1.15 → 1.08 ms a pass.
    """

    def forward(self, x):
        x = x.to(self.weight.dtype)
        one_row = x.numel() == self.weight.numel() and not torch.is_grad_enabled()
        if one_row and x.device.type == "cpu" and x.dtype == torch.float32:
            row = x.reshape(-1)
            mean_square = row.dot(row).item() / len(row)
            eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
            return (x * self.weight).mul_((mean_square + eps) ** -0.5)
        return super().forward(x)


# %% The caches
class GrowingBuffer:
    """A tensor (..., length, width) that grows along its second-to-last dimension.

    Space doubles when it runs out, so n appends copy O(n) rows in all, not O(n²). For inference
    only: what is stored is cut off from the gradient.
    """

    def __init__(self, capacity=0):
        self.capacity = capacity
        self.length = 0
        self.storage = None

    def append(self, rows, start=None):
        """Stores `rows` (..., new, width) and returns all rows so far (a view).

        start: where they go; default: behind the last. A number below the length overwrites: what
            stood from there on is forgotten. A tensor (B,), for sequences of unequal length, gives
            each sequence a place of its own; then the view is as long as the longest, and who
            reads it must leave out what lies behind a sequence's end.
        """
        if self.storage is not None:
            held, got = self.storage.shape, rows.shape
            if held[:-2] != got[:-2] or held[-1] != got[-1]:
                kept = (*held[:-2], self.length, held[-1])
                raise ValueError(f"cache holds rows {kept}, got {tuple(got)} to append")
        start = self.length if start is None else start
        ragged = torch.is_tensor(start)
        latest = int(start.max()) if ragged else start
        if latest > self.length:
            raise ValueError(f"start={latest} would leave a gap behind the {self.length} rows held")
        end = latest + rows.shape[-2]
        if self.storage is None or end > self.storage.shape[-2]:
            self._grow(rows, end)
        if ragged:
            places = start[:, None] + torch.arange(rows.shape[-2], device=rows.device)
            sequences = torch.arange(len(rows), device=rows.device)[:, None]
            self.storage[sequences, places] = rows.detach()
        else:
            self.storage[..., start:end, :] = rows.detach()
        self.length = end
        return self.view()

    def _grow(self, rows, needed):
        held = 0 if self.storage is None else self.storage.shape[-2]
        size = max(needed, self.capacity, 2 * held)
        storage = rows.new_zeros(*rows.shape[:-2], size, rows.shape[-1])
        if self.storage is not None:
            storage[..., : self.length, :] = self.view()
        self.storage = storage

    def view(self):
        if self.storage is None:
            raise ValueError("the cache is empty: nothing was appended yet")
        return self.storage[..., : self.length, :]

    def truncate(self, length):
        """Forgets all rows after the first `length`: rolls the cache back."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of length {self.length} to {length}")
        self.length = length

    def used_bytes(self):
        return 0 if self.storage is None else self.view().numel() * self.storage.element_size()

    def allocated_bytes(self):
        return 0 if self.storage is None else self.storage.nbytes


class KVCache:
    """Keys and values of one layer, (B, groups, length, K) each: 2 · groups · K numbers a token.

    `capacity`: room for so many tokens is set aside at the first append.
    """

    def __init__(self, capacity=0):
        self.keys = GrowingBuffer(capacity)
        self.values = GrowingBuffer(capacity)

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


# %% The module: all heads at once, and one head at a time on the same parameters
class MultiHeadAttention(nn.Module):
    """H query heads over `num_kv_heads` key/value heads (H: MHA; 1: MQA; between: GQA).

    `d_model` is D; heads have width K = D / H.
    """

    def __init__(self, d_model, num_heads, num_kv_heads=None, dropout=0.0, bias=False):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or d_model % num_heads:
            raise ValueError(f"d_model={d_model} must be divisible by num_heads={num_heads}")
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads={num_heads} must be divisible by num_kv_heads={num_kv_heads}"
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout={dropout} must be at least 0 and below 1")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_width = d_model // num_heads
        self.dropout = dropout
        self.q_proj = nn.Linear(d_model, d_model, bias=bias)
        self.k_proj = nn.Linear(d_model, num_kv_heads * self.head_width, bias=bias)
        self.v_proj = nn.Linear(d_model, num_kv_heads * self.head_width, bias=bias)
        self.o_proj = nn.Linear(d_model, d_model, bias=bias)

    def _heads(self, x_BTD):
        """(B, T, heads · K) → (B, heads, T, K)."""
        return x_BTD.unflatten(-1, (-1, self.head_width)).transpose(-3, -2)

    def forward(self, x, mask=None, cache=None, causal=True, path="fused"):
        """(B, T, D) → (B, T, D).

        Args:
            mask: boolean, broadcastable to (B, H, T, S), on top of the causal one.
            cache: a `KVCache`; the T tokens are appended and attend to all that it holds. For
                inference: no gradient flows through what is cached.
            causal: False lets every token see every other.
            path: "fused" (PyTorch's kernel), "explicit" (phase 1's function, all heads at once)
                or "loop" (head by head, the naive reference).
        """
        d_model = self.q_proj.in_features
        if x.dim() != 3 or x.shape[-1] != d_model:
            raise ValueError(f"input must be (B, T, {d_model}), got {tuple(x.shape)}")
        if path not in ("fused", "explicit", "loop"):
            raise ValueError(f"path={path!r} must be 'fused', 'explicit' or 'loop'")
        if mask is not None:  # before the cache changes
            past = 0 if cache is None else cache.length
            shape = (x.shape[0], self.num_heads, x.shape[1], past + x.shape[1])
            mask = expanded_mask(mask, shape)
        q_BHTK = self._heads(self.q_proj(x))
        keys, values = self._heads(self.k_proj(x)), self._heads(self.v_proj(x))
        if cache is not None:
            keys, values = cache.append(keys, values)
        dropout = self.dropout if self.training else 0.0
        if path == "fused":
            heads = fused_attention(
                q_BHTK, keys, values, mask, dropout_p=dropout, causal=causal
            )  # fmt: skip
        else:
            if causal:
                triangle_TS = causal_mask(x.shape[1], keys.shape[-2], device=x.device)
                mask = triangle_TS if mask is None else mask & triangle_TS
            attend = self._explicit if path == "explicit" else self._loop
            heads = attend(q_BHTK, keys, values, mask, dropout)
        return self.o_proj(heads.transpose(-3, -2).flatten(-2))

    def _explicit(self, q_BHTK, keys, values, mask, dropout):
        shared_by = self.num_heads // self.num_kv_heads
        k_BHSK = keys.repeat_interleave(shared_by, dim=-3)
        v_BHSK = values.repeat_interleave(shared_by, dim=-3)
        return scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, mask, dropout_p=dropout)[0]

    def _loop(self, q_BHTK, keys, values, mask, dropout):
        shape = (*q_BHTK.shape[:-1], keys.shape[-2])
        mask_BHTS = None if mask is None else mask.expand(shape)
        heads = []
        for h in range(self.num_heads):
            group = h * self.num_kv_heads // self.num_heads
            one_mask = None if mask is None else mask_BHTS[:, h]
            head, _ = scaled_dot_product_attention(
                q_BHTK[:, h], keys[:, group], values[:, group], one_mask, dropout_p=dropout
            )
            heads.append(head)
        return torch.stack(heads, dim=1)


# %% The demonstration
@one_line_errors
def main(argv=None):
    parser = demonstration_parser(__doc__)
    parser.add_argument("--heads", type=int, default=8, help="query heads; must divide 64")
    parser.add_argument(
        "--kv-heads", type=int, default=2, help="key/value heads of the GQA example"
    )
    arguments = parse_arguments(parser, argv)
    demo = Demonstration("multihead_attention_coded.py", arguments.device, arguments.seed)
    d_model, length = 64, 10
    x_BTD = torch.randn(2, length, d_model, device=arguments.device)

    kinds = {"MHA": arguments.heads, "GQA": arguments.kv_heads, "MQA": 1}
    cache_bytes = {}
    for kind, kv_heads in kinds.items():
        attention = MultiHeadAttention(d_model, arguments.heads, kv_heads)
        attention = attention.to(arguments.device).eval()
        with torch.no_grad():
            loop = attention(x_BTD, path="loop")
            demo.same(f"{kind}: a loop of heads = all heads at once", "(B, T, D)",
                      attention(x_BTD, path="explicit"), loop)  # fmt: skip
            demo.same(f"{kind}: fused kernel = loop", "(B, T, D)", attention(x_BTD), loop)
            cache = KVCache()
            chunks = x_BTD.split([1, 1, 4, 1, 3], dim=1)
            pieces = torch.cat([attention(chunk, cache=cache) for chunk in chunks], dim=1)
        demo.same(f"{kind}: appends of 1, 1, 4, 1, 3 = one pass", "(B, T, D)", pieces, loop)
        cache_bytes[kind] = cache.used_bytes() // (2 * length)
    q_BHTK, k_BHSK, v_BHSV = torch.randn(3, 2, 4, length, 16, device=arguments.device)
    demo.same("two products = fused kernel, causal", "(B, H, T, V)",
              product_attention(q_BHTK, k_BHSK, v_BHSV, causal=True),
              fused_attention(q_BHTK, k_BHSK, v_BHSV, causal=True))  # fmt: skip
    linear, norm = Linear(256, 512, bias=False), RMSNorm(256, eps=1e-6)
    row = torch.randn(1, 256)
    with torch.no_grad():
        demo.same("one row, shared out among the cores", "(1, out)", linear(row),
                  F.linear(row, linear.weight), 1e-5)  # fmt: skip
        demo.same("norm of one row by a dot product", "(1, D)", norm(row),
                  F.rms_norm(row, (256,), norm.weight, 1e-6))  # fmt: skip
    figures = ", ".join(f"{kind} {size}" for kind, size in cache_bytes.items())
    expected = {kind: 2 * heads * d_model // arguments.heads * 4 for kind, heads in kinds.items()}
    demo.check("cache: 2 · groups · K numbers of 4 bytes", "bytes per token", figures,
               cache_bytes == expected)  # fmt: skip
    demo.finish("--heads 16 --kv-heads 4", "--heads 4 --kv-heads 3: what does the error say?")


if __name__ == "__main__":
    main()
