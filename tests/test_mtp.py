"""Phase 6: prediction modules, losses, the small language model, speculation in plain form."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mla_coded import LatentCache, MultiHeadLatentAttention
from moe_coded import MixtureOfExperts, SwiGLU, TopKRouter, TransformerBlock
from mtp_coded import (
    CausalLM,
    IndependentHead,
    MultiTokenPredictor,
    Sampling,
    cost_of,
    draft,
    greedy_generate,
    mtp_loss,
    next_token_loss,
    shifted_targets,
    small_language,
    small_model,
    speculative_generate,
    tokens_a_pass,
    train_small,
    verify,
)


def build(depth=2, std=0.3, max_positions=None, vocab=17, mtp_class=MultiTokenPredictor,
          model_class=CausalLM):
    def block():
        attention = MultiHeadLatentAttention(
            24, num_attention_heads=2, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=2,
            v_head_dim=6,
        )
        return TransformerBlock(attention, SwiGLU(24, 32))

    mtp_blocks = [block() for _ in range(depth)]
    model = model_class(vocab, 24, [block(), block()], mtp_blocks, max_positions=max_positions,
                        mtp_class=mtp_class)
    model.init_weights(std)
    return model.eval()


def ids_of(*shape, vocab=17):
    return torch.randint(vocab, shape)


# The modules
def test_shapes_of_every_depth():
    model, ids = build(depth=3), ids_of(2, 9)
    logits = model.mtp_logits(model.hidden_states(ids), ids)
    assert [tuple(entry.shape) for entry in logits] == [(2, 8, 17), (2, 7, 17), (2, 6, 17)]


def test_module_matches_the_equation():
    model, ids = build(depth=2), ids_of(1, 6)
    hidden = model.hidden_states(ids)
    expected = []
    for k, module in enumerate(model.mtp, start=1):
        hidden = hidden[:, :-1]
        rows = torch.cat(
            [
                module.enorm(F.embedding(ids[:, k:], model.embed_tokens.weight)),
                module.hnorm(hidden),
            ],
            dim=-1,
        )
        hidden = module.norm(module.block(rows @ module.eh_proj.weight.T))
        expected.append(hidden @ model.lm_head.weight.T)
    torch.testing.assert_close(model.mtp_logits(model.hidden_states(ids), ids), expected)


def test_an_independent_head_is_its_block_and_a_norm():
    model, hidden = build(depth=1, mtp_class=IndependentHead), torch.randn(1, 4, 24)
    head = model.mtp[0]
    torch.testing.assert_close(head(hidden, None), head.norm(head.block(hidden)))


@pytest.mark.parametrize("mtp_class", [MultiTokenPredictor, IndependentHead])
@pytest.mark.parametrize(("options", "eps"), [(dict(norm_eps=0.5), 0.5), ({}, 1e-6)])
def test_every_norm_adds_the_models_epsilon_which_is_the_released_one_by_default(
    mtp_class, options, eps
):
    model = CausalLM(17, 24, [], [nn.Identity()], mtp_class=mtp_class, **options)
    alone = mtp_class(nn.Identity(), model.embed_tokens, model.lm_head, **options)
    x = 1e-3 * torch.randn(24)
    norms = [m for each in (model, alone) for m in each.modules() if isinstance(m, nn.RMSNorm)]
    assert len(norms) == (7 if mtp_class.chained else 3)
    for norm in norms:
        torch.testing.assert_close(norm(x), x / (x.square().mean() + eps).sqrt())


def test_fresh_weights_are_random_in_matrices_zero_in_biases_and_left_alone_in_norms():
    attention = MultiHeadLatentAttention(64, 2, 16, 16, 2, 16, attention_bias=True)
    model = CausalLM(64, 64, [TransformerBlock(attention, SwiGLU(64, 64))])
    for options, std in ((dict(std=0.5), 0.5), ({}, 0.02)):
        for parameter in model.parameters():
            nn.init.constant_(parameter, 7.0)
        model.init_weights(**options)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                assert (parameter == (0 if name.endswith("bias") else 7)).all()
            else:
                assert parameter.std().item() == pytest.approx(std, rel=0.1)
                assert abs(parameter.mean().item()) < 0.2 * std
    assert sum(name.endswith("bias") for name, _ in model.named_parameters()) == 2


def test_embedding_and_head_are_shared():
    model = build(depth=2)
    names = [name for name, _ in model.named_parameters()]
    assert not any("mtp" in name and ("embedding" in name or "head" in name) for name in names)
    for module in model.mtp:
        assert module.embedding is model.embed_tokens and module.head is model.lm_head


@pytest.mark.parametrize("edited", range(1, 9))
def test_editing_a_token_moves_no_prediction_made_before_it(edited):
    model, ids = build(depth=2), ids_of(1, 9)
    changed = ids.clone()
    changed[0, edited] = (ids[0, edited] + 1) % 17
    all_logits = []
    for text in (ids, changed):
        hidden = model.hidden_states(text)
        all_logits.append([model.lm_head(hidden), *model.mtp_logits(hidden, text)])
    for k, (before, after) in enumerate(zip(*all_logits, strict=True)):
        # row i of depth k has read tokens up to i + k
        first = max(0, edited - k)
        assert torch.equal(before[:, :first], after[:, :first])
        if first < before.shape[1]:
            assert not torch.equal(before[:, first], after[:, first])


def test_independent_heads_do_not_see_the_token_in_between():
    model, ids = build(depth=1, mtp_class=IndependentHead), ids_of(1, 6)
    changed = ids.clone()
    changed[0, 4] = (ids[0, 4] + 1) % 17
    before, after = (model.mtp_logits(model.hidden_states(t), t)[0] for t in (ids, changed))
    assert torch.equal(before[:, :4], after[:, :4])


def test_every_parameter_gets_a_gradient_from_the_mtp_loss():
    model, ids = build(depth=2), ids_of(2, 8)
    mtp_loss(model.mtp_logits(model.hidden_states(ids), ids), ids).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_independent_heads_all_start_from_the_main_hidden_state():
    model, ids = build(depth=2, mtp_class=IndependentHead), ids_of(1, 6)
    hidden = model.hidden_states(ids)
    second = model.lm_head(model.mtp[1](hidden[:, :-2], ids[:, 2:]))
    torch.testing.assert_close(model.mtp_logits(hidden, ids)[1], second)
    assert torch.equal(speculative_generate(model, ids, 9)[0], model.generate(ids, 9))


def test_a_chained_module_learns_what_an_independent_head_cannot():
    losses = {}
    for mtp_class in (IndependentHead, MultiTokenPredictor):
        torch.manual_seed(0)
        model = small_model(mtp_class, depth=1)
        _, losses[mtp_class] = train_small(model, 80, 0.3, "cpu")
    assert losses[MultiTokenPredictor] < losses[IndependentHead] - 0.2


# The losses
def certain_logits(targets, vocab=17):
    return F.one_hot(targets, vocab).float() * 50


def test_targets_are_the_tokens_each_depth_should_predict():
    ids = ids_of(2, 8)
    perfect = [certain_logits(F.pad(ids[:, k + 1 :], (0, 1))) for k in (1, 2)]
    assert mtp_loss(perfect, ids, weight=1.0).item() < 1e-6
    assert next_token_loss(certain_logits(F.pad(ids[:, 1:], (0, 1))), ids).item() < 1e-6
    late = [certain_logits(F.pad(ids[:, k + 2 :], (0, 2))) for k in (1, 2)]
    assert mtp_loss(late, ids, weight=1.0).item() > 1


def test_loss_by_hand():
    model, ids = build(depth=2), ids_of(1, 6)
    logits = model.mtp_logits(model.hidden_states(ids), ids)
    total = 0.0
    for k in (1, 2):
        log_probs = logits[k - 1].log_softmax(-1)
        rows = [-log_probs[0, i, ids[0, i + k + 1]] for i in range(6 - k - 1)]
        total += sum(rows) / len(rows)
    torch.testing.assert_close(mtp_loss(logits, ids, weight=0.3), 0.3 / 2 * total)


def test_targets_never_cross_a_document_boundary():
    model, ids = build(depth=2), ids_of(1, 8)
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    logits = model.mtp_logits(model.hidden_states(ids), ids)
    loss = mtp_loss(logits, ids, 1.0, documents)
    kept = {1: (0, 1, 4, 5), 2: (0, 4)}  # rows whose target is in their own document
    expected = sum(
        -sum(logits[k - 1].log_softmax(-1)[0, i, ids[0, i + k + 1]] for i in rows) / len(rows)
        for k, rows in kept.items()
    )
    torch.testing.assert_close(loss, expected / 2)


def test_padding_is_never_a_target():
    model, ids = build(depth=1), ids_of(2, 7)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    mask = torch.tensor([0] * 3 + [1] * 7).expand(2, 10)
    hidden, padded_hidden = model.hidden_states(ids), model.hidden_states(padded, mask)
    torch.testing.assert_close(padded_hidden[:, 3:], hidden, rtol=1e-4, atol=1e-5)
    logits = model.mtp_logits(hidden, ids)
    padded_logits = model.mtp_logits(padded_hidden, padded, mask)
    torch.testing.assert_close(
        mtp_loss(padded_logits, padded, token_mask=mask),
        mtp_loss(logits, ids),
        rtol=1e-4,
        atol=1e-5,
    )
    torch.testing.assert_close(
        next_token_loss(model.lm_head(padded_hidden), padded, mask),
        next_token_loss(model.lm_head(hidden), ids), rtol=1e-4, atol=1e-5,
    )


def test_targets_of_the_example_in_the_docstring():
    ids, documents = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 0, 0, 1]])
    assert shifted_targets(ids, 4, 1, documents).tolist() == [[6, 7, -100, -100]]
    assert shifted_targets(ids, 4, 2, documents).tolist() == [[7, -100, -100, -100]]


def test_padding_has_no_target_and_is_none_on_either_side():
    ids, real = torch.tensor([[4, 5, 6, 7, 8]]), torch.tensor([[0, 1, 1, 1, 0]])
    assert shifted_targets(ids, 5, 1, token_mask=real).tolist() == [[-100, 6, 7, -100, -100]]
    assert shifted_targets(ids, 3, 2, token_mask=real).tolist() == [[-100, 7, -100]]


def test_losses_of_half_precision_logits_are_taken_in_fp32():
    logits, ids = torch.randn(2, 6, 17).bfloat16(), ids_of(2, 6)
    for loss in (next_token_loss, lambda logits, ids: mtp_loss([logits[:, :-1]], ids)):
        assert torch.equal(loss(logits, ids), loss(logits.float(), ids))
        assert loss(logits, ids).dtype == torch.float32


def test_lambda_is_that_of_v3():
    logits, ids = [torch.randn(2, 5, 17)], ids_of(2, 6)
    assert mtp_loss(logits, ids) == mtp_loss(logits, ids, weight=0.3)  # section 4.2


def test_the_loss_of_a_single_target_is_its_own():
    logits, ids = torch.randn(1, 2, 17), ids_of(1, 2)
    wanted = -logits[0, 0].log_softmax(dim=0)[ids[0, 1]]
    torch.testing.assert_close(next_token_loss(logits, ids), wanted)


def test_no_targets_give_zero():
    assert mtp_loss([], ids_of(1, 4)) == 0
    assert mtp_loss([torch.randn(1, 1, 17)], ids_of(1, 2)) == 0
    documents = torch.arange(4)[None]
    assert mtp_loss([torch.randn(1, 3, 17)], ids_of(1, 4), document_ids=documents) == 0


def test_untrained_loss_is_ln_of_the_vocabulary():
    model, ids = build(depth=1, std=0.02), ids_of(4, 30)
    hidden = model.hidden_states(ids)
    assert next_token_loss(model.lm_head(hidden), ids).item() == pytest.approx(
        math.log(17), abs=0.1
    )
    loss = mtp_loss(model.mtp_logits(hidden, ids), ids, 1.0)
    assert loss.item() == pytest.approx(math.log(17), abs=0.1)


# The language model
@pytest.mark.parametrize("path", ["expanded", "absorbed"])
def test_cached_pieces_match_one_pass(path):
    model, ids = build(depth=0), ids_of(2, 10)
    caches = model.new_caches()
    with torch.no_grad():
        pieces = [model(p, caches=caches, path=path) for p in ids.split([4, 1, 3, 2], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(ids), rtol=1e-4, atol=1e-4)


def test_a_cache_too_few_is_no_shorter_model():
    model, ids = build(depth=0), ids_of(1, 3)
    with pytest.raises(ValueError, match="shorter"):
        model(ids, caches=model.new_caches()[:1])


# Sampling
def test_sampling_follows_the_temperature():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]])).expand(20_000, 3)
    for temperature in (1.0, 0.5):
        drawn = Sampling(temperature, generator=torch.Generator().manual_seed(0)).choose(logits)[0]
        shares = torch.bincount(drawn, minlength=3) / 20_000
        expected = (logits[0] / temperature).softmax(0)
        assert (shares - expected).abs().max() < 0.015  # 4 standard errors
    assert (Sampling().choose(logits)[0] == 0).all()


def test_top_k_and_top_p_by_hand():
    logits = torch.tensor([0.5, 0.1, 0.3, 0.1]).log()
    cut = [
        (dict(top_k=2), [0.625, 0, 0.375, 0]),
        (dict(top_k=9), [0.5, 0.1, 0.3, 0.1]),
        (dict(top_p=0.5), [1, 0, 0, 0]),  # the best token holds it alone
        (dict(top_p=0.51), [0.625, 0, 0.375, 0]),
        (dict(top_p=1.0), [0.5, 0.1, 0.3, 0.1]),
        (dict(top_p=1e-9), [1, 0, 0, 0]),
        (dict(top_k=2, top_p=0.6), [1, 0, 0, 0]),  # 0.625 after the first cut
    ]
    for options, expected in cut:
        got = Sampling(1.0, **options).probabilities(logits)
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float32))


def test_probabilities_are_in_fp32():
    logits = torch.randn(3, 9).bfloat16()
    assert torch.equal(
        Sampling(0.7).probabilities(logits), Sampling(0.7).probabilities(logits.float())
    )


def test_sampling_holds_at_the_edges():
    tied = Sampling(1.0, top_k=2).probabilities(torch.zeros(5))
    assert (tied > 0).sum() == 2  # as many as asked for, whichever
    for temperature in (1e-38, 1e-6):  # next to greedy, no overflow
        sharp = Sampling(temperature).probabilities(torch.tensor([5.0, 30.0, 2.0]))
        assert sharp.tolist() == [0, 1, 0]


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_drawing_from_nothing_is_named(value):
    with pytest.raises(ValueError, match="probabilities are not finite"):
        Sampling(1.0).draw(torch.tensor([[0.5, 0.5], [value, 0.0]]))


@pytest.mark.parametrize(("uniform", "token"), [(0.2, 0), (0.25, 1), (0.7, 1), (0.75, 2)])
def test_the_running_sums_of_the_example_choose_its_tokens(uniform, token, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.full(shape, uniform))
    assert Sampling(1.0).draw(torch.tensor([[0.25, 0.5, 0.25]])).item() == token


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 1), (0.49, 1), (0.51, 3), (1.0, 3)])
def test_a_token_without_probability_is_never_drawn(uniform, token, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.full(shape, uniform))
    probabilities = torch.tensor([[0.0, 0.35, 0.0, 0.35, 0.0]])  # need not sum to 1
    assert Sampling(1.0).draw(probabilities).item() == token


# Generation
def test_generation_matches_recomputing_everything():
    model, ids = build(depth=0), ids_of(2, 4)
    expected = ids
    for _ in range(12):
        expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(ids, 12), expected)
    assert torch.equal(greedy_generate(model, ids, 12), expected)


def test_prompts_of_unequal_length_give_what_they_give_alone():
    model, prompts = build(depth=1), [ids_of(1, n) for n in (3, 7, 5)]
    alone = [model.generate(prompt, 9)[0, prompt.shape[1] :] for prompt in prompts]
    batch = torch.cat([F.pad(prompt, (7 - prompt.shape[1], 0)) for prompt in prompts])
    mask = torch.stack([(torch.arange(7) >= 7 - p.shape[1]).long() for p in prompts])
    together = model.generate(batch, 9, attention_mask=mask)
    assert torch.equal(together[:, 7:], torch.stack(alone))


def check_stops(model_class, **options):
    """Rows of a batch end behind the given token, and nowhere else."""
    stops = set()
    for seed in range(6):
        torch.manual_seed(seed)
        model, ids = build(depth=1, std=0.15, model_class=model_class), ids_of(3, 3)
        free = model.generate(ids, 10, **options)
        assert free.shape == (3, 13)
        stop = free[0, 5].item()
        stopped = model.generate(ids, 10, eos_token_id=stop, pad_token_id=16, **options)
        for row, free_row in zip(stopped, free, strict=True):
            new = free_row[3:].tolist()
            end = new.index(stop) + 1 if stop in new else 10
            assert row[3:].tolist() == new[:end] + [16] * (10 - end)
            stops.add((seed, end))
    assert len(stops) > 6  # rows of one batch stopped at different places


def test_generation_stops_at_the_given_token_only():
    check_stops(CausalLM)


def test_generation_reports_what_it_wrote():
    model, ids = build(depth=0), ids_of(2, 5)
    result = model.complete(ids, 6, Sampling())
    assert torch.equal(result.ids, model.generate(ids, 6))
    assert (result.forwards, result.tokens, result.drafted, result.accepted) == (6, 6, 0, 0)
    assert result.cache_bytes == 2 * 2 * 10 * (8 + 2) * 4  # the last token was not read
    assert torch.equal(result.logprobs, torch.zeros(2, 6))  # greedy: no choice
    stop = result.ids[0, 7].item()
    stopped = model.complete(ids[:1], 6, Sampling(), eos_token_id=stop)
    assert (stopped.forwards, stopped.tokens) == (3, 3) and stopped.ids.shape == (1, 11)


def check_logprobs(model):
    """What was drawn has the log-probabilities that one pass over the text gives."""
    ids, mask = ids_of(2, 4), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    sampling = Sampling(0.7, top_k=5, generator=torch.Generator().manual_seed(3))
    result = model.complete(ids, 6, sampling, attention_mask=mask)
    logits = model(result.ids, F.pad(mask, (0, 6), value=1))[:, 3:-1]
    wanted = sampling.probabilities(logits).gather(2, result.ids[:, 4:, None]).squeeze(2).log()
    torch.testing.assert_close(result.logprobs, wanted, atol=1e-5, rtol=1e-4)


def test_logprobs_are_those_of_the_tokens_drawn():
    check_logprobs(build(depth=0))


def test_sampling_is_repeatable_with_a_seed():
    model, ids = build(depth=0, std=0.05), ids_of(1, 3)
    runs = [
        model.generate(ids, 12, temperature=1.0, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def joint_chances(model, prompt, sampling, new):
    """The exact probability of every continuation of `new` tokens, (vocabulary,) * new."""
    vocab = model.lm_head.out_features
    chances = torch.ones(1)
    for n in range(new):
        texts = torch.cartesian_prod(*[torch.arange(vocab)] * n).view(-1, n) if n else None
        ids = prompt if n == 0 else torch.cat([prompt.expand(len(texts), -1), texts], dim=1)
        following = sampling.probabilities(model(ids)[:, -1])
        chances = (chances[:, None] * following).flatten()
    return chances


def surprise(counts, chances):
    """(χ² − degrees of freedom) / its standard deviation; above 5: another distribution."""
    expected = chances.double() * counts.sum()
    large = expected >= 5
    pooled = [torch.cat([x[large], x[~large].sum()[None]]) for x in (counts.double(), expected)]
    counts, expected = (x[pooled[1] > 0] for x in pooled)
    freedom = len(expected) - 1
    return ((counts - expected) ** 2 / expected).sum().sub(freedom).item() / (2 * freedom) ** 0.5


def check_sampling_follows(model):
    """Sampled texts over 5 tokens have the distribution that the model gives."""
    prompt = ids_of(1, 3, vocab=5)
    ids = model.generate(
        prompt.expand(20_000, -1), 3, 1.0, generator=torch.Generator().manual_seed(1)
    )
    counts = torch.bincount((ids[:, 3:] * torch.tensor([25, 5, 1])).sum(dim=1), minlength=125)
    assert abs(surprise(counts, joint_chances(model, prompt, Sampling(1.0), new=3))) < 5


def test_plain_sampling_follows_the_model():
    check_sampling_follows(build(0, std=0.4, vocab=5))


def test_generation_takes_what_a_caller_may_have():
    model, ids = build(depth=1), ids_of(2, 4)
    assert torch.equal(model.generate(ids.int(), 6), model.generate(ids, 6))
    nothing = model.complete(ids, 0, Sampling())
    assert torch.equal(nothing.ids, ids) and nothing.ids is not ids and nothing.forwards == 0
    assert model.generate(ids[:0], 3).shape == (0, 7)
    assert [x.shape for x in model.mtp_logits(model.hidden_states(ids[:, :1]), ids[:, :1])] == [
        (2, 0, 17)
    ]


def check_each_token_is_read_once(model):
    ids, read = ids_of(2, 5), []
    model.embed_tokens.register_forward_hook(
        lambda module, args, output: read.append(args[0].shape)
    )
    model.generate(ids, 6)
    assert read == [(2, 5)] + [(2, 1)] * 5


@pytest.mark.performance
def test_each_token_is_read_once():
    check_each_token_is_read_once(build(depth=0))


def check_can_be_trained_on(model, *outputs):
    """What a model wrote is no part of a graph, nor of inference mode: it can enter training."""
    for output in outputs:
        model.zero_grad()
        next_token_loss(model(output), output).backward()
        assert model.embed_tokens.weight.grad.norm() > 0


def test_generated_ids_can_be_trained_on():
    model, ids = build(depth=1), ids_of(1, 4)
    drafted = speculative_generate(model, ids, 5)[0]
    check_can_be_trained_on(model, model.generate(ids, 5), drafted)


def test_generation_fills_the_context_exactly():
    model = build(depth=1, max_positions=12)
    assert model.generate(ids_of(1, 8), 4).shape == (1, 12)
    assert speculative_generate(model, ids_of(1, 8), 4)[0].shape == (1, 12)


# The parts that later phases use
def test_blocks_experts_and_copies():
    def block():
        attention = MultiHeadLatentAttention(8, 2, 4, 2, 2, 2)
        return TransformerBlock(attention, MixtureOfExperts(8, 4, TopKRouter(8, 4, 2)))

    dense, sparse, drafter = build(depth=0).layers[0], block(), block()
    model = CausalLM(17, 8, [dense, sparse], [drafter])
    assert model.blocks() == [dense, sparse, drafter]
    assert model.moe_layers() == {"layer 1": sparse.mlp, "MTP 1": drafter.mlp}
    model = build(depth=1)
    copied, ids = model.copy(), ids_of(1, 5)
    assert torch.equal(copied(ids), model(ids)) and model.prepared() is model
    assert copied.lm_head.weight is not model.lm_head.weight
    assert copied.mtp[0].head is copied.lm_head


def test_routings_are_recorded_where_a_list_is_given():
    def block():
        attention = MultiHeadLatentAttention(8, 2, 4, 2, 2, 2)
        return TransformerBlock(attention, MixtureOfExperts(8, 4, TopKRouter(8, 4, 2)))

    model, ids, routed = CausalLM(17, 8, [block(), block()], [block()]), ids_of(2, 5), []
    hidden = model.hidden_states(ids, torch.tensor([[0, 1, 1, 1, 1], [1] * 5]), routed=routed)
    model.mtp_logits(hidden, ids, routed=routed)
    assert [each.layer for each in routed] == list(model.moe_layers().values())
    assert [each.load().sum().item() for each in routed] == [9 * 2, 9 * 2, 8 * 2]


# Speculative decoding
@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("prompt_length", [1, 2, 7])
def test_speculative_text_is_the_greedy_text(depth, prompt_length):
    for seed in range(3):
        torch.manual_seed(seed)
        model, prompt = build(depth), ids_of(1, prompt_length)
        for new in (1, 2, 23):
            drafted, figures = speculative_generate(model, prompt, new)
            assert torch.equal(drafted, model.generate(prompt, new))
            assert figures["forwards"] + figures["accepted"] == new


def test_speculative_sampling_draws_from_its_generator_alone():
    model, ids = build(depth=2, std=0.05), ids_of(1, 3)
    texts = [
        speculative_generate(model, ids, 12, 1.0, torch.Generator().manual_seed(seed))[0].tolist()
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_speculatively_sampled_texts_follow_the_model():
    model, prompt = build(depth=1, std=0.3, vocab=3), ids_of(1, 2, vocab=3)
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(9)
    for _ in range(100):
        text, _ = speculative_generate(model, prompt, 2, 0.5, generator)
        counts[text[0, 2] * 3 + text[0, 3]] += 1
    with torch.no_grad():
        wanted, other = (joint_chances(model, prompt, Sampling(t), new=2) for t in (0.5, 1.0))
    assert abs(surprise(counts, wanted)) < 5 < surprise(counts, other)


@pytest.mark.performance
def test_a_round_is_one_pass_of_the_main_model_whether_or_not_it_drafts():
    model, passes = build(depth=2), []
    model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    text, figures = speculative_generate(model, ids_of(1, 4), 12)
    assert len(passes) == figures["forwards"] and figures["drafted"] > 0


class OracleBlock(nn.Module):
    """The block of an MTP module whose states make the head say what it is told.

    texts: (B, length), from the left, in which the module is to find token i + 2 at position i.
    """

    def __init__(self, model, texts):
        super().__init__()
        self.head, self.texts = [model.lm_head], F.pad(texts, (0, 99))
        self.input_layernorm, self.self_attn = nn.Identity(), OracleMemory()

    def forward(self, hidden, cache=None, positions=None, **options):
        if positions is None:
            positions = torch.arange(hidden.shape[1])
        if cache is not None:
            self.self_attn.remember(hidden, positions, cache)
        rows, weight = torch.arange(len(self.texts))[:, None], self.head[0].weight
        wanted = self.texts[rows, positions + 2]
        return weight[wanted] / weight[wanted].norm(dim=-1, keepdim=True) * 100


class OracleMemory(nn.Module):
    """Stands in for the oracle's attention: it remembers zeros."""

    def new_cache(self, store):
        return LatentCache(store)

    def remember(self, hidden, positions, cache):
        return cache.append(hidden.new_zeros(*hidden.shape[:2], 10))


def with_oracle(model, texts):
    """The model with a module that drafts these texts."""
    model.mtp[0].block, model.mtp[0].norm = OracleBlock(model, texts), nn.Identity()
    return model


def with_equal_rows(model):
    """The model with a head of which the row in whose direction a state points wins."""
    with torch.no_grad():
        model.lm_head.weight.div_(model.lm_head.weight.norm(dim=1, keepdim=True))
    return model


@pytest.mark.parametrize("wrong_every", [0, 1, 3])
def test_good_drafts_save_passes_and_bad_ones_change_nothing(wrong_every):
    model, prompt = with_equal_rows(build(depth=1)), ids_of(1, 4)
    plain = model.generate(prompt, 24)
    told = plain.clone()
    if wrong_every:
        told[:, ::wrong_every] = (told[:, ::wrong_every] + 1) % 17
    text, figures = speculative_generate(with_oracle(model, told), prompt, 24)
    assert torch.equal(text, plain)
    if wrong_every == 0:  # the first pass yields 1 token, then 2 a pass: 1 + 11 · 2 + 1
        assert figures == dict(forwards=13, drafted=11, accepted=11)
    if wrong_every == 1:
        assert figures["accepted"] == 0 and figures["forwards"] == 24


@pytest.mark.parametrize("mtp_class", [MultiTokenPredictor, IndependentHead])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_draft_is_the_choice_of_its_module_once_the_drafts_before_are_there(
    temperature, mtp_class
):
    model, ids = build(depth=3, mtp_class=mtp_class), ids_of(1, 7)
    sampling = Sampling(temperature, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        drafts, chances = draft(model, ids, model.hidden_states(ids[:, :-1]), 3, sampling)
        text = torch.cat([ids, drafts], dim=1)
        hidden = model.hidden_states(text)
        # Row 5 of module k, which has read tokens up to 5 + k, guesses token 6 + k.
        logits = [depth[:, 5] for depth in model.mtp_logits(hidden, text)]
    if sampling.greedy:
        assert chances is None and drafts.tolist() == [[row.argmax().item() for row in logits]]
    else:
        wanted = torch.stack([sampling.probabilities(row) for row in logits], dim=1)
        torch.testing.assert_close(chances, wanted, atol=1e-5, rtol=1e-4)


def test_verified_drafts_are_tokens_from_the_model_and_confident_ones_are_not():
    p_logits, q_logits = torch.randn(2, 3, 6)
    p, q = p_logits.softmax(-1), q_logits.softmax(-1)
    sampling = Sampling(1.0, generator=torch.Generator().manual_seed(0))
    for check, far in ((verify, False), (accept_by_confidence, True)):
        drafts = torch.stack([sampling.draw(row.expand(50_000, 6)) for row in q[:2]], dim=1)
        logits, chances = p_logits.expand(50_000, 3, 6), q[:2].expand(50_000, 2, 6)
        accepted, own = check(logits, drafts, chances, sampling)
        first = torch.where(accepted > 0, drafts[:, 0], own)
        second = torch.where(accepted > 1, drafts[:, 1], own)[accepted > 0]
        for tokens, wanted in ((first, p[0]), (second, p[1])):
            assert (abs(surprise(torch.bincount(tokens, minlength=6), wanted)) > 5) == far


def test_the_round_of_the_docstring():
    on, the, rug, mat, stop = range(5)
    logits = F.one_hot(torch.tensor([[on, the, mat, stop]]), 5).float()
    accepted, own = verify(logits, torch.tensor([[on, the, rug]]), None, Sampling())
    assert (accepted.item(), own.item()) == (2, mat)


def test_the_shares_of_the_docstring():
    p, q, draws = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.7, 0.1]), 100_000
    sampling = Sampling(1.0, generator=torch.Generator().manual_seed(0))
    drafts = sampling.draw(q.expand(draws, 3))[:, None]
    accepted, own = verify(p.log().expand(draws, 2, 3), drafts, q.expand(draws, 1, 3), sampling)
    ways = drafts[accepted == 1, 0], own[accepted == 0]
    shares = torch.stack([torch.bincount(tokens, minlength=3) for tokens in ways]) / draws
    wanted = torch.tensor([[0.2, 0.3, 0.1], [0.3, 0.0, 0.1]])
    torch.testing.assert_close(shares, wanted, rtol=0, atol=0.006)  # 4 standard errors


@pytest.mark.parametrize(("uniform", "wanted"), [(0.42, (1, 0)), (0.43, (0, 0)), (0.8, (0, 2))])
def test_a_uniform_number_accepts_or_rejects_a_draft(uniform, wanted, monkeypatch):
    # The draft is token 1 with p = .3 and q = .7: it is accepted below 3/7. After a rejection,
    # .3 0 .1 are left: .43 · .4 falls to token 0, .8 · .4 to token 2.
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.full(shape, uniform))
    logits, q = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.2, 0.7, 0.1])
    got = verify(logits.expand(1, 2, 3), torch.tensor([[1]]), q.expand(1, 1, 3), Sampling(1.0))
    assert tuple(each.item() for each in got) == wanted


def test_a_draft_without_probability_is_never_accepted(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.zeros(shape))
    logits, q = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.5, 0.5])
    got = verify(logits.expand(1, 2, 2), torch.tensor([[1]]), q.expand(1, 1, 2), Sampling(1.0))
    assert tuple(each.item() for each in got) == (0, 0)


def test_a_rejection_that_only_rounding_can_cause_draws_from_the_model(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.ones(shape))
    p = torch.tensor([0.0, 0.5, 0.5, 0.0])  # = q: nothing is left of p − q
    got = verify(p.log().expand(1, 2, 4), torch.tensor([[1]]), p.expand(1, 1, 4), Sampling(1.0))
    assert tuple(each.item() for each in got) == (0, 2)


def test_tokens_a_pass_by_hand():
    assert tokens_a_pass(0.5, modules=2) == 1.75
    assert [tokens_a_pass(a, modules=3) for a in (0.0, 1.0)] == [1, 4]


def accept_by_confidence(logits, drafts, draft_chances, sampling):
    """The fault: a draft the model finds likely is accepted, whatever it was drawn from."""
    chances = sampling.probabilities(logits)
    p = chances[:, :-1].gather(2, drafts[..., None]).squeeze(2)
    accepted = (p > 0.2).long().cumprod(dim=1).sum(dim=1)
    own = chances.gather(1, accepted[:, None, None].expand(-1, 1, chances.shape[2])).squeeze(1)
    return accepted, sampling.draw(own)


# The tiny language
def test_a_token_has_three_followers_of_80_15_and_5_percent_in_every_text():
    texts, followers = [small_language(30_000, seed=seed) for seed in (1, 2)], []
    for text in texts:
        counts = torch.zeros(32, 32)
        counts.index_put_((text[:-1], text[1:]), torch.ones(len(text) - 1), accumulate=True)
        often = counts.sum(dim=1) > 400
        shares = (counts / counts.sum(dim=1, keepdim=True))[often].sort(descending=True).values
        assert (shares[:, 3:] == 0).all() and len(text) == 30_000 and text[0] == 0
        usual = shares[shares[:, 2] > 0].median(dim=0).values[:3]  # three different followers
        torch.testing.assert_close(usual, torch.tensor([0.8, 0.15, 0.05]), atol=0.01, rtol=0)
        followers.append((counts > 0)[often])
    assert torch.equal(*followers) and not torch.equal(*texts)


def test_training_on_it_is_adamw_without_decay_along_a_cosine():
    model = small_model(depth=2, width=8)
    plain, drafter = model.copy(), model.copy()
    text, generator = small_language(40_000, seed=1), torch.Generator().manual_seed(3)
    optimizer = torch.optim.AdamW(plain.parameters(), weight_decay=0.0)
    for step in range(2):
        starts = torch.randint(len(text) - 64, (16,), generator=generator).tolist()
        ids = torch.stack([text[start : start + 64] for start in starts])
        hidden = plain.hidden_states(ids)
        loss = next_token_loss(plain.lm_head(hidden), ids)
        loss = loss + mtp_loss(plain.mtp_logits(hidden, ids), ids, 0.7)
        for p, gradient in zip(
            plain.parameters(), torch.autograd.grad(loss, list(plain.parameters())), strict=True
        ):
            p.grad = gradient
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 + math.cos(math.pi * step / 2)) / 2
        optimizer.step()
    losses = train_small(model, 2, 0.7, "cpu", seed=3, rate=1e-2)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-3, atol=1e-4)
    held_out = small_language(8_192, seed=2).view(-1, 64)
    with torch.no_grad():
        hidden = plain.hidden_states(held_out)
        wanted = (next_token_loss(plain.lm_head(hidden), held_out).item(),
                  mtp_loss(plain.mtp_logits(hidden, held_out)[:1], held_out, 1.0).item())
    assert losses == pytest.approx(wanted, rel=1e-4)
    coarse = train_small(drafter, 2, 0.7, "cpu", seed=3, rate=1e-2, precision=torch.bfloat16)
    assert coarse != losses and coarse == pytest.approx(losses, rel=0.02)


# Cost, mistakes, the script
@pytest.mark.performance
def test_cost_of_a_module_is_counted(capsys):
    ids = small_language(32, seed=0)[None]
    base, with_mtp = cost_of(small_model(), ids), cost_of(small_model(depth=1), ids)
    assert capsys.readouterr().out == ""
    block = sum(p.numel() for p in small_model().layers[0].parameters())
    assert with_mtp[0] - base[0] == block + 3 * 48 + 2 * 48 * 48

    def block_flops(T):
        mlp = 3 * 48 * 96
        projections = 48 * 4 * (12 + 4) + 48 * (24 + 4) + 24 * 4 * (12 + 12) + 4 * 12 * 48
        scores = 4 * T * (12 + 4 + 12)
        return 2 * T * (projections + scores + mlp)

    def head_flops(T):
        return 2 * T * 48 * 32

    assert base[1] == 2 * block_flops(32) + head_flops(32)
    assert with_mtp[1] - base[1] == 2 * 31 * 96 * 48 + block_flops(31) + head_flops(31)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.tensor([[3, 17]])), "token id 17 is not within the vocabulary of 17"),
        (lambda m: m(torch.tensor([[-1, 2]])), "token id -1 is not within"),
        (lambda m: m(torch.tensor([3, 1])), r"input_ids must be \(B, T\) with T ≥ 1, got \(2,\)"),
        (lambda m: m(torch.zeros(1, 0, dtype=torch.long)), "with T ≥ 1"),
        (lambda m: m(torch.ones(1, 2)), "input_ids must be integers, got torch.float32"),
        (lambda m: m(ids_of(1, 13)), "13 tokens exceed the context of 12"),
        (lambda m: m.generate(ids_of(1, 8), 5), "prompt of 8 and 5 new tokens exceed the context"),
        (lambda m: m.generate(ids_of(1, 2), -1), "max_new_tokens=-1"),
        (lambda m: m.generate(ids_of(1, 2), 2, temperature=-1.0), "temperature=-1.0 must be"),
        (lambda m: m.generate(ids_of(1, 2), 2, 1.0, top_k=0), "top_k=0 must be at least 1"),
        (lambda m: m.generate(ids_of(1, 2), 2, 1.0, top_p=1.5), "top_p=1.5 must be at most 1"),
        (lambda m: m.generate(ids_of(1, 2), 2, 1.0, top_p=0.0), "top_p=0.0 must be a number above"),
        (lambda m: m.generate(ids_of(1, 2), 2, pad_token_id=17), "pad_token_id=17 is not within"),
        (lambda m: m(ids_of(1, 4), attention_mask=torch.ones(1, 3)), r"mask must be \(1, 4\)"),
        (lambda m: m.mtp_logits(torch.zeros(1, 4, 24), ids_of(1, 4), torch.ones(1, 5)),
         r"mask must be \(1, 4\), got \(1, 5\)"),
        (lambda m: m.generate(ids_of(1, 3), 2, attention_mask=torch.tensor([[1, 1, 0]])),
         "padded on the left"),
        (lambda m: speculative_generate(build(depth=0), ids_of(1, 3), 2), "needs MTP modules"),
        (lambda m: speculative_generate(m, ids_of(2, 3), 2), "one sequence at a time, got 2"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(build(depth=1, max_positions=12))


@pytest.mark.integration
def test_script(check_script):
    check_script("mtp_coded.py", ["--depth", 0], "--depth=0")


def test_the_smallest_top_k_is_greedy():
    chosen = Sampling(1.0, top_k=1).probabilities(torch.tensor([[0.1, 2.0, 1.9]]))
    assert chosen.tolist() == [[0, 1, 0]]


def test_a_greedy_round_stops_at_the_first_wrong_draft():
    model_chooses = F.one_hot(torch.tensor([1, 2, 3, 4]), 10).float()
    for drafts, accepted, own in (((9, 2, 3), 0, 1), ((1, 9, 3), 1, 2), ((1, 2, 3), 3, 4)):
        got = verify(model_chooses[None], torch.tensor([drafts]), None, Sampling())
        assert [number.item() for number in got] == [accepted, own]
