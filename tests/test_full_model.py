"""Phase 10: configuration, parity with transformers, checkpoints, training, command line."""

import json
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import deepseek_full_model as full
from deepseek_full_model import (
    HERE,
    AlignmentRun,
    AlignOptions,
    DeepSeekConfig,
    DeepSeekModel,
    RunOptions,
    TrainingRun,
    build_optimizers,
    cache_elements,
    parameter_counts,
    released_tensors,
    score,
    training_flops_per_token,
    training_step,
)
from mla_coded import LatentCache
from moe_coded import MixtureOfExperts, TopKRouter
from pipeline import checkpoint, compiler, corpus
from pipeline.loop import read_metrics
from quantization_coded import (
    SCHEMES,
    convert_qat,
    prepare_fp8_training,
    prepare_qat,
    quantize_cache,
    quantize_model,
)

YARN = {
    "type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 32,
    "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
}  # fmt: skip
COMMON = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 12,
    "num_hidden_layers": 3, "num_attention_heads": 4, "kv_lora_rank": 12, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 6, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "first_k_dense_replace": 1, "max_position_embeddings": 128,
}  # fmt: skip
V2 = {"model_type": "deepseek_v2"}
KINDS = {
    "v2_lite": {**COMMON, **V2, "n_shared_experts": 2, "topk_method": "greedy"},
    "v2_lite_wide": {**COMMON, **V2, "topk_method": "greedy", "num_experts_per_tok": 6,
                     "v_head_dim": 16, "moe_intermediate_size": 20, "hidden_size": 40},
    "v2": {**COMMON, **V2, "q_lora_rank": 16, "topk_method": "group_limited_greedy", "n_group": 4,
           "topk_group": 2, "routed_scaling_factor": 16.0, "num_experts_per_tok": 3,
           "rms_norm_eps": 1e-2},  # the norms inside attention keep 1e-6
    "v2_two_groups": {**COMMON, **V2, "q_lora_rank": 8, "topk_method": "group_limited_greedy",
                      "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0},
    "v3": {**COMMON, "q_lora_rank": 16, "n_group": 4, "topk_group": 2,
           "routed_scaling_factor": 2.5, "num_experts_per_tok": 3},
    "v3_plain_queries": {**COMMON, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 4,
                         "attention_bias": True, "q_lora_rank": None, "first_k_dense_replace": 2},
}  # fmt: skip
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
WITH_AND_WITHOUT_YARN = pytest.mark.parametrize("yarn", [None, YARN], ids=["plain", "yarn"])


def build(kind="v3", yarn=None, std=0.3, **changes):
    config = DeepSeekConfig(**{**KINDS[kind], "rope_scaling": yarn, **changes})
    model = DeepSeekModel(config)
    model.init_weights(std)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(-0.3, 0.3)
    return model.eval()


def transformers_class(model_type):
    import transformers

    transformers.logging.set_verbosity_error()
    names = {"deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}
    return getattr(transformers, names[model_type])


def load_in_transformers(directory, model_type):
    model, info = transformers_class(model_type).from_pretrained(
        directory, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval(), info


@pytest.fixture
def in_transformers(tmp_path):
    """in_transformers(model) → the same weights in transformers' class, through the files."""

    def convert(model):
        model.save_pretrained(tmp_path / "ours")
        theirs, info = load_in_transformers(tmp_path / "ours", model.config.model_type)
        missing, unexpected = info["missing_keys"], info["unexpected_keys"]
        mtp = f"model.layers.{model.config.num_hidden_layers}."
        assert not missing and all(key.startswith(mtp) for key in unexpected), info
        assert not info["mismatched_keys"]
        return theirs

    return convert


def ids_of(*shape, vocab=61):
    return torch.randint(vocab, shape)


# Parity with transformers
@pytest.mark.comparison
@EVERY_KIND
@WITH_AND_WITHOUT_YARN
def test_saved_model_gives_the_same_logits_and_gradients_in_transformers(
    kind, yarn, in_transformers
):
    ours = build(kind, yarn, std=0.15)
    theirs, ids = in_transformers(ours), ids_of(2, 40)
    logits, expected = ours(ids), theirs(ids).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)

    for model, output in ((ours, logits), (theirs, expected)):
        model.zero_grad()
        F.cross_entropy(output[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    # Transformers fuses its experts as we do, but not gate and up of the other feed-forwards.
    gradients = {}
    for name, p in ours.named_parameters():
        if name.endswith("gate_up_proj.weight"):
            for part, half in zip(("gate_proj", "up_proj"), p.grad.chunk(2), strict=True):
                gradients[name.replace("gate_up_proj", part)] = half
        else:
            gradients[name] = p.grad
    for name, parameter in theirs.named_parameters():
        got, want = gradients.pop(name.removeprefix("model.")), parameter.grad
        assert want.norm() > 0, name
        assert (got - want).norm() <= 1e-3 * want.norm(), name
    assert not gradients


@pytest.mark.comparison
@EVERY_KIND
@WITH_AND_WITHOUT_YARN
def test_model_saved_by_transformers_loads_and_gives_the_same(kind, yarn, tmp_path):
    config_class = transformers_class(KINDS[kind].get("model_type", "deepseek_v3")).config_class
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if yarn:
        rope = {"rope_theta": 10000.0, "rope_type": "yarn", **yarn}
        rope.pop("type")
    settings = {k: v for k, v in KINDS[kind].items() if k != "model_type"}
    theirs = transformers_class(config_class.model_type)(
        config_class(
            **settings,
            rope_parameters=rope,
            attn_implementation="eager",
            num_key_value_heads=settings["num_attention_heads"],
        )
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.15) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
        for name, buffer in theirs.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(-0.3, 0.3)
    theirs.save_pretrained(tmp_path)
    if config_class.model_type == "deepseek_v3":
        assert "scoring_func" not in json.loads((tmp_path / "config.json").read_text())
        with pytest.warns(UserWarning, match="no MTP tensors: loaded without MTP"):
            ours = DeepSeekModel.from_pretrained(tmp_path)
    else:
        ours = DeepSeekModel.from_pretrained(tmp_path)
    assert len(ours.mtp) == 0
    ids = ids_of(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(ids), theirs(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.comparison
@EVERY_KIND
@WITH_AND_WITHOUT_YARN
def test_cached_generation_is_transformers_greedy_generation(kind, yarn, in_transformers):
    ours = build(kind, yarn, num_nextn_predict_layers=0)
    theirs, prompt = in_transformers(ours), ids_of(3, 9)
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(ours.generate(prompt, 30), expected)


@pytest.mark.comparison
def test_left_padded_generation_is_transformers_generation(in_transformers):
    ours = build("v3")
    theirs, prompt = in_transformers(ours), ids_of(2, 9)
    mask = torch.ones_like(prompt)
    mask[1, :4] = 0
    expected = theirs.generate(prompt, attention_mask=mask, max_new_tokens=20, do_sample=False,
                               eos_token_id=None, pad_token_id=0)  # fmt: skip
    assert torch.equal(ours.generate(prompt, 20, attention_mask=mask), expected)


@pytest.fixture(scope="module")
def sixty_one_layers(tmp_path_factory):
    """A 61-layer model of tiny width with its MTP layer, in the released names, and its folder."""
    torch.manual_seed(5)
    model = build(
        "v3", num_hidden_layers=61, hidden_size=16, intermediate_size=16, q_lora_rank=8,
        kv_lora_rank=8, moe_intermediate_size=8, num_attention_heads=2,
        num_nextn_predict_layers=1, first_k_dense_replace=3, std=0.1,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("sixty_one")
    model.save_pretrained(directory)
    return model, directory


@pytest.mark.comparison
def test_mtp_drafts_match_transformers_mtp_model(sixty_one_layers):
    from transformers.modeling_layers import MtpModel

    ours, directory = sixty_one_layers
    main, info = load_in_transformers(directory, "deepseek_v3")
    assert not info["missing_keys"] and not info["unexpected_keys"]
    mtp, ids = MtpModel.from_pretrained(main), ids_of(1, 12)
    with torch.no_grad():
        hidden = ours.hidden_states(ids)
        theirs = main.model(ids).last_hidden_state
        torch.testing.assert_close(hidden, theirs, rtol=0, atol=1e-4)
        state = mtp.forward_layer(
            0, theirs[:, :-1], torch.arange(1, 12)[None], None, input_ids=ids[:, 1:]
        )
        expected = mtp.shared_head(state)
        got = ours.mtp_logits(hidden, ids)[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.01


@pytest.mark.comparison
def test_transformers_speculates_with_our_mtp_layer(sixty_one_layers):
    ours, directory = sixty_one_layers
    main, _ = load_in_transformers(directory, "deepseek_v3")
    main.generation_config.eos_token_id = None
    prompt = ids_of(1, 6)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
               "attention_mask": torch.ones_like(prompt)}  # fmt: skip
    drafted = main.generate(prompt, use_mtp=True, **options)
    assert torch.equal(drafted, ours.generate(prompt, 12, speculative=True))
    assert torch.equal(drafted, ours.generate(prompt, 12))


# Published numbers
PUBLISHED = {
    "deepseek_v2_lite": (15_706_484_224, 2_661_150_208, 2_451_435_008, 2_241_719_808, 15_552),
    "deepseek_v2": (235_741_434_880, 21_375_800_320, 20_851_512_320, 20_327_224_320, 34_560),
    "deepseek_v3": (671_026_404_352, 37_552_282_624, 36_625_603_584, 35_698_924_544, 35_136),
}


@pytest.mark.performance
@pytest.mark.parametrize("name", PUBLISHED)
def test_released_configurations_have_the_published_sizes(name):
    config = DeepSeekConfig.from_file(HERE / "configs" / f"{name}.json")
    with torch.device("meta"):
        model = DeepSeekModel(config)
    counts = parameter_counts(model)
    total, *active, cached = PUBLISHED[name]
    assert counts["total"] == total
    assert [counts[key] for key in list(counts)[1:4]] == active
    assert cache_elements(config) == cached
    tensors = released_tensors(model)
    main = {n: t for n, t in tensors.items() if not n.startswith("model.layers.61.")}
    biases = [t.numel() for n, t in main.items() if n.endswith("e_score_correction_bias")]
    assert sum(t.numel() for t in main.values()) == total + sum(biases)
    if name == "deepseek_v3":
        assert counts["mtp"] == 11_610_067_968 and sum(biases) == 14_848
        assert sum(p.numel() for p in model.parameters()) == 682_636_472_320
        # Bytes aside, the released files hold these and one scale for every 128 × 128 block.
        stored = {**tensors, **full.mtp_copies(model)}
        assert sum(t.numel() for t in stored.values()) == 684_531_386_000 - 41_540_496
        gigaflops = training_flops_per_token(model, 4096) / 1e9
        assert gigaflops == pytest.approx(250.46, abs=0.01)
    if name == "deepseek_v2":
        gigaflops = training_flops_per_token(model, 4096) / 1e9
        assert gigaflops == pytest.approx(155.31, abs=0.01)


@pytest.mark.performance
def test_cache_of_the_model_holds_latent_and_rotary_key_only():
    model, caches = build("v3"), None
    caches = model.new_caches()
    model(ids_of(2, 10), caches=caches)
    assert all(isinstance(cache, LatentCache) for cache in caches)
    used = sum(cache.used_bytes() for cache in caches)
    assert used == 2 * 10 * cache_elements(model.config) * 4 == 2 * 10 * 3 * (12 + 8) * 4


# The model
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
        hidden = model.hidden_states(text, attention_mask)
        model.mtp_logits(hidden, text, attention_mask)
        figures.append(
            [(moe.gate.load.clone(), moe.last_balance_loss) for moe in model.moe_layers().values()]
        )
        for moe in model.moe_layers().values():
            moe.gate.load.zero_()
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


# Training step
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


def test_training_step_moves_the_bias_of_overloaded_experts_down_by_gamma():
    model = build("v3", std=0.1)
    routers = [moe.gate for moe in model.moe_layers().values()]
    for router in routers:
        router.e_score_correction_bias.zero_()
    loads = []
    hook = [r.register_forward_hook(lambda _, __, out: loads.append(out.indices)) for r in routers]
    step_once(model, gamma=0.01)
    for router, indices, handle in zip(routers, loads, hook, strict=True):
        handle.remove()
        load = torch.bincount(indices.flatten(), minlength=8).float()
        expected = -0.01 * torch.sign(load - load.mean())
        torch.testing.assert_close(router.e_score_correction_bias, expected)
    model.eval()
    before = routers[0].e_score_correction_bias.clone()
    model(ids_of(2, 9))
    assert torch.equal(routers[0].e_score_correction_bias, before) and routers[0].load.sum() == 0


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
    for faster, optimizer in (("bfloat16", "muon"), ("float32", "adamw")):
        monkeypatch.setattr(full, "fastest_precision", lambda device, faster=faster: faster)
        options = RunOptions(steps=1)
        options.settle("cpu")
        assert (options.precision, options.optimizer) == (faster, optimizer)
        asked = RunOptions(steps=1, precision="float32", optimizer="muon")
        asked.settle("cpu")
        assert (asked.precision, asked.optimizer) == ("float32", "muon")
    assert full.fastest_precision("mps") == "float32"
    only_adamw = build_optimizers(build("v3"), 1e-3, muon=False)
    assert [type(optimizer) for optimizer in only_adamw] == [torch.optim.AdamW]


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


# Scoring
def test_score_is_the_plain_sum_over_every_byte():
    documents = [corpus.Document("a", "def f(x):\n    return x\n" * 9), corpus.Document("b", "y")]
    tokenizer = corpus.train_tokenizer(documents, 280)
    model = build("v3", vocab_size=tokenizer.get_vocab_size(), num_nextn_predict_layers=1,
                  max_position_embeddings=16, std=0.1)  # fmt: skip
    optimizers = build_optimizers(model, 1e-2)
    ids = torch.tensor([[0, *corpus.encode(tokenizer, documents[0].text)][:16]])
    for _ in range(4):  # so that drafts are right sometimes
        training_step(model, optimizers, ids, torch.zeros_like(ids), 1e-2, 1.0, 0.0)
    scores = score(model, tokenizer, documents, batch_size=3)
    nats, tokens, agreed, drafted, right = 0.0, 0, 0, 0, 0
    loads = {"layer 1": 0, "layer 2": 0}
    for document in documents:
        ids = [0, *corpus.encode(tokenizer, document.text), 0]
        for start, first, end in corpus.scoring_windows(len(ids), 16):
            window = torch.tensor([ids[start:end]])
            log_probs = model(window).log_softmax(-1)[0]
            for name in loads:
                chosen = model.moe_layers()[name].last_routing.indices
                loads[name] = loads[name] + torch.bincount(chosen.flatten(), minlength=8)
            for target in range(first, end):
                nats -= log_probs[target - start - 1, ids[target]].item()
                tokens += 1
            choices = log_probs.argmax(-1).tolist()
            if end - start > 2:
                drafts = model.mtp_logits(model.hidden_states(window), window)[0][0].argmax(-1)
                for target in range(max(first, start + 2), end):
                    agreed += drafts[target - start - 2] == choices[target - start - 1]
                    right += drafts[target - start - 2] == ids[target]
                    drafted += 1
    size = sum(document.size for document in documents)
    assert scores["bits_per_byte"] == pytest.approx(nats / np.log(2) / size, rel=1e-5)
    assert scores["tokens"] == tokens and scores["bytes"] == size
    assert scores["mtp_acceptance"] == pytest.approx(agreed.item() / drafted)
    assert 0 < agreed < drafted and agreed != right
    busiest = {name: (load.max() / load.float().mean()).item() for name, load in loads.items()}
    assert scores["max_load"] == pytest.approx(busiest)


def test_uniform_model_scores_the_uniform_rate():
    documents = [corpus.Document("a", "def f(x):\n    return x\n" * 9)]
    tokenizer = corpus.train_tokenizer(documents, 280)
    model = build("v3", vocab_size=tokenizer.get_vocab_size())
    with torch.no_grad():
        model.lm_head.weight.zero_()
    scores = score(model, tokenizer, documents)
    uniform = corpus.uniform_rate(scores["tokens"], scores["bytes"], tokenizer.get_vocab_size())
    assert scores["bits_per_byte"] == pytest.approx(uniform, rel=1e-6)


# Configuration
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


def test_configuration_round_trips(tmp_path):
    for name in ("deepseek_v2_lite", "deepseek_v2", "deepseek_v3", "small"):
        config = DeepSeekConfig.from_file(HERE / "configs" / f"{name}.json")
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
        ({"rope_theta": "x"}, "rope_theta='x' must be a number above 0"),
        ({"rope_theta": 0}, "rope_theta=0 must be a number above 0"),
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


# Checkpoints
@pytest.fixture
def saved(tmp_path):
    model = build("v3", num_nextn_predict_layers=2)
    model.save_pretrained(tmp_path / "saved")
    return model, tmp_path / "saved"


def rewrite(directory, change):
    tensors = dict(checkpoint.read_tensors(checkpoint.tensor_files(directory)))
    change(tensors)
    checkpoint.write_tensors(directory / checkpoint.WEIGHTS, tensors)


@EVERY_KIND
@WITH_AND_WITHOUT_YARN
def test_round_trip_is_exact(kind, yarn, tmp_path):
    depth = 1 if kind.startswith("v3") else 0
    model = build(kind, yarn, num_nextn_predict_layers=depth)
    model.save_pretrained(tmp_path)
    again = DeepSeekModel.from_pretrained(tmp_path)
    assert again.config == model.config
    theirs = again.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


def test_released_names_and_one_tensor_for_each_expert(saved):
    _, directory = saved
    names = set(checkpoint.tensor_files(directory))
    assert {
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
        "model.layers.0.mlp.gate_proj.weight", "model.layers.0.self_attn.q_a_layernorm.weight",
        "model.layers.1.self_attn.kv_a_proj_with_mqa.weight",
        "model.layers.1.mlp.experts.7.down_proj.weight", "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.1.mlp.shared_experts.up_proj.weight",
        "model.layers.3.eh_proj.weight", "model.layers.3.enorm.weight",
        "model.layers.3.hnorm.weight", "model.layers.3.shared_head.norm.weight",
        "model.layers.3.shared_head.head.weight", "model.layers.3.embed_tokens.weight",
        "model.layers.4.eh_proj.weight",
    } <= names  # fmt: skip
    assert not any("rotary" in name or "load" in name or "mtp" in name for name in names)


def test_absent_mtp_layers_load_without_and_partial_ones_do_not(saved):
    model, directory = saved
    rewrite(directory, lambda t: t.pop("model.layers.3.eh_proj.weight"))
    with pytest.raises(ValueError, match=r"lacks 1 tensors: model\.layers\.3\.eh_proj\.weight"):
        DeepSeekModel.from_pretrained(directory)
    mtp = ("model.layers.3.", "model.layers.4.")
    rewrite(directory, lambda t: [t.pop(name) for name in list(t) if name.startswith(mtp)])
    with pytest.warns(UserWarning, match="loaded without MTP"):
        again = DeepSeekModel.from_pretrained(directory)
    assert len(again.mtp) == 0 and again.config.num_nextn_predict_layers == 0
    ids = ids_of(1, 9)
    torch.testing.assert_close(again.eval()(ids), model(ids))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"lacks 1 tensors: model\.norm\.weight"),
        (lambda t: t.update({"model.layers.9.x": torch.ones(1)}), r"unexpected 1 tensors: model"),
        (lambda t: t.update({"lm_head.weight": torch.ones(61, 31)}),
         r"lm_head\.weight has shape \(61, 31\), want \(61, 32\)"),
        (lambda t: t.update({"model.layers.3.embed_tokens.weight": torch.ones(61, 32)}),
         "differs from the main model's"),
    ],
)  # fmt: skip
def test_wrong_tensors_are_named(saved, change, message):
    _, directory = saved
    rewrite(directory, change)
    with pytest.raises(ValueError, match=message):
        DeepSeekModel.from_pretrained(directory)


def test_no_checkpoint_and_unsupported_checkpoints_are_named(saved, tmp_path):
    _, directory = saved
    with pytest.raises(ValueError, match="is no checkpoint: it has no config.json"):
        DeepSeekModel.from_pretrained(tmp_path / "nowhere")
    shutil.copytree(directory, tmp_path / "no_weights")
    (tmp_path / "no_weights" / checkpoint.WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"is no checkpoint: it has no model\.safetensors"):
        DeepSeekModel.from_pretrained(tmp_path / "no_weights")
    config = checkpoint.read_json(directory / "config.json")
    config["quantization_config"] = {"quant_method": "fp8"}
    checkpoint.write_json(directory / "config.json", config)
    with pytest.raises(ValueError, match=r"is quantised \(fp8\)"):
        DeepSeekModel.from_pretrained(directory)


# Quantised checkpoints
WIDE = {
    "hidden_size": 64, "kv_lora_rank": 32, "q_lora_rank": 32, "v_head_dim": 16,
    "moe_intermediate_size": 64, "intermediate_size": 64, "num_nextn_predict_layers": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def calibration():
    return torch.randint(61, (4, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("sizes", [WIDE, {"num_nextn_predict_layers": 1}], ids=["wide", "odd"])
def test_a_quantised_model_comes_back_from_its_files(scheme, sizes, calibration, tmp_path):
    model = quantize_model(build("v3", attention_bias=True, **sizes), scheme, calibration)
    quantize_cache(model, 6).save_pretrained(tmp_path)
    again = DeepSeekModel.from_pretrained(tmp_path)
    assert again.quantization == model.quantization and again.cache_bits == 6
    assert again.config == model.config and not again.training
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor.float(), theirs[name].float()), name
    ids = ids_of(2, 9)
    assert torch.equal(model(ids), again(ids))
    assert torch.equal(
        model.generate(ids, 5, speculative=True), again.generate(ids, 5, speculative=True)
    )
    content = checkpoint.read_json(tmp_path / "config.json")["quantization_config"]
    assert content["quant_method"] == "quantization_coded" and content["cache_bits"] == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantised_model_that_was_cast_comes_back_in_fp32(scheme, dtype, calibration, tmp_path):
    model = quantize_model(build("v3", **WIDE).to(dtype), scheme, calibration).to(dtype)
    model.save_pretrained(tmp_path)
    again, ids = DeepSeekModel.from_pretrained(tmp_path), ids_of(2, 9)
    assert again.lm_head.weight.dtype == torch.float32
    torch.testing.assert_close(again(ids), model.float()(ids))


def test_wrong_types_of_codes_are_named(tmp_path):
    quantize_model(build("v3", **WIDE), "int8").save_pretrained(tmp_path)
    file = tmp_path / "quantized.safetensors"
    tensors = dict(checkpoint.read_tensors(checkpoint.tensor_files(tmp_path, file.name)))
    tensors["layers.0.mlp.down_proj.scale"] = tensors["layers.0.mlp.down_proj.scale"].float()
    checkpoint.write_tensors(file, tensors)
    with pytest.raises(ValueError, match=r"down_proj\.scale is torch.float32, want torch.bfloat16"):
        DeepSeekModel.from_pretrained(tmp_path)


@pytest.mark.performance
def test_quantised_files_hold_little_more_than_what_is_in_memory(calibration, tmp_path):
    model = quantize_model(build("v3", **WIDE), "int4", calibration)
    model.save_pretrained(tmp_path)
    stored = sum(t.nbytes for t in model.state_dict().values())
    shared = model.embed_tokens.weight.nbytes + model.lm_head.weight.nbytes
    names = checkpoint.tensor_files(tmp_path, "quantized.safetensors")
    assert not any("mtp.0.embedding" in name or "mtp.1.head" in name for name in names)
    size = sum(t.nbytes for _, t in checkpoint.read_tensors(names))
    assert size == stored - 2 * shared  # what both MTP modules share stands there once


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(bits=1), "damaged: bits=1 must be from 2 to 8"),
        (lambda c: c.pop("cache_bits"), "damaged: 'cache_bits'"),
        (lambda c: c.update(speed=3), "damaged: .*unexpected keyword argument 'speed'"),
        (lambda c: c.update(cache_bits=64), "config is damaged: bits=64 must be from 2 to 8"),
        (lambda c: c.update(bits=4), "holds unexpected|has shape|is torch.int8"),
        (lambda c: c.update(layer="fp8"), "lacks|is torch.int8"),
    ],
)
def test_damaged_quantised_checkpoints_are_named(change, message, tmp_path):
    quantize_model(build("v3", **WIDE), "int8").save_pretrained(tmp_path)
    content = checkpoint.read_json(tmp_path / "config.json")
    change(content["quantization_config"])
    checkpoint.write_json(tmp_path / "config.json", content)
    with pytest.raises(ValueError, match=message):
        DeepSeekModel.from_pretrained(tmp_path)


def test_missing_and_extra_tensors_of_a_quantised_checkpoint_are_named(tmp_path):
    quantize_model(build("v3", **WIDE), "int8").save_pretrained(tmp_path)
    tensors = dict(
        checkpoint.read_tensors(checkpoint.tensor_files(tmp_path, "quantized.safetensors"))
    )
    tensors.pop("layers.0.mlp.down_proj.codes")
    checkpoint.write_tensors(tmp_path / "quantized.safetensors", tensors)
    with pytest.raises(ValueError, match=r"lacks 1 tensors: layers\.0\.mlp\.down_proj\.codes"):
        DeepSeekModel.from_pretrained(tmp_path)


@pytest.mark.comparison
def test_transformers_does_not_misread_a_quantised_directory(tmp_path):
    from transformers import AutoModelForCausalLM

    quantize_model(build("v3", **WIDE), "int8").save_pretrained(tmp_path)
    with pytest.raises(OSError, match="no file named model.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_model_in_qat_is_not_saved_and_one_trained_in_fp8_is(tmp_path):
    model = build("v3", **WIDE)
    with pytest.raises(ValueError, match="prepared for QAT: save what convert_qat makes of it"):
        prepare_qat(model, "int8").save_pretrained(tmp_path / "qat")
    convert_qat(prepare_qat(model, "int8")).save_pretrained(tmp_path / "int8")
    assert DeepSeekModel.from_pretrained(tmp_path / "int8").quantization["bits"] == 8
    prepare_fp8_training(model).save_pretrained(tmp_path / "fp8")
    again = DeepSeekModel.from_pretrained(tmp_path / "fp8")
    assert again.quantization is None
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


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


def test_calibration_texts_are_drawn_from_all_of_the_text_by_a_seed(small_run, tmp_path):
    _, options = small_run
    run = TrainingRun(tmp_path / "run", RunOptions(**options, steps=1), "cpu")

    def draw(sequences, length, seed):
        return full.calibration_ids(run.tokenizer, run.corpus.train, sequences, length, seed)

    assert torch.equal(draw(5, 16, 0), draw(5, 16, 0)) and draw(5, 16, 0).shape == (5, 16)
    assert not torch.equal(draw(5, 16, 0), draw(5, 16, 1))
    everything = draw(10**9, 16, 0)
    ids, _ = corpus.token_stream(run.tokenizer, run.corpus.train)
    assert torch.equal(everything.flatten().sort()[0], ids[: everything.numel()].sort()[0])
    assert torch.equal(draw(5, 10**9, 0), ids[None])  # a text shorter than one piece


def test_the_score_goes_through_a_quantised_cache(small_run, tmp_path):
    _, options = small_run
    run = TrainingRun(tmp_path / "run", RunOptions(**options, steps=1), "cpu")
    model, documents = run.model, run.corpus.validation
    exact = score(model, run.tokenizer, documents)["bits_per_byte"]
    rates = []
    for bits in (8, 2):
        quantize_cache(model, bits)
        rates.append(score(model, run.tokenizer, documents)["bits_per_byte"])
    assert rates[0] != exact and abs(rates[0] - exact) < abs(rates[1] - exact)


# Runs
@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """Options of a run that takes seconds, on a text of its own."""
    folder = tmp_path_factory.mktemp("run")
    text = folder / "text.py"
    text.write_text("".join(f"def f_{i}(x):\n    return x + {i}\n" for i in range(1500)))
    config = checkpoint.read_json(HERE / "configs" / "small.json")
    config |= {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "moe_intermediate_size": 16, "num_attention_heads": 2, "kv_lora_rank": 16,
        "q_lora_rank": 16, "max_position_embeddings": 64,
    }  # fmt: skip
    checkpoint.write_json(folder / "config.json", config)
    return folder, {
        "config": str(folder / "config.json"), "data": [str(text)], "batch_size": 2,
        "sequence_length": 32,
    }  # fmt: skip


def flags(options):
    parts = []
    for name, value in options.items():
        parts += [f"--{name.replace('_', '-')}", *(value if isinstance(value, list) else [value])]
    return parts


@pytest.mark.integration
def test_a_stopped_run_resumes_with_the_same_figures(small_run, tmp_path, monkeypatch):
    _, options = small_run
    whole = TrainingRun(tmp_path / "whole", RunOptions(**options, steps=8), "cpu")
    whole.train()

    stopped = TrainingRun(tmp_path / "stopped", RunOptions(**options, steps=8), "cpu")
    update = stopped.optimizers[0].step

    def interrupted():
        update()
        if stopped.state.step == 4:
            signal.raise_signal(signal.SIGINT)  # Ctrl-C between weights and routing bias

    stopped.optimizers[0].step = interrupted
    with pytest.raises(SystemExit) as exit_info:
        stopped.train()
    assert exit_info.value.code == 130 and stopped.state.step == 5
    monkeypatch.chdir(tmp_path / "stopped")  # from another directory
    full.main(["train", "--resume", str(tmp_path / "stopped"), "--device", "cpu"])

    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "stopped"))
    for line in one + two:
        line.pop("seconds")
    assert len(one) == 8 and one == two
    ours = dict(checkpoint.read_tensors(checkpoint.tensor_files(whole.checkpoint)))
    for name, tensor in checkpoint.read_tensors(checkpoint.tensor_files(stopped.checkpoint)):
        assert torch.equal(tensor, ours[name]), name


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


def test_schedules_of_the_run(small_run, tmp_path, monkeypatch):
    _, options = small_run
    run, asked = TrainingRun(tmp_path / "run", RunOptions(**options, steps=1), "cpu"), []
    monkeypatch.setattr(full, "training_step", lambda *arguments: asked.append(arguments[4:7]))
    for used in (0.0, 0.5, 0.7, 0.99):
        run.step(0, used)
    rates, weights, gammas = zip(*asked, strict=True)
    assert weights == pytest.approx((0.3, 0.3, 0.1, 0.1))
    assert gammas == (run.options.gamma,) * 3 + (0.0,)
    assert rates[1] > rates[2] > rates[3] > 0


@pytest.mark.integration
def test_whole_pipeline_from_the_command_line(small_run, run_script, tmp_path):
    _, options = small_run
    result = run_script("deepseek_full_model.py", *flags(options), "--steps", 6, "--out", "run")
    assert result.returncode == 0, result.stderr
    for promised in ("bits per byte, test part", "this model", "zlib -9", "lzma -9", "uniform",
                     "MTP acceptance", "busiest expert / mean load", "tokens/s", "continuation of",
                     "the same text as plain greedy decoding"):  # fmt: skip
        assert promised in result.stdout
    run = tmp_path / "run"
    assert {
        "metrics.jsonl", "loss.png", "expert_load.png", "results.json", "checkpoint", "aligned"
    } == {path.name for path in run.iterdir()}  # fmt: skip
    for promised in ("aligning ", "held-out prompts, before → after 1 steps", "the reward"):
        assert promised in result.stdout
    assert (run / "aligned" / "alignment.png").stat().st_size > 1000
    assert {path.name for path in (run / "checkpoint").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "run.json", "optimizer",
    }  # fmt: skip
    printed = float(result.stdout.split("this model")[1].split()[0])
    evaluated = run_script("deepseek_full_model.py", "evaluate", "--checkpoint", "run")
    assert evaluated.returncode == 0, evaluated.stderr
    assert float(evaluated.stdout.split("this model")[1].split()[0]) == printed

    texts = [
        run_script("deepseek_full_model.py", "generate", "--checkpoint", "run/checkpoint",
                   "--prompt", "def f", "--max-new-tokens", 20, *extra).stdout
        for extra in ([], ["--speculative"])
    ]  # fmt: skip
    assert texts[0].startswith("def f") and texts[0] == texts[1]
    sampled = [
        run_script("deepseek_full_model.py", "generate", "--checkpoint", "run", "--prompt", "def f",
                   "--max-new-tokens", 20, "--temperature", 0.9, "--top-k", 50, "--top-p", 0.9,
                   "--prefill-chunk", 2, "--seed", seed, *extra)
        for seed, extra in ((1, []), (1, []), (2, []), (1, ["--speculative", "--depth", 2]))
    ]  # fmt: skip
    assert sampled[0].stdout == sampled[1].stdout != sampled[2].stdout
    figures = sampled[3].stderr
    for promised in ("tokens/s", "drafts accepted", "tokens a pass", "cache ", " bytes"):
        assert promised in figures
    compared = run_script(
        "benchmarks/against_transformers.py", "--quick", "--checkpoint", "run", timeout=180
    )
    assert compared.returncode == 0, compared.stderr
    assert "1 of 1 texts the same as plain" in compared.stdout
    again = run_script("deepseek_full_model.py", *flags(options), "--steps", 6, "--out", "run")
    assert again.returncode == 2 and "already holds a run" in again.stderr


# Alignment
@pytest.fixture
def trained(small_run, tmp_path):
    """A run of two steps."""
    _, options = small_run
    run = TrainingRun(tmp_path / "trained", RunOptions(**options, steps=2), "cpu")
    run.train()
    return run


@pytest.fixture
def any_line_is_valid(monkeypatch):
    """A judge whose reward an untrained model finds."""
    monkeypatch.setattr(
        compiler, "verdict", lambda prompt, text: "valid" if len(text) % 2 else "invalid"
    )


ALIGN = dict(prompts=2, group_size=4, max_new_tokens=12, learning_rate=1e-3)


@pytest.mark.integration
def test_a_stopped_alignment_resumes_with_the_same_figures(
    trained, tmp_path, monkeypatch, any_line_is_valid
):
    def options():
        return AlignOptions(str(trained.checkpoint), **ALIGN, steps=5)

    whole = AlignmentRun(tmp_path / "whole", options(), "cpu")
    whole.align()
    stopped = AlignmentRun(tmp_path / "stopped", options(), "cpu")
    update = stopped.trainer.optimizer.step

    def interrupted():
        update()
        if stopped.state.step == 2:
            signal.raise_signal(signal.SIGINT)

    stopped.trainer.optimizer.step = interrupted
    with pytest.raises(SystemExit) as exit_info:
        stopped.align()
    assert exit_info.value.code == 130 and stopped.state.step == 3
    monkeypatch.chdir(tmp_path / "stopped")
    full.main(["align", "--resume", str(tmp_path / "stopped"), "--device", "cpu"])

    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "stopped"))
    for line in one + two:
        line.pop("seconds")
    assert len(one) == 5 and one == two
    assert any(line["reward"] > 0 for line in one) and one[-1]["kl"] > 0
    ours = dict(checkpoint.read_tensors(checkpoint.tensor_files(whole.checkpoint)))
    for name, tensor in checkpoint.read_tensors(checkpoint.tensor_files(stopped.checkpoint)):
        assert torch.equal(tensor, ours[name]), name
    paid = [checkpoint.read_json(run.checkpoint / "align.json")["paid"] for run in (whole, stopped)]
    assert paid[0] == paid[1] != []


@pytest.mark.integration
def test_align_from_the_command_line(trained, tmp_path, capsys, monkeypatch, any_line_is_valid):
    monkeypatch.chdir(tmp_path)
    small = [part for name, value in ALIGN.items()
             for part in (f"--{name.replace('_', '-')}", str(value))]  # fmt: skip
    command = ["align", "--checkpoint", "trained", *small, "--steps", "2", "--out", "aligned"]
    full.main(command)
    printed = capsys.readouterr().out
    for promised in ("valid  ", "distinct", "bits per byte, test part", "MTP acceptance",
                     "the cheapest ways to the reward", "temperature 1, 12 tokens"):  # fmt: skip
        assert promised in printed
    results = checkpoint.read_json(tmp_path / "aligned" / "results.json")
    assert results["steps"] == 2 and results["before"]["test"] != results["after"]["test"]
    full.main(["evaluate", "--checkpoint", "aligned"])
    rate = results["after"]["test"]["bits_per_byte"]
    assert f"this model   {rate:.4f}" in capsys.readouterr().out
    before = dict(checkpoint.read_tensors(checkpoint.tensor_files(trained.checkpoint)))
    after = dict(checkpoint.read_tensors(checkpoint.tensor_files(tmp_path / "aligned/checkpoint")))
    same = {name for name in before if torch.equal(before[name], after[name])}
    layer = "model.layers.2."  # the MTP module is left as it was, its copies are the main model's
    copies = {f"{layer}embed_tokens.weight", f"{layer}shared_head.head.weight"}
    assert {name for name in before if name.startswith(layer)} - copies <= same
    assert not {name for name in same if name.startswith("model.layers.0.self_attn")}
    before = set(tmp_path.rglob("*"))
    full.main(["align", "--resume", "aligned"])
    assert "already aligned for the whole budget (2 steps)" in capsys.readouterr().out
    for arguments, message in (
        (command, "--out aligned already holds a run"),
        (["align"], "want --checkpoint DIR or --resume RUN"),
        (["align", "--resume", "trained"], "trained holds no alignment"),
        (["align", "--resume", "aligned", "--seed", "3"], "leave out ['seed']"),
        (["align", "--checkpoint", "trained", "--steps", "0"], "budget must be above 0, got 0"),
        (["align", "--checkpoint", "trained", "--group-size", "0"], "group_size=0 must be"),
        (["align", "--checkpoint", "trained", "--max-new-tokens", "64"], "max_new_tokens=64"),
        (["align", "--checkpoint", "nowhere"], "nowhere is no checkpoint"),
        (["train", "--resume", "aligned"], "aligned is an alignment"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            full.main(arguments)
        error = capsys.readouterr().err
        assert exit_info.value.code == 2 and message in error, error
        assert error.startswith("error: ") and error.count("\n") == 1
    assert set(tmp_path.rglob("*")) == before  # nothing was left behind


@pytest.mark.integration
def test_an_alignment_without_any_reward_resumes_but_not_on_another_reference(
    trained, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compiler, "verdict", lambda prompt, text: "invalid")
    options = AlignOptions(str(trained.checkpoint), **ALIGN, steps=2, kl_coef=0.0)
    AlignmentRun(tmp_path / "run", options, "cpu").align()
    full.main(["align", "--resume", "run", "--steps", "3"])
    printed = capsys.readouterr().out
    assert "after 3 steps" in printed and "nothing earned the reward" in printed
    full.main(["train", "--resume", "trained", "--steps", "3"])
    with pytest.raises(SystemExit):
        full.main(["align", "--resume", "run", "--steps", "4"])
    assert "the reference of run, is not what it was" in capsys.readouterr().err


@pytest.mark.integration
def test_alignment_needs_python_and_weights_that_learn(trained, tmp_path):
    prose = tmp_path / "prose.txt"
    prose.write_text("".join(f"This is line {i} of a text.\n" for i in range(2000)))
    options = AlignOptions(str(trained.checkpoint), [str(prose)], steps=1, **ALIGN)
    with pytest.raises(full.NoPrompts, match="0 prompts to learn from and 0 held out are Python"):
        AlignmentRun(tmp_path / "run", options, "cpu")
    full.main(["quantize", "--checkpoint", str(trained.checkpoint), "--scheme", "int8", "--out",
               str(tmp_path / "int8")])  # fmt: skip
    with pytest.raises(ValueError, match="int8 is quantised: it cannot be trained"):
        AlignmentRun(tmp_path / "run", AlignOptions(str(tmp_path / "int8"), steps=1), "cpu")
    assert not (tmp_path / "run").exists()


def test_prompts_to_learn_from_are_training_text(trained, tmp_path):
    options = AlignOptions(str(trained.checkpoint), steps=1, **ALIGN)
    run = AlignmentRun(tmp_path / "run", options, "cpu")
    parts = {name: "".join(d.text for d in run.corpus.part(name)) for name in ("train", "test")}
    assert all(run.decode(prompt) in parts["train"] for prompt in run.prompts)
    assert all(run.decode(prompt) in parts["test"] for prompt in run.held_out)
    end = run.separator
    assert run.decode([end, *corpus.encode(run.tokenizer, "a = 1\nb")]) == "a = 1\n"
    assert run.decode([*corpus.encode(run.tokenizer, "a = 1\nb"), end]) == "a = 1\nb"
    assert run.decode([end]) == ""


def test_held_out_prompts_were_never_learnt_from(trained, tmp_path):
    text = tmp_path / "repeats.py"  # 40 functions stand in all parts
    numbers = (i if i % 3 == 0 else i % 40 for i in range(1500))
    text.write_text("".join(f"def f_{i}(x):\n    return x + {i}\n" for i in numbers))
    options = AlignOptions(str(trained.checkpoint), [str(text)], steps=1, **ALIGN)
    run = AlignmentRun(tmp_path / "run", options, "cpu")
    assert len(run.held_out) > 5
    assert not {*map(tuple, run.prompts)} & {*map(tuple, run.held_out)}


@pytest.mark.integration
def test_quantize_from_the_command_line(small_run, tmp_path, capsys, monkeypatch):
    _, options = small_run
    monkeypatch.chdir(tmp_path)
    run = TrainingRun(tmp_path / "run", RunOptions(**options, steps=2), "cpu")
    run.train()

    def main(*arguments):
        full.main([*map(str, arguments), "--device", "cpu"])
        return capsys.readouterr().out

    def refused(*arguments):
        with pytest.raises(SystemExit) as exit_info:
            main(*arguments)
        error = capsys.readouterr().err
        assert exit_info.value.code == 2 and error.count("\n") == 1
        return error

    capsys.readouterr()
    exact = main("evaluate", "--checkpoint", "run")
    quantize = ("quantize", "--checkpoint", "run", "--scheme")
    printed = main(*quantize, "gptq4", "--out", "small", "--cache-bits", 6,
                   "--calibration-sequences", 4)  # fmt: skip
    assert "method gptq" in printed and "latent cache in 6 bits" in printed
    assert {path.name for path in (tmp_path / "small").iterdir()} == {
        "config.json", "quantized.safetensors", "tokenizer.json", "run.json",
    }  # fmt: skip
    scored = main("evaluate", "--checkpoint", "small")
    assert scored.startswith("quantised (layer weights, bits 4") and "note" not in scored
    rates = [float(text.split("this model")[1].split()[0]) for text in (exact, scored)]
    assert rates[0] != rates[1] and abs(rates[1] / rates[0] - 1) < 0.02
    text = main("generate", "--checkpoint", "small", "--prompt", "def f", "--speculative")
    assert text.startswith("def f")
    main(*quantize, "int8", "--out", "eight")
    assert "--out eight exists already" in refused(*quantize, "int4", "--out", "eight")
    again = ("quantize", "--checkpoint", "small", "--scheme", "int8", "--out", "x")
    assert "quantised already" in refused(*again)
    assert "invalid choice: 'int5'" in refused(*quantize, "int5", "--out", "x")
    assert "bits=1 must be from 2 to 8" in refused(
        *quantize, "int8", "--out", "x", "--cache-bits", 1
    )
    assert "--calibration-sequences=0 must be at least 1" in refused(
        *quantize, "awq4", "--out", "x", "--calibration-sequences", 0
    )
    assert "--data is for schemes that calibrate" in refused(
        *quantize, "int8", "--out", "x", "--data", "nowhere.txt"
    )
    cached = main("evaluate", "--checkpoint", "small", "--cache-bits", 2)
    assert float(cached.split("this model")[1].split()[0]) != rates[1]
    for command in (("evaluate", "--checkpoint", "small"), ("generate", "--checkpoint", "small")):
        assert "bits=1 must be from 2 to 8" in refused(*command, "--cache-bits", 1)
    (tmp_path / "run").rename("x.old")  # no other directory is touched
    main("quantize", "--checkpoint", "x.old", "--scheme", "int8", "--out", "x")
    assert (tmp_path / "x.old" / "checkpoint" / "run.json").is_file()
    (tmp_path / "x.old").rename("run")
    shutil.rmtree("x")
    shutil.copytree("small", "resumed/checkpoint")
    assert "is quantised: it cannot be trained" in refused("train", "--resume", "resumed")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "small", "eight", "resumed"}


@pytest.mark.integration
def test_evaluate_scores_all_of_a_users_file(small_run, tmp_path, capsys):
    folder, options = small_run
    run = TrainingRun(tmp_path / "run", RunOptions(**options, steps=2), "cpu")
    run.train()
    mine = tmp_path / "mine.py"
    mine.write_text("x = 1\n" * 30)
    full.main(["evaluate", "--checkpoint", str(run.checkpoint), "--data", str(mine)])
    assert "180 bytes" in capsys.readouterr().out


@pytest.mark.integration
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere.txt"], "No such file"),
        (["--data", "empty.txt"], "empty.txt: the file holds no text"),
        (["--data", "short.txt"], "the text is too short"),
        (["--steps", "0"], "the training budget must be above 0, got 0"),
        (["--batch-size", "0", "--steps", "1"], "--batch-size=0 must be a number of at least 1"),
        (["--seed", "-1", "--steps", "1"], "--seed=-1 must be a number of at least 0"),
        (["--gamma", "nan", "--steps", "1"], "--gamma=nan must be a number of at least 0"),
        (["--precision", "fp8", "--steps", "1"], "invalid choice: 'fp8'"),
        (["--optimizer", "sgd", "--steps", "1"], "invalid choice: 'sgd'"),
        (["--learning-rate", "0", "--steps", "1"], "--learning-rate=0.0 must be a number above 0"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--minutes", "inf"], "the training budget must be above 0, got inf"),
        (["train", "--resume", "run", "--seed", "3"], "run holds no training run"),
        (
            ["--config", str(HERE / "configs" / "deepseek_v3.json"), "--steps", "1"],
            "a quantised model cannot be trained",
        ),
        (["--minutes", "nan"], "the training budget must be above 0, got nan"),
        (["--out", "short.txt", "--steps", "1"], "--out short.txt is a file"),
        (["--sequence-length", "9999", "--steps", "1"], "--sequence-length=9999 exceeds"),
        (["--config", "nowhere.json", "--steps", "1"], "nowhere.json cannot be read"),
        (["train", "--resume", "nowhere"], "nowhere holds no training run"),
        (["evaluate", "--checkpoint", "nowhere"], "nowhere is no checkpoint"),
        (["generate", "--checkpoint", "nowhere"], "nowhere is no checkpoint"),
        (["--device", "abacus"], "device 'abacus' is not available"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line_and_write_nothing(
    arguments, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("a\nb\nc\nd\n")
    with pytest.raises(SystemExit) as exit_info:
        full.main(arguments)
    error = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert {path.name for path in tmp_path.iterdir()} == {"empty.txt", "short.txt"}


@pytest.mark.integration
def test_prompt_past_the_context_is_one_line(small_run, tmp_path, capsys):
    _, options = small_run
    run = TrainingRun(tmp_path / "run", RunOptions(**options, steps=1), "cpu")
    run.save()
    for prompt, new in (("word " * 200, 4), ("word", 64)):
        with pytest.raises(SystemExit) as exit_info:
            full.main(["generate", "--checkpoint", str(run.checkpoint), "--prompt", prompt,
                       "--max-new-tokens", str(new)])  # fmt: skip
        error = capsys.readouterr().err
        assert exit_info.value.code == 2 and "exceed the context of 64" in error
        assert error.count("\n") == 1
    for wrong, message in (
        (["--top-p", "0", "--temperature", "1"], "top_p=0.0 must be above 0"),
        (["--top-k", "0", "--temperature", "1"], "top_k=0 must be at least 1"),
        (["--top-k", "5"], "--top-k and --top-p are for a --temperature above 0"),
        (["--depth", "2"], "--depth is for --speculative"),
        (["--speculative", "--depth", "0"], "depth=0 must be at least 1"),
        (["--temperature", "nan"], "temperature=nan must be a number"),
    ):
        with pytest.raises(SystemExit):
            full.main(["generate", "--checkpoint", str(run.checkpoint), *wrong])
        printed = capsys.readouterr()
        assert message in printed.err and printed.err.count("\n") == 1 and not printed.out


@pytest.mark.integration
def test_resuming_on_changed_text_is_refused(small_run, tmp_path):
    folder, options = small_run
    text = tmp_path / "text.py"
    text.write_text("".join(f"a = {i}\n" for i in range(4000)))
    run = TrainingRun(
        tmp_path / "run", RunOptions(**{**options, "data": [str(text)]}, steps=2), "cpu"
    )
    run.save()
    text.write_text("".join(f"b = {i}\n" for i in range(4000)))
    with pytest.raises(SystemExit) as exit_info:
        full.main(["train", "--resume", str(tmp_path / "run")])
    assert exit_info.value.code == 2


@pytest.mark.integration
def test_resuming_keeps_the_runs_options_and_says_when_it_is_done(small_run, tmp_path, capsys):
    _, options = small_run
    run = TrainingRun(tmp_path / "run", RunOptions(**options, steps=2), "cpu")
    run.train()
    resume = ["train", "--resume", str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        full.main([*resume, "--seed", "3", "--out", "x"])
    assert "leave out ['seed', 'out']" in capsys.readouterr().err
    full.main(resume)
    assert "already trained for the whole budget (2 steps)" in capsys.readouterr().out
    full.main([*resume, "--steps", "4"])
    assert "trained 4 steps" in capsys.readouterr().out


@pytest.mark.integration
def test_a_damaged_run_is_named_and_a_killed_save_is_recovered(small_run, tmp_path, capsys):
    _, options = small_run
    run = TrainingRun(tmp_path / "run", RunOptions(**options, steps=2), "cpu")
    run.train()
    run.checkpoint.rename(tmp_path / "run" / "checkpoint.old")  # killed between the two renames
    with pytest.raises(SystemExit):
        full.main(["--out", str(tmp_path / "run"), "--steps", "1"])
    assert "already holds a run" in capsys.readouterr().err and run.checkpoint.is_dir()
    for content in ({}, {"options": {"speed": 1}, "state": {}, "corpus": ""}, {"options": []}):
        checkpoint.write_json(run.checkpoint / "run.json", content)
        for command in (["train", "--resume"], ["evaluate", "--checkpoint"]):
            with pytest.raises(SystemExit) as exit_info:
                full.main([*command, str(tmp_path / "run")])
            assert exit_info.value.code == 2
            assert "run.json is damaged" in capsys.readouterr().err


def test_flags_before_and_after_the_command_count():
    arguments = full.build_parser().parse_args(["--steps", "20", "train", "--seed", "3"])
    assert (arguments.steps, arguments.seed, arguments.resume) == (20, 3, None)


@pytest.mark.integration
def test_help():
    with pytest.raises(SystemExit) as exit_info:
        full.main(["--help"])
    assert exit_info.value.code == 0
