"""Phase 4: latent attention, its cache, its paths and its published sizes."""

import re

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from mla_coded import (
    LatentCache,
    MultiHeadLatentAttention,
    cache_elements_per_token,
    decode_flops,
)

SIZES = {
    "hidden_size": 32, "num_attention_heads": 4, "kv_lora_rank": 12, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4, "v_head_dim": 6,
}
QUERIES = pytest.mark.parametrize("q_lora_rank", [None, 10])


def build(q_lora_rank=None, **changes):
    return MultiHeadLatentAttention(**{**SIZES, **changes}, q_lora_rank=q_lora_rank)


@QUERIES
@pytest.mark.parametrize("path", ["expanded", "einsum", "absorbed"])
@pytest.mark.parametrize("v_head_dim", [6, 12, 20])
def test_paths_match_head_by_head_forward_and_backward(q_lora_rank, path, v_head_dim):
    attention = build(q_lora_rank, v_head_dim=v_head_dim)
    attention.softmax_scale *= 1.5  # phase 7 changes it
    x = torch.randn(2, 7, 32)
    results = []
    for kind in (path, "naive"):
        attention.zero_grad()
        output = attention(x, path=kind)
        output.square().sum().backward()
        results.append([output.detach(), *(p.grad.clone() for p in attention.parameters())])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


@QUERIES
@pytest.mark.parametrize("attention_bias", [False, True])
def test_matches_the_equations_in_numpy(q_lora_rank, attention_bias):
    attention = build(q_lora_rank, attention_bias=attention_bias).double()
    x = torch.randn(1, 5, 32).double()
    with torch.no_grad():
        attention.kv_a_layernorm.weight.uniform_(0.5, 2)
    w = {name: p.detach().numpy() for name, p in attention.named_parameters()}
    biased = ["kv_a_proj_with_mqa", "o_proj"] + ["q_a_proj"] * (q_lora_rank is not None)
    names = {f"{name}.bias" for name in biased if attention_bias}
    assert {name for name in w if name.endswith("bias")} == names
    h = x[0].numpy()

    def project(rows, name):
        return rows @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def norm(rows, weight):
        return rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-6) * weight

    down = project(h, "kv_a_proj_with_mqa")
    latent, k_rope = norm(down[:, :12], w["kv_a_layernorm.weight"]), down[:, 12:]
    if q_lora_rank is None:
        queries = project(h, "q_proj")
    else:
        compressed = norm(project(h, "q_a_proj"), w["q_a_layernorm.weight"])
        queries = project(compressed, "q_b_proj")
    outputs = []
    for head in range(4):
        q = queries[:, head * 12 : (head + 1) * 12]
        rows = w["kv_b_proj.weight"][head * 14 : (head + 1) * 14]
        k, v = np.concatenate([latent @ rows[:8].T, k_rope], 1), latent @ rows[8:].T
        scores = np.where(np.tril(np.ones((5, 5))) > 0, q @ k.T / np.sqrt(12), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        outputs.append(weights / weights.sum(-1, keepdims=True) @ v)
    expected = project(np.concatenate(outputs, 1), "o_proj")
    np.testing.assert_allclose(attention(x)[0].detach().numpy(), expected, rtol=1e-10, atol=1e-12)


@QUERIES
@pytest.mark.parametrize("path", ["expanded", "einsum", "absorbed", "naive"])
@pytest.mark.parametrize("chunks", [[1] * 9, [5, 4], [3, 1, 1, 4]])
def test_cached_chunks_match_one_pass(q_lora_rank, path, chunks):
    attention, x, cache = build(q_lora_rank), torch.randn(2, 9, 32), LatentCache()
    with torch.no_grad():
        pieces = [attention(part, cache=cache, path=path) for part in x.split(chunks, dim=1)]
        naive = attention(x, path="naive")
    torch.testing.assert_close(torch.cat(pieces, 1), naive, rtol=1e-4, atol=1e-5)


@pytest.mark.performance
def test_cache_holds_exactly_the_latent_and_one_rotary_key():
    attention, cache = build(), LatentCache()
    attention(torch.randn(3, 7, 32), cache=cache)
    assert cache.used_bytes() == 3 * 7 * (12 + 4) * 4


def test_cached_latent_is_normed_and_the_rotary_key_comes_from_the_hidden_state():
    attention, cache, x = build(), LatentCache(), torch.randn(1, 6, 32)
    attention(x, cache=cache)
    latent, k_rope = cache.rows.rows.split([12, 4], dim=-1)
    torch.testing.assert_close(latent.square().mean(-1), torch.ones(1, 6), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(k_rope, x @ attention.kv_a_proj_with_mqa.weight[12:].T)


@pytest.mark.parametrize("path", ["expanded", "einsum", "absorbed", "naive"])
def test_no_output_depends_on_a_later_token(path):
    attention, x = build(), torch.randn(1, 6, 32)
    changed = x.clone()
    changed[:, 4] += 1
    before, after = attention(x, path=path), attention(changed, path=path)
    assert torch.equal(before[:, :4], after[:, :4]) and not torch.equal(before, after)


@pytest.mark.parametrize("path", ["expanded", "einsum", "absorbed", "naive"])
def test_left_padding_changes_nothing_and_hidden_rows_are_zero(path):
    attention, x = build(), torch.randn(1, 6, 32)
    real = torch.tensor([False, False, True, True, True, True])
    output = attention(x, mask=real[None, None, None, :], path=path)
    torch.testing.assert_close(output[:, 2:], attention(x[:, 2:], path=path), rtol=1e-4, atol=1e-5)
    assert (output[:, :2] == 0).all()


@pytest.mark.parametrize("path", ["expanded", "einsum", "absorbed", "naive"])
def test_each_head_obeys_its_own_mask(path):
    attention, x = build(), torch.randn(2, 6, 32)
    attention.o_proj = torch.nn.Identity()  # the output is the heads, side by side
    mask_BHTS = torch.rand(2, 4, 6, 6) < 0.6
    heads = attention(x, mask=mask_BHTS, path=path).chunk(4, dim=-1)
    for h, head in enumerate(heads):
        same_for_all = attention(x, mask=mask_BHTS[:, h, None], path="naive")
        torch.testing.assert_close(head, same_for_all.chunk(4, dim=-1)[h], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", ["expanded", "einsum", "absorbed", "naive"])
def test_padding_stays_hidden_in_the_cache(path):
    attention, x, cache = build(), torch.randn(2, 6, 32), LatentCache()
    real_BHTS = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()[:, None, None]
    pieces = [
        attention(x[:, start:end], mask=real_BHTS[..., :end], cache=cache, path=path)
        for start, end in ((0, 4), (4, 5), (5, 6))
    ]
    one_pass = attention(x, mask=real_BHTS, path="naive")
    torch.testing.assert_close(torch.cat(pieces, 1), one_pass, rtol=1e-4, atol=1e-5)


def test_positions_continue_after_the_cached_tokens_unless_they_are_given():
    attention, x, cache, seen = build(), torch.randn(2, 3, 32), LatentCache(), []
    attention.rotate = lambda part, positions: seen.append(positions.tolist()) or part
    attention(x)
    attention(x, cache=cache)
    attention(x[:, :2], cache=cache)
    attention(x[:, :1], positions=torch.tensor([[7], [9]]), cache=cache)
    # each time for the queries, then for the keys
    assert seen[::2] == seen[1::2] == [[0, 1, 2], [0, 1, 2], [3, 4], [[7], [9]]]


def test_positions_are_made_on_the_device_of_the_input():
    attention, devices = build().to("meta"), set()
    attention.rotate = lambda part, positions: devices.add(positions.device.type) or part
    attention(torch.ones(1, 3, 32, device="meta"))
    assert devices == {"meta"}


@pytest.mark.parametrize("path", ["expanded", "einsum", "absorbed"])
def test_the_smallest_sizes_work(path):
    attention = MultiHeadLatentAttention(1, 1, 1, 1, 2, 1, q_lora_rank=1)
    x = torch.randn(1, 3, 1)
    output = attention(x, path=path)
    assert output.shape == (1, 3, 1) and output.abs().sum() > 0
    torch.testing.assert_close(output, attention(x, path="naive"))


@pytest.mark.parametrize("path", ["expanded", "einsum", "absorbed", "naive"])
def test_what_was_remembered_is_attended_to(path):
    attention, x = build(), torch.randn(2, 9, 32)
    whole_cache, cache = LatentCache(), LatentCache()
    whole = attention(x, cache=whole_cache, path=path)
    attention.remember(x[:, :7], torch.arange(7), cache)
    last = attention(x[:, 7:], cache=cache, path=path)
    # another order of summation
    torch.testing.assert_close(last, whole[:, 7:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cache.rows.rows, whole_cache.rows.rows)


def test_a_model_without_positions_parts_works():
    attention, x = build(qk_rope_head_dim=0), torch.randn(1, 4, 32)
    torch.testing.assert_close(attention(x, path="absorbed"), attention(x, path="naive"))


def test_every_parameter_gets_a_gradient():
    attention = build(10)
    attention(torch.randn(2, 5, 32)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in attention.parameters())


def test_published_cache_sizes():
    mla = {"latent": 512, "rotary": 64}
    assert cache_elements_per_token("MLA", 27, **mla) == 15_552  # V2-Lite
    assert cache_elements_per_token("MLA", 60, **mla) == 34_560  # V2
    assert cache_elements_per_token("MLA", 61, **mla) * 2 == 70_272  # V3, bytes in BF16
    assert cache_elements_per_token("GQA", 80, groups=8, head_width=128) * 2 == 327_680
    assert cache_elements_per_token("GQA", 126, groups=8, head_width=128) * 2 == 516_096
    v2 = {"heads": 128, "head_width": 128, "groups": 8}
    sizes = [cache_elements_per_token(kind, 60, **v2) for kind in ("MHA", "GQA", "MQA")]
    assert sizes == [1_966_080, 122_880, 15_360]
    dense_67b = cache_elements_per_token("GQA", 95, groups=8, head_width=128) * 2
    # The published 93.3 % counts 6 bits a number; at equal precision it is 82.2 %.
    assert 1 - 34_560 * 6 / 8 / dense_67b == pytest.approx(0.93339, abs=1e-5)
    assert 1 - 34_560 * 2 / dense_67b == pytest.approx(0.82237, abs=1e-5)


def test_sizes_that_are_not_given_count_as_one_head_and_no_width():
    for kind in ("MHA", "GQA", "MQA", "MLA"):
        assert cache_elements_per_token(kind, 3) == 0
    for kind in ("MHA", "GQA", "MQA"):
        assert cache_elements_per_token(kind, 3, head_width=8) == 3 * 2 * 8
    assert cache_elements_per_token("MLA", 3, latent=8) == 3 * 8


@pytest.mark.performance
def test_the_cache_sizes_in_the_docstring_add_up():
    sums = re.findall(r"(\d+ · [\d ·+()]+) = ([\d,]+) bytes", LatentCache.__doc__)
    assert [size for _, size in sums] == ["70,272", "4,997,120"]
    for numbers, size in sums:
        assert eval(numbers.replace("·", "*")) == int(size.replace(",", ""))
    assert 2 * cache_elements_per_token("MLA", 61, latent=512, rotary=64) == 70_272  # V3


@pytest.mark.performance
@pytest.mark.parametrize("context", [1, 16, 40])
def test_counted_decode_flops_match_the_counter(context):
    attention, cache = build(), LatentCache()
    attention(torch.randn(1, context - 1, 32), cache=cache) if context > 1 else None
    one = torch.randn(1, 1, 32)
    counts = {}
    for path, counted in (("expanded", "naive"), ("absorbed", "absorbed")):
        # The counter has no formula of its own for the CPU's fused attention.
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        formula = {fused: lambda *shapes, out_shape, **_: sdpa_flop_count(*shapes[:3])}
        counter = FlopCounterMode(display=False, custom_mapping=formula)
        with counter, torch.no_grad():
            attention(one, cache=cache, path=counted)
        cache.truncate(context - 1)
        projections = 2 * 32 * (4 * 12 + 12 + 4 + 4 * 6)
        counts[path] = counter.get_total_flops() - projections
    assert counts == {path: decode_flops(attention, context, path) for path in counts}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_rope_head_dim": 3}, "qk_rope_head_dim=3 must be even"),
        ({"qk_rope_head_dim": -2}, "qk_rope_head_dim=-2 must be even"),
        ({"kv_lora_rank": 0}, "kv_lora_rank=0 must be at least 1"),
        ({"q_lora_rank": 0}, "q_lora_rank=0 must be at least 1"),
    ],
)
def test_wrong_sizes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        MultiHeadLatentAttention(**{**SIZES, **changes})


def test_wrong_calls_are_named():
    with pytest.raises(ValueError, match=r"input must be \(B, T, 32\), got \(1, 2, 31\)"):
        build()(torch.ones(1, 2, 31))
    for path in ("expanded", "absorbed", "naive"):
        cache = LatentCache()
        with pytest.raises(ValueError, match="mask must be boolean"):
            build()(torch.ones(1, 2, 32), mask=torch.ones(2), path=path, cache=cache)
        assert cache.length == 0
    with pytest.raises(ValueError, match="path='fast'"):
        build()(torch.ones(1, 2, 32), path="fast")
    with pytest.raises(ValueError, match="kind='XYZ'"):
        cache_elements_per_token("XYZ", 1)
    with pytest.raises(ValueError, match="path='naive' must be"):
        decode_flops(build(), 4, "naive")


@pytest.mark.integration
def test_script(check_script):
    check_script("mla_coded.py", ["--context", 0], "--context=0")
