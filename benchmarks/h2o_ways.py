"""The shapes of the heavy-hitter cache's benchmark, its inputs, and everything that is timed, by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import rivals_h2o
import torch
from torch import Tensor

Call = Callable[[], object]

OURS = "sinklora"
# Ours in parts: the causal forward, and the score pass with its lse.
FORWARD, SCORES = "sinklora forward", "sinklora scores"
EAGER, CHUNKED, SDPA = "eager N x N", "eager in chunks", "sdpa, no scores"
PROMPT_RIVALS = {
    EAGER: rivals_h2o.prompt_eager,
    CHUNKED: rivals_h2o.prompt_chunked,
    SDPA: rivals_h2o.prompt_sdpa,
}
STEP_RIVALS = {
    "eager": rivals_h2o.step_eager,
    "eager, expanded": rivals_h2o.step_eager_expanded,
    "sdpa + scores": rivals_h2o.step_sdpa,
    "sdpa gqa + scores": rivals_h2o.step_sdpa_gqa,
    "published": rivals_h2o.step_published,
    "sdpa alone": rivals_h2o.sdpa_alone,
    "sdpa gqa alone": rivals_h2o.sdpa_alone_gqa,
}
READS = ("read, amax", "read, sum")
PROMPT_WAYS = (OURS, FORWARD, SCORES, *PROMPT_RIVALS)
STEP_WAYS = (OURS, *STEP_RIVALS, *READS)
# Of what eager attention holds at once: for each query and key of a head, the float32 probabilities, and the
# logits and the probabilities in the inputs' dtype.
EAGER_LIMIT = 8 * 2**30


@dataclass(frozen=True)
class Case:
    dtype: str
    num_heads: int
    num_kv_heads: int
    num_tokens: int
    head_dim: int
    device: str = "cpu"

    @classmethod
    def parse(cls, dtype: str, shape: str) -> Case:
        """From "H/Hkv/N/D"."""
        numbers = [int(part) for part in shape.split("/")]
        if len(numbers) != 4 or min(numbers) < 1:
            raise ValueError(f"shape: expected H/Hkv/N/D, four positive numbers, got {shape!r}")
        return cls(dtype, *numbers)

    def shape(self) -> str:
        return f"{self.num_heads}/{self.num_kv_heads}/{self.num_tokens}/{self.head_dim}"

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def eager_bytes(self) -> int:
        return self.num_heads * self.num_tokens**2 * (4 + 2 * self.torch_dtype.itemsize)

    def cache_bytes(self) -> int:
        """What a step over num_tokens slots has to read: keys, values, scores and positions."""
        entry = 2 * self.head_dim * self.torch_dtype.itemsize + 8
        return self.num_kv_heads * self.num_tokens * entry

    def random(self, heads: int, tokens: int) -> Tensor:
        """(1, heads, tokens, D), in memory (1, tokens, heads, D) as a model makes it."""
        shape = (1, tokens, heads, self.head_dim)
        return torch.empty(shape, dtype=self.torch_dtype, device=self.device).normal_().transpose(1, 2)


def last_level_cache_bytes(device: str = "cpu") -> int:
    """Of the processor, 64 MiB where the system does not say; of a CUDA device, L2."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties().L2_cache_size)
    sizes = [64 * 2**20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith("K"):
            sizes.append(int(text[:-1]) * 1024)
    return max(sizes[1:], default=sizes[0])


def num_cold_caches(case: Case) -> int:
    """So many caches that each is out of every processor cache again when its next turn comes.

    Three times the last level would not do: its replacement is no strict queue, and parts survive a sweep.
    """
    return max(2, math.ceil(6 * last_level_cache_bytes(case.device) / case.cache_bytes()))


def skip_reason(way: str, case: Case) -> str:
    if way == EAGER and case.eager_bytes() > EAGER_LIMIT:
        gibibytes = case.eager_bytes() / 2**30
        return f"skipped: would hold {gibibytes:.0f} GiB, more than {EAGER_LIMIT // 2**30}"
    return ""


def prompt_call(way: str, case: Case) -> Call:
    """One prompt's attention, causal, without gradients."""
    from sinklora.torch_h2o import attention_scores, causal_attention

    torch.manual_seed(0)
    query = case.random(case.num_heads, case.num_tokens)
    key, value = (case.random(case.num_kv_heads, case.num_tokens) for _ in range(2))
    if way in PROMPT_RIVALS:
        return lambda: PROMPT_RIVALS[way](query, key, value)
    if way == FORWARD:
        return lambda: causal_attention(query, key, value)
    if way == SCORES:
        lse = causal_attention(query, key, value)[1]
        return lambda: attention_scores(query, key, lse)
    if way != OURS:
        raise ValueError(f"way: expected one of {', '.join(PROMPT_WAYS)}, got {way!r}")

    def ours() -> object:
        output, lse = causal_attention(query, key, value)
        return output, attention_scores(query, key, lse)

    return ours


def step_call(way: str, case: Case, num_caches: int) -> Call:
    """One step in each of num_caches caches in turn, all at their budget, half of it recent."""
    torch.manual_seed(0)
    query = case.random(case.num_heads, 1)
    new_key, new_value = (case.random(case.num_kv_heads, 1) for _ in range(2))
    if way in READS:
        floats = torch.ones(num_caches * case.cache_bytes() // 4, device=case.device)
        return floats.amax if way == READS[0] else floats.sum
    # The published way keeps no free slot: it has one entry less and adds the new one to its end.
    entries = _entries(case, case.num_tokens - (way == "published"))
    if way == OURS:
        steps = [_our_step(case, *(x.clone() for x in entries)) for _ in range(num_caches)]
        return lambda: [step(query, new_key, new_value) for step in steps]
    step = STEP_RIVALS[way]
    caches = [_slots(case, *(x.clone() for x in entries)) for _ in range(num_caches)]
    return lambda: [step(slots, query, new_key, new_value) for slots in caches]


def _entries(case: Case, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """key, value (1, Hkv, slots, D), scores float32 (1, Hkv, slots)."""
    shape = (1, case.num_kv_heads, slots)
    entries = (*shape, case.head_dim)
    key, value = (torch.randn(entries, device=case.device).to(case.torch_dtype) for _ in range(2))
    return key, value, torch.rand(shape, device=case.device)


def _slots(case: Case, key: Tensor, value: Tensor, scores: Tensor) -> rivals_h2o.Slots:
    slots = key.shape[2]
    positions = torch.arange(slots, device=case.device).expand(1, case.num_kv_heads, slots).contiguous()
    free = torch.zeros(1, case.num_kv_heads, 1, dtype=torch.int64, device=case.device)
    return rivals_h2o.Slots(key, value, scores, positions, free, slots, (slots - 1) // 2)


def _our_step(
    case: Case, key: Tensor, value: Tensor, scores: Tensor
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from sinklora.torch_h2o import h2o_decode

    slots = key.shape[2]
    positions = torch.arange(slots, dtype=torch.int32).expand(1, case.num_kv_heads, slots).contiguous()
    positions[:, :, 0] = -1
    free_slot = torch.zeros(1, case.num_kv_heads, dtype=torch.int32)
    budget = slots - 1
    rows = torch.tensor([[slots, budget, budget, budget // 2]], dtype=torch.int32)
    positions, free_slot, rows = (x.to(case.device) for x in (positions, free_slot, rows))

    def step(query: Tensor, new_key: Tensor, new_value: Tensor) -> Tensor:
        return h2o_decode(query, new_key, new_value, key, value, scores, positions, free_slot, rows)

    return step
