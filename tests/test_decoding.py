"""Generation at speed: equal to phase 6's plain form, for every row of a batch."""

import pytest
import torch
import torch.nn.functional as F
from test_mtp import (
    accept_by_confidence,
    build,
    check_can_be_trained_on,
    check_each_token_is_read_once,
    check_logprobs,
    check_sampling_follows,
    check_stops,
    ids_of,
    joint_chances,
    surprise,
    with_equal_rows,
    with_oracle,
)

from lesson.writing import Generation
from mtp_coded import CausalLM, IndependentHead, Sampling, speculative_generate
from multihead_attention_coded import KVCache, RowStore
from pipeline import decoding
from pipeline.decoding import (
    Continuation,
    Depth,
    Drafter,
    PreallocatedRows,
    Task,
    count_round,
    deepest_draft,
    last_outputs,
    left_aligned,
    slots,
    take,
)
from quantization_coded import quantize_cache


class Fast(CausalLM):
    """Phase 6's model with production decoding."""

    def complete(self, *args, **options):
        return decoding.complete(self, *args, **options)


def fast(*args, **options):
    return build(*args, model_class=Fast, **options)


def plainly(model, *args, **options):
    """What phase 6 generates with the same weights."""
    return CausalLM.complete(model, *args, Sampling(), **options).ids


def drafted(model, ids, new, depth=None, sampling=None, **options):
    """`Generation` with drafts."""
    sampling = sampling or Sampling()
    return model.complete(ids, new, sampling, speculative=True, depth=depth, **options)


# The store
def test_a_store_keeps_what_row_store_keeps():
    plain, store = RowStore(), PreallocatedRows(capacity=3)
    for shape in ((2, 4), (2, 3, 4)):  # rows of a sequence, and of several heads
        plain, store = RowStore(), PreallocatedRows(capacity=3)
        for new, kept in ((2, 1), (3, 4), (1, 5), (4, 0), (2, 2)):
            rows = torch.randn(*shape[:-1], new, shape[-1], requires_grad=True)
            got = store.append(rows)
            assert torch.equal(got, plain.append(rows)) and not got.requires_grad
            assert store.length == plain.length and store.used_bytes() == plain.used_bytes()
            plain.truncate(kept)
            store.truncate(kept)


@pytest.mark.performance
def test_a_store_reserves_by_doubling_or_as_told():
    store, sizes = PreallocatedRows(), set()
    for _ in range(100):
        store.append(torch.zeros(1, 1, 2))
        sizes.add(store.storage.shape[-2])
    assert sizes == {1, 2, 4, 8, 16, 32, 64, 128}
    told = PreallocatedRows(capacity=50)
    told.append(torch.zeros(1, 3, 2))
    assert told.storage.shape[-2] == 50
    assert (told.used_bytes(), told.allocated_bytes()) == (3 * 2 * 4, 50 * 2 * 4)
    told = PreallocatedRows(capacity=50)
    assert (told.used_bytes(), told.allocated_bytes()) == (0, 0)


def test_a_truncated_store_overwrites():
    store, rows = PreallocatedRows(), torch.arange(12.0).view(1, 6, 2)
    store.append(rows)
    store.truncate(2)
    got = store.append(-rows[:, :1])  # the rest is forgotten
    assert torch.equal(got, torch.cat([rows[:, :2], -rows[:, :1]], dim=1))


@pytest.mark.parametrize("heads", [(), (2,)])
def test_sequences_of_unequal_length_have_places_of_their_own(heads):
    def each(*values):
        return torch.tensor(values).view(1, *[1] * len(heads), -1, 1).expand(3, *heads, -1, 1)

    store = PreallocatedRows(capacity=6)
    store.append(each(0.0, 0.0, 0.0, 0.0))
    store.truncate(torch.tensor([0, 3, 2]))
    assert store.length == 3
    store.append(each(1.0))
    view = store.append(each(2.0).requires_grad_())  # behind each sequence's own end
    assert not view.requires_grad
    view = view if not heads else view[:, 1]
    assert view[..., 0].tolist() == [[1, 2, 0, 0, 0], [0, 0, 0, 1, 2], [0, 0, 1, 2, 0]]
    assert store.length == 5 and store.storage.shape[-2] == 6  # no reallocation
    assert store.lengths.tolist() == [2, 5, 4]
    store.truncate(torch.tensor([2, 4, 4]))
    view = store.append(each(*[9.0] * 5))  # growth keeps the rows
    assert view.shape[-2] == 9
    view = view if not heads else view[:, 1]
    assert view[0, :7, 0].tolist() == [1, 2, 9, 9, 9, 9, 9]
    assert view[1, :, 0].tolist() == [0, 0, 0, 1, 9, 9, 9, 9, 9]
    store.truncate(3)  # all alike again
    assert store.append(each(7.0)).shape[-2] == 4 and store.lengths is None


def test_mistakes_with_a_store_are_named():
    for length in (3, torch.tensor([0, 3]), -1):
        store = PreallocatedRows()
        store.append(torch.zeros(2, 2, 4))
        with pytest.raises(ValueError, match="cannot truncate a cache of length 2 to (3|-1)"):
            store.truncate(length)
    for rows in (torch.zeros(3, 1, 4), torch.zeros(2, 1, 5)):
        with pytest.raises(ValueError, match=r"cache holds rows \(2, 2, 4\), got"):
            store.append(rows)


def test_caches_of_earlier_phases_take_the_store():
    cache, plain = KVCache(PreallocatedRows), KVCache()
    for new in (3, 1, 2):
        key, value = torch.randn(2, 2, 4, new, 6)
        for got, want in zip(cache.append(key, value), plain.append(key, value), strict=True):
            assert torch.equal(got, want)


# Places
def test_prompts_get_their_padding_behind_them():
    ids = torch.arange(12).view(2, 6)
    mask = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 1, 1, 1, 1, 1]])
    aligned, lengths = left_aligned(ids, mask)
    assert aligned[0, :2].tolist() == [4, 5] and aligned[1, :5].tolist() == [7, 8, 9, 10, 11]
    assert lengths.tolist() == [2, 5]
    aligned, lengths = left_aligned(ids, None)
    assert torch.equal(aligned, ids) and lengths.tolist() == [6, 6]


def test_rows_of_a_batch_stand_at_places_of_their_own():
    rows = torch.arange(12).view(2, 6)
    assert take(rows, 1, 2).tolist() == [[1, 2], [7, 8]]
    assert take(rows, torch.tensor([1, 3]), 2).tolist() == [[1, 2], [9, 10]]
    options = slots(torch.tensor([0, 2]), 2, "cpu")
    assert options["positions"].tolist() == [[0, 1], [2, 3]]
    assert options["mask"].int().tolist() == [
        [[[1, 0, 0, 0], [1, 1, 0, 0]]], [[[1, 1, 1, 0], [1, 1, 1, 1]]]
    ]
    options = slots(3, 2, "cpu")
    assert options["positions"].tolist() == [3, 4] and "mask" not in options
    assert [slots(0, n, "cpu")["path"] for n in (1, 500)] == ["absorbed", "expanded"]


# A pass
@pytest.mark.parametrize("last", [1, 2, 5])
def test_last_outputs_are_those_of_the_whole_pass(last):
    block, hidden = build(depth=0).layers[0], torch.randn(2, 5, 24)
    caches = [block.self_attn.new_cache(PreallocatedRows) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            block(hidden[:, :3], cache=cache)
        got = last_outputs(block, hidden, caches[0], 3, last)
        want = block(hidden, cache=caches[1])[:, -last:]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)  # one is absorbed
    got, want = (cache.rows.append(torch.zeros(2, 0, 10)) for cache in caches)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


# Equal to phase 6
@pytest.mark.parametrize("options", [{}, {"speculative": True}, {"prefill_chunk": 3}])
def test_text_is_that_of_phase_6(options):
    model, ids = fast(depth=2), ids_of(3, 7)
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[2, :6] = 0
    for padding in (None, mask):
        want = plainly(model, ids, 20, attention_mask=padding)
        got = model.generate(ids, 20, attention_mask=padding, **options)
        assert torch.equal(got[:, 7:], want[:, 7:])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("modules", [1, 2, 4])
def test_speculation_is_that_of_phase_6(modules, temperature):
    for seed in range(3):
        torch.manual_seed(seed)
        model = fast(modules, std=0.15)
        for length in (1, 2, 7):
            prompt = ids_of(1, length)
            text, figures = speculative_generate(
                model, prompt, 23, temperature, generator=torch.Generator().manual_seed(seed)
            )
            # The same random numbers in the same order.
            sampling = Sampling(temperature, generator=torch.Generator().manual_seed(seed))
            result = drafted(model, prompt, 23, modules, sampling)
            assert torch.equal(result.ids, text)
            assert figures == {name: getattr(result, name) for name in figures}


def test_independent_heads_draft_as_in_phase_6():
    model, ids = fast(depth=2, mtp_class=IndependentHead), ids_of(1, 6)
    assert torch.equal(model.generate(ids, 9, speculative=True), plainly(model, ids, 9))
    text, figures = speculative_generate(model, ids, 9)
    result = drafted(model, ids, 9, depth=2)
    assert torch.equal(result.ids, text) and figures["accepted"] == result.accepted


def test_logprobs_are_those_of_the_tokens_drawn():
    check_logprobs(fast(depth=0))
    model, ids = fast(depth=1), ids_of(1, 4)
    assert drafted(model, ids, 3).logprobs is None
    assert model.complete(ids, 2, Sampling()).logprobs.tolist() == [[0, 0]]  # greedy: no choice


@pytest.mark.parametrize("speculative", [False, True])
def test_sampling_is_repeatable_with_a_seed(speculative):
    model, ids = fast(depth=1, std=0.05), ids_of(1, 3)
    runs = [
        model.generate(ids, 12, temperature=1.0, generator=torch.Generator().manual_seed(seed),
                       speculative=speculative)
        for seed in (1, 1, 2)
    ]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("speculative", [False, True])
def test_prompts_of_unequal_length_give_what_they_give_alone(speculative):
    model, prompts = fast(depth=1), [ids_of(1, n) for n in (3, 7, 5)]
    alone = [model.generate(prompt, 9)[0, prompt.shape[1] :] for prompt in prompts]
    batch = torch.cat([F.pad(prompt, (7 - prompt.shape[1], 0)) for prompt in prompts])
    mask = torch.stack([(torch.arange(7) >= 7 - p.shape[1]).long() for p in prompts])
    together = model.generate(batch, 9, attention_mask=mask, speculative=speculative)
    assert torch.equal(together[:, 7:], torch.stack(alone))


@pytest.mark.parametrize("speculative", [False, True])
def test_generation_stops_at_the_given_token_only(speculative):
    check_stops(Fast, speculative=speculative)


# Drafts
@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("prompt_length", [1, 2, 7])
def test_speculative_text_is_the_greedy_text(depth, prompt_length):
    for seed in range(3):
        torch.manual_seed(seed)
        model, prompt = fast(depth), ids_of(1, prompt_length)
        for new in (1, 2, 23):
            result = drafted(model, prompt, new)
            assert torch.equal(result.ids, plainly(model, prompt, new))
            assert result.forwards + result.accepted == new


@pytest.mark.parametrize("wrong_every", [0, 1, 3])
def test_good_drafts_save_passes_and_bad_ones_change_nothing(wrong_every):
    model, prompt = with_equal_rows(fast(depth=1)), ids_of(1, 4)
    plain = plainly(model, prompt, 24)
    told = plain.clone()
    if wrong_every:
        told[:, ::wrong_every] = (told[:, ::wrong_every] + 1) % 17
    result = drafted(with_oracle(model, told), prompt, 24, depth=1)
    assert torch.equal(result.ids, plain)
    if wrong_every == 0:  # the first pass yields 1 token, then 2 a pass: 1 + 11 · 2 + 1
        assert (result.forwards, result.drafted, result.accepted) == (13, 11, 11)
    if wrong_every == 1:
        assert result.accepted == 0 and result.forwards == 24


def test_rejected_drafts_leave_no_trace_in_the_caches():
    # Trained drafts are accepted sometimes; after each round the next choice must still be exact.
    model, prompt = fast(depth=2, std=0.15), ids_of(1, 5)
    result = drafted(model, prompt, 60)
    assert 0 <= result.accepted < result.drafted
    assert torch.equal(result.ids, plainly(model, prompt, 60))


def drafts_without_caches(model, tokens, depth):
    """Greedy drafts (1, depth) behind tokens (1, n)."""
    n, modules = tokens.shape[1], len(model.mtp)
    states = model.hidden_states(tokens)[:, :-1]
    for k in range(1, depth + 1):
        module = model.mtp[min(k, modules) - 1]
        if k <= modules:  # position i: the state before it, and token i + k
            rows = module.join(states, tokens[:, k : k + n - 1])
        else:  # one position more: its own last state, and the newest draft
            rows = torch.cat([rows, module.join(states[:, -1:], tokens[:, -1:])], dim=1)
        states = module.norm(module.block(rows))
        drafts = model.lm_head(states[:, -1]).argmax(dim=-1)
        tokens = torch.cat([tokens, drafts[:, None]], dim=1)
    return tokens[:, n:]


@pytest.mark.parametrize(
    ("modules", "depth"), [(1, 1), (1, 4), (2, 1), (2, 2), (2, 4), (3, 3), (3, 6)]
)
@pytest.mark.parametrize("lengths", [[7], [2], [5, 7, 2]])
def test_drafts_are_those_of_the_modules_without_caches(modules, depth, lengths):
    model, ids, longest = fast(modules, std=0.4), ids_of(len(lengths), 7), max(lengths)
    tokens, lengths = F.pad(ids, (0, 9)), torch.tensor(lengths)
    drafter = Drafter(model, 16, Sampling(), model.lm_head)
    drafter.observe(model.hidden_states(ids[:, : longest - 1]), torch.zeros_like(lengths))
    drafter.draft(tokens, lengths, depth)
    for row, length in enumerate(lengths.tolist()):
        want = drafts_without_caches(model, ids[row : row + 1, :length], depth)
        assert torch.equal(tokens[row : row + 1, length : length + depth], want)


@pytest.mark.parametrize(
    ("modules", "depth"), [(1, 1), (1, 3), (2, 2), (3, 3), (2, 4), (3, 1), (2, None), (3, None)]
)
def test_cached_drafts_are_those_of_a_fresh_start(modules, depth, monkeypatch):
    model, prompt, rounds = fast(modules, std=0.15), ids_of(2, 5), []
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
    drafted(model, prompt, 40, depth)
    assert len(rounds) > (10 if depth else 3) and all(rounds)


def test_depth_follows_what_was_accepted_and_pauses_ever_longer():
    depth = Depth(deepest=3)
    assert [depth.next(0, 0), depth.next(1, 1), depth.next(2, 2), depth.next(3, 3)] == [1, 2, 3, 3]
    assert depth.next(3, 1) == 2
    asked, count = [], 2
    for _ in range(12):  # nothing is ever accepted
        count = depth.next(count, 0)
        asked.append(count)
    assert asked == [0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0]
    depth = Depth(deepest=3)
    depth.next(1, 0)
    assert depth.next(0, 0) == 1 and depth.next(1, 1) == 2 and depth.pause == 0


def test_depth_has_limits_of_its_own():
    depth = Depth()
    count = [depth.next(1, accepted) for accepted in (1, 10, 11, 12)]
    assert count == [2, 11, 12, 12]
    for pause in (1, 2, 4, 8, 16, 16):
        asked = [depth.next(1, 0), *(depth.next(0, 0) for _ in range(pause))]
        assert asked == [0] * pause + [1]


def test_the_deepest_draft_is_the_one_asked_for_or_what_the_modules_can():
    chained, apart = fast(2), fast(2, mtp_class=IndependentHead)
    assert [deepest_draft(chained, depth) for depth in (None, 1, 5)] == [12, 1, 5]
    assert [deepest_draft(apart, depth) for depth in (None, 1, 2)] == [2, 1, 2]


def test_a_round_counts_the_drafts_that_were_of_use():
    result = Generation(None, forwards=4, drafted=10, accepted=5)
    # Row 0 has all it wants and the model's own token, row 1 is finished, row 2 stops at a draft.
    most = count_round(result, useful=[2, 0, 3], accepted=[2, 3, 3], appended=[3, 0, 1])
    assert (result.forwards, result.drafted, result.accepted, most) == (5, 15, 5 + 2 + 1, 2)


def test_drafting_goes_on_for_slow_rows_after_a_fast_one_has_finished():
    model, prompts = with_equal_rows(fast(depth=1)), ids_of(2, 4)
    plain = plainly(model, prompts, 9)
    told = torch.stack([plain[0], (plain[1] + 1) % 17])  # right for row 0, wrong for row 1
    result = drafted(with_oracle(model, told), prompts, 9, depth=1)
    assert torch.equal(result.ids, plain)
    # Row 0 gets 1 token, then 2 a pass: 4 drafts. Row 1 gets 1 a pass: 7 drafts, none for its last.
    assert (result.forwards, result.drafted, result.accepted) == (9, 4 + 7, 4)


def test_a_batch_outlives_its_fast_row_and_the_longest_pause():
    model, prompts = with_equal_rows(fast(depth=1)), ids_of(3, 6)
    mask = torch.ones_like(prompts)
    mask[1:, :3] = 0  # the fast row is the longest
    plain = plainly(model, prompts, 90, attention_mask=mask)
    texts = plain.clone()
    texts[1:, :-3] = (plain[1:, 3:] + 1) % 17  # left-aligned, and never right
    result = drafted(with_oracle(model, texts), prompts, 90, attention_mask=mask)
    assert torch.equal(result.ids[:, 6:], plain[:, 6:]) and result.forwards > 80


# Sampling with drafts: the distribution stays
@pytest.mark.parametrize(
    ("modules", "depth", "options"),
    [
        (1, 1, {}), (1, 3, {}), (2, 2, {}), (1, None, {}),
        (1, 3, {"top_k": 3}), (1, 3, {"top_p": 0.7}), (1, 3, {"temperature": 0.6}),
    ],
)
def test_sampled_text_keeps_its_distribution(modules, depth, options, monkeypatch):
    model, prompt = fast(modules, std=0.4, vocab=5), ids_of(1, 3, vocab=5)
    settings = {"temperature": 1.0, **options}
    chances = joint_chances(model, prompt, Sampling(**settings), new=4)
    base = torch.tensor([125, 25, 5, 1])

    def counts():
        sampling = Sampling(**settings, generator=torch.Generator().manual_seed(1))
        result = drafted(model, prompt.expand(20_000, -1), 4, depth, sampling)
        assert 0.1 < result.accepted / result.drafted < 0.95  # the draft disagrees
        return torch.bincount((result.ids[:, 3:] * base).sum(dim=1), minlength=625)

    assert abs(surprise(counts(), chances)) < 5
    monkeypatch.setattr(decoding, "verify", accept_by_confidence)
    assert surprise(counts(), chances) > 20


def test_plain_sampling_follows_the_model():
    check_sampling_follows(fast(0, std=0.4, vocab=5))


# Prompts, streams, memory
@pytest.mark.parametrize("speculative", [False, True])
def test_generation_takes_what_a_caller_may_have(speculative):
    model, ids = fast(depth=1), ids_of(2, 4)
    expected = model.generate(ids, 6, speculative=speculative)
    assert torch.equal(model.generate(ids.int(), 6, speculative=speculative), expected)
    nothing = model.complete(ids, 0, Sampling(), speculative=speculative)
    assert torch.equal(nothing.ids, ids) and nothing.ids is not ids and nothing.forwards == 0
    assert model.generate(ids[:0], 3, speculative=speculative).shape == (0, 7)


@pytest.mark.parametrize("chunk", [1, 3, 7, 50])
@pytest.mark.parametrize("speculative", [False, True])
def test_prompts_read_in_chunks_give_the_same_text(chunk, speculative):
    model, ids = fast(depth=1), ids_of(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    options = dict(attention_mask=mask, speculative=speculative)
    assert torch.equal(
        model.generate(ids, 9, prefill_chunk=chunk, **options), model.generate(ids, 9, **options)
    )


@pytest.mark.performance
@pytest.mark.parametrize("speculative", [False, True])
def test_chunks_limit_what_is_read_at_once(speculative):
    model, ids, read = fast(depth=1), ids_of(2, 7), []
    model.layers[0].register_forward_hook(lambda m, args, out: read.append(args[0].shape[1]))
    for chunk, sizes in ((3, [3, 3, 1]), (None, [7])):
        read.clear()
        model.generate(ids, 2, prefill_chunk=chunk, speculative=speculative)
        assert read[: len(sizes)] == sizes and max(read[len(sizes) :]) <= 2


@pytest.mark.performance
def test_the_caches_of_drafts_count():
    model, ids = fast(depth=1), ids_of(1, 5)
    row = (8 + 2) * 4  # bytes of one token in one layer
    # Two layers read all but the last token. The module reads positions 0 … 4, once 5 is known.
    for new, rows in ((1, 2 * 5), (2, 2 * 6), (3, 2 * 7 + 5)):
        result = drafted(model, ids, new, depth=1)
        assert (result.cache_bytes, result.tokens) == (rows * row, new)


@pytest.mark.parametrize("speculative", [False, True])
def test_stream_gives_the_text_as_it_comes(speculative):
    model, ids, passes = fast(depth=1, std=0.15), ids_of(2, 4), []
    stop = model.generate(ids, 12)[0, 9].item()
    result = model.complete(
        ids, 12, Sampling(), speculative=speculative, stream=passes.append, eos_token_id=stop,
        pad_token_id=16,
    )
    assert len(passes) == result.forwards
    assert result.tokens == max(sum(len(new[row]) for new in passes) for row in range(2))
    for row in range(2):
        streamed = [token for new in passes for token in new[row]]
        assert streamed + [16] * (12 - len(streamed)) == result.ids[row, 4:].tolist()


def test_what_is_confirmed_ends_at_the_end_and_at_a_stop():
    task = Task(ids_of(3, 4), torch.tensor([4, 2, 3]), 5, Sampling(), eos_token_id=9,
                pad_token_id=0, prefill_chunk=None, stream=None, copies=1)
    text = Continuation(task, room=3)
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
    model, ids, made = fast(depth=1), ids_of(2, 5), []

    class Recorded(PreallocatedRows):
        def __init__(self, capacity):
            super().__init__(capacity)
            made.append(self)

    monkeypatch.setattr(decoding, "PreallocatedRows", Recorded)
    result = model.complete(ids, 20, Sampling(), speculative=speculative)
    latents = [store for store in made if store.storage.shape[-1] == 8 + 2]
    layers, main = 2 + speculative, 2 * 24 * (8 + 2) * 4  # the last token is read by nobody
    assert len(latents) == layers
    if speculative:
        assert result.cache_bytes <= main * layers
        assert [store.storage.shape[-1] for store in made if store not in latents] == [24]
    else:
        assert result.cache_bytes == main * layers
        assert sum(s.allocated_bytes() for s in latents) == main * layers  # not one number more
    assert len({store.storage.data_ptr() for store in latents}) == layers
    assert all(s.storage.shape[0] == 2 and s.storage.dtype == torch.float32 for s in latents)


@pytest.mark.performance
def test_each_token_is_read_once():
    check_each_token_is_read_once(fast(depth=0))


def test_generated_ids_can_be_trained_on():
    model, ids = fast(depth=1), ids_of(1, 4)
    outputs = [model.generate(ids, 5, speculative=each) for each in (False, True)]
    check_can_be_trained_on(model, *outputs)


def test_generation_fills_the_context_exactly():
    model = fast(depth=1, max_positions=12)
    for speculative in (False, True):
        assert model.generate(ids_of(1, 8), 4, speculative=speculative).shape == (1, 12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate(ids_of(1, 8), 5), "prompt of 8 and 5 new tokens exceed the context"),
        (lambda m: m.generate(ids_of(1, 2), 2, prefill_chunk=0), "prefill_chunk=0"),
        (lambda m: m.generate(ids_of(1, 2), 2, depth=2), "depth=2 is for speculative=True"),
        (lambda m: drafted(m, ids_of(1, 2), 2, depth=0), "depth=0 must be at least 1"),
        (lambda m: drafted(fast(1, mtp_class=IndependentHead), ids_of(1, 2), 4, depth=2),
         "1 independent heads guess no further"),
        (lambda m: drafted(fast(depth=0), ids_of(1, 3), 2), "needs MTP modules"),
        (lambda m: m.generate(ids_of(1, 3), 2, attention_mask=torch.tensor([[1, 1, 0]])),
         "padded on the left"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(fast(depth=1, max_positions=12))


# Several texts of one prompt
@pytest.mark.parametrize("make", [build, fast])
@pytest.mark.parametrize("even", [True, False])
def test_copies_of_a_prompt_are_those_of_the_prompt_written_so_often(make, even):
    model, ids = make(depth=1, std=0.2), ids_of(2, 5)
    mask = None if even else torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])

    def drawn(ids, mask, **options):
        sampling = Sampling(1.0, generator=torch.Generator().manual_seed(0))
        return model.complete(ids, 6, sampling, attention_mask=mask, **options)

    read = []
    model.embed_tokens.register_forward_hook(lambda m, args, out: read.append(len(args[0])))
    once = drawn(ids, mask, copies=3)
    assert read == [2] + [6] * 5  # the prompts alone are read once
    often = drawn(ids.repeat_interleave(3, dim=0), None if even else mask.repeat_interleave(3, 0))
    assert torch.equal(once.ids, often.ids) and len(set(map(tuple, once.ids.tolist()))) > 4
    torch.testing.assert_close(once.logprobs, often.logprobs, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="copies=0 must be at least 1"):
        drawn(ids, mask, copies=0)


def test_copies_go_with_drafts_quantised_caches_and_nothing_to_write():
    model, ids = fast(depth=1), ids_of(2, 4)
    plain = model.generate(ids, 5).repeat_interleave(2, dim=0)
    assert torch.equal(model.generate(ids, 5, copies=2, speculative=True), plain)
    assert torch.equal(model.generate(ids, 0, copies=2), ids.repeat_interleave(2, dim=0))
    assert torch.equal(build(depth=0).generate(ids, 0, copies=2), ids.repeat_interleave(2, dim=0))
    quantize_cache(model, 8)
    plain = model.generate(ids, 5).repeat_interleave(2, dim=0)
    assert torch.equal(model.generate(ids, 5, copies=2), plain)
