"""Phase 10: configuration, model, cost, training step, the training run, the command line."""

import dataclasses
import pathlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_deepseek import COMMON, EVERY_KIND, KINDS, V2, WIDE, YARN, build, ids_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import deepseek_full_model as full
from deepseek_full_model import (
    NEWTON_SCHULZ,
    DeepSeekConfig,
    DeepSeekModel,
    Muon,
    RunOptions,
    TrainingRun,
    build_optimizers,
    cache_elements,
    orthogonalized,
    parameter_counts,
    silence_blocks,
    training_flops_per_token,
    training_step,
)
from mla_coded import LatentCache
from moe_coded import (
    MixtureOfExperts,
    TopKRouter,
    expert_balance_loss,
    sequence_balance_loss,
)
from mtp_coded import mtp_loss, next_token_loss
from pipeline import checkpoint, corpus, released, training
from pipeline.run import learning_rate
from quantization_coded import prepare_fp8_training, prepare_qat

ROOT = pathlib.Path(__file__).parent.parent

PUBLISHED = {
    "deepseek_v2_lite": (15_706_484_224, 2_661_150_208, 2_451_435_008, 2_241_719_808, 15_552),
    "deepseek_v2": (235_741_434_880, 21_375_800_320, 20_851_512_320, 20_327_224_320, 34_560),
    "deepseek_v3": (671_026_404_352, 37_552_282_624, 36_625_603_584, 35_698_924_544, 35_136),
}


@pytest.mark.performance
@pytest.mark.parametrize("name", PUBLISHED)
def test_released_configurations_have_the_published_sizes(name):
    config = DeepSeekConfig.from_file(ROOT / "configs" / f"{name}.json")
    with torch.device("meta"):
        model = DeepSeekModel(config)
    counts = parameter_counts(model)
    total, *active, cached = PUBLISHED[name]
    assert counts["total"] == total
    assert [counts[key] for key in list(counts)[1:4]] == active
    assert cache_elements(config) == cached
    tensors = released.released_tensors(model)
    main = {n: t for n, t in tensors.items() if not n.startswith("model.layers.61.")}
    biases = [t.numel() for n, t in main.items() if n.endswith("e_score_correction_bias")]
    assert sum(t.numel() for t in main.values()) == total + sum(biases)
    if name == "deepseek_v3":
        assert counts["mtp"] == 11_610_067_968 and sum(biases) == 14_848
        assert sum(p.numel() for p in model.parameters()) == 682_636_472_320
        # Bytes aside, the released files hold these and one scale for every 128 × 128 block.
        stored = {**tensors, **released.mtp_copies(model)}
        assert sum(t.numel() for t in stored.values()) == 684_531_386_000 - 41_540_496
        gigaflops = training_flops_per_token(model, 4096) / 1e9
        assert gigaflops == pytest.approx(250.46, abs=0.01)
    if name == "deepseek_v2":
        gigaflops = training_flops_per_token(model, 4096) / 1e9
        assert gigaflops == pytest.approx(155.31, abs=0.01)


def test_a_model_without_mtp_counts_none():
    model = build("v2")
    counts = parameter_counts(model)
    assert counts["mtp"] == 0
    assert counts["total"] == sum(p.numel() for p in model.parameters())


@pytest.mark.performance
def test_cache_of_the_model_holds_latent_and_rotary_key_only():
    model, caches = build("v3"), None
    caches = model.new_caches()
    model(ids_of(2, 10), caches=caches)
    assert all(isinstance(cache, LatentCache) for cache in caches)
    used = sum(cache.used_bytes() for cache in caches)
    assert used == 2 * 10 * cache_elements(model.config) * 4 == 2 * 10 * 3 * (12 + 8) * 4


@EVERY_KIND
@pytest.mark.parametrize("chunks", [[1] * 12, [5, 1, 6], [3, 9]])
def test_full_pass_matches_any_chunks(kind, chunks):
    model, ids = build(kind), ids_of(2, 12)
    caches = model.new_caches()
    with torch.no_grad():
        pieces = [model(p, caches=caches, path="absorbed") for p in ids.split(chunks, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(ids), rtol=0, atol=1e-4)


def test_speculative_generation_is_lossless_in_the_full_model():
    for depth in (1, 2):
        model, ids = build("v3", num_nextn_predict_layers=depth), ids_of(2, 7)
        assert torch.equal(model.generate(ids, 25, speculative=True), model.generate(ids, 25))


@pytest.mark.parametrize("edited", [3, 7, 11])
def test_editing_a_token_moves_nothing_before_it(edited):
    model, ids = build("v3", num_nextn_predict_layers=1), ids_of(1, 12)
    changed = ids.clone()
    changed[0, edited] = (ids[0, edited] + 1) % 61
    hidden, changed_hidden = model.hidden_states(ids), model.hidden_states(changed)
    torch.testing.assert_close(hidden[:, :edited], changed_hidden[:, :edited])
    before = model.mtp_logits(hidden, ids)[0][:, : edited - 1]
    after = model.mtp_logits(changed_hidden, changed)[0][:, : edited - 1]
    torch.testing.assert_close(before, after)


def test_padding_reaches_no_router_load_and_no_balance_loss():
    model, ids = build("v3", num_nextn_predict_layers=1, std=0.1).train(), ids_of(2, 8)
    padded = torch.cat([ids_of(2, 5), ids], dim=1)
    mask = torch.tensor([0] * 5 + [1] * 8).expand(2, 13)
    figures = []
    for text, attention_mask in ((ids, None), (padded, mask)):
        routed = []
        hidden = model.hidden_states(text, attention_mask, routed=routed)
        model.mtp_logits(hidden, text, attention_mask, routed=routed)
        figures.append([(each.load(), each.balance_loss()) for each in routed])
    torch.testing.assert_close(figures[1], figures[0], rtol=1e-4, atol=1e-6)


def test_first_loss_is_ln_of_the_vocabulary():
    model, ids = DeepSeekModel(DeepSeekConfig(**KINDS["v3"])), ids_of(4, 50)
    loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(np.log(61), abs=0.05)


def test_dense_layers_come_first():
    model = build("v3", first_k_dense_replace=2, num_hidden_layers=4, num_nextn_predict_layers=1)
    kinds = [isinstance(block.mlp, MixtureOfExperts) for block in model.layers]
    assert kinds == [False, False, True, True]
    assert list(model.moe_layers()) == ["layer 2", "layer 3", "MTP 1"]


def test_every_second_layer_may_be_sparse():
    model = build("v3", first_k_dense_replace=1, moe_layer_freq=2, num_hidden_layers=6)
    kinds = [isinstance(block.mlp, MixtureOfExperts) for block in model.layers]
    assert kinds == [False, False, True, False, True, False]


@pytest.mark.parametrize("std", [0.0, 0.3])
def test_matrices_start_from_the_range_of_the_configuration(std):
    config = DeepSeekConfig(**KINDS["v3"], initializer_range=std, num_nextn_predict_layers=1)
    for name, parameter in DeepSeekModel(config).named_parameters():
        if parameter.dim() >= 2:
            assert parameter.square().mean().sqrt().item() == pytest.approx(std, rel=0.2), name


@pytest.mark.parametrize("seq_aux", [True, False])
def test_the_balance_loss_is_the_one_that_the_configuration_asks_for(seq_aux):
    model, routed = build("v3", seq_aux=seq_aux, aux_loss_alpha=0.25), []
    model(ids_of(3, 9), routed=routed)
    loss = sequence_balance_loss if seq_aux else expert_balance_loss
    for each in routed:
        scores, indices = (part.unflatten(0, (3, 9)) for part in each.routing[2:0:-1])
        torch.testing.assert_close(each.balance_loss(), loss(scores, indices, alpha=0.25))


def step_once(model, gamma=0.01, weight=0.3):
    optimizers = build_optimizers(model, 1e-3)
    ids = ids_of(4, 20)
    return training_step(model, optimizers, ids, torch.zeros_like(ids), 1e-3, weight, gamma)


def test_training_step_moves_every_parameter_and_reports():
    model = build("v3", num_nextn_predict_layers=1, std=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    figures = step_once(model)
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters())
    assert figures["tokens"] == 80 and figures["mtp_loss"] > 0 and figures["balance_loss"] > 0
    assert set(figures["max_load"]) == {"layer 1", "layer 2", "MTP 1"}


def test_a_step_has_the_losses_and_the_gradient_of_its_equation():
    """L_next + λ/2 (L_1 + L_2) + Σ L_balance by phase 6's plain losses. λ is 0.7."""
    model, ids = build("v3", std=0.1, num_nextn_predict_layers=2, aux_loss_alpha=0.5), ids_of(2, 12)
    documents, routed = (torch.arange(12) // 5).expand(2, 12), []
    hidden = model.hidden_states(ids, routed=routed)
    next_loss = next_token_loss(model.lm_head(hidden), ids)  # also across the ends of documents
    depths = model.mtp_logits(hidden, ids, routed=routed)
    further_loss = mtp_loss(depths, ids, weight=1.0, document_ids=documents)
    balance_loss = sum(layer_pass.balance_loss() for layer_pass in routed)
    (next_loss + 0.7 * further_loss + balance_loss).backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    figures = training_step(model, [], ids, documents, 1e-3, 0.7, 0.0)
    losses = [figures[name] for name in ("loss", "mtp_loss", "balance_loss")]
    assert losses == pytest.approx([next_loss.item(), further_loss.item(), balance_loss.item()])
    assert all(type(loss) is float for loss in losses)  # nothing of the step stays in memory
    assert type(figures["gradient_norm"]) is float
    length = torch.stack([gradient.norm() for gradient in wanted.values()]).norm().item()
    assert figures["gradient_norm"] == pytest.approx(length) and length > 1
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad * length, wanted[name], atol=1e-5, rtol=1e-3)
    assert model.training


def test_a_step_forgets_the_gradient_of_the_step_before():
    model, ids = build("v3"), ids_of(2, 9)
    optimizers = [torch.optim.SGD(model.parameters())]
    first, second = (
        training_step(model, optimizers, ids, torch.zeros_like(ids), 0.0, 0.3, 0.0)
        for _ in range(2)
    )
    assert first["gradient_norm"] == pytest.approx(second["gradient_norm"])


def test_training_step_moves_the_bias_of_overloaded_experts_down_by_gamma():
    model = build("v3", std=0.1)
    routers = [moe.gate for moe in model.moe_layers().values()]
    for router in routers:
        router.e_score_correction_bias.zero_()
    loads = []
    hook = [r.register_forward_hook(lambda _, __, out: loads.append(out.indices)) for r in routers]
    max_load = step_once(model, gamma=0.01)["max_load"].values()
    for router, indices, handle, busiest in zip(routers, loads, hook, max_load, strict=True):
        handle.remove()
        load = torch.bincount(indices.flatten(), minlength=8).float()
        assert busiest == pytest.approx((load.max() / load.mean()).item(), abs=1e-3)
        expected = -0.01 * torch.sign(load - load.mean())
        torch.testing.assert_close(router.e_score_correction_bias, expected)
    model.eval()
    before = routers[0].e_score_correction_bias.clone()
    model(ids_of(2, 9))
    assert torch.equal(routers[0].e_score_correction_bias, before)


def test_training_step_lowers_the_balance_loss():
    model, ids = build("v3", std=0.1, aux_loss_alpha=1000.0), ids_of(4, 20)
    optimizers = [torch.optim.SGD(model.parameters())]
    losses = [
        training_step(model, optimizers, ids, torch.zeros_like(ids), 0.01, 0.0, 0.0)["balance_loss"]
        for _ in range(8)
    ]
    assert losses[-1] < losses[0] - 1


def test_norms_and_routers_do_not_decay():
    model = build("v3", num_nextn_predict_layers=1)
    decay = {
        id(p): group["weight_decay"]
        for optimizer in build_optimizers(model, 1e-3)
        for group in optimizer.param_groups
        for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        spared = "norm" in name or ".gate.weight" in name or name.endswith("bias")
        assert (decay.pop(id(parameter)) == 0) == spared, name
    assert not decay


def test_optimizers_have_the_rate_and_the_precision_asked_for():
    adamw, muon = build_optimizers(build("v3"), 2e-3, precision=torch.bfloat16)
    assert {group["lr"] for o in (adamw, muon) for group in o.param_groups} == {2e-3}
    assert muon.precision == torch.bfloat16


@pytest.mark.parametrize(("name", "kinds"), [("adamw", 1), ("muon", 2)])
def test_a_run_has_the_optimizers_that_its_options_name(name, kinds):
    run = TrainingRun.__new__(TrainingRun)
    run.model = build("v3")
    run.options = RunOptions(steps=1, optimizer=name, learning_rate=2e-3, precision="bfloat16")
    optimizers = run.build_optimizers()
    assert [type(optimizer) for optimizer in optimizers] == [torch.optim.AdamW, Muon][:kinds]
    assert {group["lr"] for o in optimizers for group in o.param_groups} == {2e-3}
    assert kinds == 1 or optimizers[1].precision == torch.bfloat16


def test_training_step_clips_the_gradient_to_length_1():
    model, ids = build("v3", num_nextn_predict_layers=1), ids_of(4, 20)
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    optimizers = [torch.optim.SGD(model.parameters())]
    figures = training_step(model, optimizers, ids, torch.zeros_like(ids), 1.0, 0.3, 0.0)
    after = nn.utils.parameters_to_vector(model.parameters()).detach()
    assert figures["gradient_norm"] > 1.5
    assert (after - before).norm().item() == pytest.approx(1.0, rel=1e-3)


def test_bfloat16_is_for_matrix_products_only():
    model, ids = build("v3", num_nextn_predict_layers=1), ids_of(2, 30)
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.RMSNorm, TopKRouter)):
            module.register_forward_hook(
                lambda _, __, out, name=name: seen.update({name: getattr(out, "scores", out).dtype})
            )
    residual = []
    model.mtp[0].block.register_forward_pre_hook(lambda _, args: residual.append(args[0].dtype))
    figures = [
        training_step(model, [], ids, torch.zeros_like(ids), 1e-3, 0.3, 0.0, precision)
        for precision in (torch.float32, torch.bfloat16)
    ]
    assert residual == [torch.float32] * 2
    for name, dtype in seen.items():
        exact = "norm" in name or name.endswith((".gate", "embed_tokens"))
        assert dtype == (torch.float32 if exact else torch.bfloat16), name
    for key in ("loss", "mtp_loss"):  # 8 bits of mantissa
        assert figures[1][key] == pytest.approx(figures[0][key], rel=0.01)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


def test_settings_follow_what_is_fast_on_the_machine(monkeypatch):
    for faster in ("bfloat16", "float32"):
        monkeypatch.setattr(training, "fastest_precision", lambda device, faster=faster: faster)
        options, asked = RunOptions(steps=1), RunOptions(steps=1, precision="float32")
        for each in (options, asked):
            each.settle("cpu")
        assert (options.precision, asked.precision) == (faster, "float32")
    assert training.fastest_precision("mps") == "float32"
    only_adamw = build_optimizers(build("v3"), 1e-3, muon=False)
    assert [type(optimizer) for optimizer in only_adamw] == [torch.optim.AdamW]


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (3, 8, 8)])
def test_orthogonalized_is_near_the_orthogonal_factor(shape):
    """A spectrum from 1 to 1/40 of the norm: the singular vectors stay, the values come near 1."""
    torch.manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.logspace(0, -1.3, U.shape[-1])
    G = 1e-5 * U * values @ Vh
    ours, exact = orthogonalized(G), U @ Vh
    kept = (U.mT @ ours @ Vh.mT).diagonal(dim1=-2, dim2=-1)
    assert kept.min() > 0.73 and kept.max() < 1.27
    torch.testing.assert_close(U * kept[..., None, :] @ Vh, ours, atol=1e-5, rtol=0)  # nothing else
    assert (ours - exact).norm() < 0.27 * exact.norm()
    bfloat16 = orthogonalized(G, torch.bfloat16)
    assert bfloat16.dtype == torch.float32 and (bfloat16 - ours).norm() < 0.05 * ours.norm()


def test_newton_schulz_polynomials_do_what_their_comment_says():
    value = torch.linspace(0.01, 1, 10_000, dtype=torch.float64)
    for a, b, c in NEWTON_SCHULZ:
        value = a * value + b * value**3 + c * value**5
    assert value.min() > 0.73 - 1e-3 and value.max() < 1.27 + 1e-3


@pytest.mark.performance
def test_the_smaller_of_the_two_products_is_taken():
    """Each step of (6, 20) and of (20, 6) multiplies X Xᵀ (6, 6), its square, and X by a sum."""
    for shape in ((6, 20), (20, 6)):
        with FlopCounterMode(display=False) as counter:
            orthogonalized(torch.randn(shape))
        assert counter.get_total_flops() == len(NEWTON_SCHULZ) * 2 * (2 * 6 * 6 * 20 + 6**3)


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_matrices_with_zero_gradients_only_decay(weight_decay):
    matrix = torch.nn.Parameter(torch.randn(4, 6))
    before, matrix.grad = matrix.detach().clone(), torch.zeros(4, 6)
    Muon([matrix], lr=0.1, weight_decay=weight_decay).step()
    torch.testing.assert_close(matrix.detach(), before * (1 - 0.1 * weight_decay))


def test_muon_is_pytorchs_with_better_polynomials():
    """Two steps: momentum, decay, scale and sign are those of torch.optim.Muon."""
    torch.manual_seed(0)
    first = [torch.randn(24, 8), torch.randn(24, 8), torch.randn(5, 9)]
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in first] for _ in range(2))
    optimizers = [
        Muon(ours, lr=0.02, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(2):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, other, start in zip(ours, theirs, first, strict=True):
        moved, wanted = mine - 0.998**2 * start, other - 0.998**2 * start
        similar = F.cosine_similarity(moved.flatten(), wanted.flatten(), dim=0)
        assert similar > 0.97 and 0.8 < moved.norm() / wanted.norm() < 1.25
    state = optimizers[0].state[ours[0]]["momentum_buffer"]
    torch.testing.assert_close(state, optimizers[1].state[theirs[0]]["momentum_buffer"])


def test_muon_takes_matrices_of_all_shapes_alike():
    """One product for all of a shape is the same as one matrix after another."""
    torch.manual_seed(0)
    first = [torch.randn(4, 6), torch.randn(6, 4), torch.randn(4, 6)]
    gradients = [torch.randn_like(w) for w in first]
    moved = []
    for parts in ([[0, 1, 2]], [[0], [1], [2]]):
        matrices = [torch.nn.Parameter(w.clone()) for w in first]
        for matrix, gradient in zip(matrices, gradients, strict=True):
            matrix.grad = gradient
        for part in parts:
            Muon([matrices[i] for i in part], lr=0.1).step()
        moved.append(torch.cat([matrix.detach().flatten() for matrix in matrices]))
    torch.testing.assert_close(*moved, atol=1e-5, rtol=1e-5)


def test_silent_blocks_add_nothing_at_first_and_learn():
    model, ids = build("v3", num_nextn_predict_layers=1, std=0.05), ids_of(2, 9)
    assert silence_blocks(model) is model
    with torch.no_grad():
        expected = model.lm_head(model.norm(model.embed_tokens(ids)))
        torch.testing.assert_close(model(ids), expected)
    optimizers = build_optimizers(model, 1e-2)
    for _ in range(2):
        training_step(model, optimizers, ids, torch.zeros_like(ids), 1e-2, 0.3, 0.0)
    last = [p for name, p in model.named_parameters() if "o_proj" in name or "down_proj" in name]
    assert len(last) >= 8 and all(p.any() for p in last)


def test_a_new_run_starts_with_silent_blocks(small_run, tmp_path):
    run = TrainingRun(tmp_path / "run", RunOptions(**small_run[1], steps=1), "cpu")
    named = dict(run.model.named_parameters())
    last = [named[name] for name in named if "o_proj" in name or "down_proj" in name]
    assert last and not any(p.any() for p in last)


def test_without_mtp_weight_the_modules_do_not_run():
    model, ids = build("v3", num_nextn_predict_layers=1), ids_of(2, 9)
    before = {name: p.clone() for name, p in model.mtp.named_parameters() if "block" in name}
    biases = [m.gate.e_score_correction_bias for m in model.moe_layers().values()]
    at_first = [bias.clone() for bias in biases]
    figures = training_step(
        model, build_optimizers(model, 1e-2), ids, torch.zeros_like(ids), 1e-2, 0.0, 0.1
    )
    assert figures["mtp_loss"] is None and set(figures["max_load"]) == {"layer 1", "layer 2"}
    assert all(torch.equal(dict(model.mtp.named_parameters())[n], p) for n, p in before.items())
    stayed = [torch.equal(bias, old) for bias, old in zip(biases, at_first, strict=True)]
    assert stayed == [False, False, True]


def test_the_mtp_module_learns_late_and_then_counts_a_third():
    run = TrainingRun.__new__(TrainingRun)
    for begin, weights in ((0.5, [0.0, 0.3, 0.1]), (0.0, [0.3, 0.3, 0.1]), (0.8, [0.0, 0.0, 0.0])):
        run.options = RunOptions(steps=1, mtp_from=begin)
        assert [run.mtp_weight(used) for used in (0.49, 0.5, 0.7)] == pytest.approx(weights)
    assert run.mtp_weight(0.8) == pytest.approx(0.1)


def test_training_step_sets_the_rate_of_all_optimizers():
    model, ids = build("v3", num_nextn_predict_layers=1), ids_of(2, 9)
    optimizers = build_optimizers(model, 1e-3)
    training_step(model, optimizers, ids, torch.zeros_like(ids), 7e-4, 0.3, 0.0)
    assert {group["lr"] for o in optimizers for group in o.param_groups} == {7e-4}


def test_muon_takes_the_matrices_between_hidden_states():
    model = build("v3", num_nextn_predict_layers=1)
    adamw, muon = build_optimizers(model, 1e-3)
    names = {p: name for name, p in model.named_parameters()}
    in_muon = {names[p] for group in muon.param_groups for p in group["params"]}
    in_adamw = {names[p] for group in adamw.param_groups for p in group["params"]}
    assert not in_muon & in_adamw and in_muon | in_adamw == set(names.values())
    for name in in_muon:
        assert name.endswith("_proj.weight") or "_proj_with_mqa" in name, name
    for name in ("embed_tokens.weight", "lm_head.weight", "layers.1.mlp.gate.weight"):
        assert name in in_adamw


@pytest.mark.parametrize("muon", [True, False])
def test_training_lowers_the_loss(muon):
    torch.manual_seed(1)
    model = build("v3", num_nextn_predict_layers=1, std=0.05)
    optimizers, ids = build_optimizers(model, 3e-3, muon), ids_of(2, 30)
    losses = [
        training_step(model, optimizers, ids, torch.zeros_like(ids), 3e-3, 0.3, 0.001)
        for _ in range(30)
    ]
    assert losses[-1]["loss"] < 0.5 * losses[0]["loss"]
    assert losses[-1]["mtp_loss"] < 0.5 * losses[0]["mtp_loss"]


def test_both_spellings_of_the_rotary_settings_are_one():
    base = {**KINDS["v3"], "model_type": "deepseek_v3"}
    released = DeepSeekConfig.from_dict({**base, "rope_theta": 5000, "rope_scaling": YARN})
    settings = {**YARN, "rope_type": YARN["type"], "rope_theta": 5000}
    settings.pop("type")
    new = DeepSeekConfig.from_dict({**base, "rope_parameters": settings})
    assert released.yarn == new.yarn and released.rope_theta == new.rope_theta == 5000
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    assert DeepSeekConfig.from_dict({**base, "rope_parameters": plain}).yarn is None


def test_router_fields_follow_from_the_model_type():
    v3 = DeepSeekConfig.from_dict({**KINDS["v3"], "model_type": "deepseek_v3"})
    assert (v3.scoring_func, v3.topk_method, v3.norm_topk_prob) == ("sigmoid", "noaux_tc", True)
    v2 = DeepSeekConfig.from_dict({**COMMON, **V2, "n_group": None, "topk_group": None})
    assert (v2.scoring_func, v2.topk_method, v2.norm_topk_prob) == ("softmax", "greedy", False)


SMALLEST = {  # the smallest legal values; a rotary width must be even
    **dict.fromkeys(
        ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "v_head_dim",
         "num_key_value_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "topk_group",
         "moe_layer_freq", "intermediate_size", "moe_intermediate_size", "n_routed_experts",
         "num_experts_per_tok", "n_group", "max_position_embeddings"), 1,
    ),
    **dict.fromkeys(
        ("first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers",
         "initializer_range", "aux_loss_alpha"), 0,
    ),
    "qk_rope_head_dim": 2,
}
JUST_ABOVE = dict(rms_norm_eps=1e-9, routed_scaling_factor=1e-3, rope_theta=1.001)


def test_the_smallest_model_works():
    model = DeepSeekModel(DeepSeekConfig(**SMALLEST, **JUST_ABOVE))
    assert isinstance(model.layers[0].mlp, MixtureOfExperts)
    assert model(torch.zeros(1, 1, dtype=torch.long)).isfinite().all()
    with pytest.raises(ValueError, match="2 tokens exceed the context of 1"):
        model(torch.zeros(1, 2, dtype=torch.long))


@pytest.mark.parametrize("name", [*SMALLEST, *JUST_ABOVE])
def test_a_value_below_the_smallest_is_named(name):
    below = int(JUST_ABOVE[name]) if name in JUST_ABOVE else SMALLEST[name] - 1
    with pytest.raises(ValueError, match=f"{name}={below}"):
        DeepSeekConfig(**{**SMALLEST, name: below})


def test_fields_that_a_file_leaves_out():
    """Files of transformers lack some of these: the values are those of the released code."""
    fields = dataclasses.fields(DeepSeekConfig)
    needed = [field.name for field in fields if field.default is dataclasses.MISSING]
    config = DeepSeekConfig(**{name: SMALLEST[name] for name in needed})
    for name, value in dict(
        initializer_range=0.02, rms_norm_eps=1e-6, rope_theta=10000.0, rope_scaling=None,
        max_position_embeddings=4096, attention_bias=False, q_lora_rank=None, n_group=1,
        topk_group=1, moe_layer_freq=1, first_k_dense_replace=0, n_shared_experts=1,
        routed_scaling_factor=1.0, aux_loss_alpha=0.001, seq_aux=True, num_nextn_predict_layers=0,
    ).items():
        assert getattr(config, name) == value, name


def test_configuration_round_trips(tmp_path):
    for name in ("deepseek_v2_lite", "deepseek_v2", "deepseek_v3", "small"):
        config = DeepSeekConfig.from_file(ROOT / "configs" / f"{name}.json")
        checkpoint.write_json(tmp_path / "config.json", config.to_dict())
        assert DeepSeekConfig.from_file(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size=0 must be an integer of at least 1"),
        ({"vocab_size": "many"}, "vocab_size='many' must be an integer"),
        ({"hidden_size": None}, "the configuration lacks hidden_size"),
        ({"model_type": None}, "model_type=None is not supported"),
        ({"model_type": "llama"}, "model_type='llama' is not supported, want deepseek_v2 or"),
        ({"rope_theta": "x"}, "rope_theta='x' must be a number above 1"),
        ({"rope_theta": 1}, "rope_theta=1 must be a number above 1"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps='x' must be a number"),
        ({"attention_bias": "false"}, "attention_bias='false' must be true or false"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn' must be an object"),
        ({"rope_scaling": {**YARN, "factor": "x"}}, "factor='x' must be a number"),
        ({"rope_parameters": [1]}, "rope_parameters=.* must be an object"),
        ({"quantization_config": "fp8"}, "quantization_config='fp8' must be an object"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim=7 must be even"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax' is not supported for deepseek_v3"),
        ({"topk_method": "greedy"}, "topk_method='greedy' is not supported for deepseek_v3"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True is not supported"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1 is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "type='linear' is not supported"),
        ({"rope_scaling": {"type": "yarn"}}, "lacks .*factor"),
        ({"rope_scaling": {**YARN, "speed": 3}}, "unknown fields .*speed"),
        ({"rope_interleave": False}, "rope_interleave=False is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
    ],
)
def test_wrong_configurations_are_named(changes, message, tmp_path):
    content = {**KINDS["v3"], "model_type": "deepseek_v3", **changes}
    checkpoint.write_json(tmp_path / "config.json", content)
    with pytest.raises(ValueError, match=message) as caught:
        DeepSeekConfig.from_file(tmp_path / "config.json")
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 must be from 1"),
        ({"n_group": 3}, "n_routed_experts=8 must be divisible by n_group=3"),
        ({"topk_group": 5}, "topk_group=5 must be from 1 to n_group=4"),
    ],
)
def test_wrong_routing_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        DeepSeekModel(DeepSeekConfig(**{**KINDS["v3"], **changes}))


@pytest.mark.parametrize("prepare", [lambda m: prepare_qat(m, "int4"), prepare_fp8_training])
def test_the_whole_training_step_runs_on_rounded_weights(prepare):
    model = prepare(build("v3", **WIDE))
    ids = ids_of(2, 12)
    optimizers = build_optimizers(model, 1e-2)
    losses = [
        training_step(model, optimizers, ids, torch.zeros_like(ids), 1e-2, 0.3, 0.001)["loss"]
        for _ in range(6)
    ]
    assert losses[-1] < losses[0]


def test_schedules_of_the_run(small_run, tmp_path, monkeypatch):
    _, options = small_run
    chosen = RunOptions(
        **options, steps=1, mtp_from=0.5, learning_rate=2e-3, gamma=0.02, precision="bfloat16"
    )
    run, asked, given = TrainingRun(tmp_path / "run", chosen, "cpu"), [], []
    monkeypatch.setattr(
        full, "training_step", lambda *g, **schedule: given.append(g) or asked.append(schedule)
    )
    shares = (0.0, 0.5, 0.66, 2 / 3, 0.94, 0.95)
    for number, used in enumerate(shares):
        run.step(number, used)
    names = ("rate", "mtp_weight", "gamma")
    rates, weights, gammas = ([each[name] for each in asked] for name in names)
    assert weights == pytest.approx([0.0, 0.3, 0.3, 0.1, 0.1, 0.1])
    assert gammas == 5 * [0.02] + [0.0]
    assert rates == [learning_rate(used, 2e-3) for used in shares]
    assert {each["precision"] for each in asked} == {torch.bfloat16}
    model, optimizers, ids, document_ids = given[3]
    assert model is run.model and optimizers is run.optimizers
    assert all(map(torch.equal, (ids, document_ids), run.batches[3]))


@pytest.mark.integration
def test_tokenizer_and_batches_come_from_the_training_part_alone(small_run, tmp_path, monkeypatch):
    _, options = small_run
    seen, train_tokenizer = [], corpus.train_tokenizer
    monkeypatch.setattr(
        corpus,
        "train_tokenizer",
        lambda docs, size: seen.extend(docs) or train_tokenizer(docs, size),
    )
    run = TrainingRun(tmp_path / "run", RunOptions(**options, steps=1), "cpu")
    assert seen == run.corpus.train and not set(seen) & {*run.corpus.test, *run.corpus.validation}
    pieces = run.tokenizer.decode(run.batches.ids.tolist(), skip_special_tokens=False)
    assert pieces.split(corpus.SEPARATOR)[1:-1] == [document.text for document in run.corpus.train]


def flags(options):
    parts = []
    for name, value in options.items():
        parts += [f"--{name.replace('_', '-')}", *(value if isinstance(value, list) else [value])]
    return parts


@pytest.mark.integration
def test_whole_pipeline_from_the_command_line(
    small_run, run_script, tmp_path, capsys, monkeypatch
):
    _, options = small_run
    command = [*map(str, flags(options)), "--steps", "6", "--out", "run"]
    result = run_script("deepseek_full_model.py", *command)
    assert result.returncode == 0, result.stderr
    for promised in (
        "bits per byte, test part", "this model", "zlib -9", "lzma -9", "uniform",
        "MTP acceptance", "busiest expert / mean load", "tokens/s", "continuation of",
        "the same text as plain greedy decoding", "aligning ",
        "held-out prompts, before → after 1 steps", "its module left as it was",
    ):
        assert promised in result.stdout
    run = tmp_path / "run"
    assert {
        "metrics.jsonl", "loss.png", "expert_load.png", "results.json", "checkpoint", "aligned"
    } == {path.name for path in run.iterdir()}
    assert (run / "aligned" / "alignment.png").stat().st_size > 1000
    assert {path.name for path in (run / "checkpoint").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "run.json", "optimizer",
    }
    monkeypatch.chdir(tmp_path)
    full.main(["evaluate", "--checkpoint", "run", "--device", "cpu"])
    rates = [
        float(printed.split("this model")[1].split()[0])
        for printed in (result.stdout, capsys.readouterr().out)
    ]
    assert rates[0] == rates[1]
    with pytest.raises(SystemExit) as exit_info:
        full.main(command)
    assert exit_info.value.code == 2 and "already holds a run" in capsys.readouterr().err
