"""Picks the quickest attention: two products for short BF16 texts, absorbed for few queries."""

import functools

import torch
import torch.nn.functional as F

from causal_attention_coded import causal_mask
from multihead_attention_coded import allowed_keys

# Up to so many tokens, it pays to store all scores. With one sequence of 1,024, a training step
# takes 0.30 s, and 0.33 fused. With one of 2,048, it takes 1.07 s and 827 MB; fused, 0.80 and 544.
PRODUCTS_UP_TO = 1024
# From so many queries on, the expanded path is faster than the absorbed one. After 1,024 tokens, 24
# queries take 7.3 ms absorbed and 8.4 expanded; 64 take 12.9 and 12.5 (benchmarks/scaling.py).
EXPAND_FROM = 48


def quickest_attention(query, key, value, mask=None, scale=None, causal=False):
    """`fused_attention`, by two products where they are faster: short texts in BF16 on a CPU."""
    T, S = query.shape[-2], key.shape[-2]
    if key.shape[1] == 1 < query.shape[1]:
        return attention_of_rows(query, key, value, mask, scale, causal)
    short = T == S <= PRODUCTS_UP_TO and query.dtype == torch.bfloat16
    pays = short and query.device.type == "cpu" and query.shape[1] == key.shape[1]
    attend = product_attention if pays else kernel_attention
    return attend(query, key, value, mask, scale=scale, causal=causal)


def kernel_attention(query, key, value, mask=None, scale=None, causal=False):
    """`fused_attention` that makes no causal mask for a whole text or for a single query.

    For a whole text, it uses the kernel's own causal flag, which lines up the first query with the
    first key. A single query sees all keys. Other texts share one mask in all layers.
    """
    (T, K), (S, V) = query.shape[-2:], value.shape[-2:]
    use_flag = causal and mask is None and T == S
    if causal and mask is None and 1 < T < S:
        mask = causal_bias(1, query, S)
    else:
        mask = allowed_keys(query, key, mask, causal and not use_flag and T > 1)
    if V < K:  # the CPU kernel needs equal widths, so zeros fill up the values
        value = F.pad(value, (0, K - V))
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=use_flag, scale=scale,
        enable_gqa=key.shape[-3] != query.shape[-3],
    )
    return output[..., :V]


def attention_of_rows(query, key, value, mask=None, scale=None, causal=False):
    """`fused_attention` of many heads over a single key/value head, as in MLA's absorbed path.

    The queries of all heads become rows of one head, (B, 1, H·T, K). So one pass over the keys
    serves many rows. Separate heads would need a pass each.
    """
    H, T = query.shape[1:3]
    if mask is not None:
        allowed_BHTS = allowed_keys(query, key, mask, causal).expand(-1, H, T, -1)
        mask = allowed_BHTS.flatten(1, 2).unsqueeze(1)
    elif causal and T > 1:
        mask = causal_bias(H, query, key.shape[-2])
    rows = query.flatten(1, 2).unsqueeze(1)
    mixed = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale).squeeze(1)
    return mixed.unflatten(1, (H, T))


def causal_bias(heads, query, S):
    """The causal mask of T queries and S keys in the form that the kernel adds to the scores.

    It is 0 for an allowed key and −∞ for another one, (1, 1, heads·T, S). All layers of a pass ask
    for the same one, so the last one is kept. This saves 6 to 11 % of a pass of 2 to 32 tokens.
    """
    inference = torch.is_inference_mode_enabled()  # such a tensor cannot serve in training
    return _kept_bias(heads, query.shape[-2], S, query.dtype, query.device, inference)


@functools.lru_cache(maxsize=1)
def _kept_bias(heads, T, S, dtype, device, inference):
    hidden_TS = ~causal_mask(T, S, device)
    bias_TS = torch.zeros(T, S, dtype=dtype, device=device).masked_fill_(hidden_TS, -torch.inf)
    return bias_TS.repeat(heads, 1)[None, None]


def product_attention(query, key, value, mask=None, scale=None, causal=False):
    """`fused_attention` as two batched matrix products with the scores in between.

    It stores all B·H·T·S scores, which the fused kernel avoids. For short texts, they fit in the
    processor's cache, and its matrix units run at full rate. With 32 heads of 256 × 48 in BF16,
    forward and backward take 3.6 ms, and 9.5 fused (FP32: 7.9 and 8.6). The shapes are those of
    `fused_attention` with groups = H.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    shape = (*query.shape[:-1], key.shape[-2])
    allowed = allowed_keys(query, key, mask, causal)
    bias = query.new_zeros(1)  # hides nothing
    if allowed is not None:  # finite, so that a row without any key gives no NaN
        hidden = torch.finfo(query.dtype).min / 2
        bias = query.new_zeros(allowed.shape).masked_fill(~allowed, hidden)
    scores = torch.baddbmm(
        bias.expand(shape).flatten(0, 1), query.flatten(0, 1), key.flatten(0, 1).mT, alpha=scale
    )
    output = torch.bmm(scores.softmax(dim=-1), value.flatten(0, 1)).unflatten(0, shape[:2])
    return output if mask is None else output * allowed.any(dim=-1, keepdim=True)
