"""Speed as a pass: each quicker piece equals its plain twin, and so does a whole model."""

import functools

import pytest
import torch
from torch import nn

import pipeline.fast.experts
from deepseek_full_model import DeepSeekConfig, DeepSeekModel, build_optimizers, training_step
from moe_coded import Experts, MixtureOfExperts, SwitchRouter, TopKRouter
from mtp_coded import CausalLM, next_token_loss, shifted_loss
from multihead_attention_coded import fused_attention
from pipeline.fast import (
    ChunkedHeadLoss,
    QuickExperts,
    QuickLinear,
    QuickNorm,
    decoding_head,
    few_rows,
    grouped_linear,
    head_loss,
    product_attention,
    quickest_attention,
    shared_linear,
    speed_up,
)
from pipeline.fast.attention import attention_of_rows, causal_bias, kernel_attention
from pipeline.fast.few_rows import in_parts
from rope_coded import RotaryEmbedding

SIZES = dict(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=128,
    moe_intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    num_nextn_predict_layers=1,
    max_position_embeddings=128,
)


def plain_and_quick(monkeypatch, **changes):
    """The same model without and with the pass."""
    config = DeepSeekConfig(**{**SIZES, **changes})
    monkeypatch.setattr(DeepSeekModel, "prepared", CausalLM.prepared)
    plain = DeepSeekModel(config)
    quick = speed_up(plain.copy())
    assert {type(m) for m in plain.modules()} & {QuickLinear, QuickNorm, QuickExperts} == set()
    return plain, quick


# The whole model
@pytest.mark.integration
@pytest.mark.parametrize("q_lora_rank", [None, 24])
def test_a_model_with_the_pass_equals_one_without(monkeypatch, q_lora_rank):
    plain, quick = plain_and_quick(monkeypatch, q_lora_rank=q_lora_rank)
    assert {QuickLinear, QuickNorm, QuickExperts} <= {type(m) for m in quick.modules()}
    assert {block.self_attn.attend for block in quick.blocks()} == {quickest_attention}
    ids = torch.randint(300, (2, 20))
    documents = torch.zeros_like(ids)
    for tokens in (ids, ids[:1, :1]):
        with torch.no_grad():
            torch.testing.assert_close(quick(tokens), plain(tokens), rtol=1e-5, atol=1e-5)
    for speculative in (False, True):
        texts = [m.eval().generate(ids[:, :9], 24, speculative=speculative) for m in (plain, quick)]
        assert torch.equal(*texts)
    gradients = []
    for model in (plain, quick):
        step = dict(rate=0.0, mtp_weight=0.3, gamma=0.0)
        training_step(model, build_optimizers(model, 0.0, muon=False), ids, documents, **step)
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_state_dicts_are_the_plain_ones_and_the_pass_may_be_repeated(monkeypatch):
    plain, quick = plain_and_quick(monkeypatch)
    classes = [type(module) for module in quick.modules()]
    again = speed_up(speed_up(quick).copy())
    assert [type(module) for module in again.modules()] == classes
    assert plain.state_dict().keys() == again.state_dict().keys()
    plain.load_state_dict(again.state_dict())
    with torch.device("meta"):
        assert DeepSeekModel(DeepSeekConfig(**SIZES)).prepared() is not None
        assert all(p.is_meta for p in speed_up(plain.copy().to("meta")).parameters())


def test_decoding_never_reads_old_weights(monkeypatch):
    monkeypatch.setattr("pipeline.fast.head.PACK_FROM_NUMBERS", 1)
    plain, quick = plain_and_quick(monkeypatch)
    ids = torch.randint(300, (2, 12))
    for _ in range(2):  # generate, take an optimizer step, generate
        assert torch.equal(plain.eval().generate(ids, 20), quick.eval().generate(ids, 20))
        for model in (plain, quick):
            torch.manual_seed(1)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            next_token_loss(model(ids), ids).backward()
            optimizer.step()
            optimizer.zero_grad()


# The output head
@pytest.mark.parametrize("shift", [1, 2])
@pytest.mark.parametrize("rows", [3, 600])
def test_chunked_loss_is_the_plain_loss(shift, rows):
    head, hidden = nn.Linear(16, 50, bias=False), torch.randn(2, rows, 16, requires_grad=True)
    ids, documents = torch.randint(50, (2, rows)), torch.randint(2, (2, rows))
    mask = torch.rand(2, rows) > 0.2
    results = []
    for loss in (
        shifted_loss(head(hidden), ids, shift, documents, mask),
        head_loss(head, hidden, ids, shift, documents, mask),
    ):
        results.append([loss, *torch.autograd.grad(3 * loss, [hidden, head.weight])])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_chunked_loss_of_bfloat16_logits_is_worked_out_in_fp32():
    hidden, weight = torch.randn(600, 24).bfloat16(), torch.randn(501, 24).bfloat16()
    targets = torch.randint(501, (600,))
    logits = nn.functional.linear(hidden, weight).float()
    expected = nn.functional.cross_entropy(logits, targets, reduction="sum")
    # only the order of the sum differs; in BF16 it would be off by a few in a thousand
    loss = ChunkedHeadLoss.apply(hidden, weight, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


@pytest.mark.performance
def test_chunked_loss_never_holds_all_logits_in_fp32(monkeypatch):
    monkeypatch.setattr(ChunkedHeadLoss, "ROWS", 8)
    head, hidden = nn.Linear(24, 501, bias=False), torch.randn(2, 32, 24)
    ids, largest = torch.randint(501, (2, 32)), []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
            output = function(*arguments, **(kwargs or {}))
            if torch.is_tensor(output) and output.shape[-1:] == (501,):
                largest.append((output.dtype, output.numel()))
            return output

    with torch.autocast("cpu", torch.bfloat16), Sizes():
        head_loss(head, hidden, ids, 1)
    assert max(n for dtype, n in largest if dtype == torch.float32) == 8 * 501


def test_chunked_loss_passes_a_gradient_check_in_float64():
    hidden, weight = torch.randn(5, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    targets = torch.tensor([0, 6, -100, 3, 3])
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: ChunkedHeadLoss.apply(h, w, targets), leaves)


def test_chunked_loss_without_gradients():
    head, ids = nn.Linear(24, 17, bias=False), torch.randint(17, (2, 5))
    with torch.inference_mode():
        assert head_loss(head, torch.randn(2, 5, 24), ids, 1) > 0


@pytest.mark.parametrize("rows", [0, 1])
def test_chunked_loss_of_no_guess_is_zero(rows):
    head, hidden = nn.Linear(24, 17, bias=False), torch.randn(2, rows, 24, requires_grad=True)
    loss = head_loss(head, hidden, torch.zeros(2, rows, dtype=torch.long), 1)
    assert loss.item() == 0 and not torch.autograd.grad(loss, head.weight)[0].any()


def test_chunked_loss_of_one_guess_is_its_own():
    head, hidden, ids = nn.Linear(24, 17, bias=False), torch.randn(1, 2, 24), torch.tensor([[3, 5]])
    expected = -head(hidden)[0, 0].log_softmax(dim=0)[5]
    torch.testing.assert_close(head_loss(head, hidden, ids, 1), expected)


@pytest.mark.parametrize("rows", [1, 2, 4, 6])
def test_the_packed_head_is_the_head(monkeypatch, rows):
    monkeypatch.setattr("pipeline.fast.head.PACK_FROM_NUMBERS", 1)
    head, x = QuickLinear(64, 512, bias=False), torch.randn(rows, 64)
    packed = decoding_head(head, 16)
    assert packed is not head and not packed(x).requires_grad
    with torch.no_grad():
        torch.testing.assert_close(packed(x), head(x), rtol=1e-5, atol=1e-5)


def test_short_texts_small_heads_and_other_layers_are_not_packed():
    large, small = QuickLinear(1024, 1024, bias=False), QuickLinear(64, 64, bias=False)
    plain = nn.Linear(1024, 1024, bias=False)
    assert decoding_head(large, 15) is large
    assert decoding_head(small, 100) is small
    assert decoding_head(plain, 100) is plain
    assert decoding_head(large.bfloat16(), 100) is large
    with_bias = QuickLinear(1024, 1024)
    assert decoding_head(with_bias, 100) is with_bias
    elsewhere = QuickLinear(1024, 1024, bias=False, device="meta")
    assert decoding_head(elsewhere, 100) is elsewhere


# Experts by choice
ROUTERS = {
    "v2": functools.partial(TopKRouter, 16, 8, 3, scoring_func="softmax", topk_method="greedy"),
    "v3": functools.partial(TopKRouter, 16, 8, 3, n_group=4, topk_group=2),
    "switch": functools.partial(SwitchRouter, 16, 8, capacity_factor=0.75),
}


@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_experts_by_choice_are_the_dense_ones(monkeypatch, kind, dtype, tokens):
    monkeypatch.setattr(pipeline.fast.experts, "FEW_CHOICES", 100)
    router = ROUTERS[kind]()
    nn.init.normal_(router.weight)
    layer = MixtureOfExperts(16, 8, router, n_shared_experts=1).to(dtype)
    x = torch.randn(tokens, 16, dtype=dtype, requires_grad=True)
    results = []
    for layer.experts.__class__, dispatch in ((Experts, "dense"), (QuickExperts, "grouped")):
        layer.zero_grad()
        output = layer(x, dispatch=dispatch)
        leaves = [x, *layer.parameters()]
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


def test_only_a_few_choices_go_one_by_one(monkeypatch):
    layer = speed_up(MixtureOfExperts(16, 8, TopKRouter(16, 8, 3)))
    taken = []
    monkeypatch.setattr(
        pipeline.fast.experts, "by_choice", lambda e, x, routing: taken.append(len(x)) or x
    )
    for tokens in (1, 2, 3, 0):
        layer(torch.randn(tokens, 16))
    assert taken == [1, 2]


# Experts of many tokens
@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.parametrize("width", [16, 13])  # 13: rows the grouped kernel cannot take
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_grouped_experts_equal_the_plain_ones(kind, width, precision):
    router = ROUTERS[kind]()
    nn.init.normal_(router.weight)
    layer, x = MixtureOfExperts(16, width, router), torch.randn(40, 16, requires_grad=True)
    results = []
    for layer.experts.__class__ in (Experts, QuickExperts):
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            output = layer(x)
        assert output.dtype == torch.float32
        leaves = [x, *layer.parameters()]
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    tolerance = 1e-5 if precision == torch.float32 else 0.05  # BF16 keeps 8 bits
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


def test_odd_width_falls_back_and_even_width_calls_the_kernel(monkeypatch):
    called = []
    kernel = nn.functional.grouped_mm
    monkeypatch.setattr(
        nn.functional, "grouped_mm", lambda *a, **k: called.append(1) or kernel(*a, **k)
    )
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    for width, out, dtype, calls in (
        (8, 4, torch.float32, 1), (7, 4, torch.float32, 1), (8, 5, torch.float32, 1),
        (8, 4, torch.float64, 1),  # the kernel is not for FP64
        (4, 4, torch.bfloat16, 1), (8, 16, torch.bfloat16, 2),  # 8 bytes and 16
    ):
        rows, weights = torch.randn(5, width, dtype=dtype), torch.randn(3, out, width, dtype=dtype)
        expected = torch.cat([rows[:2] @ weights[0].T, rows[2:] @ weights[2].T])
        torch.testing.assert_close(grouped_linear(rows, weights, ends), expected)
        assert len(called) == calls
    speed_up(MixtureOfExperts(16, 8, TopKRouter(16, 8, 3)))(torch.randn(9, 16))
    assert len(called) == 2 + 2  # a layer with the pass: both of its products


def test_grouped_products_follow_autocast():
    rows, weights = torch.randn(6, 8), torch.randn(2, 16, 8)
    ends = torch.tensor([4, 6], dtype=torch.int32)
    assert grouped_linear(rows, weights, ends).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        product = grouped_linear(rows, weights, ends)
    assert product.dtype == torch.bfloat16
    expected = torch.cat([rows[:4] @ weights[0].T, rows[4:] @ weights[1].T])
    torch.testing.assert_close(product.float(), expected, rtol=0.02, atol=0.1)  # 8 bits


# Attention by two products
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("T", [1, 4, 7])
@pytest.mark.parametrize(("width", "scale"), [(5, 0.3), (8, None), (11, None)])  # 8: that of keys
def test_quick_attention_is_fused_attention(causal, masked, T, width, scale):
    query, key, value = (torch.randn(2, 3, n, w) for n, w in ((T, 8), (7, 8), (7, width)))
    mask = None
    if masked:
        mask = torch.rand(2, 1, T, 7) < 0.6
        mask[1, :, 0] = False  # a query with no key at all
    results = []
    for attend in (fused_attention, product_attention, kernel_attention, quickest_attention):
        leaves = [t.clone().requires_grad_() for t in (query, key, value)]
        output = attend(*leaves, mask, scale, causal=causal)
        results.append((output, torch.autograd.grad(output.square().sum(), leaves)))
    for quick in results[1:]:  # another order of summation
        torch.testing.assert_close(quick, results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 3])
def test_every_query_sees_every_key_unless_told(heads):
    query, key = torch.randn(2, 3, 7, 8), torch.randn(2, heads, 7, 8)
    attentions = [quickest_attention, kernel_attention]
    attentions += [attention_of_rows] if heads == 1 else [product_attention]
    for attend in attentions:
        expected = fused_attention(query, key, key)
        torch.testing.assert_close(attend(query, key, key), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 4, 7])
def test_groups_of_heads_share_their_keys_in_every_precision(dtype, T):
    query, key, value = (torch.randn(2, h, n, 8, dtype=dtype) for h, n in ((4, T), (2, 7), (2, 7)))
    expected = fused_attention(query, key, value, causal=True)
    output = quickest_attention(query, key, value, causal=True)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02  # BF16 keeps 8 bits
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [None, (2, 1, 1, 7), (2, 3, 1, 7), (7,)])
@pytest.mark.parametrize("T", [1, 4, 7])
def test_heads_over_one_key_head_become_its_rows(monkeypatch, causal, masked, T):
    query, key = torch.randn(2, 3, T, 8), torch.randn(2, 1, 7, 8)
    mask = None if masked is None else torch.rand(masked) < 0.6
    seen, kernel = [], nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        nn.functional, "scaled_dot_product_attention",
        lambda rows, *rest, **options: seen.append((rows.shape, options["attn_mask"]))
        or kernel(rows, *rest, **options),
    )
    output = quickest_attention(query, key, key, mask, 0.3, causal=causal)
    ((shape, given),) = seen
    assert shape == (2, 1, 3 * T, 8)
    assert (given is None) == (not masked and (T == 1 or not causal))  # one query sees all keys
    monkeypatch.undo()
    expected = fused_attention(query, key, key, mask, 0.3, causal=causal)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 3])  # over one key head, or over three
def test_the_kept_mask_serves_only_texts_like_the_last_one(heads):
    key = torch.randn(1, 3 // heads, 9, 8)
    with torch.inference_mode():  # a tensor that is made here cannot serve in training
        quickest_attention(torch.randn(1, 3, 4, 8), key, key, causal=True)
    for T, S, dtype in ((4, 9, torch.float32), (2, 9, torch.float32), (2, 5, torch.float32),
                        (2, 5, torch.float64), (4, 9, torch.float32)):
        query = torch.randn(1, 3, T, 8, dtype=dtype, requires_grad=True)
        keys = key[:, :, :S].to(dtype)
        results = []
        for attend in (quickest_attention, fused_attention):
            output = attend(query, keys, keys, causal=True)
            results.append((output, *torch.autograd.grad(output.square().sum(), query)))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.performance
def test_all_layers_of_a_pass_share_one_mask():
    query = torch.randn(1, 3, 4, 8)
    first = causal_bias(3, query, 9)
    assert first is causal_bias(3, torch.zeros_like(query), 9)
    causal_bias(3, query, 10)
    assert first is not causal_bias(3, query, 9)  # only the last one is kept: a mask may be large


@pytest.mark.performance
def test_a_whole_text_needs_no_mask_of_its_own():
    T, sizes = 64, []
    q, k, v = (torch.randn(1, 2, T, width, requires_grad=True) for width in (8, 8, 5))

    def note(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        quickest_attention(q, k, v, causal=True)
    assert max(sizes) < T * T


# A few rows on all cores
@pytest.mark.parametrize("cores", [1, 2, 3])
@pytest.mark.parametrize("shape", [(64,), (1, 1, 64), (3, 64), (2, 3, 64)])
def test_a_few_rows_shared_out_are_the_same_product(cores, shape, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    shared, measured = [], []
    monkeypatch.setattr(few_rows, "sharing_pays_from", lambda *a: measured.append(a) or 64 * 1000)
    monkeypatch.setattr(few_rows, "in_parts", lambda *a: shared.append(len(a[1])) or in_parts(*a))
    for out in (1536, 1537):  # which two and three cores can share out, and which not
        layer, x = QuickLinear(64, out, bias=False), torch.randn(shape)
        expected = torch.nn.functional.linear(x, layer.weight)
        with torch.no_grad():
            # another order of summation
            torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(
                shared_linear(x, layer.weight), expected, rtol=1e-5, atol=1e-5
            )
            shared_linear(x, layer.weight[:900])  # too small
        assert layer(x).requires_grad  # with gradients, PyTorch's own
    assert shared == {1: [], 2: [1536, 1536], 3: [1536, 1536]}[cores]
    assert set(measured) <= {(cores, torch.Size(shape).numel() > 64)}  # one row or several


def test_a_few_rows_get_the_bias_of_their_layer():
    layer, x = QuickLinear(64, 48), torch.randn(3, 64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias)
        assert layer(x[0]).shape == (48,)


def test_the_time_of_all_products_is_measured(monkeypatch):
    done = []
    monkeypatch.setattr(few_rows.time, "perf_counter", lambda: 5.0 + len(done))
    took = few_rows.seconds(lambda *given: done.append(given), "rows", ["a", "b", "c"], 2)
    assert took == 3 and done == [("rows", each, 2) for each in "abc"]


@pytest.mark.parametrize("several", [False, True])
def test_the_size_from_which_sharing_pays_is_the_first_that_is_faster(several, monkeypatch):
    def pretended(product, rows, weights, *cores):
        assert rows.shape == (3 if several else 1, weights.shape[2])
        large = weights[0].numel() >= 2**20
        return 1.0 if not cores else 0.8 if large else 0.95

    monkeypatch.setattr(few_rows, "seconds", pretended)
    measure = few_rows.sharing_pays_from.__wrapped__
    assert measure(2, several) == 2**20
    monkeypatch.setattr(few_rows, "seconds", lambda product, *a: float(product is in_parts))
    assert measure(2, several) == float("inf")


def test_norm_of_a_single_row_is_torchs(monkeypatch):
    norm = QuickNorm(24, eps=1e-3)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        for x in (torch.randn(1, 1, 24), torch.randn(24), torch.zeros(1, 24), torch.randn(1, 48)):
            x = x[..., :24]
            expected = torch.nn.functional.rms_norm(x, (24,), norm.weight, 1e-3)
            torch.testing.assert_close(norm(x), expected, rtol=1e-6, atol=1e-7)
        rows = torch.randn(2, 3, 24)
        assert torch.equal(norm(rows), nn.functional.rms_norm(rows, (24,), norm.weight, 1e-3))
        norm = QuickNorm(24)  # PyTorch's own eps
        x = torch.randn(1, 24)
        torch.testing.assert_close(norm(x), torch.nn.functional.rms_norm(x, (24,)))
        assert norm(x.bfloat16()).dtype == torch.float32  # the precision of its weight
        narrow, x = QuickNorm(24).bfloat16(), torch.randn(50, 1, 24).bfloat16()
        assert all(torch.equal(narrow(row), nn.functional.rms_norm(row, (24,))) for row in x)
    norm(torch.randn(1, 24)).sum().backward()
    assert norm.weight.grad is not None
    monkeypatch.delattr(nn.RMSNorm, "forward")
    with torch.no_grad():
        torch.testing.assert_close(norm(torch.ones(1, 24)), torch.ones(1, 24))  # the short way


def test_products_are_for_whole_short_texts_in_bfloat16():
    def chosen(T, S, dtype):
        seen = []
        q, k = torch.randn(1, 2, T, 8, dtype=dtype), torch.randn(1, 2, S, 8, dtype=dtype)
        with pytest.MonkeyPatch.context() as patch:
            for name in ("kernel_attention", "product_attention"):
                patch.setattr(f"pipeline.fast.attention.{name}",
                              lambda *_, name=name, **__: seen.append(name))
            quickest_attention(q, k, k, causal=True)
        return seen[0]

    assert chosen(6, 6, torch.bfloat16) == "product_attention"
    assert chosen(6, 6, torch.float32) == chosen(2, 6, torch.bfloat16) == "kernel_attention"
    assert chosen(1025, 1025, torch.bfloat16) == "kernel_attention"


# The rotations of a pass
@pytest.mark.performance
def test_all_layers_of_a_pass_share_their_rotations():
    quick, positions = speed_up(RotaryEmbedding(8)), torch.arange(5)
    assert quick.rotations(positions) is quick.rotations(positions)


def test_kept_rotations_are_those_of_the_positions_asked_for():
    plain = RotaryEmbedding(8)
    quick = speed_up(RotaryEmbedding(8))
    for positions in (torch.arange(5), torch.arange(3, 8), torch.arange(3, 8).expand(2, 5)):
        for _ in range(2):
            torch.testing.assert_close(quick.rotations(positions), plain.rotations(positions))


def test_rotations_kept_while_inferring_are_not_used_in_training():
    quick, positions = speed_up(RotaryEmbedding(8)), torch.arange(5)
    with torch.inference_mode():
        quick.rotations(positions)
    x = torch.randn(5, 4, dtype=torch.complex64, requires_grad=True)
    (x * quick.rotations(positions)).abs().sum().backward()  # an inference tensor would fail here
    assert x.grad.isfinite().all()
