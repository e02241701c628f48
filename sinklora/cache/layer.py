"""One layer of an H2O cache: its buffers, a prompt, and one step of decoding.

SPEC.md, section 2; source: H2O, arXiv 2306.14048. The kernels do the work (torch_h2o.py); this says which
memory they work in.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .. import torch_h2o
from ..budget import Budget
from .follow import Followed
from .new import NewMask, NewTokens
from .past import LastForward, gather_past
from .record import Timeline
from .rotary import Rotary
from .rows import RowCounts

# A layer's tensors, all with the batch as their first dimension.
TENSORS = ("keys", "values", "scores", "positions", "free_slot", "rows")

# While the budget is not reached, this many slots at least are made at once.
LEAST_GROWTH = 64


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all layers of a cache share; see H2OCache."""

    score_window: int | None = None
    group_reduction: str = "sum"
    positions: str = "original"
    record: bool = False


class H2OLayer(Followed, CacheLayerMixin):
    """Keys and values (B, Hkv, slots, D), a float32 score and an int32 position for each slot.

    The entries of a row stand in the slots 0 .. used, one of which is free: the next token goes there. The
    buffers are made outside of inference mode, since they are written in place later.
    """

    # Tensors from the first attention on, None before.
    keys: Any
    values: Any
    scores: Any  # float32 (B, Hkv, slots)
    positions: Any  # int32 (B, Hkv, slots), -1 in unused slots
    free_slot: Any  # int32 (B, Hkv)
    rows: Any  # int32 (B, 4), see csrc/core/h2o.h

    rotary: Rotary | None = None  # where positions are ranks
    num_layers: int | None = None  # of the cache that this layer is one of
    told: tuple[Tensor | None, NewMask] | None = (
        None  # in the first layer: a forward's mask, and what it says
    )
    is_compileable = False
    supports_early_init = False  # how many slots are needed shows with the first tokens

    def __init__(self, index: int, budget: Budget, settings: Settings) -> None:
        super().__init__()
        self.index = index
        self.budget = budget
        self.settings = settings
        self.timeline: Timeline | None = Timeline() if settings.record else None
        self.recording = False  # is the last forward kept for `crop`?
        self.reset()

    def reset(self) -> None:
        """Forgets all tokens and frees their memory."""
        for name in TENSORS:
            setattr(self, name, None)
        self.forget()
        self.told = None
        self.last: LastForward | None = None
        self._attended: tuple[Tensor, Tensor, Tensor] | None = None
        if self.timeline is not None:
            self.timeline = Timeline()
        self.unfinished = False  # has a forward brought tokens whose attention has not come to its end?
        self.is_initialized = False

    # ---- what transformers asks of a layer ----

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the first attention makes the buffers."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Notes that tokens came, and returns them as they are: attention gets the kept ones from here."""
        self.unfinished = True
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The mask's columns of the new tokens: of the kept ones none is hidden."""
        return query_length, self.columns

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return not self.counts.evicted

    def get_max_length(self) -> int:
        return -1

    def reach(self, num_new: int) -> int:
        """How many positions the last of num_new tokens looks back on, itself included."""
        return self.columns + num_new

    def entries(self) -> tuple[Tensor, Tensor]:
        """Positions, int64 (B, Hkv, kept), ascending and -1 behind them, and scores in the same order."""
        if self.positions is None:
            return torch.empty(0, 0, 0, dtype=torch.int64), torch.empty(0, 0, 0)
        last = torch.iinfo(torch.int32).max
        order = self.positions.where(self.positions >= 0, last).argsort(2)[:, :, : self.counts.most_used]
        return self.positions.gather(2, order).long(), self.scores.gather(2, order)

    def memory_bytes(self) -> int:
        """Bytes of the memory behind all tensors."""
        found = (getattr(self, name) for name in TENSORS)
        return sum(tensor.untyped_storage().nbytes() for tensor in found if tensor is not None)

    # ---- attention ----

    def check(self, name: str, new: Tensor) -> None:
        """ValueError or TypeError unless new keys or values fit those of the buffers."""
        if self.keys is None:
            return
        batch, heads, _, dim = self.keys.shape
        if (new.shape[0], new.shape[1], new.shape[3]) != (batch, heads, dim):
            raise ValueError(
                f"past_key_values: expected a {name} of shape ({batch}, {heads}, tokens, {dim}), as layer "
                f"{self.index} of this H2OCache holds, got {tuple(new.shape)}: another model or another "
                "batch needs a cache of its own, or reset()"
            )
        if new.dtype != self.keys.dtype or new.device != self.keys.device:
            raise TypeError(
                f"past_key_values: expected a {name} of {self.keys.dtype} on {self.keys.device}, as layer "
                f"{self.index} of this H2OCache holds, got {new.dtype} on {new.device}"
            )

    def attend(self, new: NewTokens) -> Tensor:
        """Attention of the new tokens over the kept entries and themselves, and then eviction.

        Returns (B, H, n, D). Raises ValueError or TypeError, with nothing changed, where the tokens do not
        fit.
        """
        self.check("key", new.key)
        self.check("value", new.value)
        num_new = new.query.shape[2]
        self.unfinished = True
        self.last = None
        before = self.scores.clone() if self.recording and self.scores is not None else None
        if num_new == 1:
            self._make_room(new.key)
            output = self._step(new)
            self.follow_step(new.mask)
        else:
            with torch.inference_mode(False), torch.no_grad():
                output = self._prompt(new)
        self.follow_columns(new.mask, num_new)
        if self.recording and not self.counts.evicted and new.mask.tensor is None:
            self.last = LastForward(before, self._attended, new.scale)
        self._attended = None
        if self.timeline is not None:
            self.timeline.note(self.positions, self.counts.seen)
        self.unfinished = False
        return output

    def _step(self, new: NewTokens) -> Tensor:
        return self._run_step(new, new.query, new.key, self.keys)

    def _run_step(self, new: NewTokens, query: Tensor, key: Tensor, keys: Tensor) -> Tensor:
        """One step over keys, (B, Hkv, slots, D) as they attend, with the new token's query and key."""
        output: Tensor = torch_h2o.h2o_decode(
            *(query, key, new.value),
            *(keys, self.values, self.scores, self.positions, self.free_slot, self.rows),
            new_mask=new.mask.tensor,
            num_sinks=self.budget.num_sink_tokens,
            mean=self.settings.group_reduction == "mean",
            scale=new.scale,
        )
        return output

    def _prompt(self, new: NewTokens) -> Tensor:
        """A forward of more than one token. The first copies no keys or values but those that stay."""
        before = self.counts_before(new.key.shape[0])
        num_new, heads, mask = new.key.shape[2], new.key.shape[1], new.mask.tensor
        positions = before.positions(num_new, mask, new.key.device)[:, None].expand(-1, heads, -1)
        key, value = self._to_store(new), new.value
        past = gather_past(self, before) if before.most_used else None
        if past is not None:
            key, value = torch.cat([past.key, key], 2), torch.cat([past.value, value], 2)
            positions = torch.cat([past.positions, positions], 2)
            mask = past.mask_with(mask, num_new)
        output, scores = self._attend_prompt(new, key, value, mask)
        if past is not None:
            scores[:, :, : past.scores.shape[2]] += past.scores
        counts = before.after_prompt(num_new, new.mask.counts, self.budget)
        rows = counts.tensor(key.device)
        keys, values, scores, positions = torch_h2o.h2o_select(
            *(key, value, scores, positions.contiguous(), rows),
            num_sinks=self.budget.num_sink_tokens,
            capacity=counts.capacity(LEAST_GROWTH),
        )
        self._put(keys, values, scores, positions, counts)
        return output

    def _to_store(self, new: NewTokens) -> Tensor:
        return new.key

    def _attend_prompt(
        self, new: NewTokens, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Output, and what each key's score grows by, float32 (B, Hkv, n_key)."""
        return self._run_prompt(new.query, key, value, mask, new.scale)

    def _run_prompt(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        output, lse = torch_h2o.causal_attention(query, key, value, scale=scale, padding_mask=mask)
        scores = torch_h2o.attention_scores(
            *(query, key, lse),
            scale=scale,
            score_window=self.settings.score_window,
            padding_mask=mask,
            group_reduction=self.settings.group_reduction,
        )
        # Detached: a forward with gradients enabled would keep its graph alive, and could not be copied.
        self._attended = (query.detach(), key.detach(), lse) if self.recording else None
        return output, scores

    # ---- memory ----

    def _put(
        self, keys: Tensor, values: Tensor, scores: Tensor, positions: Tensor, counts: RowCounts
    ) -> None:
        self.keys, self.values, self.scores, self.positions = keys, values, scores, positions
        self.place(counts)
        self.is_initialized = True

    def place(self, counts: RowCounts) -> None:
        """Sets the counts where the entries of each row are in its first slots."""
        device = self.keys.device
        used = torch.tensor(counts.used, dtype=torch.int32, device=device)
        self.free_slot = used[:, None].repeat(1, self.keys.shape[1])
        self.rows = counts.tensor(device)
        self.counts = counts

    def _make_room(self, like: Tensor) -> None:
        """Buffers with a slot for one more token in every row."""
        if self.is_initialized and self.bounds.most_used < self.keys.shape[2]:
            return
        with torch.inference_mode(False), torch.no_grad():
            batch, heads, _, dim = like.shape
            counts = self.bounds if self.is_initialized else RowCounts.empty(batch, self.budget)
            slots = counts.capacity(LEAST_GROWTH)
            keys = like.new_empty(batch, heads, slots, dim)
            values = torch.empty_like(keys)
            scores = torch.zeros(batch, heads, slots, dtype=torch.float32, device=like.device)
            positions = torch.full((batch, heads, slots), -1, dtype=torch.int32, device=like.device)
            if not self.is_initialized:
                self._put(keys, values, scores, positions, counts)
                return
            old = self.keys.shape[2]
            for new, name in (
                (keys, "keys"),
                (values, "values"),
                (scores, "scores"),
                (positions, "positions"),
            ):
                new[:, :, :old] = getattr(self, name)
                setattr(self, name, new)
