"""Phase 5: routing, dispatch, balance."""

import functools
import math

import numpy as np
import pytest
import torch

from moe_coded import (
    MixtureOfExperts,
    Routing,
    SwiGLU,
    SwitchRouter,
    TopKRouter,
    TransformerBlock,
    communication_balance_loss,
    device_balance_loss,
    expert_balance_loss,
    expert_parameters,
    sequence_balance_loss,
    swiglu,
    switch_balance_loss,
    train_on_clusters,
)
from multihead_attention_coded import MultiHeadAttention

ROUTERS = {
    "v2_lite": lambda: TopKRouter(16, 8, 3, "softmax", "greedy", norm_topk_prob=False),
    "v2": lambda: TopKRouter(16, 8, 3, "softmax", "group_limited_greedy", 4, 2, False, 16.0),
    "v3": lambda: TopKRouter(16, 8, 3, n_group=4, topk_group=2, routed_scaling_factor=2.5),
    "switch": lambda: SwitchRouter(16, 8, capacity_factor=0.75),
}
EVERY_ROUTER = pytest.mark.parametrize("kind", ROUTERS)


def build_router(kind):
    router = ROUTERS[kind]()
    with torch.no_grad():
        router.weight.normal_()
        if kind == "v3":
            router.e_score_correction_bias.uniform_(-0.4, 0.4)
    return router


def decisions(layer, x, token_mask=None):
    """The `Routed` of one pass."""
    routed = []
    layer(x, token_mask, routed)
    return routed[0]


def biased_router(scores, bias, active, **options):
    """A V3 router that sees these scores: one-hot tokens, weights that invert the sigmoid."""
    scores = torch.tensor(scores)
    router = TopKRouter(len(scores), scores.shape[1], active, **options)
    with torch.no_grad():
        router.weight.copy_(torch.logit(scores).T)
        router.e_score_correction_bias.copy_(torch.tensor(bias))
    return router, torch.eye(len(scores))


# Routing
def test_v3_bias_selects_and_does_not_weigh():
    scores = [[0.9, 0.8, 0.3, 0.2]]
    router, x = biased_router(scores, [0.0, 0.0, 0.7, 0.0], 2, routed_scaling_factor=2.5)
    weights, indices, _, _ = router(x)
    assert sorted(indices[0].tolist()) == [0, 2]  # 1.0 and 0.9 beat 0.8
    chosen = dict(zip(indices[0].tolist(), weights[0].tolist(), strict=True))
    assert chosen[0] == pytest.approx(2.5 * 0.9 / 1.2, rel=1e-5)
    assert chosen[2] == pytest.approx(2.5 * 0.3 / 1.2, rel=1e-5)


def test_bias_that_keeps_the_selection_leaves_the_weights_unchanged():
    router, x = build_router("v3"), torch.randn(50, 16)
    router.e_score_correction_bias.zero_()
    before = router(x)
    router.e_score_correction_bias.fill_(0.37)  # the same for all experts
    after = router(x)
    assert torch.equal(before.indices, after.indices)
    assert torch.equal(before.weights, after.weights)


def test_v3_group_score_is_the_sum_of_the_two_best_biased_scores():
    # group 0 has the best expert, group 1 the best pair
    options = {"n_group": 2, "topk_group": 1}
    router, x = biased_router([[0.9, 0.1, 0.6, 0.6]], [0.0, 0.0, 0.0, 0.0], 2, **options)
    assert sorted(router(x).indices[0].tolist()) == [2, 3]
    router, x = biased_router([[0.9, 0.1, 0.6, 0.6]], [0.3, 0.0, 0.0, 0.0], 2, **options)
    assert sorted(router(x).indices[0].tolist()) == [0, 1]  # 0.9 + 0.3 + 0.1 against 1.2


def test_v3_group_score_takes_two_of_a_larger_group():
    # sums of whole groups would favour the first: 2.0 against 1.9; the two best favour the second
    scores = [[0.5, 0.5, 0.5, 0.5, 0.9, 0.8, 0.1, 0.1]]
    router, x = biased_router(scores, [0.0] * 8, 2, n_group=2, topk_group=1)
    assert sorted(router(x).indices[0].tolist()) == [4, 5]


def test_routers_compute_in_float32_for_half_precision_inputs_and_autocast():
    for kind in ROUTERS:
        router, x = build_router(kind), torch.randn(300, 16).bfloat16()
        expected = router(x.float())
        with torch.autocast("cpu", torch.bfloat16):
            under_autocast = router(x)
        for got in (router(x), under_autocast):
            assert got.scores.dtype == torch.float32
            assert torch.equal(got.scores, expected.scores)


def test_bias_keeps_float32_when_the_model_is_cast():
    router = TopKRouter(4, 4, 1).bfloat16()
    router.e_score_correction_bias.fill_(0.5)
    router.update_bias(torch.tensor([6, 2, 4, 4]), 0.001)
    expected = torch.tensor([0.499, 0.501, 0.5, 0.5])
    torch.testing.assert_close(router.e_score_correction_bias, expected)


@EVERY_ROUTER
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dispatches_agree_in_other_precisions(kind, dtype):
    layer, x = (
        MixtureOfExperts(16, 8, build_router(kind), 1).to(dtype),
        torch.randn(9, 16, dtype=dtype),
    )
    tolerance = 1e-6 if dtype == torch.float64 else 0.05
    for dispatch in ("loop", "grouped"):
        torch.testing.assert_close(
            layer(x, dispatch=dispatch), layer(x, dispatch="dense"), rtol=tolerance, atol=tolerance
        )


def test_switch_gives_padding_no_place():
    router, x = build_router("switch"), torch.randn(16, 16)
    padded = torch.cat([torch.randn(24, 16), x])
    real = torch.tensor([0] * 24 + [1] * 16)
    with_padding, alone = router(padded, real), router(x)
    assert torch.equal(with_padding.kept[24:], alone.kept) and not with_padding.kept[:24].any()
    assert not alone.kept.all()


def test_switch_block_passes_dropped_tokens_through():
    layer = MixtureOfExperts(16, 8, build_router("switch"))
    block, x = TransformerBlock(MultiHeadAttention(16, 4), layer), torch.randn(1, 30, 16)
    routed = []
    output = block(x, routed=routed)
    hidden = x + block.self_attn(block.input_layernorm(x))
    dropped = ~routed[0].routing.kept.view(1, 30)
    assert dropped.any()
    assert torch.equal(output[dropped], hidden[dropped])
    assert not torch.isclose(output[~dropped], hidden[~dropped]).all(dim=-1).any()


def test_block_hands_the_token_mask_to_its_experts():
    layer, routed = MixtureOfExperts(16, 8, build_router("v3")), []
    block = TransformerBlock(MultiHeadAttention(16, 4), layer)
    block(torch.randn(1, 5, 16), torch.tensor([[0, 0, 1, 1, 1]]), routed)
    assert routed[0].load().sum() == 3 * 3


def test_v3_masked_groups_stay_out_when_biased_scores_are_negative():
    options = {"n_group": 2, "topk_group": 1}
    router, x = biased_router([[0.6, 0.5, 0.4, 0.3]], [-2.0, -2.0, -3.0, -3.0], 2, **options)
    assert sorted(router(x).indices[0].tolist()) == [0, 1]


def test_v2_group_score_is_the_best_expert():
    router = TopKRouter(1, 4, 2, "softmax", "group_limited_greedy", 2, 1, norm_topk_prob=False)
    with torch.no_grad():
        router.weight.copy_(torch.log(torch.tensor([[0.4], [0.04], [0.28], [0.28]])))
    weights, indices, scores, _ = router(torch.ones(1, 1))
    assert sorted(indices[0].tolist()) == [0, 1]
    torch.testing.assert_close(weights, scores.gather(1, indices))  # no renormalisation


@pytest.mark.parametrize("kind", ["v2_lite", "v2", "v3"])
def test_routing_matches_a_plain_python_derivation(kind):
    router, x = build_router(kind), torch.randn(40, 16)
    weights, indices, _, _ = router(x)
    logits = x.double().numpy() @ router.weight.detach().double().numpy().T
    for token in range(40):
        if kind == "v3":
            score = 1 / (1 + np.exp(-logits[token]))
            choice = score + router.e_score_correction_bias.double().numpy()
        else:
            score = np.exp(logits[token]) / np.exp(logits[token]).sum()
            choice = score
        allowed = set(range(8))
        if kind != "v2_lite":
            groups = [choice[g * 2 : g * 2 + 2] for g in range(4)]
            value = [g.sum() if kind == "v3" else g.max() for g in groups]
            best = sorted(range(4), key=lambda g: -value[g])[:2]
            allowed = {g * 2 + i for g in best for i in range(2)}
        chosen = sorted(allowed, key=lambda e: -choice[e])[:3]
        total = sum(score[e] for e in chosen)
        factor = {"v2_lite": 1.0, "v2": 16.0, "v3": 2.5 / total}[kind]
        expected = {e: score[e] * factor for e in chosen}
        got = dict(zip(indices[token].tolist(), weights[token].tolist(), strict=True))
        assert got == pytest.approx(expected, rel=1e-4)


def test_switch_drops_what_exceeds_the_capacity_in_order():
    router = SwitchRouter(2, 2, capacity_factor=1.0)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[5.0, 0.0], [0.0, 5.0]]))
    x = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 2)
    routing = router(x)
    assert router.capacity(6) == 3
    assert routing.indices.flatten().tolist() == [0, 0, 0, 0, 1, 1]
    assert routing.kept.flatten().tolist() == [True, True, True, False, True, True]
    torch.testing.assert_close(routing.weights, routing.scores.max(1, keepdim=True).values)


def test_queue_of_the_docstring():
    router = SwitchRouter(2, 2, capacity_factor=1.0)
    with torch.no_grad():
        router.weight.copy_(torch.eye(2))
    routing = router(torch.eye(2)[[0, 0, 1, 0, 0, 1]])
    assert router.capacity(6) == 3 and int((~routing.kept).sum()) == 1
    assert routing.kept.flatten().tolist() == [True] * 4 + [False, True]


def test_switch_dropped_tokens_get_nothing_from_the_routed_experts():
    layer, x = MixtureOfExperts(16, 8, build_router("switch")), torch.randn(30, 16)
    for dispatch in ("dense", "loop", "grouped"):
        routed = []
        output = layer(x, routed=routed, dispatch=dispatch)
        dropped = ~routed[0].routing.kept.squeeze(1)
        assert dropped.any() and (output[dropped] == 0).all()
        assert (output[~dropped].abs().sum(1) > 0).all()


# Dispatch
@EVERY_ROUTER
@pytest.mark.parametrize("width", [16, 13])
@pytest.mark.parametrize("tokens", ["random", "one expert", "one token"])
def test_dispatches_agree_forward_and_backward(kind, width, tokens):
    layer = MixtureOfExperts(16, width, build_router(kind), n_shared_experts=1)
    x = {"random": torch.randn(2, 9, 16), "one token": torch.randn(1, 1, 16)}.get(tokens)
    if tokens == "one expert":
        x = torch.randn(1, 1, 16).expand(2, 9, 16).clone()  # the other experts are empty
    x.requires_grad_()
    results = {}
    for dispatch in ("dense", "loop", "grouped"):
        layer.zero_grad()
        x.grad = None
        output = layer(x, dispatch=dispatch)
        output.square().sum().backward()
        gradients = {name: p.grad.clone() for name, p in layer.named_parameters()}
        results[dispatch] = {"output": output.detach(), "x": x.grad.clone(), **gradients}
    for dispatch in ("loop", "grouped"):
        torch.testing.assert_close(results[dispatch], results["dense"], rtol=1e-3, atol=1e-4)


def test_runs_of_the_docstring():
    layer = MixtureOfExperts(16, 8, TopKRouter(16, 3, 2))
    routing = Routing(torch.rand(3, 2), torch.tensor([[1, 0], [2, 1], [1, 2]]), torch.rand(3, 3))
    x, seen = torch.randn(3, 16), []
    layer.experts.by_runs = lambda rows, lengths: seen.append((rows, lengths.tolist())) or rows
    layer.experts.grouped(x, routing)
    (rows, lengths), = seen
    assert torch.equal(rows, x[[0, 0, 1, 2, 1, 2]]) and lengths == [1, 3, 2]


def test_experts_follow_autocast_and_their_sum_stays_float32():
    layer, x = MixtureOfExperts(16, 8, build_router("v3")), torch.randn(20, 16)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        output, product = layer(x), layer.experts.by_runs(x, torch.tensor([20] + 7 * [0]))
    assert (output.dtype, product.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(output, expected, rtol=0.02, atol=0.05)  # 8 bits


def test_shared_experts_see_every_token_and_no_residual_is_added():
    layer, x = MixtureOfExperts(16, 8, build_router("v3"), n_shared_experts=2), torch.randn(5, 16)
    with torch.no_grad():
        layer.experts.down_proj.zero_()
    torch.testing.assert_close(layer(x), layer.shared_experts(x))
    assert layer.shared_experts.down_proj.in_features == 16


def test_swiglu_by_hand():
    network = SwiGLU(1, 1)
    with torch.no_grad():
        network.gate_up_proj.weight.copy_(torch.tensor([[2.0], [3.0]]))
        network.down_proj.weight.fill_(5.0)
    # gate 2, up 3: 5 · SiLU(2) · 3
    expected = 5 * (2 / (1 + np.exp(-2.0))) * 3
    assert network(torch.ones(1, 1)).item() == pytest.approx(expected, rel=1e-6)
    by_matrices = swiglu(torch.ones(1, 1), network.gate_up_proj.weight, network.down_proj.weight)
    assert by_matrices.item() == pytest.approx(expected, rel=1e-6)


def test_rmsnorm_by_hand():
    norm = torch.nn.RMSNorm(2, eps=0.0)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0]))
    # (3, 4): root mean square √12.5
    expected = torch.tensor([3.0, 8.0]) / 12.5**0.5
    torch.testing.assert_close(norm(torch.tensor([3.0, 4.0])), expected)


@pytest.mark.parametrize("kind", ["experts", "dense"])
@pytest.mark.parametrize("options", [{}, {"norm_eps": 1e-3}])
def test_block_is_two_normed_residual_steps(kind, options):
    experts = MixtureOfExperts(16, 8, build_router("v3"), 1)
    layer = {"experts": experts, "dense": SwiGLU(16, 8)}[kind]
    block = TransformerBlock(MultiHeadAttention(16, 4), layer, **options)
    x = torch.randn(2, 5, 16) / 1000  # small, so that eps matters
    with torch.no_grad():
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.weight.uniform_(0.5, 2)
        block.self_attn.o_proj.weight /= 1000

    def normed(rows, norm):
        eps = options.get("norm_eps", 1e-6)
        return rows / (rows.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight

    hidden = x + block.self_attn(normed(x, block.input_layernorm))
    expected = hidden + layer(normed(hidden, block.post_attention_layernorm))
    torch.testing.assert_close(block(x), expected)


def test_routing_example_of_the_docstring():
    scores, bias = [[0.9, 0.1, 0.6, 0.7], [0.2, 0.3, 0.4, 0.6]], torch.tensor([0, 0, 0, -0.4])
    router, x = biased_router(scores, bias.tolist(), 2, n_group=2, topk_group=1)
    routing = router(x)
    torch.testing.assert_close(routing.scores, torch.tensor(scores))
    groups = (routing.scores + bias).unflatten(1, (2, 2)).sum(dim=2)
    torch.testing.assert_close(groups, torch.tensor([[1.0, 0.9], [0.5, 0.6]]))
    assert routing.indices.tolist() == [[0, 1], [2, 3]]
    torch.testing.assert_close(routing.weights, torch.tensor([[0.9, 0.1], [0.4, 0.6]]))
    router.e_score_correction_bias.zero_()
    assert [sorted(row) for row in router(x).indices.tolist()] == [[2, 3], [2, 3]]


# Balance losses
def test_uneven_use_can_cost_less_than_alpha():
    scores = torch.tensor([[0.51, 0.49], [0.51, 0.49], [0.0, 1.0]])
    loss = expert_balance_loss(scores, torch.tensor([[0], [0], [1]]), 1.0)
    assert loss.item() == pytest.approx(0.8933, abs=1e-4)


def even_routing(tokens=16, experts=8, active=2):
    scores = torch.full((tokens, experts), 1 / experts)
    indices = (torch.arange(tokens * active) % experts).view(tokens, active)
    return scores, indices


def test_losses_are_alpha_at_perfect_balance():
    scores, indices = even_routing()
    assert expert_balance_loss(scores, indices, 0.003).item() == pytest.approx(0.003)
    assert device_balance_loss(scores, indices, 0.05, 4).item() == pytest.approx(0.05)
    assert switch_balance_loss(scores, indices[:, :1] + torch.tensor([0, 1] * 8)[:, None], 0.01) \
        .item() == pytest.approx(0.01)
    # neighbours share a device, so each of these tokens is sent to one device: M' = 1
    communication = communication_balance_loss(scores, indices, 0.02, devices=4, max_devices=1)
    assert communication.item() == pytest.approx(0.02)
    base = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    sequence = torch.stack([base.roll(shift, 1)[0] for shift in range(4)])[None] / 10
    turning = sequence_balance_loss(sequence, sequence.topk(2).indices, 1e-4)
    assert turning.item() == pytest.approx(1e-4)


def test_losses_by_hand_when_unbalanced():
    scores = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.5, 0.3, 0.1, 0.1]])
    indices = torch.tensor([[0, 1], [0, 1]])
    # f = 4/(2·2)·(2, 2, 0, 0) = (2, 2, 0, 0); P = (0.6, 0.2, 0.1, 0.1)
    assert expert_balance_loss(scores, indices, 1.0).item() == pytest.approx(1.6)
    # two devices: f' = (2, 0), P' = (0.8, 0.2)
    assert device_balance_loss(scores, indices, 1.0, 2).item() == pytest.approx(1.6)
    # f'' = 2/(1·2)·(2, 0) = (2, 0)
    assert communication_balance_loss(scores, indices, 1.0, 2, 1).item() == pytest.approx(1.6)
    # a token may be sent to both devices: f'' = 2/(2·2)·(2, 0) = (1, 0)
    assert communication_balance_loss(scores, indices, 1.0, 2, 2).item() == pytest.approx(0.8)
    # experts 1 and 2 are on both devices: f'' = 2/(2·2)·(2, 2) = (1, 1)
    apart = torch.tensor([[1, 2], [2, 1]])
    assert communication_balance_loss(scores, apart, 1.0, 2, 2).item() == pytest.approx(1.0)
    # Switch, E Σ f P with f = (1, 0, 0, 0): 4 · 0.6
    assert switch_balance_loss(scores, indices[:, :1], 1.0).item() == pytest.approx(2.4)
    # sequences: rows are a sequence each; f = 4/2·(1, 1, 0, 0), P the scores: 1.6 and 1.6
    sequences = sequence_balance_loss(scores[:, None], indices[:, None], 1.0)
    assert sequences.item() == pytest.approx(1.6)


def test_sequence_loss_normalises_scores_and_ignores_the_bias():
    router, x = build_router("v3"), torch.randn(2, 6, 16)
    layer = MixtureOfExperts(16, 8, router, 0, functools.partial(sequence_balance_loss, alpha=1.0))
    before = decisions(layer, x)
    scores = before.routing.scores.view(2, 6, 8)
    expected = 0.0
    for sequence in scores:
        counts = torch.zeros(8)
        for token in sequence:
            counts[token.topk(3).indices] += 1
        shares = (sequence / sequence.sum(1, keepdim=True)).mean(0)
        expected += (counts * 8 / (3 * 6) * shares).sum() / 2
    torch.testing.assert_close(before.balance_loss(), expected)
    router.e_score_correction_bias.uniform_(-2, 2)
    torch.testing.assert_close(decisions(layer, x).balance_loss(), before.balance_loss())


@pytest.mark.parametrize(
    ("kind", "balance"),
    [("v3", sequence_balance_loss), ("v2", expert_balance_loss), ("switch", switch_balance_loss)],
)
def test_padding_enters_neither_loss_nor_load(kind, balance):
    layer = MixtureOfExperts(16, 8, build_router(kind), 0, functools.partial(balance, alpha=1.0))
    x = torch.randn(2, 6, 16)
    plain = decisions(layer, x)
    padded = torch.cat([torch.randn(2, 3, 16), x], dim=1)
    real = torch.tensor([0] * 3 + [1] * 6).expand(2, 9)  # integers, as attention masks are
    with_padding = decisions(layer, padded, real)
    torch.testing.assert_close(with_padding.balance_loss(), plain.balance_loss())
    assert torch.equal(with_padding.load(), plain.load())


def test_device_losses_leave_padding_out_and_empty_rows_do_not_dilute():
    scores, indices = torch.rand(6, 8).softmax(1), torch.rand(6, 8).topk(2).indices
    mask = torch.tensor([0, 0, 1, 1, 1, 1])
    for loss, extra in ((device_balance_loss, (4,)), (communication_balance_loss, (4, 2))):
        padded = loss(scores, indices, 1.0, *extra, token_mask=mask)
        torch.testing.assert_close(padded, loss(scores[2:], indices[2:], 1.0, *extra))
    rows = scores.view(2, 3, 8)
    chosen = indices.view(2, 3, 2)
    half = sequence_balance_loss(rows, chosen, 1.0, torch.tensor([[0, 0, 0], [1, 1, 1]]))
    torch.testing.assert_close(half, sequence_balance_loss(rows[1:], chosen[1:], 1.0))


@pytest.mark.parametrize(("B", "T", "E"), [(0, 3, 2), (2, 0, 2), (1, 1, 1)])
def test_sequence_loss_of_the_smallest_batches(B, T, E):
    scores, indices = torch.full((B, T, E), 0.5), torch.zeros(B, T, 1, dtype=torch.long)
    assert sequence_balance_loss(scores, indices, 0.5).item() == (0.5 if B * T else 0)


@pytest.mark.parametrize("balance", [sequence_balance_loss, expert_balance_loss])
def test_balance_loss_reaches_the_router(balance):
    kind = "v3" if balance is sequence_balance_loss else "v2"
    layer = MixtureOfExperts(16, 8, build_router(kind), 0, functools.partial(balance, alpha=1.0))
    decisions(layer, torch.randn(2, 6, 16)).balance_loss().backward()
    assert layer.gate.weight.grad.abs().sum() > 0


# The bias update
def test_overloaded_expert_loses_exactly_gamma():
    router = TopKRouter(4, 4, 1)
    router.update_bias(torch.tensor([6, 2, 4, 4]), 0.25)  # mean 4
    assert router.e_score_correction_bias.tolist() == [-0.25, 0.25, 0.0, 0.0]
    router.update_bias(torch.zeros(4), 0.25)  # no load: nothing moves
    assert router.e_score_correction_bias.tolist() == [-0.25, 0.25, 0.0, 0.0]
    without = TopKRouter(4, 4, 1, "softmax", "greedy")
    without.update_bias(torch.tensor([6, 2, 4, 4]), 0.25)
    assert not dict(without.named_buffers())


def test_a_pass_leaves_nothing_behind_but_what_was_asked_for():
    layer, x, routed = MixtureOfExperts(16, 8, build_router("v3")), torch.randn(10, 16), []
    before = {**vars(layer), **vars(layer.gate)}
    layer(x, routed=routed)
    layer(x, routed=routed)
    assert {**vars(layer), **vars(layer.gate)} == before
    for one in routed:
        assert torch.equal(one.load(), torch.bincount(one.routing.indices.flatten(), minlength=8))
        assert one.load().sum() == 10 * 3 and one.balance_loss() == 0


def test_experts_that_no_token_chose_have_the_load_zero():
    layer = MixtureOfExperts(2, 1, TopKRouter(2, 4, 1))
    with torch.no_grad():
        layer.gate.weight.copy_(torch.tensor([[0.0, 0], [1, 1], [0, 0], [0, 0]]))
    assert decisions(layer, torch.ones(5, 2)).load().tolist() == [0, 5, 0, 0]


def test_bias_is_stored_with_the_model_and_gets_no_gradient():
    router = build_router("v3")
    assert "e_score_correction_bias" in router.state_dict()
    assert "e_score_correction_bias" not in dict(router.named_parameters())


def test_bias_and_loss_balance_a_load_that_is_uneven_without_them():
    busiest = {}
    for balancing in ("none", "bias", "loss"):
        shares, error = train_on_clusters(balancing, 80, gamma=0.02, seed=1)
        busiest[balancing] = shares[-20:].mean(0).max().item() * 8
        assert isinstance(error, float) and error < 1  # about 5 before training
    assert busiest["none"] > 1.8
    assert busiest["bias"] < 1.3 and busiest["loss"] < 1.3


@pytest.mark.performance
def test_published_expert_parameters():
    exist, used = expert_parameters(7168, 2048, routed=256, active=8, shared=1)
    assert (exist, used) == (257 * 44_040_192, 9 * 44_040_192)


@pytest.mark.performance
def test_loop_runs_each_expert_on_its_own_tokens_only(monkeypatch):
    layer, x, rows = MixtureOfExperts(16, 8, build_router("v3")), torch.randn(20, 16), []
    expert = layer.experts.expert
    monkeypatch.setattr(
        layer.experts, "expert", lambda e, x: rows.append(len(x)) or expert(e, x)
    )
    layer(x, dispatch="loop")
    assert sum(rows) == 20 * 3
    rows.clear()
    layer(x, dispatch="dense")
    assert sum(rows) == 20 * 8


@EVERY_ROUTER
def test_every_parameter_gets_a_gradient(kind):
    layer = MixtureOfExperts(16, 8, build_router(kind), n_shared_experts=1)
    layer(torch.randn(200, 16)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TopKRouter(4, 8, 9), "num_experts_per_tok=9 must be from 1 to the 8 experts"),
        (lambda: TopKRouter(4, 8, 5, n_group=4, topk_group=2), "to the 4 experts that can be"),
        (lambda: TopKRouter(4, 8, 2, n_group=3), "=8 must be divisible by n_group=3"),
        (lambda: TopKRouter(4, 8, 2, n_group=2, topk_group=3), "topk_group=3 must be from 1 to"),
        (lambda: TopKRouter(4, 8, 2, n_group=8, topk_group=4), "n_group=8 leaves 1 expert a group"),
        (lambda: TopKRouter(4, 8, 2, "relu"), "scoring_func='relu'"),
        (lambda: TopKRouter(4, 8, 2, topk_method="best"), "topk_method='best'"),
        (lambda: TopKRouter(4, 8, 0), "num_experts_per_tok=0 must be from 1 to"),
        (lambda: TopKRouter(4, 8, 2, n_group=2, topk_group=0), "topk_group=0 must be from 1 to"),
        (lambda: SwitchRouter(4, 2, 0), "capacity_factor=0 must be above 0"),
        (lambda: SwitchRouter(4, 0), "n_routed_experts=0 must be at least 1"),
        (lambda: SwiGLU(0, 2), "hidden_size=0 must be at least 1"),
        (lambda: SwiGLU(2, 0), "intermediate_size=0 must be at least 1"),
        (lambda: MixtureOfExperts(4, 2, SwitchRouter(4, 2))(torch.ones(1, 4), dispatch="magic"),
         "dispatch='magic'"),
        (lambda: MixtureOfExperts(4, 0, SwitchRouter(4, 2)), "moe_intermediate_size=0 must be"),
        (lambda: MixtureOfExperts(5, 2, SwitchRouter(4, 2)), "reads width 4, want hidden_size=5"),
        (lambda: MixtureOfExperts(4, 2, SwitchRouter(4, 2))(torch.ones(3, 5)),
         r"input must be \(..., T, 4\), got \(3, 5\)"),
        (lambda: MixtureOfExperts(4, 2, SwitchRouter(4, 2))(torch.ones(3, 4), torch.ones(2)),
         r"token_mask must be \(3,\), got \(2,\)"),
        (lambda: device_balance_loss(*even_routing(), 1.0, 3), "must be divisible by devices=3"),
        (lambda: sequence_balance_loss(*even_routing(), 1.0), r"sequences must be \(B, T, E"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_routing_names_its_parts():
    assert Routing._fields == ("weights", "indices", "scores", "kept")


@pytest.mark.integration
def test_script_draws_its_picture(check_script, tmp_path):
    check_script("moe_coded.py", ["--steps", 3], "--steps=3")
    assert (tmp_path / "pictures" / "moe_load.png").stat().st_size > 5000


def test_a_switch_token_weighs_its_expert_by_the_softmax():
    router = SwitchRouter(1, 2)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[math.log(3.0)], [0.0]]))
    routing = router(torch.ones(1, 1))
    torch.testing.assert_close(routing.scores, torch.tensor([[0.75, 0.25]]))
    torch.testing.assert_close(routing.weights, torch.tensor([[0.75]]))


def test_capacity_for_few_tokens():
    assert SwitchRouter(2, 8, 1.0).capacity(1) == 1
    assert SwitchRouter(2, 4, 1.0).capacity(7) == 1  # rounded down
    assert SwitchRouter(2, 4).capacity(16) == 5  # a quarter more than an even share


@pytest.mark.parametrize(
    "router",
    [
        SwitchRouter(1, 1),
        TopKRouter(1, 1, 1),
        TopKRouter(1, 1, 1, topk_method="greedy"),
        TopKRouter(1, 2, 1, topk_method="group_limited_greedy", n_group=2),  # one expert a group
        TopKRouter(1, 4, 2, n_group=2),  # all experts of the best group
    ],
)
def test_the_smallest_layer_works(router):
    layer = MixtureOfExperts(1, 1, router)
    output = layer(torch.ones(1, 1, 1))
    assert output.shape == (1, 1, 1) and output.abs().sum() > 0


def test_greedy_chooses_among_all_experts_whatever_the_groups():
    # 8 experts do not even form 3 groups
    router = TopKRouter(1, 8, 2, "softmax", "greedy", n_group=3, topk_group=1)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[0.0, 3, 1, 0, 0, 0, 0, 2]]).T)
    assert router(torch.ones(1, 1)).indices.tolist() == [[1, 7]]


def test_a_router_keeps_scores_and_weighs_by_default():
    router = TopKRouter(1, 2, 2)
    with torch.no_grad():
        router.weight.copy_(torch.logit(torch.tensor([[0.6], [0.2]])))
    routing = router(torch.ones(1, 1))
    torch.testing.assert_close(routing.scores, torch.tensor([[0.6, 0.2]]))  # sigmoids
    torch.testing.assert_close(routing.weights, torch.tensor([[0.75, 0.25]]))  # their sum is 1


@pytest.mark.parametrize("logit", [-30.0, -200.0])
def test_tiny_scores_are_normed_and_zero_scores_give_no_nan(logit):
    router = TopKRouter(1, 4, 2)
    with torch.no_grad():
        router.weight.fill_(logit)
    _, indices, scores, _ = router(torch.ones(3, 1))
    rounds_to_zero = logit == -200
    assert (scores == 0).all() == rounds_to_zero
    weights = router(torch.ones(3, 1)).weights
    torch.testing.assert_close(weights, torch.full((3, 2), 0.0 if rounds_to_zero else 0.5))
    loss = sequence_balance_loss(scores[None], indices[None], 1.0)
    torch.testing.assert_close(loss, torch.tensor(0.0 if rounds_to_zero else 1.0))


def test_a_fresh_layer_has_small_random_weights():
    for router in (SwitchRouter(64, 128), TopKRouter(64, 128, 2)):
        weight = router.weight
        assert abs(weight.mean()) < 0.001 and weight.std().item() == pytest.approx(0.02, rel=0.05)
    experts = MixtureOfExperts(64, 16, SwitchRouter(64, 8)).experts
    # uniform up to 1/√(number of inputs), like `nn.Linear`
    for weight, bound in ((experts.gate_up_proj, 1 / 8), (experts.down_proj, 1 / 4)):
        assert 0.99 * bound < weight.max() <= bound and -bound <= weight.min() < -0.99 * bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_the_seed_alone_decides_a_training():
    (first, error), (again, same) = (train_on_clusters("none", 3, 0.02, seed=1) for _ in range(2))
    other, _ = train_on_clusters("none", 3, 0.02, seed=2)
    assert torch.equal(first, again) and error == same and not torch.equal(first, other)
    assert first.shape == (3, 8)
    torch.testing.assert_close(first.sum(dim=1), torch.ones(3))
