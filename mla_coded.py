"""Phase 4: multi-head latent attention (MLA), DeepSeek's small KV cache.

Phase 3 cached every head's keys and values. MLA caches one short vector for each token instead, the
latent c_KV. One matrix can rebuild the keys and values of all heads from it. A few more numbers,
k_R, carry the position: phase 7 rotates them, here they stay as they are. We can even leave the
rebuilding out. W_UK, which rebuilds the keys, can be applied to the queries instead. W_UV, which
rebuilds the values, can be applied to the outputs instead. A decoding step has many cached tokens
but only one query per head, so this saves much work. It is called *absorption*: the same function,
computed in another order. RMSNorm divides a vector by the root of its mean square.

    c_KV = RMSNorm(W_DKV h)        k_R = W_KR h          (one k_R for all heads, from h itself)
    [k_C ; v_C] = [W_UK ; W_UV] c_KV
    c_Q = RMSNorm(W_DQ h)          [q_C ; q_R] = [W_UQ ; W_QR] c_Q
    o_i = Σ_j softmax_j((q_C·k_C + q_R·k_R) / √(N + R)) v_C        (one scale for both scores)
    absorbed:  q_C·k_C = (W_UKᵀ q_C)·c_KV        o_i = W_UV Σ_j p_j c_KV       (p_j: the softmax)

Papers: DeepSeek-V2 (2024, arXiv:2405.04434), section 2.1, equations 9–19 and 37–47, Table 1, and
3.1.2 for the norms of the latents; cache sizes: "Insights into DeepSeek-V3" (2025,
arXiv:2505.09343), Table 1. Attribute names are those of the released checkpoints.
Simplified: k_R and q_R are not rotated yet; phase 7 overrides `rotate`.
Before: phases 1 to 3. Reading 15 minutes, running 2 seconds.

Dimensions: B batch · T query positions · S key positions · D model width · H heads · N
no-position part and R rotary part of a query/key · V value width · C KV latent · Q query latent.

Run:  python mla_coded.py [--context 4096] [--kv-lora-rank 32]
"""

import torch
from torch import nn

from lesson import caches, check_forward, check_sizes, checks, demonstration, flag, require
from lesson.precision import RMSNorm
from multihead_attention_coded import RowStore, allowed_keys, fused_attention
from self_attention_coded import masked_softmax


# %% The cache
class LatentCache(caches.Cache):
    """One layer's [c_KV | k_R], (B, length, C + R): the normed latent and the position key.

    The latent is cached after its norm and k_R after its rotation (phase 7), so neither is done
    again. DeepSeek-V3 has 61 layers, C = 512 and R = 64. At 2 bytes a number, a token takes

        61 · (512 + 64) · 2 = 70,272 bytes

    instead of the keys of width 192 and the values of width 128 that phase 3 would cache for
    128 heads: 61 · 128 · (192 + 128) · 2 = 4,997,120 bytes.
    """

    def __init__(self, store=RowStore):
        super().__init__(rows=store())

    def append(self, memory):
        """Stores the rows of new tokens (B, new, C + R); returns all rows so far (B, S, C + R)."""
        return self.rows.append(memory)


# %% The module: its projections, its memory, and four paths that attend
class MultiHeadLatentAttention(nn.Module):
    """MLA with the projections of the released checkpoints.

    `q_lora_rank` is Q, or None for a plain `q_proj` (V2-Lite). Each head has N, then R rows
    in `q_b_proj` (or `q_proj`), and N, then V in `kv_b_proj`. `kv_a_proj_with_mqa` has C, then R.
    The norms of the latents have eps 1e-6, even if the model's other norms have another eps.
    """

    paths = ("naive", "expanded", "einsum", "absorbed")  # each is a method
    new_cache = LatentCache  # phase 8 puts a smaller one here
    attend = staticmethod(fused_attention)

    def __init__(
        self,
        hidden_size,
        num_attention_heads,
        kv_lora_rank,
        qk_nope_head_dim,
        qk_rope_head_dim,
        v_head_dim,
        q_lora_rank=None,
        attention_bias=False,
    ):
        super().__init__()
        checks.check_even(qk_rope_head_dim=qk_rope_head_dim)
        check_sizes(kv_lora_rank=kv_lora_rank, q_lora_rank=q_lora_rank)
        self.hidden_size, self.num_heads = hidden_size, num_attention_heads
        self.q_lora_rank, self.kv_lora_rank = q_lora_rank, kv_lora_rank
        self.qk_nope_head_dim, self.qk_rope_head_dim = qk_nope_head_dim, qk_rope_head_dim
        self.v_head_dim = v_head_dim
        qk_head_dim = qk_nope_head_dim + qk_rope_head_dim
        self.softmax_scale = qk_head_dim**-0.5

        q_rows = num_attention_heads * qk_head_dim
        if q_lora_rank is None:
            self.q_proj = nn.Linear(hidden_size, q_rows, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden_size, q_lora_rank, bias=attention_bias)
            self.q_a_layernorm = RMSNorm(q_lora_rank, eps=1e-6)
            self.q_b_proj = nn.Linear(q_lora_rank, q_rows, bias=False)
        memory_rows = kv_lora_rank + qk_rope_head_dim
        self.kv_a_proj_with_mqa = nn.Linear(hidden_size, memory_rows, bias=attention_bias)
        self.kv_a_layernorm = RMSNorm(kv_lora_rank, eps=1e-6)
        kv_rows = num_attention_heads * (qk_nope_head_dim + v_head_dim)
        self.kv_b_proj = nn.Linear(kv_lora_rank, kv_rows, bias=False)
        heads_width = num_attention_heads * v_head_dim
        self.o_proj = nn.Linear(heads_width, hidden_size, bias=attention_bias)

    def rotate(self, x, positions):
        """Returns x as it is. Phase 7 overrides this and rotates x by the positions.

        x: queries (B, H, T, R) or keys (B, T, R). positions: (T,) or (B, T).
        """
        return x

    def queries(self, hidden):
        """(B, T, D) → content part (B, H, T, N) and position part (B, H, T, R), not yet rotated."""
        if self.q_lora_rank is None:
            rows = self.q_proj(hidden)
        else:
            rows = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden)))
        q_BHTK = rows.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return q_BHTK.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)

    def remember(self, hidden, positions, cache=None):
        """(B, T, D) → [c_KV | k_R] of the cached tokens, then of these tokens: (B, S, C + R)."""
        rows = self.kv_a_proj_with_mqa(hidden)
        latent_BTC, k_rope_BTR = self.split_memory(rows)
        k_rope_BTR = self.rotate(k_rope_BTR, positions)
        memory = torch.cat([self.kv_a_layernorm(latent_BTC), k_rope_BTR], dim=-1)
        return memory if cache is None else cache.append(memory)

    def split_memory(self, memory):
        """(B, S, C + R) → latents (B, S, C) and position keys (B, S, R), which all heads share."""
        return memory.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)

    def forward(self, hidden, positions=None, mask=None, cache=None, path="expanded"):
        """Causal attention, (B, T, D) → (B, T, D).

        Args:
            positions: (T,) or (B, T); default: they continue after the cached tokens.
            mask: boolean, broadcastable to (B, H, T, S). It can remove more keys, such as padding.
            cache: a `LatentCache`. The T tokens are appended to it and attend to all its tokens.
                For inference: no gradient flows through the cache.
            path: "naive" computes the equations head by head. "expanded" rebuilds keys and values,
                which is best for many queries: training and prompts. "einsum" and "absorbed" attend
                to the latents themselves, which is best for few queries: decoding. "einsum" writes
                the equations line by line; "absorbed" calls phase 3's attention.
        """
        check_forward(hidden, self.hidden_size, self.num_heads, mask, cache, path, self.paths)
        if positions is None:
            past = 0 if cache is None else cache.length
            positions = torch.arange(past, past + hidden.shape[1], device=hidden.device)
        q_nope_BHTN, q_rope_BHTR = self.queries(hidden)
        q_rope_BHTR = self.rotate(q_rope_BHTR, positions)
        memory = self.remember(hidden, positions, cache)
        heads_BHTV = getattr(self, path)(q_nope_BHTN, q_rope_BHTR, memory, mask)
        return self.o_proj(heads_BHTV.transpose(1, 2).flatten(-2))

    def up_projections(self, dtype):
        """The two halves of `kv_b_proj`: W_UK (H, N, C) and W_UV (H, V, C)."""
        rows = self.kv_b_proj.weight.to(dtype).unflatten(0, (self.num_heads, -1))
        return rows.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)

    # The naive reference
    def naive(self, q_nope_BHTN, q_rope_BHTR, memory, mask):
        """Equations 9–19, one head after another. The two scores are added, then scaled."""
        latent_BSC, k_rope_BSR = self.split_memory(memory)
        w_uk_HNC, w_uv_HVC = self.up_projections(memory.dtype)
        H = self.num_heads
        allowed_BHTS = allowed_keys(q_nope_BHTN, memory, mask).expand(-1, H, -1, -1)
        heads = []
        for h in range(H):
            k_nope_BSN, v_BSV = latent_BSC @ w_uk_HNC[h].T, latent_BSC @ w_uv_HVC[h].T
            content_BTS = q_nope_BHTN[:, h] @ k_nope_BSN.transpose(-2, -1)
            position_BTS = q_rope_BHTR[:, h] @ k_rope_BSR.transpose(-2, -1)
            scores_BTS = (content_BTS + position_BTS) * self.softmax_scale
            heads.append(masked_softmax(scores_BTS, allowed_BHTS[:, h]) @ v_BSV)
        return torch.stack(heads, dim=1)

    # Expanded: the keys and values of all heads are rebuilt
    def expanded(self, q_nope_BHTN, q_rope_BHTR, memory, mask):
        """Rebuilds keys and values from the latents, then attends as in phase 3."""
        latent_BSC, k_rope_BSR = self.split_memory(memory)
        rebuilt = self.kv_b_proj(latent_BSC).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k_nope_BHSN, v_BHSV = rebuilt.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        k_rope_BHSR = k_rope_BSR.unsqueeze(1).expand(-1, self.num_heads, -1, -1)
        q_BHTK = torch.cat([q_nope_BHTN, q_rope_BHTR], dim=-1)
        k_BHSK = torch.cat([k_nope_BHSN, k_rope_BHSR], dim=-1)
        return self.attend(q_BHTK, k_BHSK, v_BHSV, mask, scale=self.softmax_scale, causal=True)

    # Absorbed: no keys or values are rebuilt; W_UK goes to the queries, W_UV to the outputs
    def einsum(self, q_nope_BHTN, q_rope_BHTR, memory, mask):
        """The absorbed form, one equation a line. Every head attends to the latents."""
        latent_BSC, k_rope_BSR = self.split_memory(memory)
        w_uk_HNC, w_uv_HVC = self.up_projections(memory.dtype)
        allowed_BHTS = allowed_keys(q_nope_BHTN, memory, mask)

        q_latent_BHTC = torch.einsum("bhtn,hnc->bhtc", q_nope_BHTN, w_uk_HNC)
        content_BHTS = torch.einsum("bhtc,bsc->bhts", q_latent_BHTC, latent_BSC)
        position_BHTS = torch.einsum("bhtr,bsr->bhts", q_rope_BHTR, k_rope_BSR)
        scores_BHTS = (content_BHTS + position_BHTS) * self.softmax_scale
        weights_BHTS = masked_softmax(scores_BHTS, allowed_BHTS)
        mixed_BHTC = torch.einsum("bhts,bsc->bhtc", weights_BHTS, latent_BSC)
        return torch.einsum("bhtc,hvc->bhtv", mixed_BHTC, w_uv_HVC)

    def absorbed(self, q_nope_BHTN, q_rope_BHTR, memory, mask):
        """This is multi-query attention (phase 3): the memory is the only key/value head.

        The dot product of [q_latent | q_R] and [c_KV | k_R] is the sum of both scores. The memory
        also serves as the values. Its last R columns are not needed there: they are cut off.
        """
        w_uk_HNC, w_uv_HVC = self.up_projections(memory.dtype)
        query = torch.cat([q_nope_BHTN @ w_uk_HNC, q_rope_BHTR], dim=-1)  # (B, H, T, C + R)
        head = memory.unsqueeze(1)  # (B, 1, S, C + R)
        mixed = self.attend(query, head, head, mask, scale=self.softmax_scale, causal=True)
        return mixed[..., : self.kv_lora_rank] @ w_uv_HVC.transpose(1, 2)


# %% The cost: numbers cached per token, and arithmetic per decoded token
def cache_elements_per_token(kind, layers, heads=1, head_width=0, groups=1, latent=0, rotary=0):
    """Counts the numbers that one token adds to the caches of all layers (DeepSeek-V2, Table 1).

    `kind`: "MHA" 2·heads·head_width·layers, "GQA" 2·groups·head_width·layers, "MQA"
    2·head_width·layers, "MLA" (latent + rotary)·layers.
    """
    per_layer = {
        "MHA": 2 * heads * head_width,
        "GQA": 2 * groups * head_width,
        "MQA": 2 * head_width,
        "MLA": latent + rotary,
    }
    require(kind in per_layer, f"kind={kind!r} must be one of {', '.join(per_layer)}")
    return per_layer[kind] * layers


def decode_flops(attention, context, path):
    """Counts the floating-point operations of one token in one layer, from queries to outputs.

    It counts the rebuilding of `context` keys and values (expanded) or the products with W_UK and
    W_UV (absorbed), then the two products of attention. Other projections cost the same in both.
    """
    H, C, R = attention.num_heads, attention.kv_lora_rank, attention.qk_rope_head_dim
    N, V = attention.qk_nope_head_dim, attention.v_head_dim
    require(path in ("expanded", "absorbed"), f"path={path!r} must be 'expanded' or 'absorbed'")
    if path == "expanded":
        return 2 * context * C * H * (N + V) + 2 * context * H * (N + R + V)
    # C + R twice: the values have R columns, too, which are averaged and then cut off.
    return 2 * H * C * (N + V) + 2 * context * H * (C + R + C + R)


# %% The demonstration
def check_paths(demo, attention, x_BTD, name):
    """Checks that all paths agree, with and without a cache; returns the cached bytes per token."""
    cache = LatentCache()
    with torch.no_grad():
        naive = attention(x_BTD, path="naive")
        for path in ("expanded", "einsum", "absorbed"):
            output = attention(x_BTD, path=path)
            demo.same(f"{name}: {path} = head by head", "(B, T, D)", output, naive)
        pieces = [attention(x_BTD[:, :4], cache=cache)]
        for token in x_BTD[:, 4:].split(1, dim=1):
            pieces.append(attention(token, cache=cache, path="absorbed"))
    decoded = torch.cat(pieces, dim=1)
    demo.same(f"{name}: prompt of 4, then 5 decoded = one pass", "(B, T, D)", decoded, naive)
    return cache.used_bytes() // x_BTD[..., 0].numel()


def check_published_sizes(demo):
    """Checks V2's Table 1 (d_h: head width, l: layers) and the published KB per token."""
    v2 = dict(layers=60, heads=128, head_width=128, groups=8, latent=512, rotary=64)
    published = {"MHA": 1_966_080, "GQA": 122_880, "MQA": 15_360, "MLA": 34_560}
    for kind, numbers in published.items():
        elements = cache_elements_per_token(kind, **v2)
        figure = f"{elements:>9,} = {elements / (128 * 60):6.2f} · d_h · l"
        what = f"V2's size (60 layers, 128 heads of 128): {kind}"
        demo.check(what, "numbers cached per token", figure, elements == numbers)
    models = {
        "LLaMA-3.1-405B (GQA)": ("GQA", dict(layers=126, groups=8, head_width=128), 516.096),
        "Qwen-2.5-72B (GQA)": ("GQA", dict(layers=80, groups=8, head_width=128), 327.680),
        "DeepSeek-V3 (MLA)": ("MLA", dict(layers=61, latent=512, rotary=64), 70.272),
    }
    for name, (kind, sizes, published) in models.items():
        kilobytes = cache_elements_per_token(kind, **sizes) * 2 / 1000
        figure = f"{kilobytes:.3f} KB per token, published {published:.3f}"
        demo.check(f"BF16 cache of {name}", "", figure, kilobytes == published)


@demonstration(__doc__, flag("context", 4096, "keys in the decoding comparison", at_least=1),
               flag("kv-lora-rank", 32, "C of the small example", at_least=1))
def main(demo, arguments):
    sizes = dict(qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12)
    x_BTD = torch.randn(2, 9, 64, device=demo.device)
    for q_lora_rank, name in ((None, "plain queries"), (24, "query latent 24")):
        attention = MultiHeadLatentAttention(
            64, 4, arguments.kv_lora_rank, q_lora_rank=q_lora_rank, **sizes
        )
        per_token = check_paths(demo, attention.to(demo.device), x_BTD, name)
    wanted, all_heads = 4 * (arguments.kv_lora_rank + 8), 4 * 4 * (16 + 8 + 12)
    figure = f"{per_token} (MHA: {all_heads})"
    demo.check("cache: (C + R) numbers of 4 bytes", "bytes per token", figure, per_token == wanted)
    check_published_sizes(demo)

    v3 = dict(qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, q_lora_rank=1536)
    with torch.device("meta"):
        attention = MultiHeadLatentAttention(7168, 128, 512, **v3)
    context = arguments.context
    expanded, absorbed = (decode_flops(attention, context, p) for p in ("expanded", "absorbed"))
    figure = f"expanded {expanded / 1e9:.2f}, absorbed {absorbed / 1e9:.2f}"
    fewer = context == 1 or absorbed < expanded
    what = f"V3, one layer, one token, {context} keys: {expanded / absorbed:.0f}× fewer"
    demo.check(what, "GFLOP", figure, fewer)
    demo.finish("--context 131072: 114× fewer FLOPs absorbed; --context 1: about as many",
                "--kv-lora-rank 8: 64 cached bytes per token, but keys and values of lower rank")


if __name__ == "__main__":
    main()
