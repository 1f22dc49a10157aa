"""Generation at speed, for batches of unequal rows: `DeepSeekModel.complete` calls it.

Two ideas have a plain form elsewhere. `LanguageModel.complete` in lesson/writing.py writes token by
token with caches. Phase 6's `speculative_generate` drafts tokens, and the main model checks them in
one pass. This is their production form. Its caches reserve their memory in advance. Each row of a
batch has its own place in them, so rows may accept different numbers of drafts. Prompts can be read
in chunks, texts can be streamed, and the number of drafts adapts to the text. Tests show that the
results equal those of the plain forms.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from lesson import check_prompts, check_rollback, require
from lesson.writing import Generation, repeated
from mtp_coded import Sampling, verify
from pipeline.fast import EXPAND_FROM, decoding_head


@dataclass(frozen=True)
class Task:
    """What to write. prompts (B, T) start at the left of their rows; lengths (B,) of the prompts.

    Other fields: see `complete`.
    """

    prompts: torch.Tensor
    lengths: torch.Tensor
    new_tokens: int
    sampling: Sampling
    eos_token_id: int | None
    pad_token_id: int
    prefill_chunk: int | None
    stream: Any
    copies: int  # number of texts for each prompt


def complete(
    model, input_ids, max_new_tokens, sampling, attention_mask=None, eos_token_id=None,
    pad_token_id=0, speculative=False, depth=None, prefill_chunk=None, stream=None, copies=1,
):
    """Continues each prompt (B, T): a `Generation`, whose ids are (B · copies, T + new).

    Args:
        sampling, attention_mask, eos_token_id, pad_token_id, copies: see `LanguageModel.complete`.
        speculative: draft with the MTP modules. In FP32, greedy text stays the same up to ties in
            the last bit: a pass over several tokens may round differently than a pass over one. In
            BF16 such ties are common. Sampled text keeps its distribution.
        depth: number of tokens to draft in a round. If there are fewer modules, the last one is
            applied again to its own hidden states. Default: `Depth` decides (independent heads
            draft at most one token each).
        prefill_chunk: the main model reads prompts so many tokens at a time, which limits the
            memory of its layers; None: at once. (With drafts or prompts of unequal length, all last
            hidden states are stored. The modules always read a prompt at once.)
        stream: called after each pass with the new tokens, one list for each sequence.

    Raises: ValueError if prompt and new tokens exceed the context, before any work is done.
    """
    check_prompts(input_ids, max_new_tokens, attention_mask, pad_token_id, **model.limits)
    chunk = prefill_chunk
    require(chunk is None or chunk >= 1, f"prefill_chunk={chunk} must be at least 1")
    require(depth is None or speculative, f"depth={depth} is for speculative=True")
    require(copies >= 1, f"copies={copies} must be at least 1")
    input_ids = input_ids.long()
    if speculative and copies > 1:  # copies may accept different numbers of drafts
        input_ids, attention_mask = repeated(copies, [], input_ids, attention_mask)
        copies = 1
    if max_new_tokens == 0 or len(input_ids) == 0:
        ids = F.pad(input_ids.repeat_interleave(copies, dim=0), (0, max_new_tokens),
                    value=pad_token_id)
        return Generation(ids, torch.zeros(len(ids), max_new_tokens, device=ids.device))
    prompts, lengths = left_aligned(input_ids, attention_mask)
    task = Task(
        prompts, lengths, max_new_tokens, sampling, eos_token_id, pad_token_id, chunk, stream,
        copies,
    )
    result = write_with_drafts(model, task, depth) if speculative else write(model, task)
    # These copies are made outside of inference mode, so that they may enter later training.
    prompts = input_ids.repeat_interleave(copies, dim=0)
    result.ids = torch.cat([prompts, result.ids], dim=1)
    result.logprobs = None if result.logprobs is None else result.logprobs.clone()
    return result


# %% Caches that reserve room, in which each row has its own place
class PreallocatedRows:
    """Rows (..., length, width) in one tensor with room for more. The plain form is `RowStore`.

    capacity: the first append reserves room for so many rows. When the room runs out, it doubles,
    so n appends copy O(n) rows in all. For inference only: stored rows carry no gradient.

    The sequences of a batch (B, ..., length, width) may have different lengths: `truncate` also
    takes a (B,) tensor. Then `length` is the longest. `append` puts each sequence's rows at its own
    end, and returns a view up to the longest end: a mask must hide what lies behind shorter ones.
    """

    def __init__(self, capacity=0):
        self.capacity, self.length = capacity, 0
        self.storage = None
        self.lengths = None  # (B,); None: all sequences are `length` long

    def append(self, rows):
        """Stores rows (..., new, width) behind the present ones. Returns all rows, as a view."""
        if self.storage is not None:
            kept = (*self.storage.shape[:-2], self.length, self.storage.shape[-1])
            fits = kept[:-2] == rows.shape[:-2] and kept[-1] == rows.shape[-1]
            require(fits, f"cache holds rows {kept}, got {tuple(rows.shape)} to append")
        new = rows.shape[-2]
        end = self.length + new
        if self.storage is None or end > self.storage.shape[-2]:
            self._grow(rows, end)
        if self.lengths is None:
            self.storage[..., self.length : end, :] = rows.detach()
        else:
            places = self.lengths[:, None] + torch.arange(new, device=rows.device)
            sequences = torch.arange(len(rows), device=rows.device)[:, None]
            self.storage.movedim(-2, 1)[sequences, places] = rows.detach().movedim(-2, 1)
            self.lengths = self.lengths + new
        self.length = end
        return self.storage[..., :end, :]

    def _grow(self, rows, needed):
        room = 0 if self.storage is None else self.storage.shape[-2]
        size = max(needed, self.capacity, 2 * room)
        storage = rows.new_zeros(*rows.shape[:-2], size, rows.shape[-1])
        if self.storage is not None:
            storage[..., : self.length, :] = self.storage[..., : self.length, :]
        self.storage = storage

    def truncate(self, length):
        """Forgets all rows after the first `length`, a number or (B,): it rolls the cache back."""
        each = torch.is_tensor(length)
        longest = int(length.max()) if each else length
        check_rollback(longest, self.length)
        self.length, self.lengths = longest, length if each else None

    def repeat(self, times):
        """Puts `times` copies of each sequence below each other. All must have one length."""
        self.storage = self.storage.repeat_interleave(times, dim=0)

    def used_bytes(self):
        if self.storage is None:
            return 0
        return self.storage[..., : self.length, :].numel() * self.storage.element_size()

    def allocated_bytes(self):
        return 0 if self.storage is None else self.storage.nbytes


def new_caches(model, capacity, blocks=None):
    """Empty caches of the blocks (default: the main model's) with room for `capacity` tokens."""
    store = functools.partial(PreallocatedRows, capacity)
    blocks = model.layers if blocks is None else blocks
    return [block.self_attn.new_cache(store) for block in blocks]


def used_bytes(caches):
    return sum(cache.used_bytes() for cache in caches)


# %% Places: the positions at which the rows of a batch stand
def left_aligned(input_ids, attention_mask):
    """Prompts (B, T) with the padding behind them, where no token sees it; their lengths (B,)."""
    if attention_mask is None:
        return input_ids, torch.full_like(input_ids[:, 0], input_ids.shape[1])
    real_BT = attention_mask.bool()
    order_BT = (~real_BT).long().argsort(dim=1, stable=True)
    return input_ids.gather(1, order_BT), real_BT.sum(dim=1)


def one_or_each(start):
    """Places (B,) as they are, or as a number if B = 1: then slices are enough, without masks."""
    return int(start) if len(start) == 1 else start


def take(rows, start, count):
    """Rows start … start + count − 1 of (B, n, ...). start: a number, or (B,), one a sequence."""
    if not torch.is_tensor(start):
        return rows[:, start : start + count]
    places = start[:, None] + torch.arange(count, device=rows.device)
    return rows[torch.arange(len(rows), device=rows.device)[:, None], places]


def slots(start, count, device):
    """The options of a block that reads `count` tokens of each sequence, from position `start` on.

    start: a number, or (B,) if sequences have different lengths. Then a mask hides from each the
    rows behind its own tokens, which a longer prompt or a rejected draft has left there. Before
    that, the caches must be truncated to `start`.
    """
    steps = torch.arange(count, device=device)
    path = "absorbed" if count < EXPAND_FROM else "expanded"
    if not torch.is_tensor(start):
        return dict(positions=start + steps, path=path)
    positions_BT = start[:, None] + steps
    keys_S = torch.arange(int(start.max()) + count, device=device)
    mask = (keys_S <= positions_BT[..., None]).unsqueeze(1)
    return dict(positions=positions_BT, mask=mask, path=path)


# %% Reading: a pass of the main model over tokens at their places
def read(model, ids, caches, start, last=None):
    """The main model's states (B, n, D) of ids (B, n), which stand from position `start` on.

    The caches forget what they hold from `start` on. last: return only the states of so many last
    tokens (`start` must be a number).
    """
    for cache in caches:
        cache.truncate(start)
    places, hidden = slots(start, ids.shape[1], ids.device), model.embed_tokens(ids)
    for layer, cache in zip(model.layers, caches, strict=True):
        if layer is model.layers[-1] and last is not None:
            hidden = last_outputs(layer, hidden, cache, start, last)
        else:
            hidden = layer(hidden, cache=cache, **places)
    return model.norm(hidden)


def last_outputs(block, hidden, cache, start, last):
    """A block's outputs at the last tokens only, (B, last, D).

    hidden: (B, n, D), from position `start` on. For the tokens before the last, the block only
    fills its cache. Later tokens need no more (a prompt of 1,024 in four layers: 74 → 58 ms).
    """
    before = hidden.shape[1] - last
    if before > 0:
        positions = torch.arange(start, start + before, device=hidden.device)
        block.self_attn.remember(block.input_layernorm(hidden[:, :before]), positions, cache)
        hidden, start = hidden[:, before:], start + before
    return block(hidden, cache=cache, **slots(start, last, hidden.device))


def read_prompts(model, task, caches, last=None):
    """The states of the prompts (B, T, D), read in chunks. last: see `read`, for each chunk."""
    pieces, start = [], 0
    for piece in task.prompts.split(task.prefill_chunk or task.prompts.shape[1], dim=1):
        pieces.append(read(model, piece, caches, start, last))
        start += piece.shape[1]
    return torch.cat(pieces, dim=1)


# %% Writing token by token
@torch.inference_mode()
def write(model, task):
    """`Generation` of only the new tokens, (B · copies, new). Each pass writes one token a row."""
    T, new_tokens = task.prompts.shape[1], task.new_tokens
    head, caches = decoding_head(model.lm_head, new_tokens), new_caches(model, T + new_tokens - 1)
    # Rows of one length have the same places in the caches: then no mask is needed.
    even = bool((task.lengths == T).all())
    hidden = read_prompts(model, task, caches, last=1 if even else None)
    hidden, lengths = hidden[:, -1:] if even else take(hidden, task.lengths - 1, 1), task.lengths
    if task.copies > 1:
        hidden, lengths = repeated(task.copies, caches, hidden, lengths)
    start = T if even else lengths
    output = task.prompts.new_full((len(lengths), new_tokens), task.pad_token_id)
    logprobs = torch.zeros(output.shape, device=output.device)
    finished = torch.zeros_like(lengths, dtype=torch.bool)
    for i in range(new_tokens):
        fresh, logprobs[:, i] = task.sampling.choose(head(hidden[:, 0]))
        output[:, i] = fresh.masked_fill(finished, task.pad_token_id)
        if task.stream is not None:
            rows = zip(finished.tolist(), fresh.tolist(), strict=True)
            task.stream([[] if done else [token] for done, token in rows])
        if task.eos_token_id is not None:
            finished |= fresh == task.eos_token_id
            if finished.all():
                break
        if i + 1 < new_tokens:
            hidden = read(model, output[:, i : i + 1], caches, start + i)
    return Generation(
        output, logprobs, forwards=i + 1, tokens=i + 1, cache_bytes=used_bytes(caches)
    )


# %% Writing with drafts
@torch.inference_mode()
def write_with_drafts(model, task, depth=None):
    """`Generation` of only the new tokens, (B, new).

    In a round, the main model reads the last confirmed token and the drafts after it. `verify`
    accepts drafts from the left, up to the first wrong one, and adds one token of the main model's
    own. Then the modules draft again.
    """
    require(len(model.mtp) > 0, "speculative decoding needs MTP modules, and this model has none")
    adaptive, asked = Depth(deepest_draft(model, depth)), depth
    # Finished rows are read along with the others. They need room past their end for as many tokens
    # as another row drafts, or as it catches up with after a pause.
    room = max(adaptive.deepest, Depth.LONGEST_PAUSE) + 2 * len(model.mtp)
    text, result = Continuation(task, room), Generation(None)
    capacity, head = text.tokens.shape[1], decoding_head(model.lm_head, task.new_tokens)
    caches, drafter = new_caches(model, capacity), Drafter(model, capacity, task.sampling, head)
    # `start` (B,): the position of the first state in `hidden`. `judging` (B, drafted + 1, D): the
    # states from the last confirmed token on; at first only that of the prompt's last token.
    start, drafted, chances = torch.zeros_like(task.lengths), 0, None
    hidden = read_prompts(model, task, caches)
    judging = take(hidden, task.lengths - 1, 1)
    while True:  # check the drafts, confirm tokens, draft anew, read the last token and the drafts
        drafts = take(text.tokens, one_or_each(text.lengths), drafted)
        useful = text.drafts_wanted(drafted)
        accepted, own = verify(head(judging), drafts, chances, task.sampling)
        appended = text.confirm(drafts, accepted, own)
        most = count_round(result, useful.tolist(), accepted.tolist(), list(map(len, appended)))
        if task.stream is not None:
            task.stream(appended)
        if not text.active.any():
            break
        # A caller's depth or the adaptive one. Nothing is drafted past the end of the text.
        wanted = asked or adaptive.next(drafted, accepted=most)
        drafted = int(text.drafts_wanted(wanted).max())
        drafter.observe(hidden, start)
        chances = drafter.draft(text.tokens, text.lengths, drafted) if drafted else None
        start = text.lengths - 1
        unread_ids = take(text.tokens, one_or_each(start), drafted + 1)
        hidden = judging = read(model, unread_ids, caches, one_or_each(start))
    result.ids, result.tokens = text.new(), int((text.lengths - task.lengths).max())
    result.cache_bytes = used_bytes(caches) + used_bytes(drafter.caches)
    return result


def count_round(result, useful, accepted, appended):
    """Adds a round to a `Generation`. Returns the accepted drafts of the row with the most.

    The lists have one number a row. useful: drafts that the row had room for. appended: tokens that
    it got. One of these is the main model's own, unless a draft ended the text.
    """
    result.forwards += 1
    result.drafted += sum(useful)
    result.accepted += sum(map(min, useful, accepted, appended))
    return max(appended) - 1


def deepest_draft(model, depth):
    """The largest number of tokens to draft in a round: `depth`, if it is given and possible."""
    modules, chained = len(model.mtp), model.mtp[-1].chained
    require(depth is None or depth >= 1, f"depth={depth} must be at least 1")
    if not chained:
        possible = depth is None or depth <= modules
        require(possible, f"depth={depth}: {modules} independent heads guess no further")
    return depth or (Depth.DEEPEST if chained else modules)


class Depth:
    """Decides how many tokens to draft in the next round if the caller does not.

    Draft one token more than the last round accepted. If every draft was rejected, skip drafting
    for a while. So a text that the modules guess badly costs little more than without drafts.
    """

    DEEPEST, LONGEST_PAUSE = 12, 16

    def __init__(self, deepest=DEEPEST):
        self.deepest, self.pause, self.waiting = deepest, 0, 0

    def next(self, drafted, accepted):
        """The number of tokens to draft now.

        drafted: how many the last round drafted, 0 = none. accepted: how many of them the main
        model accepted; in a batch, those of the sequence with the most.

        If every draft was rejected, skip drafting for 1 round, then 2, 4, 8, at most 16. One
        accepted draft resets this.
        """
        if drafted and not accepted:
            self.pause = self.waiting = min(max(1, 2 * self.pause), self.LONGEST_PAUSE)
        elif drafted:
            self.pause = 0
        if self.waiting:
            self.waiting -= 1
            return 0
        return min(accepted + 1, self.deepest)


class Drafter:
    """The MTP modules, their caches, and the main model's hidden states that they start from.

    In these caches, as in the main model's, the place of a row is its position in the text. The
    rows of rejected drafts are overwritten.
    """

    def __init__(self, model, capacity, sampling, head):
        self.model, self.sampling, self.head = model, sampling, head
        self.unread = None  # (B,): from here on, states are new to the modules; None: there is none
        self.caches = new_caches(model, capacity, [module.block for module in model.mtp])
        self.hidden = PreallocatedRows(capacity)  # the main model's, at every token read so far

    def observe(self, hidden, start):
        """Stores the main model's states (B, n, D) from position `start` (B,) on, new or again."""
        self.hidden.truncate(one_or_each(start))
        self.hidden.append(hidden)
        self.unread = start if self.unread is None else self.unread

    def draft(self, tokens, lengths, depth):
        """Writes `depth` drafts into tokens (B, ·), for each row behind its first `lengths` tokens.

        Returns: the distributions that they were drawn from, (B, depth, W); None if greedy.

        At position i, module k joins the state of module k − 1 with token i + k, and guesses token
        i + k + 1. So at the last positions, module k needs drafts of the modules before it. These
        drafts may be rejected, so the positions are read again next time. In this example of 2
        modules, tokens 0–6 are confirmed (lengths 7), and states 0–5 are observed, of which 4 and 5
        are new (unread 4):

            module   reads positions   joined with tokens   drafts token
            1        3 4 5             4 5 6                7             `catch_up`
            2        3 4 5             5 6 7                8             `catch_up`
            2        6                 8                    9             `go_on`
            2        7                 9                    10            `go_on`

        All rows read as many positions as the row that must catch up with the most. The others read
        past their own last position. Masks hide these results until they are overwritten.
        """
        modules, newest_at, chances = len(self.model.mtp), lengths - 2, []
        first = (self.unread - modules + 1).clamp(min=0)
        count = int((newest_at - first).max()) + 1
        state = take(self.hidden.storage, one_or_each(first), count)
        self.unread = None
        for k in range(1, max(depth, modules) + 1):
            if k <= modules:
                output = self.catch_up(k, state, tokens, first)
                newest = output[:, -1:]
                if len(tokens) > 1:
                    newest = take(output, newest_at - first, 1)
                state = output if self.model.mtp[k - 1].chained else state
            else:
                newest = self.go_on(newest, tokens, newest_at + k - modules)
            if k <= depth:  # else the module only fills its cache
                drafts = self.choose(newest, chances)
                tokens.scatter_(1, (lengths + k - 1)[:, None], drafts[:, None])
        return torch.stack(chances, dim=1) if chances else None

    def catch_up(self, k, state, tokens, first):
        """Module k reads the states (B, n, D) of the module before, from position `first` (B,) on.

        Returns its states (B, n, D). For one sequence, the last module returns only its last state.
        """
        module, cache, start = self.model.mtp[k - 1], self.caches[k - 1], one_or_each(first)
        count = state.shape[1]
        joined = module.join(state, take(tokens, one_or_each(first + k), count))
        cache.truncate(start)
        if k == len(self.caches) and len(tokens) == 1:
            return module.norm(last_outputs(module.block, joined, cache, start, last=1))
        places = slots(start, count, tokens.device)
        return module.norm(module.block(joined, cache=cache, **places))

    def go_on(self, newest, tokens, position):
        """The last module at `position` (B,): it reads its own state of the position before."""
        modules = len(self.caches)
        module, cache, start = self.model.mtp[-1], self.caches[-1], one_or_each(position)
        cache.truncate(start)
        future_ids = take(tokens, one_or_each(position + modules), 1)
        return module(newest, future_ids, cache=cache, **slots(start, 1, tokens.device))

    def choose(self, newest, chances):
        """Drafts (B,) from states (B, 1, D). If drawn, their distribution (B, W) is appended."""
        logits = self.head(newest[:, 0])
        if self.sampling.greedy:
            return logits.argmax(dim=-1)
        chances.append(self.sampling.probabilities(logits))
        return self.sampling.draw(chances[-1])


class Continuation:
    """Tokens (B, ·). From the left, a row has its prompt, then confirmed tokens, then drafts.

    room: extra places for drafts past a row's end. end (B,): a row is full at this length.
    """

    def __init__(self, task, room):
        new_tokens, pad = task.new_tokens, task.pad_token_id
        self.tokens = F.pad(task.prompts, (0, new_tokens + room), value=pad)
        self.lengths, self.prompt_lengths = task.lengths, task.lengths
        self.end, self.new_tokens = task.lengths + new_tokens, new_tokens
        self.eos_token_id, self.pad_token_id = task.eos_token_id, pad
        self.active = torch.ones_like(task.lengths, dtype=torch.bool)

    def confirm(self, drafts, accepted, own):
        """Keeps each row's accepted drafts (B, d); the model's `own` token (B,) goes behind them.

        No token counts past a row's end, behind an end-of-text, or in a finished row.
        Returns: the tokens appended, one list a row.
        """
        self.tokens.scatter_(1, (self.lengths + accepted)[:, None], own[:, None])
        left, active = (self.end - self.lengths).tolist(), self.active.tolist()
        rows = zip(drafts.tolist(), accepted.tolist(), own.tolist(), strict=True)
        appended = []
        for row, (draft, count, token) in enumerate(rows):
            new = [*draft[:count], token][: left[row]] if active[row] else []
            if self.eos_token_id in new:
                new = new[: new.index(self.eos_token_id) + 1]
                self.active[row] = False
            appended.append(new)
        self.lengths = self.lengths + torch.tensor(list(map(len, appended))).to(self.lengths)
        self.active = self.active & (self.lengths < self.end)
        return appended

    def drafts_wanted(self, depth):
        """(B,): how many of `depth` drafts each row can still use; 0 for finished rows."""
        return (self.end - self.lengths - 1).clamp(max=depth) * self.active

    def new(self):
        """(B, new): the tokens appended to each row, then padding."""
        ids = take(self.tokens, self.prompt_lengths, self.new_tokens)
        places = torch.arange(self.new_tokens, device=ids.device)
        written = places < (self.lengths - self.prompt_lengths)[:, None]
        return ids.masked_fill(~written, self.pad_token_id)
