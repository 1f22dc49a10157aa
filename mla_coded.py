"""Phase 4: multi-head latent attention (MLA), DeepSeek's small KV cache.

Phase 3 cached every head's keys and values. MLA caches one short vector a token instead, the
latent c_KV, from which all heads' keys and values can be rebuilt by a matrix. A few more numbers,
k_R, carry the position; phase 7 rotates them, here they pass unrotated. Better still, the cache
need not be expanded at all: the matrix that would rebuild the keys can be applied to the (few)
queries, and the one that would rebuild the values to the (few) outputs. That is *absorption*:
the same function, computed in another order.

    c_KV = RMSNorm(W_DKV h)        k_R = W_KR h          (one k_R for all heads, from h itself)
    [k_C ; v_C] = [W_UK ; W_UV] c_KV
    c_Q = RMSNorm(W_DQ h)          [q_C ; q_R] = [W_UQ ; W_QR] c_Q
    o_i = Σ_j softmax_j((q_C·k_C + q_R·k_R) / √(N + R)) v_C        (one scale for both scores)
    absorbed:  q_C·k_C = (W_UKᵀ q_C)·c_KV        o_i = W_UV Σ_j p_j c_KV

Papers: DeepSeek-V2 (2024), section 2.1, equations 9–19 and 37–47, Table 1, the
norms of the latents in 3.1.2; cache sizes: "Insights
into DeepSeek-V3" (2025), Table 1. Attribute names are those of the released checkpoints.
Simplified: nothing; rotary positions arrive in phase 7 by overriding `rotate`.

Dimensions: B batch · T query positions · S key positions · D model width · H heads · N
no-position part and R rotary part of a query/key · V value width · C KV latent · Q query latent.

Run:  python mla_coded.py [--context 4096] [--kv-lora-rank 32]
"""

import torch
from torch import nn

from causal_attention_coded import causal_mask
from multihead_attention_coded import (
    GrowingBuffer,
    Linear,
    RMSNorm,
    fused_attention,
    product_attention,
)
from self_attention_coded import (
    Demonstration,
    demonstration_parser,
    expanded_mask,
    one_line_errors,
    parse_arguments,
)


# %% The cache
class LatentCache(GrowingBuffer):
    """One layer's [c_KV | k_R], (B, length, C + R): normed latent and rotated key, nothing else."""


# %% The module
class MultiHeadLatentAttention(nn.Module):
    """MLA with the projections of the released checkpoints.

    `q_lora_rank` is Q, or None for a plain `q_proj` (V2-Lite). The rows of `q_b_proj` (`q_proj`)
    are [N | R] per head, those of `kv_a_proj_with_mqa` [C | R], those of `kv_b_proj` [N | V] per
    head. The norms of the latents have eps 1e-6, whatever the model's other norms have.
    """

    cache_type = LatentCache  # phase 8 puts a smaller one here

    def __init__(
        self, hidden_size, num_attention_heads, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim,
        v_head_dim, q_lora_rank=None, attention_bias=False,
    ):  # fmt: skip
        super().__init__()
        sizes = dict(
            hidden_size=hidden_size, num_attention_heads=num_attention_heads,
            kv_lora_rank=kv_lora_rank, qk_nope_head_dim=qk_nope_head_dim, v_head_dim=v_head_dim,
        )  # fmt: skip
        if q_lora_rank is not None:
            sizes["q_lora_rank"] = q_lora_rank
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        if qk_rope_head_dim < 0 or qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim={qk_rope_head_dim} must be even: it rotates pairs")
        self.hidden_size, self.num_heads = hidden_size, num_attention_heads
        self.q_lora_rank, self.kv_lora_rank = q_lora_rank, kv_lora_rank
        self.qk_nope_head_dim, self.qk_rope_head_dim = qk_nope_head_dim, qk_rope_head_dim
        self.v_head_dim = v_head_dim
        qk_head_dim = qk_nope_head_dim + qk_rope_head_dim
        self.softmax_scale = qk_head_dim**-0.5

        q_rows = num_attention_heads * qk_head_dim
        if q_lora_rank is None:
            self.q_proj = Linear(hidden_size, q_rows, bias=False)
        else:
            self.q_a_proj = Linear(hidden_size, q_lora_rank, bias=attention_bias)
            self.q_a_layernorm = RMSNorm(q_lora_rank, eps=1e-6)
            self.q_b_proj = Linear(q_lora_rank, q_rows, bias=False)
        self.kv_a_proj_with_mqa = Linear(
            hidden_size, kv_lora_rank + qk_rope_head_dim, bias=attention_bias
        )
        self.kv_a_layernorm = RMSNorm(kv_lora_rank, eps=1e-6)
        kv_rows = num_attention_heads * (qk_nope_head_dim + v_head_dim)
        self.kv_b_proj = Linear(kv_lora_rank, kv_rows, bias=False)
        self.o_proj = Linear(num_attention_heads * v_head_dim, hidden_size, bias=attention_bias)

    def rotate(self, q_rope, k_rope, positions):
        """Turns the rotary halves by their positions: not here. Phase 7 overrides this method.

        q_rope (B, H, ≤ T, R), of the last tokens only; k_rope (B, T, R); positions (T,) or (B, T)
        → both, same shapes.
        """
        return q_rope, k_rope

    def new_cache(self, capacity=0):
        return self.cache_type(capacity)

    def queries(self, hidden):
        """(B, T, D) → content part (B, H, T, N) and position part (B, H, T, R)."""
        if self.q_lora_rank is None:
            rows = self.q_proj(hidden)
        else:
            rows = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden)))
        q_BHTK = rows.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return q_BHTK.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)

    def compress(self, hidden):
        """(B, T, D) → normed latent (B, T, C) and the one shared position key (B, T, R)."""
        latent, k_rope = self.kv_a_proj_with_mqa(hidden).split(
            [self.kv_lora_rank, self.qk_rope_head_dim], dim=-1
        )
        return self.kv_a_layernorm(latent), k_rope

    def forward(
        self, hidden, positions=None, mask=None, cache=None, path="expanded", start=None, last=None
    ):  # fmt: skip
        """Causal attention, (B, T, D) → (B, T, D).

        Args:
            positions: (T,) or (B, T); default: they follow on from what the cache holds.
            mask: boolean, broadcastable to (B, H, T, S), on top of the causal one.
            cache: a `LatentCache`; the T tokens are appended and attend to all that it holds. For
                inference: no gradient flows through what is cached.
            path: "expanded" rebuilds keys and values (best for many queries: training, prompts),
                "products" does the same without the fused kernel (best for short texts in BF16),
                "absorbed" attends to the latents themselves (best for few: decoding), "naive"
                goes head by head through the equations. All four are the same function.
            start: where in the cache the tokens go, see `GrowingBuffer.append`; default: behind the
                last. With a tensor, `mask` must hide what lies behind each sequence's end.
            last: outputs of the last so many tokens only, (B, last, D); all are cached.
        """
        if hidden.dim() != 3 or hidden.shape[-1] != self.hidden_size:
            raise ValueError(f"input must be (B, T, {self.hidden_size}), got {tuple(hidden.shape)}")
        paths = dict(expanded=self._expanded, products=self._products,
                     absorbed=self._absorbed, naive=self._naive)  # fmt: skip
        if path not in paths:
            raise ValueError(f"path={path!r} must be one of {', '.join(paths)}")
        B, T, _ = hidden.shape
        if last is not None and not 1 <= last <= T:
            raise ValueError(f"last={last} must be from 1 to the {T} tokens of the input")
        last = T if last is None else last
        past = 0 if cache is None else cache.length
        if start is not None:
            past = int(start.max()) if torch.is_tensor(start) else start
        if positions is None:
            positions = torch.arange(past, past + T, device=hidden.device)
        if positions.shape not in ((T,), (B, T)):
            raise ValueError(
                f"positions must be ({T},) or ({B}, {T}), got {tuple(positions.shape)}"
            )
        if mask is not None:
            mask = expanded_mask(mask, (B, self.num_heads, T, past + T))[:, :, -last:]
        q_nope_BHTN, q_rope_BHTR = self.queries(hidden[:, -last:])
        latent_BTC, k_rope_BTR = self.compress(hidden)
        q_rope_BHTR, k_rope_BTR = self.rotate(q_rope_BHTR, k_rope_BTR, positions)
        memory = torch.cat([latent_BTC, k_rope_BTR], dim=-1)  # (B, S, C + R)
        if cache is not None:
            memory = cache.append(memory, start)
        heads_BHTV = paths[path](q_nope_BHTN, q_rope_BHTR, memory, mask)
        return self.o_proj(heads_BHTV.transpose(1, 2).flatten(-2))

    def _split_memory(self, memory):
        return memory.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)

    def _products(self, q_nope_BHTN, q_rope_BHTR, memory, mask):
        return self._expanded(q_nope_BHTN, q_rope_BHTR, memory, mask, product_attention)

    def _expanded(self, q_nope_BHTN, q_rope_BHTR, memory, mask, attend=fused_attention):
        """Rebuilds all heads' keys and values, then attends as in phase 3."""
        latent_BSC, k_rope_BSR = self._split_memory(memory)
        rebuilt = self.kv_b_proj(latent_BSC).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k_nope_BHSN, v_BHSV = rebuilt.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        k_rope_BHSR = k_rope_BSR.unsqueeze(1).expand(-1, self.num_heads, -1, -1)
        q_BHTK = torch.cat([q_nope_BHTN, q_rope_BHTR], dim=-1)
        k_BHSK = torch.cat([k_nope_BHSN, k_rope_BHSR], dim=-1)
        return attend(q_BHTK, k_BHSK, v_BHSV, mask, scale=self.softmax_scale, causal=True)

    def up_projections(self, dtype):
        """The two halves of `kv_b_proj`: W_UK (H, N, C) and W_UV (H, V, C)."""
        rows = self.kv_b_proj.weight.to(dtype).unflatten(0, (self.num_heads, -1))
        return rows.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)

    def _absorbed(self, q_nope_BHTN, q_rope_BHTR, memory, mask):
        """Moves W_UK to the queries and W_UV to the outputs: multi-query attention on latents."""
        w_uk_HNC, w_uv_HVC = self.up_projections(memory.dtype)
        H, T = q_nope_BHTN.shape[1:3]
        query = torch.cat([q_nope_BHTN @ w_uk_HNC, q_rope_BHTR], dim=-1)  # (B, H, T, C + R)
        if T > 1:
            triangle_TS = causal_mask(T, memory.shape[1], device=memory.device)
            mask = triangle_TS if mask is None else mask & triangle_TS
        if mask is not None:
            mask = mask.expand(*query.shape[:3], -1).flatten(1, 2).unsqueeze(1)
        # All heads read the same keys, so heads and positions are rows of one head's queries. The
        # whole memory serves as values, too: it is read once, and the rotary part is cut off after.
        rows, memory = query.flatten(1, 2).unsqueeze(1), memory.unsqueeze(1)
        mixed = fused_attention(rows, memory, memory, mask, self.softmax_scale).squeeze(1)
        mixed_BHTC = mixed[..., : self.kv_lora_rank].unflatten(1, (H, T))
        return mixed_BHTC @ w_uv_HVC.transpose(1, 2)

    def _naive(self, q_nope_BHTN, q_rope_BHTR, memory, mask):
        """Equations 9–19 head by head; content and position scores are added, then scaled."""
        latent_BSC, k_rope_BSR = self._split_memory(memory)
        w_uk_HNC, w_uv_HVC = self.up_projections(memory.dtype)
        B, H, T, _ = q_nope_BHTN.shape
        allowed = causal_mask(T, memory.shape[1], device=memory.device)
        allowed = (allowed if mask is None else mask & allowed).expand(B, H, T, memory.shape[1])
        heads = []
        for h in range(H):
            k_nope_BSN, v_BSV = latent_BSC @ w_uk_HNC[h].T, latent_BSC @ w_uv_HVC[h].T
            content_BTS = q_nope_BHTN[:, h] @ k_nope_BSN.transpose(-2, -1)
            position_BTS = q_rope_BHTR[:, h] @ k_rope_BSR.transpose(-2, -1)
            scores_BTS = (content_BTS + position_BTS) * self.softmax_scale
            weights_BTS = scores_BTS.masked_fill(~allowed[:, h], float("-inf")).softmax(dim=-1)
            # A query with no key at all: zeros instead of 0/0.
            heads.append(weights_BTS.masked_fill(~allowed[:, h], 0.0) @ v_BSV)
        return torch.stack(heads, dim=1)


# %% The cost: numbers cached per token, and arithmetic per decoded token
def cache_elements_per_token(kind, layers, heads=1, head_width=0, groups=1, latent=0, rotary=0):
    """Numbers that a token leaves in the cache of the whole model (DeepSeek-V2, Table 1).

    `kind`: "MHA" 2·heads·head_width·layers, "GQA" 2·groups·head_width·layers, "MQA"
    2·head_width·layers, "MLA" (latent + rotary)·layers.
    """
    per_layer = {
        "MHA": 2 * heads * head_width,
        "GQA": 2 * groups * head_width,
        "MQA": 2 * head_width,
        "MLA": latent + rotary,
    }
    if kind not in per_layer:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(per_layer)}")
    return per_layer[kind] * layers


def decode_flops(attention, context, path):
    """Floating-point operations from queries to heads' outputs, one token, one layer, batch 1.

    Counted: rebuilding keys and values (expanded) or moving W_UK and W_UV (absorbed), and the two
    products of the attention itself over `context` keys. The projections, equal in both, are not.
    """
    H, C, R = attention.num_heads, attention.kv_lora_rank, attention.qk_rope_head_dim
    N, V = attention.qk_nope_head_dim, attention.v_head_dim
    if path == "expanded":
        return 2 * context * C * H * (N + V) + 2 * context * H * (N + R + V)
    if path == "absorbed":
        # The rotary part is mixed along with the latents and then cut off.
        return 2 * H * C * (N + V) + 2 * context * H * (C + R + C + R)
    raise ValueError(f"path={path!r} must be 'expanded' or 'absorbed'")


def print_cache_tables(demo):
    """DeepSeek-V2's Table 1 with V2's own sizes, and the published KB per token."""
    v2 = dict(layers=60, heads=128, head_width=128, groups=8, latent=512, rotary=64)
    published = {"MHA": 1_966_080, "GQA": 122_880, "MQA": 15_360, "MLA": 34_560}
    for kind, numbers in published.items():
        elements = cache_elements_per_token(kind, **v2)
        demo.check(
            f"V2's size (60 layers, 128 heads of 128): {kind}", "numbers cached per token",
            f"{elements:>9,} = {elements / (128 * 60):6.2f} · d_h · l", elements == numbers,
        )  # fmt: skip
    models = {
        "LLaMA-3.1-405B (GQA)": ("GQA", dict(layers=126, groups=8, head_width=128), 516.096),
        "Qwen-2.5-72B (GQA)": ("GQA", dict(layers=80, groups=8, head_width=128), 327.680),
        "DeepSeek-V3 (MLA)": ("MLA", dict(layers=61, latent=512, rotary=64), 70.272),
    }
    for name, (kind, sizes, published) in models.items():
        kilobytes = cache_elements_per_token(kind, **sizes) * 2 / 1000
        figure = f"{kilobytes:.3f} KB per token, published {published:.3f}"
        demo.check(f"BF16 cache of {name}", "", figure, kilobytes == published)


# %% The demonstration
@one_line_errors
def main(argv=None):
    parser = demonstration_parser(__doc__)
    parser.add_argument("--context", type=int, default=4096, help="keys in the decoding comparison")
    parser.add_argument("--kv-lora-rank", type=int, default=32, help="C of the small example")
    arguments = parse_arguments(parser, argv)
    if arguments.context < 1:
        raise ValueError(f"--context={arguments.context} must be at least 1")
    demo = Demonstration("mla_coded.py", arguments.device, arguments.seed)
    x_BTD = torch.randn(2, 9, 64, device=arguments.device)
    for q_lora_rank in (None, 24):
        attention = MultiHeadLatentAttention(
            64, 4, arguments.kv_lora_rank, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12,
            q_lora_rank=q_lora_rank,
        ).to(arguments.device)  # fmt: skip
        with torch.no_grad():
            naive = attention(x_BTD, path="naive")
            name = "plain queries" if q_lora_rank is None else f"query latent {q_lora_rank}"
            demo.same(f"{name}: expanded = head by head", "(B, T, D)", attention(x_BTD), naive)
            for path in ("products", "absorbed"):
                output = attention(x_BTD, path=path)
                demo.same(f"{name}: {path} = head by head", "(B, T, D)", output, naive)
            cache = LatentCache()
            pieces = [attention(x_BTD[:, :4], cache=cache)]
            for token in x_BTD[:, 4:].split(1, dim=1):
                pieces.append(attention(token, cache=cache, path="absorbed"))
        demo.same(f"{name}: prompt of 4, then 5 decoded = one pass", "(B, T, D)",
                  torch.cat(pieces, dim=1), naive)  # fmt: skip
    per_token = cache.used_bytes() // (2 * 9)
    wanted = 4 * (arguments.kv_lora_rank + 8)
    demo.check("cache: (C + R) numbers of 4 bytes", "bytes per token",
               f"{per_token} (MHA: {4 * 4 * (16 + 8 + 12)})", per_token == wanted)  # fmt: skip
    print_cache_tables(demo)
    with torch.device("meta"):
        v3 = MultiHeadLatentAttention(7168, 128, 512, 128, 64, 128, q_lora_rank=1536)
    expanded, absorbed = (
        decode_flops(v3, arguments.context, path) for path in ("expanded", "absorbed")
    )
    demo.check(
        f"V3, one layer, a token after {arguments.context}", "GFLOP",
        f"expanded {expanded / 1e9:.2f}, absorbed {absorbed / 1e9:.2f} "
        f"({expanded / absorbed:.0f}× fewer)", arguments.context == 1 or absorbed < expanded,
    )  # fmt: skip
    demo.finish("--context 131072", "--kv-lora-rank 8: a smaller cache, a lower-rank attention")


if __name__ == "__main__":
    main()
