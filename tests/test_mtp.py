"""Phase 6: prediction modules, losses, the small language model, generation, speculation."""

import math

import pytest
import torch
import torch.nn.functional as F

import mtp_coded
from mla_coded import MultiHeadLatentAttention
from moe_coded import SwiGLU, TransformerBlock
from mtp_coded import (
    CausalLM,
    Continuation,
    Depth,
    Drafter,
    IndependentHead,
    MultiTokenPredictor,
    Sampling,
    cost_of,
    decoding_head,
    mtp_loss,
    next_token_loss,
    small_language,
    small_model,
    speculative_generate,
    train_small,
)


def build(depth=2, std=0.3, max_positions=None, vocab=17, mtp_class=MultiTokenPredictor):
    def block():
        return TransformerBlock(MultiHeadLatentAttention(24, 2, 8, 6, 2, 6), SwiGLU(24, 32))

    model = CausalLM(vocab, 24, [block(), block()], [block() for _ in range(depth)],
                     max_positions=max_positions, mtp_class=mtp_class)  # fmt: skip
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
    second = model.lm_head(model.mtp[1](hidden[:, :-2]))
    torch.testing.assert_close(model.mtp_logits(hidden, ids)[1], second)
    assert torch.equal(model.generate(ids, 9, speculative=True), model.generate(ids, 9))


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
    )  # fmt: skip


@pytest.mark.parametrize("masked", [False, True])
def test_chunked_head_loss_is_the_loss_from_logits(masked, monkeypatch):
    monkeypatch.setattr(mtp_coded.ChunkedHeadLoss, "ROWS", 7)
    model, ids = build(depth=2), ids_of(3, 9)
    documents = torch.arange(27).view(3, 9) // 5 if masked else None
    mask = torch.arange(9) < torch.tensor([[9], [4], [0]]) if masked else None

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    hidden = model.hidden_states(ids)
    naive = next_token_loss(model.lm_head(hidden), ids, mask)
    naive = naive + mtp_loss(model.mtp_logits(hidden, ids), ids, 2.0, documents, mask)
    expected = gradients(naive)
    hidden = model.hidden_states(ids)
    chunked = model.head_loss(hidden, ids, 1, token_mask=mask)
    for k, states in enumerate(model.mtp_hidden_states(hidden, ids), start=1):
        chunked = chunked + model.head_loss(states, ids, k + 1, documents, mask)
    # another order of summation
    torch.testing.assert_close(chunked, naive, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(chunked), expected, rtol=1e-4, atol=1e-6)


def test_loss_of_bfloat16_logits_is_worked_out_in_fp32():
    hidden, weight = torch.randn(600, 24).bfloat16(), torch.randn(501, 24).bfloat16()
    targets = torch.randint(501, (600,))
    expected = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")
    loss = mtp_coded.ChunkedHeadLoss.apply(hidden, weight, targets)
    # only the order of the sum differs; in BF16 it would be off by a few in a thousand
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


@pytest.mark.performance
def test_chunked_head_loss_never_holds_all_logits_in_fp32(monkeypatch):
    monkeypatch.setattr(mtp_coded.ChunkedHeadLoss, "ROWS", 8)
    model, ids, largest = build(depth=0, vocab=501), ids_of(2, 32, vocab=501), []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
            output = function(*arguments, **(kwargs or {}))
            if torch.is_tensor(output) and output.shape[-1:] == (501,):
                largest.append((output.dtype, output.numel()))
            return output

    with torch.autocast("cpu", torch.bfloat16), Sizes():
        model.head_loss(model.hidden_states(ids), ids, 1)
    assert max(n for dtype, n in largest if dtype == torch.float32) == 8 * 501


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


def test_generation_matches_recomputing_everything():
    model, ids = build(depth=0), ids_of(2, 4)
    expected = ids
    for _ in range(12):
        expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(ids, 12), expected)


@pytest.mark.parametrize("speculative", [False, True])
def test_prompts_of_unequal_length_give_what_they_give_alone(speculative):
    model, prompts = build(depth=1), [ids_of(1, n) for n in (3, 7, 5)]
    alone = [model.generate(prompt, 9)[0, prompt.shape[1] :] for prompt in prompts]
    batch = torch.cat([F.pad(prompt, (7 - prompt.shape[1], 0)) for prompt in prompts])
    mask = torch.stack([(torch.arange(7) >= 7 - p.shape[1]).long() for p in prompts])
    together = model.generate(batch, 9, attention_mask=mask, speculative=speculative)
    assert torch.equal(together[:, 7:], torch.stack(alone))


@pytest.mark.parametrize("speculative", [False, True])
def test_generation_stops_at_the_given_token_only(speculative):
    stops = set()
    for seed in range(6):
        torch.manual_seed(seed)
        model, ids = build(depth=1, std=0.15), ids_of(3, 3)
        free = model.generate(ids, 10, speculative=speculative)
        assert free.shape == (3, 13)
        stop = free[0, 5].item()
        stopped = model.generate(ids, 10, 0.0, speculative, eos_token_id=stop, pad_token_id=16)
        for row, free_row in zip(stopped, free, strict=True):
            new = free_row[3:].tolist()
            end = new.index(stop) + 1 if stop in new else 10
            assert row[3:].tolist() == new[:end] + [16] * (10 - end)
            stops.add((seed, end))
    assert len(stops) > 6  # rows of one batch stopped at different places


def test_sampling_follows_the_temperature():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]])).expand(20_000, 3)
    for temperature in (1.0, 0.5):
        drawn = Sampling(temperature, generator=torch.Generator().manual_seed(0)).choose(logits)
        shares = torch.bincount(drawn, minlength=3) / 20_000
        expected = (logits[0] / temperature).softmax(0)
        assert (shares - expected).abs().max() < 0.015  # 4 standard errors
    assert (Sampling().choose(logits) == 0).all()


def test_sampling_is_repeatable_with_a_seed():
    model, ids = build(depth=0, std=0.05), ids_of(1, 3)
    runs = [
        model.generate(ids, 12, temperature=1.0, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


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


class Oracle(torch.nn.Module):
    """Stands in for an MTP module: a hidden state that makes the head say what it is told."""

    def __init__(self, model, continuation):
        super().__init__()
        self.block, self.continuation, self.model = model.mtp[0].block, continuation, [model]

    def forward(self, hidden, future_ids, cache=None, start=None, **options):
        cache.append(hidden.new_zeros(1, future_ids.shape[1], 10), start)
        head = self.model[0].lm_head.weight
        # The text after the token just read, whose place is cache.length.
        wanted = (self.continuation + [0])[cache.length + 1]
        return (head[wanted] / head[wanted].norm() * 100).expand(1, future_ids.shape[1], -1)


@pytest.mark.parametrize("wrong_every", [0, 1, 3])
def test_good_drafts_save_passes_and_bad_ones_change_nothing(wrong_every):
    model, prompt = build(depth=1), ids_of(1, 4)
    with torch.no_grad():  # so that the direction of a row of the head wins
        model.lm_head.weight.div_(model.lm_head.weight.norm(dim=1, keepdim=True))
    plain = model.generate(prompt, 24)
    draft = plain[0].tolist()
    if wrong_every:
        draft = [(t + 1) % 17 if i % wrong_every == 0 else t for i, t in enumerate(draft)]
    model.mtp[0] = Oracle(model, draft)
    drafted, figures = speculative_generate(model, prompt, 24, depth=1)
    assert torch.equal(drafted, plain)
    if wrong_every == 0:
        # the first pass yields 1 token, then 2 a pass: 1 + 11 · 2 + 1
        assert (figures["forwards"], figures["drafted"], figures["accepted"]) == (13, 11, 11)
    if wrong_every == 1:
        assert figures["accepted"] == 0 and figures["forwards"] == 24


def test_rejected_drafts_leave_no_trace_in_the_caches():
    # Trained drafts are accepted sometimes; after each round the next choice must still be exact.
    model, prompt = build(depth=2, std=0.15), ids_of(1, 5)
    _, figures = speculative_generate(model, prompt, 60)
    assert 0 <= figures["accepted"] < figures["drafted"]
    assert torch.equal(speculative_generate(model, prompt, 60)[0], model.generate(prompt, 60))


@pytest.mark.parametrize(
    ("modules", "depth"), [(1, 1), (1, 3), (2, 2), (3, 3), (2, 4), (3, 1), (2, None), (3, None)]
)
def test_cached_drafts_are_those_of_a_fresh_start(modules, depth, monkeypatch):
    model, prompt, rounds = build(modules, std=0.15), ids_of(2, 5), []
    cached_draft = Drafter.draft

    def compared(drafter, tokens, lengths, depth):  # here the depth of the round
        expected = []
        unfinished = (lengths < 45).tolist()
        for row, length in zip(tokens[unfinished], lengths[unfinished].tolist(), strict=True):
            fresh, known = Drafter(model, 64, Sampling(), model.lm_head), row[None].clone()
            everything = model.hidden_states(known[:, : length - 1])
            fresh.observe(everything, torch.zeros(1, dtype=torch.long))
            cached_draft(fresh, known, torch.tensor([length]), depth)
            expected.append(known[0, length : length + depth])
        result = cached_draft(drafter, tokens, lengths, depth)
        got = [row[n : n + depth] for row, n in zip(tokens, lengths.tolist(), strict=True)]
        rounds.append(torch.equal(torch.stack(got)[unfinished], torch.stack(expected)))
        return result

    monkeypatch.setattr(Drafter, "draft", compared)
    speculative_generate(model, prompt, 40, depth=depth)
    assert len(rounds) > (10 if depth else 3) and all(rounds)


def test_depth_follows_what_held_and_pauses_ever_longer():
    depth = Depth(deepest=3)
    assert [depth.next(0, 0), depth.next(1, 1), depth.next(2, 2), depth.next(3, 3)] == [1, 2, 3, 3]
    assert depth.next(3, 1) == 2
    asked, drafted = [], 2
    for _ in range(12):  # nothing ever holds
        drafted = depth.next(drafted, 0)
        asked.append(drafted)
    assert asked == [0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0]
    depth = Depth(deepest=3)
    depth.next(1, 0)
    assert depth.next(0, 0) == 1 and depth.next(1, 1) == 2 and depth.pause == 0


class HalfOracle(torch.nn.Module):
    """Drafts what it is told for each row and position."""

    def __init__(self, model, texts):
        super().__init__()
        self.block, self.texts, self.model = model.mtp[0].block, texts, [model]

    def forward(self, hidden, future_ids, cache=None, positions=None, start=None, **options):
        cache.append(hidden.new_zeros(*future_ids.shape, 10), start)
        head = self.model[0].lm_head.weight
        wanted = F.pad(self.texts, (0, 99))[torch.arange(len(self.texts))[:, None], positions + 2]
        return head[wanted] / head[wanted].norm(dim=-1, keepdim=True) * 100


def test_a_batch_outlives_its_fast_row_and_the_longest_pause():
    model, prompts = build(depth=1), ids_of(3, 6)
    with torch.no_grad():  # so that the direction of a row of the head wins
        model.lm_head.weight.div_(model.lm_head.weight.norm(dim=1, keepdim=True))
    mask = torch.ones_like(prompts)
    mask[1:, :3] = 0  # the fast row is the longest
    plain = model.generate(prompts, 90, attention_mask=mask)
    texts = plain.clone()
    texts[1:, :-3] = (plain[1:, 3:] + 1) % 17  # left-aligned, and never right
    model.mtp[0] = HalfOracle(model, texts)
    figures = {}
    drafted = model.generate(prompts, 90, attention_mask=mask, speculative=True, figures=figures)
    assert torch.equal(drafted, plain) and figures["forwards"] > 80


# Sampling with drafts: the distribution stays
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


def accept_by_confidence(logits, drafts, draft_chances, sampling):
    """The fault: a draft the model finds likely is taken, whatever it was drawn from."""
    chances = sampling.probabilities(logits)
    p = chances[:, :-1].gather(2, drafts[..., None]).squeeze(2)
    accepted = (p > 0.2).long().cumprod(dim=1).sum(dim=1)
    own = chances.gather(1, accepted[:, None, None].expand(-1, 1, chances.shape[2])).squeeze(1)
    return accepted, sampling.draw(own)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_drawing_from_nothing_is_named(value):
    with pytest.raises(ValueError, match="probabilities are not finite"):
        Sampling(1.0).draw(torch.tensor([[0.5, 0.5], [value, 0.0]]))


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 1), (0.49, 1), (0.51, 3), (1.0, 3)])
def test_a_token_without_probability_is_never_drawn(uniform, token, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.full(shape, uniform))
    probabilities = torch.tensor([[0.0, 0.35, 0.0, 0.35, 0.0]])  # need not sum to 1
    assert Sampling(1.0).draw(probabilities).item() == token


@pytest.mark.parametrize(
    ("modules", "depth", "options"),
    [
        (1, 1, {}), (1, 3, {}), (2, 2, {}), (1, None, {}),
        (1, 3, {"top_k": 3}), (1, 3, {"top_p": 0.7}), (1, 3, {"temperature": 0.6}),
    ],
)  # fmt: skip
def test_sampled_text_keeps_its_distribution(modules, depth, options, monkeypatch):
    model, prompt = build(modules, std=0.4, vocab=5), ids_of(1, 3, vocab=5)
    settings = {"temperature": 1.0, **options}
    chances = joint_chances(model, prompt, Sampling(**settings), new=4)
    base = torch.tensor([125, 25, 5, 1])

    def counts():
        ids, figures = speculative_generate(
            model, prompt.expand(20_000, -1), 4, depth=depth,
            generator=torch.Generator().manual_seed(1), **settings,
        )  # fmt: skip
        assert 0.1 < figures["accepted"] / figures["drafted"] < 0.95  # the draft disagrees
        return torch.bincount((ids[:, 3:] * base).sum(dim=1), minlength=625)

    assert abs(surprise(counts(), chances)) < 5
    monkeypatch.setattr(mtp_coded, "verify", accept_by_confidence)
    assert surprise(counts(), chances) > 20


def test_plain_sampling_follows_the_model():
    model, prompt = build(0, std=0.4, vocab=5), ids_of(1, 3, vocab=5)
    ids = model.generate(
        prompt.expand(20_000, -1), 3, 1.0, generator=torch.Generator().manual_seed(1)
    )
    counts = torch.bincount((ids[:, 3:] * torch.tensor([25, 5, 1])).sum(dim=1), minlength=125)
    assert abs(surprise(counts, joint_chances(model, prompt, Sampling(1.0), new=3))) < 5


def test_sampling_holds_at_the_edges():
    tied = Sampling(1.0, top_k=2).probabilities(torch.zeros(5))
    assert (tied > 0).sum() == 2  # as many as asked for, whichever
    for temperature in (1e-38, 1e-6):  # next to greedy, no overflow
        sharp = Sampling(temperature).probabilities(torch.tensor([5.0, 30.0, 2.0]))
        assert sharp.tolist() == [0, 1, 0]


def test_generation_takes_what_a_caller_may_have():
    model, ids = build(depth=1), ids_of(2, 4)
    for speculative in (False, True):
        expected = model.generate(ids, 6, speculative=speculative)
        assert torch.equal(model.generate(ids.int(), 6, speculative=speculative), expected)
        figures = {}
        same = model.generate(ids, 0, speculative=speculative, figures=figures)
        assert torch.equal(same, ids) and same is not ids and figures["forwards"] == 0
        assert model.generate(ids[:0], 3, speculative=speculative).shape == (0, 7)
    with torch.inference_mode():
        assert model.head_loss(model.hidden_states(ids), ids, 1) > 0
    assert [x.shape for x in model.mtp_logits(model.hidden_states(ids[:, :1]), ids[:, :1])] == [
        (2, 0, 17)
    ]


def test_a_head_of_another_kind_is_left_to_itself():
    head = torch.nn.Sequential(torch.nn.Linear(64, 2**14, bias=False))
    assert decoding_head(head, tokens=500) is head


def test_head_loss_passes_a_gradient_check_in_float64():
    hidden, weight = torch.randn(5, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    targets = torch.tensor([0, 6, -100, 3, 3])
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: mtp_coded.ChunkedHeadLoss.apply(h, w, targets), leaves
    )


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


# Generation
@pytest.mark.parametrize("chunk", [1, 3, 7, 50])
@pytest.mark.parametrize("speculative", [False, True])
def test_prompts_read_in_chunks_give_the_same_text(chunk, speculative):
    model, ids = build(depth=1), ids_of(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    options = dict(attention_mask=mask, speculative=speculative)
    assert torch.equal(
        model.generate(ids, 9, prefill_chunk=chunk, **options), model.generate(ids, 9, **options)
    )


@pytest.mark.parametrize("speculative", [False, True])
def test_stream_gives_the_text_as_it_comes(speculative):
    model, ids, passes = build(depth=1, std=0.15), ids_of(2, 4), []
    stop = model.generate(ids, 12)[0, 9].item()
    figures = {}
    output = model.generate(
        ids, 12, speculative=speculative, stream=passes.append, figures=figures,
        eos_token_id=stop, pad_token_id=16,
    )  # fmt: skip
    assert len(passes) == figures["forwards"]
    for row in range(2):
        streamed = [token for new in passes for token in new[row]]
        assert streamed + [16] * (12 - len(streamed)) == output[row, 4:].tolist()


def test_what_is_confirmed_ends_at_the_end_and_at_a_stop():
    text = Continuation(ids_of(3, 4), torch.tensor([4, 2, 3]), 5, 3, eos_token_id=9, pad_token_id=0)
    drafts = torch.tensor([[1, 9, 3], [4, 5, 6], [1, 2, 3]])
    for row, (draft, length) in enumerate(zip(drafts, text.lengths.tolist(), strict=True)):
        text.tokens[row, length : length + 3] = draft
    # Row 0 stops within its drafts, row 1 gets all and one more, row 2 one and the model's own.
    appended = text.confirm(drafts, torch.tensor([3, 3, 1]), own=torch.tensor([7, 8, 9]))
    assert appended == [[1, 9], [4, 5, 6, 8], [1, 9]]
    assert text.lengths.tolist() == [6, 6, 5] and text.active.tolist() == [False, True, False]
    # Row 1 has room for one more, the others are finished.
    assert text.drafts_wanted(3).tolist() == [0, 0, 0]
    more = torch.tensor([[1, 1], [2, 3], [1, 1]])
    text.tokens[1, 6:8] = more[1]
    assert text.confirm(more, torch.tensor([2, 2, 2]), own=torch.tensor([7, 7, 7])) == [[], [2], []]
    assert not text.active.any()
    assert text.new().tolist() == [[1, 9, 0, 0, 0], [4, 5, 6, 8, 2], [1, 9, 0, 0, 0]]


@pytest.mark.performance
@pytest.mark.parametrize("speculative", [False, True])
def test_caches_take_exactly_the_latent_and_the_rotary_key(speculative, monkeypatch):
    model, ids, made = build(depth=1), ids_of(2, 5), []
    new_caches = model.new_caches

    def recorded(*args, **kwargs):
        made.append(new_caches(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(model, "new_caches", recorded)
    figures = {}
    model.generate(ids, 20, speculative=speculative, figures=figures)
    width, layers = 8 + 2, 2 + speculative
    main = 2 * 24 * width * 4  # all tokens but the last, which nobody reads
    if speculative:
        assert figures["cache_bytes"] <= main * layers
    else:
        assert figures["cache_bytes"] == main * layers
        assert sum(c.allocated_bytes() for c in made[0]) == main * layers  # not one number more
    assert len({c.storage.data_ptr() for c in made[0]}) == 2
    for cache in (cache for caches in made for cache in caches):
        assert cache.storage.shape[::2] == (2, width) and cache.storage.dtype == torch.float32


@pytest.mark.performance
def test_each_token_is_read_once():
    model, ids = build(depth=0), ids_of(2, 5)
    read = []
    model.embed_tokens.register_forward_hook(
        lambda module, args, output: read.append(args[0].shape)
    )
    model.generate(ids, 6)
    assert read == [(2, 5)] + [(2, 1)] * 5


def test_generated_ids_can_be_trained_on():
    model, ids = build(depth=1), ids_of(1, 4)
    for speculative in (False, True):
        output = model.generate(ids, 5, speculative=speculative)
        model.zero_grad()
        next_token_loss(model(output), output).backward()
        assert model.embed_tokens.weight.grad.norm() > 0


def test_packed_head_is_the_head():
    head = torch.nn.Linear(64, 2**14, bias=False)
    packed = decoding_head(head, tokens=500)
    assert packed is not head and decoding_head(head, tokens=2) is head
    for rows in (torch.randn(1, 64), torch.randn(3, 2, 64), torch.randn(6, 64)[::2]):
        # another order of summation
        torch.testing.assert_close(packed(rows), head(rows), rtol=1e-5, atol=1e-5)
    assert decoding_head(head.double(), tokens=500) is head  # no such kernel


def test_padding_takes_no_position():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = build(depth=0)._padding(ids_of(2, 2), mask, past=3)
    assert options["positions"].tolist() == [[1, 2], [3, 4]]
    assert options["token_mask"].tolist() == [[True, True], [True, True]]


@pytest.mark.performance
def test_cost_of_a_module_is_counted():
    ids = small_language(32, seed=0)[None]
    base, with_mtp = cost_of(small_model(), ids), cost_of(small_model(depth=1), ids)
    block = sum(p.numel() for p in small_model().layers[0].parameters())
    assert with_mtp[0] - base[0] == block + 3 * 48 + 2 * 48 * 48
    assert with_mtp[1] > base[1]


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
        (lambda m: m.generate(ids_of(1, 2), 2, temperature=-1.0), "temperature=-1.0"),
        (lambda m: m.generate(ids_of(1, 2), 2, 1.0, top_k=0), "top_k=0 must be at least 1"),
        (lambda m: m.generate(ids_of(1, 2), 2, 1.0, top_p=1.5), "top_p=1.5 must be above 0"),
        (lambda m: m.generate(ids_of(1, 2), 2, prefill_chunk=0), "prefill_chunk=0"),
        (lambda m: m.generate(ids_of(1, 2), 2, pad_token_id=17), "pad_token_id=17 is not within"),
        (lambda m: m.generate(ids_of(1, 2), 2, depth=2), "depth=2 is for speculative=True"),
        (lambda m: speculative_generate(m, ids_of(1, 2), 2, depth=0), "depth=0 must be at least 1"),
        (lambda m: speculative_generate(build(1, mtp_class=IndependentHead), ids_of(1, 2), 4,
                                        depth=2), "1 independent heads guess no further"),
        (lambda m: m(ids_of(1, 4), attention_mask=torch.ones(1, 3)), r"mask must be \(1, 4\)"),
        (lambda m: m.generate(ids_of(1, 3), 2, attention_mask=torch.tensor([[1, 1, 0]])),
         "padded on the left"),
        (lambda m: speculative_generate(build(depth=0), ids_of(1, 3), 2), "needs MTP modules"),
    ],
)  # fmt: skip
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(build(depth=1, max_positions=12))


def test_generation_fills_the_context_exactly():
    model = build(depth=1, max_positions=12)
    for speculative in (False, True):
        assert model.generate(ids_of(1, 8), 4, speculative=speculative).shape == (1, 12)


@pytest.mark.integration
def test_script(check_script):
    check_script("mtp_coded.py", ["--steps", 30], ["--depth", 0], "--depth=0")
