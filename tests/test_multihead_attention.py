"""Phase 3: heads, fused path, caches, grouped queries."""

import math
import re

import pytest
import torch
from torch import nn

from mla_coded import cache_elements_per_token
from multihead_attention_coded import (
    KVCache,
    MultiHeadAttention,
    RowStore,
    allowed_keys,
    attention_at_once,
    attention_by_heads,
    fused_attention,
    heads_read,
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


@pytest.mark.parametrize("bias", [True, False])
def test_all_projections_have_a_bias_or_none(bias):
    attention = MultiHeadAttention(16, 4, 2, bias=bias)
    assert {name for name, _ in attention.named_children()} == {f"{x}_proj" for x in "qkvo"}
    assert all((projection.bias is not None) == bias for projection in attention.children())


def test_by_default_no_bias_no_dropout_and_a_key_value_head_for_each_head():
    attention = MultiHeadAttention(16, 4)
    assert {p.shape for p in attention.parameters()} == {(16, 16)}
    assert attention.dropout == 0


@KINDS
@pytest.mark.parametrize("path", ["loop", "explicit", "fused"])
@pytest.mark.parametrize("chunks", [[1] * 9, [4, 5], [1, 3, 1, 2, 2]])
def test_cached_chunks_match_one_pass(kv_heads, path, chunks):
    attention, x, cache = MultiHeadAttention(32, 8, kv_heads), torch.randn(2, 9, 32), KVCache()
    with torch.no_grad():
        pieces = [attention(part, cache=cache, path=path) for part in x.split(chunks, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), attention(x, path="loop"))


@pytest.mark.parametrize("path", ["loop", "explicit", "fused"])
def test_a_mask_covers_the_cached_tokens_too(path):
    attention, x, cache = MultiHeadAttention(16, 4, 2), torch.randn(2, 6, 16), KVCache()
    real = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    real[1, ..., :2] = False  # the second text is padded on the left
    with torch.no_grad():
        attention(x[:, :4], real[..., :4], cache, path=path)
        got = attention(x[:, 4:], real, cache, path=path)
        torch.testing.assert_close(got[0], attention(x[:1])[0, 4:])
        torch.testing.assert_close(got[1], attention(x[1:, 2:])[0, 2:])


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


def test_neighbours_share_a_head_as_the_docstring_shows():
    rows = dict(re.findall(r"^ +([hg])    ([\d ]+)$", attention_by_heads.__doc__, re.MULTILINE))
    shown = {letter: [int(number) for number in row.split()] for letter, row in rows.items()}
    assert shown["h"] == list(range(8))
    for attend in MultiHeadAttention.paths.values():
        assert heads_read(attend, 8, 2) == shown["g"]
    tiled = torch.arange(2.0).repeat(4).int().tolist()
    assert " ".join(map(str, tiled)) in attention_at_once.__doc__ and tiled != shown["g"]


@pytest.mark.performance
def test_the_sizes_in_the_docstring_are_those_of_table_1():
    table = re.findall(r"(M\w+|GQA).*?((?:\d+ [·+] )+\d+) +([\d,]+) +([\d.]+) GB", KVCache.__doc__)
    assert [kind for kind, *_ in table] == ["MHA", "GQA", "MQA", "MLA"]
    v2 = dict(layers=60, heads=128, head_width=128, groups=8, latent=512, rotary=64)
    for kind, per_layer, per_token, whole_text in table:
        numbers = cache_elements_per_token(kind, **v2)
        assert 60 * eval(per_layer.replace("·", "*")) == numbers
        assert per_token == f"{2 * numbers:,}"
        assert whole_text == f"{2 * numbers * 131_072 / 1e9:.1f}"


@pytest.mark.performance
@pytest.mark.parametrize(
    ("dropout", "value_width", "stored"), [(0.0, 8, False), (0.0, 4, False), (0.1, 8, True)]
)
def test_the_fused_kernel_keeps_no_weights_but_a_composition_does(dropout, value_width, stored):
    T, sizes = 64, []

    def note(tensor):
        sizes.append(tensor.numel())
        return tensor

    q, k, v = (torch.randn(1, 2, T, K, requires_grad=True) for K in (8, 8, value_width))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        fused_attention(q, k, v, dropout_p=dropout, causal=True)
    # fused, the largest is the mask, which all heads share
    assert (2 * T * T in sizes) == stored and max(sizes) <= (2 if stored else 1) * T * T


def test_the_kernels_own_flag_aligns_the_first_query_where_ours_aligns_the_last():
    q, (k, v) = torch.randn(1, 1, 2, 4), torch.randn(2, 1, 1, 4, 4)
    first, last = torch.ones(2, 4).tril(0) > 0, torch.ones(2, 4).tril(2) > 0
    assert first.sum(-1).tolist() == [1, 2] and last.sum(-1).tolist() == [3, 4]
    with_flag = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(with_flag, attention_by_heads(q, k, v, first))
    ours = fused_attention(q, k, v, causal=True)
    torch.testing.assert_close(ours, attention_by_heads(q, k, v, last))


def test_the_online_softmax_of_the_docstring():
    scores, values = [0.0, math.log(2), 0.0], [1.0, 4.0, 1.0]
    m, l, o, shown = -math.inf, 0.0, 0.0, []  # noqa: E741
    for s, v in zip(scores, values, strict=True):
        new = max(m, s)
        l, o = (x * math.exp(m - new) + math.exp(s - new) * y for x, y in ((l, 1), (o, v)))  # noqa: E741
        m = new
        shown.append((m, l, o))
    torch.testing.assert_close(torch.tensor(shown), torch.tensor(
        [[0, 1, 1], [math.log(2), 1 / 2 + 1, 1 / 2 + 4], [math.log(2), 2, 5]]))
    lines = ["m     0    ln 2           ln 2", "l     1    1/2 + 1        3/2 + 1/2 = 2",
             "o     1    1/2 + 4        9/2 + 1/2 = 5        o / l = 5/2"]
    assert all(line in fused_attention.__doc__ for line in lines)
    weights, running = (2 * 128 * 4096 * numbers / 1e9 for numbers in (4096, 2 + 128))
    assert f"{weights:.1f} GB a layer" in fused_attention.__doc__
    assert f"{running:.1f} GB at V = 128" in fused_attention.__doc__
    key, value = (torch.tensor(x).reshape(1, 1, 3, 1) for x in (scores, values))
    assert fused_attention(torch.ones(1, 1, 1, 1), key, value).item() == pytest.approx(5 / 2)


@pytest.mark.parametrize("shape", [(7,), (1, 7), (5, 7), (4, 5, 7), (2, 1, 5, 7)])
@pytest.mark.parametrize("causal", [True, False])
def test_masks_of_any_rank_act_alike_on_all_functions(shape, causal):
    q, (k, v) = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 2, 7, 8)
    mask = torch.rand(shape) > 0.3
    by_heads = attention_by_heads(q, k, v, mask, causal=causal)
    torch.testing.assert_close(attention_at_once(q, k, v, mask, causal=causal), by_heads)
    torch.testing.assert_close(fused_attention(q, k, v, mask, causal=causal), by_heads)


@pytest.mark.parametrize("causal", [True, False])
def test_allowed_keys_joins_both_masks(causal):
    query, key, real = torch.ones(1, 2, 3, 4), torch.ones(1, 1, 5, 4), torch.ones(5) > 0
    real[1] = False
    allowed = allowed_keys(query, key, real, causal)
    rows = [[1, 0, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 1, 1, 1]] if causal else [[1, 0, 1, 1, 1]] * 3
    assert torch.equal(allowed.expand(1, 2, 3, 5), torch.tensor(rows).bool().expand(1, 2, 3, 5))
    assert allowed.dim() == 4 and allowed.shape[1] == 1  # the heads share it
    assert allowed_keys(query, key, causal=False) is None


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
    with pytest.raises(ValueError, match="num_heads=4 must be divisible by num_kv_heads=0"):
        MultiHeadAttention(32, 4, 0)
    with pytest.raises(ValueError, match="dropout=1.0 must be at least 0 and below 1"):
        MultiHeadAttention(32, 4, dropout=1.0)
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
    check_script("multihead_attention_coded.py", ["--kv-heads", 3], "num_kv_heads=3")
