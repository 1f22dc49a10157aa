"""Phase 3: heads, fused path, caches, grouped queries."""

import pytest
import torch
from torch import nn

from multihead_attention_coded import (
    KVCache,
    MultiHeadAttention,
    RowStore,
    attention_at_once,
    attention_by_heads,
    fused_attention,
)
from self_attention_coded import scaled_dot_product_attention

KINDS = pytest.mark.parametrize("kv_heads", [8, 2, 1])


@KINDS
@pytest.mark.parametrize("causal", [True, False])
def test_three_paths_agree_forward_and_backward(kv_heads, causal):
    attention, x = MultiHeadAttention(32, 8, kv_heads, bias=True), torch.randn(2, 6, 32)
    results = {}
    for path in ("loop", "explicit", "fused"):
        attention.zero_grad()
        output = attention(x, path=path, causal=causal)
        output.square().sum().backward()
        results[path] = [output.detach(), *(p.grad.clone() for p in attention.parameters())]
    for path in ("explicit", "fused"):
        # gradients are sums of some hundred products: a few float32 roundings apart
        torch.testing.assert_close(results[path], results["loop"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", ["loop", "explicit", "fused"])
def test_padding_mask_and_dropout_act_on_every_path(path):
    attention, x = MultiHeadAttention(16, 4, 2, dropout=0.5).eval(), torch.randn(2, 6, 16)
    real = torch.tensor([False, False, True, True, True, True])
    output = attention(x, mask=real, path=path)
    torch.testing.assert_close(output[:, 2:], attention(x[:, 2:], path=path))
    attention.train()
    assert not torch.allclose(attention(x, path=path), attention(x, path=path))
    attention.eval()
    assert torch.equal(attention(x, path=path), attention(x, path=path))


@pytest.mark.comparison
def test_matches_torch_multihead_attention():
    ours, theirs = (
        MultiHeadAttention(24, 4, bias=True),
        nn.MultiheadAttention(24, 4, batch_first=True),
    )
    with torch.no_grad():
        theirs.in_proj_weight.copy_(
            torch.cat([ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight])
        )
        theirs.in_proj_bias.copy_(torch.cat([ours.q_proj.bias, ours.k_proj.bias, ours.v_proj.bias]))
        theirs.out_proj.weight.copy_(ours.o_proj.weight)
        theirs.out_proj.bias.copy_(ours.o_proj.bias)
    x = torch.randn(2, 7, 24)
    forbidden = nn.Transformer.generate_square_subsequent_mask(7)
    expected, _ = theirs(x, x, x, attn_mask=forbidden, is_causal=True, need_weights=False)
    for path in ("loop", "explicit", "fused"):
        torch.testing.assert_close(ours(x, path=path), expected, rtol=1e-5, atol=1e-5)


@KINDS
@pytest.mark.parametrize("path", ["loop", "explicit", "fused"])
@pytest.mark.parametrize("chunks", [[1] * 9, [4, 5], [1, 3, 1, 2, 2]])
def test_cached_chunks_match_one_pass(kv_heads, path, chunks):
    attention, x, cache = MultiHeadAttention(32, 8, kv_heads), torch.randn(2, 9, 32), KVCache()
    with torch.no_grad():
        pieces = [attention(part, cache=cache, path=path) for part in x.split(chunks, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), attention(x, path="loop"))


def test_editing_a_token_leaves_earlier_outputs_alone_with_a_cache():
    attention, x, outputs = MultiHeadAttention(16, 4), torch.randn(1, 8, 16), []
    changed = x.clone()
    changed[:, 6] += 1
    for text in (x, changed):
        cache = KVCache()
        outputs.append(torch.cat([attention(p, cache=cache) for p in text.split([3, 5], 1)], 1))
    assert torch.equal(outputs[0][:, :6], outputs[1][:, :6])
    assert not torch.equal(outputs[0][:, 6:], outputs[1][:, 6:])


@pytest.mark.performance
@KINDS
def test_cache_holds_two_widths_of_the_kv_heads_per_token(kv_heads):
    attention, cache = MultiHeadAttention(32, 8, kv_heads), KVCache()
    attention(torch.randn(3, 11, 32), cache=cache)
    assert cache.used_bytes() == 3 * 11 * 2 * kv_heads * (32 // 8) * 4


def test_a_store_returns_all_rows_and_carries_no_gradient():
    store, rows = RowStore(), torch.randn(2, 5, 3, requires_grad=True)
    assert (store.length, store.used_bytes()) == (0, 0)
    store.append(rows[:, :2])
    everything = store.append(rows[:, 2:])
    assert torch.equal(everything, rows) and not everything.requires_grad
    assert (store.length, store.used_bytes()) == (5, 2 * 5 * 3 * 4)
    store.truncate(2)
    assert torch.equal(store.append(rows[:, 4:]), rows[:, [0, 1, 4]])


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_heads_at_once_are_heads_one_by_one(groups):
    q, (k, v) = torch.randn(2, 4, 3, 8), torch.randn(2, 2, groups, 5, 8)
    mask = torch.rand(2, 1, 3, 5) > 0.3
    by_heads = attention_by_heads(q, k, v, mask)
    torch.testing.assert_close(attention_at_once(q, k, v, mask), by_heads)
    torch.testing.assert_close(fused_attention(q, k, v, mask), by_heads)


def test_cache_rolls_back():
    attention, x, cache = MultiHeadAttention(16, 4), torch.randn(1, 6, 16), KVCache()
    with torch.no_grad():
        attention(x[:, :4], cache=cache)
        attention(torch.randn(1, 3, 16), cache=cache)  # a guess that proves wrong
        cache.truncate(4)
        torch.testing.assert_close(attention(x[:, 4:], cache=cache), attention(x)[:, 4:])


@pytest.mark.parametrize("value_width", [3, 8, 12])
def test_fused_attention_takes_any_value_width(value_width):
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, value_width)
    mask = torch.rand(2, 1, 5, 7) > 0.3
    mask[..., 0] = True
    expected, _ = scaled_dot_product_attention(q, k, v, mask, scale=0.2)
    torch.testing.assert_close(fused_attention(q, k, v, mask, scale=0.2), expected)


def test_fused_attention_gives_zeros_for_a_fully_masked_row():
    q = torch.randn(1, 2, 3, 4, requires_grad=True)
    mask = torch.tensor([[True], [False], [True]]).expand(3, 3)
    output = fused_attention(q, q.detach(), q.detach(), mask)
    output.sum().backward()
    assert (output[:, :, 1] == 0).all() and q.grad.isfinite().all()


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="d_model=30 must be divisible by num_heads=4"):
        MultiHeadAttention(30, 4)
    with pytest.raises(ValueError, match="num_heads=4 must be divisible by num_kv_heads=3"):
        MultiHeadAttention(32, 4, 3)
    with pytest.raises(ValueError, match=r"input must be \(B, T, 8\), got \(2, 8\)"):
        MultiHeadAttention(8, 2)(torch.ones(2, 8))
    with pytest.raises(ValueError, match="path='magic'"):
        MultiHeadAttention(8, 2)(torch.ones(1, 2, 8), path="magic")
    with pytest.raises(ValueError, match="mask must be boolean"):
        MultiHeadAttention(8, 2)(torch.ones(1, 2, 8), mask=torch.ones(2))
    cache = KVCache()
    with pytest.raises(ValueError, match="path='magic'"):
        MultiHeadAttention(8, 2)(torch.ones(1, 2, 8), path="magic", cache=cache)
    with pytest.raises(ValueError, match="mask must be broadcastable"):
        MultiHeadAttention(8, 2)(torch.ones(1, 2, 8), torch.ones(3, 3) > 0, cache=cache)
    assert cache.length == 0
    MultiHeadAttention(8, 2)(torch.ones(1, 2, 8), cache=cache)
    with pytest.raises(ValueError, match="cannot truncate a cache of length 2 to 3"):
        cache.truncate(3)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        MultiHeadAttention(8, 2)(torch.ones(2, 1, 8), cache=cache)


@pytest.mark.integration
def test_script(check_script):
    check_script("multihead_attention_coded.py", [], ["--kv-heads", 3], "num_kv_heads=3")
