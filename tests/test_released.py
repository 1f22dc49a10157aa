"""Released names and shards: parity with transformers, round trips, quantised checkpoints."""

import json
import shutil
import warnings

import pytest
import torch
import torch.nn.functional as F
from small_deepseek import EVERY_KIND, KINDS, WIDE, WITH_AND_WITHOUT_YARN, build, ids_of
from tokenizers import Tokenizer, models

from deepseek_full_model import DeepSeekConfig, DeepSeekModel
from pipeline import checkpoint, corpus
from pipeline.released import load_with_tokenizer
from quantization_coded import (
    SCHEMES,
    convert_qat,
    prepare_fp8_training,
    prepare_qat,
    quantize_cache,
    quantize_model,
)
from rope_coded import YarnScaling

YARN_SIZES = {"factor": 8.0, "original_max_position_embeddings": 16}


# The settings
@pytest.mark.parametrize(
    ("settings", "theta", "yarn"),
    [
        ({}, 10000.0, False),  # what is absent has its usual value
        ({"rope_parameters": {}, "rope_theta": 7.0}, 10000.0, False),
        ({"rope_parameters": {"type": "default", "rope_theta": 50.0}}, 50.0, False),
        ({"rope_parameters": {"type": "yarn", "mscale": None, **YARN_SIZES}}, 10000.0, True),
        ({"rope_parameters": {"rope_type": "yarn", **YARN_SIZES}}, 10000.0, True),
        ({"rope_scaling": {"rope_type": "yarn", "mscale": None, **YARN_SIZES}}, 10000.0, True),
        ({"rope_scaling": {"type": "yarn", **YARN_SIZES}, "rope_theta": 7}, 7, True),
        ({"rope_interleave": True, "mlp_bias": False}, 10000.0, False),
        ({"rope_interleave": None, "n_group": None, "topk_group": None}, 10000.0, False),
    ],
)
def test_every_spelling_of_settings_is_read(settings, theta, yarn):
    raw = {**KINDS["v3"], "model_type": "deepseek_v3", **settings}
    before = json.dumps(raw)
    config = DeepSeekConfig.from_dict(raw)
    assert config.rope_theta == theta and json.dumps(raw) == before
    assert config.yarn == (YarnScaling(**YARN_SIZES) if yarn else None)
    assert config.num_key_value_heads == config.num_attention_heads
    if raw["n_group"] is None:
        assert (config.n_group, config.topk_group) == (1, 1)


def test_missing_settings_and_numbers_that_are_none_are_named():
    raw = {**KINDS["v3"], "hidden_size": None}
    with pytest.raises(ValueError, match="the configuration lacks hidden_size, model_type$"):
        DeepSeekConfig.from_dict(raw)
    with pytest.raises(ValueError, match="factor=True must be a number"):
        DeepSeekConfig(**KINDS["v3"], rope_scaling={"type": "yarn", **YARN_SIZES, "factor": True})


def test_a_config_is_written_with_what_readers_need():
    content = DeepSeekConfig(**KINDS["v3_plain_queries"]).to_dict()
    assert content["architectures"] == ["DeepseekV3ForCausalLM"]
    assert content["torch_dtype"] == "float32"
    nulls = {name for name, value in content.items() if value is None}
    assert nulls == {"q_lora_rank", "rope_scaling", "bos_token_id", "eos_token_id", "pad_token_id"}
    assert DeepSeekConfig(**KINDS["v3"]).to_dict()["q_lora_rank"] == 16


# Files
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
    )
    assert torch.equal(ours.generate(prompt, 30), expected)


@pytest.mark.comparison
def test_left_padded_generation_is_transformers_generation(in_transformers):
    ours = build("v3")
    theirs, prompt = in_transformers(ours), ids_of(2, 9)
    mask = torch.ones_like(prompt)
    mask[1, :4] = 0
    expected = theirs.generate(prompt, attention_mask=mask, max_new_tokens=20, do_sample=False,
                               eos_token_id=None, pad_token_id=0)
    assert torch.equal(ours.generate(prompt, 20, attention_mask=mask), expected)


@pytest.fixture(scope="module")
def sixty_one_layers(tmp_path_factory):
    """A 61-layer model of tiny width with its MTP layer, in the released names, and its folder."""
    torch.manual_seed(5)
    model = build(
        "v3", num_hidden_layers=61, hidden_size=16, intermediate_size=16, q_lora_rank=8,
        kv_lora_rank=8, moe_intermediate_size=8, num_attention_heads=2,
        num_nextn_predict_layers=1, first_k_dense_replace=3, std=0.1,
    )
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
               "attention_mask": torch.ones_like(prompt)}
    drafted = main.generate(prompt, use_mtp=True, **options)
    assert torch.equal(drafted, ours.generate(prompt, 12, speculative=True))
    assert torch.equal(drafted, ours.generate(prompt, 12))


@pytest.fixture
def saved(tmp_path):
    model = build("v3", num_nextn_predict_layers=2)
    model.save_pretrained(tmp_path / "deep" / "saved")
    return model, tmp_path / "deep" / "saved"


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
    } <= names
    assert not any("rotary" in name or "load" in name or "mtp" in name for name in names)


def test_absent_mtp_layers_load_without_and_partial_ones_do_not(saved):
    model, directory = saved
    rewrite(directory, lambda t: t.pop("model.layers.3.eh_proj.weight"))
    with pytest.raises(ValueError, match=r"lacks 1 tensors: model\.layers\.3\.eh_proj\.weight"):
        DeepSeekModel.from_pretrained(directory)
    mtp = ("model.layers.3.", "model.layers.4.")
    rewrite(directory, lambda t: [t.pop(name) for name in list(t) if name.startswith(mtp)])
    with pytest.warns(UserWarning, match="loaded without MTP") as caught:
        again = DeepSeekModel.from_pretrained(directory)
    assert caught[0].filename == __file__  # it points at the caller
    assert len(again.mtp) == 0 and again.config.num_nextn_predict_layers == 0
    ids = ids_of(1, 9)
    torch.testing.assert_close(again.eval()(ids), model(ids))


def test_files_may_be_in_bf16_hold_rotary_tables_and_lack_the_copies(saved):
    model, directory = saved

    def as_released(tensors):
        for name in list(tensors):
            if name.startswith("model.layers.4.") and ("embed" in name or "head.head" in name):
                tensors.pop(name)
            else:
                tensors[name] = tensors[name].bfloat16()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    rewrite(directory, as_released)
    theirs = DeepSeekModel.from_pretrained(directory).state_dict()
    for name, tensor in model.state_dict().items():
        assert theirs[name].dtype == tensor.dtype, name
        assert torch.equal(theirs[name], tensor.bfloat16().to(tensor.dtype)), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: [t.pop(f"model.layers.{i}.input_layernorm.weight") for i in (4, 2, 0, 1)],
         r"lacks 4 tensors: model\.layers\.0.*layers\.1.*layers\.2[\w.]*, …"),
        (lambda t: t.pop("model.norm.weight"), r"lacks 1 tensors: model\.norm\.weight"),
        (lambda t: t.update({"model.layers.9.x": torch.ones(1)}), r"unexpected 1 tensors: model"),
        (lambda t: t.update({"lm_head.weight": torch.ones(61, 31)}),
         r"lm_head\.weight has shape \(61, 31\), want \(61, 32\)"),
        (lambda t: t.update({"model.layers.3.embed_tokens.weight": torch.ones(61, 32)}),
         "differs from the main model's"),
    ],
)
def test_wrong_tensors_are_named(saved, change, message):
    _, directory = saved
    rewrite(directory, change)
    with pytest.raises(ValueError, match=message):
        DeepSeekModel.from_pretrained(directory)


def test_no_checkpoint_and_unsupported_checkpoints_are_named(saved, tmp_path):
    _, directory = saved
    with pytest.raises(ValueError, match="is not a checkpoint: it has no config.json"):
        DeepSeekModel.from_pretrained(tmp_path / "nowhere")
    shutil.copytree(directory, tmp_path / "no_weights")
    (tmp_path / "no_weights" / checkpoint.WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"is not a checkpoint: it has no model\.safetensors"):
        DeepSeekModel.from_pretrained(tmp_path / "no_weights")
    config = checkpoint.read_json(directory / "config.json")
    config["quantization_config"] = {"quant_method": "fp8"}
    checkpoint.write_json(directory / "config.json", config)
    with pytest.raises(ValueError, match=r"is quantised \(fp8\)"):
        DeepSeekModel.from_pretrained(directory)


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
    with pytest.raises(ValueError, match="prepared for QAT: convert it by convert_qat"):
        prepare_qat(model, "int8").save_pretrained(tmp_path / "qat")
    convert_qat(prepare_qat(model, "int8")).save_pretrained(tmp_path / "int8")
    assert DeepSeekModel.from_pretrained(tmp_path / "int8").quantization["bits"] == 8
    prepare_fp8_training(model).save_pretrained(tmp_path / "fp8")
    again = DeepSeekModel.from_pretrained(tmp_path / "fp8")
    assert again.quantization is None
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


# A model with its tokenizer
def test_a_checkpoint_or_that_of_a_run_is_loaded_with_its_tokenizer(trained):
    directory = trained / "checkpoint"
    for asked in (trained, directory):
        loaded = load_with_tokenizer(DeepSeekModel, asked, "cpu")
        assert loaded.directory == directory and not loaded.model.training
        assert loaded.tokenizer.get_vocab_size() == loaded.model.config.vocab_size
    directory.rename(trained / "checkpoint.old")  # killed while it was replaced
    assert load_with_tokenizer(DeepSeekModel, directory, "cpu").directory == directory


def test_what_is_missing_is_noted_even_where_warnings_are_ignored(trained, capsys):
    directory = trained / "checkpoint"
    mtp = "model.layers.2."
    rewrite(directory, lambda t: [t.pop(name) for name in list(t) if name.startswith(mtp)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_with_tokenizer(DeepSeekModel, directory, "cpu")
    note = f"note: {directory} holds no MTP tensors: loaded without MTP\n"
    assert capsys.readouterr().err == note


def test_tokenizers_that_do_not_fit_are_named(trained):
    path = trained / "checkpoint" / "tokenizer.json"
    text = " ".join(map(chr, range(1000, 1100))) * 9
    large = corpus.train_tokenizer([corpus.Document("a", text)], 350)
    for tokenizer, message in (
        (large, "the tokenizer has 350 entries, the model only 300"),
        (Tokenizer(models.BPE()), r"the tokenizer has no <\|end_of_text\|>"),
    ):
        tokenizer.save(str(path))
        with pytest.raises(ValueError, match=message):
            load_with_tokenizer(DeepSeekModel, trained, "cpu")
