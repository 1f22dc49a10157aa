"""Checks of arguments: the last value that each lets through, and the first that it refuses."""

import math

import pytest
import torch

from lesson import checks


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def ids(*rows):
    return torch.tensor(rows, dtype=torch.long)


def mask(*shape):
    return zeros(*shape, dtype=torch.bool)


PROMPT = ids([0, 6], [3, 3])
PADDED = dict(new=0, attention_mask=None, pad_token_id=0, vocabulary=7)


@pytest.mark.parametrize(
    ("check", "arguments", "options"),
    [
        (checks.check_sizes, [], dict(a=1, b=None)),
        (checks.check_divides, [], dict(a=6, b=1)),
        (checks.check_divides, [], dict(a=6, b=6)),
        (checks.check_input, [zeros(1, 3), 3], {}),
        (checks.check_input, [zeros(2, 2, 1, 3), 3], {}),
        (checks.check_input, [zeros(2, 1, 3), 3, "B"], {}),
        (checks.check_attention, [zeros(2, 3), zeros(4, 3), zeros(4, 5)], {}),
        (checks.require_shape, [zeros(1, 2), "ids"], dict(B=1, T=2)),
        (checks.check_token_ids, [ids([0], [6]), 7], dict(past=3, new=4, longest=8)),
        (checks.check_token_ids, [zeros(0, 2, dtype=torch.long), 7], {}),
        (checks.check_token_ids, [ids([0]).to("meta"), 7], {}),
        (checks.check_attention_mask, [mask(2, 3), (2, 3)], {}),
        (checks.check_prompts, [PROMPT], PADDED | dict(longest=2, pad_token_id=6)),
        (checks.check_prompts, [PROMPT], PADDED | dict(attention_mask=ids([0, 1], [1, 1]))),
        (checks.check_dropout, [0.0], {}),
        (checks.check_dropout, [0.999], {}),
        (checks.check_heads, [8, 4, 2, 0.0], {}),
        (checks.check_positions, [zeros(3), 2, 3], {}),
        (checks.check_positions, [zeros(2, 3), 2, 3], {}),
        (checks.check_rollback, [0, 3], {}),
        (checks.check_rollback, [3, 3], {}),
        (checks.check_choice, ["ab"], dict(a="a", b="b")),
        (checks.check_up_to, [3, "n=3"], dict(a=1, b=3)),
        (checks.check_even, [], dict(a=0, b=2)),
        (checks.check_groups, [12, 6, 4, 2, 2], {}),
        (checks.check_groups, [1, 1, 1, 1, 2], {}),
        (checks.check_tokens, [zeros(2, 3), 3, None, "a", "ab"], {}),
        (checks.check_tokens, [zeros(4, 2, 3), 3, mask(4, 2), "b", "ab"], {}),
    ],
)
def test_the_last_legal_value_passes(check, arguments, options):
    assert check(*arguments, **options) is None


@pytest.mark.parametrize(
    ("check", "arguments", "options", "message"),
    [
        (checks.check_sizes, [], dict(a=1, b=0), "b=0 must be at least 1"),
        (checks.check_divides, [], dict(a=6, b=4), "a=6 must be divisible by b=4"),
        (checks.check_divides, [], dict(a=6, b=0), "a=6 must be divisible by b=0"),
        (checks.check_divides, [], dict(a=6, b=-3), "a=6 must be divisible by b=-3"),
        (checks.check_input, [zeros(3), 3], {}, r"\(\.\.\., T, 3\), got \(3,\)"),
        (checks.check_input, [zeros(1, 4), 3], {}, r"\(\.\.\., T, 3\), got \(1, 4\)"),
        (checks.check_input, [zeros(1, 3), 3, "B"], {}, r"\(B, T, 3\), got \(1, 3\)"),
        (checks.check_input, [zeros(1, 1, 1, 3), 3, "B"], {}, r"\(B, T, 3\), got"),
        (checks.check_attention, [zeros(3), zeros(4, 3), zeros(4, 5)], {}, "length, width"),
        (checks.check_attention, [zeros(2, 3), zeros(4, 3), zeros(4)], {}, "length, width"),
        (checks.check_attention, [zeros(2, 3), zeros(4, 2), zeros(4, 5)], {}, "3 must equal"),
        (checks.check_attention, [zeros(2, 3), zeros(4, 3), zeros(2, 3)], {}, "4 keys for 2"),
        (checks.expanded_mask, [zeros(2, 3), (2, 3)], {}, "boolean.*got torch.float32"),
        (checks.expanded_mask, [mask(2), (2, 3)], {}, r"broadcastable to \(2, 3\), got \(2,\)"),
        (checks.expanded_mask, [mask(1, 2, 3), (2, 3)], {}, "broadcastable"),
        (checks.require_shape, [zeros(0, 2), "ids"], dict(B=1, T=2), r"ids \(B, T\) with B ≥ 1"),
        (checks.require_shape, [zeros(5), "ids"], dict(B=1, T=2), r"T ≥ 2, got \(5,\)"),
        (checks.require_shape, [[[1, 2]], "ids"], dict(B=1, T=2), "got list"),
        (checks.check_token_ids, [ids(0, 1), 7], {}, r"T ≥ 1, got \(2,\)"),
        (checks.check_token_ids, [zeros(2, 0).long(), 7], {}, r"T ≥ 1, got \(2, 0\)"),
        (checks.check_token_ids, [zeros(2, 3), 7], {}, "must be integers, got torch.float32"),
        (checks.check_token_ids, [ids([0, 7]), 7], {}, "token id 7 is not within"),
        (checks.check_token_ids, [ids([-1, 7]), 7], {}, "token id -1 is not within"),
        (checks.check_token_ids, [ids([0, 1]), 7], dict(past=3, longest=4),
         "^5 tokens exceed the context of 4"),
        (checks.check_token_ids, [ids([0, 1]), 7], dict(new=3, longest=4),
         "prompt of 2 and 3 new tokens exceed the context of 4"),
        (checks.check_attention_mask, [mask(2), (2, 3)], {}, r"\(2, 3\), got \(2,\)"),
        (checks.check_prompts, [PROMPT], PADDED | dict(new=-1), "max_new_tokens=-1"),
        (checks.check_prompts, [PROMPT], PADDED | dict(new=1, longest=2), "prompt of 2 and 1 new"),
        (checks.check_prompts, [PROMPT], PADDED | dict(pad_token_id=-1), "pad_token_id=-1"),
        (checks.check_prompts, [PROMPT], PADDED | dict(pad_token_id=7), "pad_token_id=7"),
        (checks.check_prompts, [PROMPT], PADDED | dict(attention_mask=mask(2, 3)), r"got \(2, 3\)"),
        (checks.check_prompts, [PROMPT], PADDED | dict(attention_mask=ids([1, 0], [1, 1])),
         "padded on the left"),
        (checks.require_shapes, [(2,)], dict(a=zeros(2), b=zeros(3)), r"b must be \(2,\), got"),
        (checks.check_dropout, [1.0], {}, "dropout=1.0"),
        (checks.check_dropout, [-0.1], {}, "dropout=-0.1"),
        (checks.check_dropout, [math.nan], {}, "dropout=nan"),
        (checks.check_heads, [9, 4, 2, 0.0], {}, "d_model=9 must be divisible by num_heads=4"),
        (checks.check_heads, [8, 4, 3, 0.0], {}, "num_heads=4 must be divisible by num_kv_heads=3"),
        (checks.check_heads, [8, 4, 2, 1.0], {}, "dropout=1.0"),
        (checks.check_positions, [zeros(2), 2, 3], {}, r"\(3,\) or \(2, 3\), got \(2,\)"),
        (checks.check_positions, [zeros(1, 3), 2, 3], {}, r"got \(1, 3\)"),
        (checks.check_rollback, [4, 3], {}, "length 3 to 4"),
        (checks.check_rollback, [-1, 3], {}, "length 3 to -1"),
        (checks.check_choice, ["ab"], dict(a="a", b="c"), r"b='c' must be one of \('a', 'b'\)"),
        (checks.check_up_to, [3, "n=3"], dict(a=1, b=4), "b=4 must be from 1 to n=3"),
        (checks.check_up_to, [3, "n=3"], dict(a=0), "a=0 must be from 1 to n=3"),
        (checks.check_even, [], dict(a=2, b=3), "b=3 must be even"),
        (checks.check_even, [], dict(a=-2), "a=-2 must be even"),
        (checks.check_groups, [8, 4, 3, 2, 2], {}, "n_routed_experts=8 must be divisible by n_g"),
        (checks.check_groups, [8, 4, 4, 5, 2], {}, "topk_group=5 must be from 1 to n_group=4"),
        (checks.check_groups, [12, 7, 4, 2, 2], {}, "num_experts_per_tok=7 .* the 6 experts that"),
        (checks.check_groups, [4, 2, 4, 2, 2], {}, "n_group=4 leaves 1 expert a group, want 2"),
        (checks.check_tokens, [zeros(2, 3), 3, None, "c", "ab"], {}, "dispatch='c'"),
        (checks.check_tokens, [zeros(2, 4), 3, None, "a", "ab"], {}, r"got \(2, 4\)"),
        (checks.check_tokens, [zeros(2, 3), 3, mask(3), "a", "ab"], {}, r"token_mask must be"),
    ],
)
def test_the_first_illegal_value_is_named(check, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        check(*arguments, **options)


@pytest.mark.parametrize("shape", [(3,), (1, 3), (2, 1), (4, 1, 2, 3), (1, 1)])
def test_a_mask_is_expanded_or_only_gets_dimensions_in_front(shape):
    given = torch.rand(shape) < 0.5
    expanded = checks.expanded_mask(given, (4, 5, 2, 3))
    assert torch.equal(expanded, given.broadcast_to(4, 5, 2, 3))
    assert expanded.data_ptr() == given.data_ptr()  # a view
    in_front = checks.boolean_mask(given, (4, 5, 2, 3))
    assert in_front.shape == (1,) * (4 - len(shape)) + shape
    assert torch.equal(in_front.flatten(), given.flatten())


def test_no_mask_stays_none():
    assert checks.expanded_mask(None, (2, 3)) is checks.boolean_mask(None, (2, 3)) is None


@pytest.mark.parametrize("stored", [0, 4])
def test_arguments_of_an_attention_are_checked_with_the_cached_keys(stored):
    class Cached:
        length = stored

    right = dict(x=zeros(2, 3, 8), width=8, heads=5, mask=mask(2, 5, 3, 3 + stored), path="b",
                 cache=Cached() if stored else None, paths=("a", "b"))
    checks.check_forward(**right)
    for wrong, message in (
        (dict(x=zeros(3, 8)), r"input must be \(B, T, 8\)"),
        (dict(path="c"), "path='c' must be one of a, b"),
        (dict(mask=mask(2, 5, 3, 4 + stored)), "broadcastable"),
        (dict(mask=mask(4, 1, 1, 1)), "broadcastable"),
    ):
        with pytest.raises(ValueError, match=message):
            checks.check_forward(**{**right, **wrong})
