"""What the heavy-hitter cache's operations are compared with: plain torch, each in the fastest form found.

A prompt: query (B, H, N, D); key, value (B, Hkv, N, D), causal.

prompt_eager
    Eager attention, as transformers computes it, and its column sums: the whole N x N matrix of every head,
    softmax in float32, summed over queries and over a key/value head's query heads. The only way to scores
    that users have.
prompt_chunked
    The same over 256 queries at a time and only the keys up to the last of them: half the work, O(N) memory.
    The best that plain torch can do; nobody writes it.
prompt_sdpa
    torch's SDPA: no scores, so a floor that anything with scores is to be held against.

A step of decoding over N slots with one more for the new token: query (B, H, 1, D); new_key, new_value
(B, Hkv, 1, D). Every way but the published one writes the new token into the evicted one's slot, in place.

step_eager, step_eager_expanded
    softmax(query @ key^T) @ value with the probabilities added to the scores. The query heads of a key/value
    head as the rows of one matrix, or keys and values expanded to all query heads.
step_sdpa, step_sdpa_gqa
    SDPA over the slots, with the query heads of a key/value head as rows, or with enable_gqa; then
    softmax(query @ key^T) once more for the scores, which SDPA does not give.
step_published
    As in H2O's published code: concatenate, softmax, sum, topk, sort, a boolean gather of the whole cache.
    Query heads as rows here, where that code repeats keys and values: less to copy.
sdpa_alone, sdpa_alone_gqa
    SDPA alone over the slots: no new token, no scores, no eviction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

QUERIES_PER_CHUNK = 256


def grouped(query: Tensor, num_kv_heads: int) -> Tensor:
    """(B, H, n, D) as (B, Hkv, H/Hkv * n, D): the query heads of a key/value head as rows of one matrix."""
    batch, _, tokens, dim = query.shape
    return query.reshape(batch, num_kv_heads, -1, tokens, dim).flatten(2, 3)


def expanded(x: Tensor, num_heads: int) -> Tensor:
    """(B, Hkv, N, D) repeated to (B, H, N, D), as transformers' repeat_kv does."""
    batch, kv_heads, tokens, dim = x.shape
    if kv_heads == num_heads:
        return x
    return x[:, :, None].expand(batch, kv_heads, num_heads // kv_heads, tokens, dim).reshape(
        batch, num_heads, tokens, dim
    )  # fmt: skip


def prompt_sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    gqa = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=gqa)


def prompt_eager(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """(output (B, H, N, D), scores float32 (B, Hkv, N)).

    The mask is added in place and the float32 probabilities are what is summed: three times as fast as
    transformers' own order of steps in bfloat16.
    """
    batch, _, tokens, dim = query.shape
    kv_heads = key.shape[1]
    logits = grouped(query * (1 / math.sqrt(dim)), kv_heads) @ key.transpose(2, 3)
    mask = torch.full((tokens, tokens), -math.inf, dtype=query.dtype, device=query.device).triu_(1)
    logits.view(batch, kv_heads, -1, tokens, tokens).add_(mask)
    probability = logits.softmax(-1, dtype=torch.float32)
    output = probability.to(query.dtype) @ value
    return output.view(query.shape), probability.sum(2)


def prompt_chunked(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """As prompt_eager. A chunk's query heads are rows of one matrix, so keys are not repeated."""
    batch, heads, tokens, dim = query.shape
    kv_heads = key.shape[1]
    output = torch.empty_like(query)
    scores = torch.zeros(batch, kv_heads, tokens, device=query.device)
    square = (QUERIES_PER_CHUNK, QUERIES_PER_CHUNK)
    future = torch.ones(square, dtype=torch.bool, device=query.device).triu_(1)
    for begin in range(0, tokens, QUERIES_PER_CHUNK):
        end = min(begin + QUERIES_PER_CHUNK, tokens)
        size = end - begin
        logits = grouped(query[:, :, begin:end], kv_heads) @ key[:, :, :end].transpose(2, 3)
        logits *= 1 / math.sqrt(dim)
        by_query = logits.view(batch, kv_heads, -1, size, end)
        by_query[..., begin:].masked_fill_(future[:size, :size], -math.inf)
        probability = logits.softmax(-1, dtype=torch.float32)
        scores[:, :, :end] += probability.sum(2)
        chunk = probability.to(value.dtype) @ value[:, :, :end]
        output[:, :, begin:end] = chunk.view(batch, heads, size, dim)
    return output, scores


@dataclass
class Slots:
    """A cache that stands at its budget: every slot but the free one holds an entry.

    key, value (B, Hkv, N + 1, D); scores float32, positions int64 (B, Hkv, N + 1); free int64 (B, Hkv, 1):
    where the next token goes; seen: its position; recent: newest entries that stay.
    """

    key: Tensor
    value: Tensor
    scores: Tensor
    positions: Tensor
    free: Tensor
    seen: int
    recent: int

    def insert(self, new_key: Tensor, new_value: Tensor) -> None:
        index = self.free[..., None].expand(-1, -1, -1, self.key.shape[3])
        self.key.scatter_(2, index, new_key)
        self.value.scatter_(2, index, new_value)
        self.positions.scatter_(2, self.free, self.seen)
        self.scores.scatter_(2, self.free, 0.0)

    def add_and_evict(self, probability: Tensor) -> None:
        """Adds float32 (B, Hkv, N + 1) and frees the slot with the least score outside the recent ones."""
        self.scores += probability
        evictable = self.positions <= self.seen - self.recent
        self.free = torch.where(evictable, self.scores, math.inf).argmin(2, keepdim=True)
        self.seen += 1


def step_eager(slots: Slots, query: Tensor, new_key: Tensor, new_value: Tensor) -> Tensor:
    slots.insert(new_key, new_value)
    rows = grouped(query * (1 / math.sqrt(query.shape[3])), slots.key.shape[1])
    probability = (rows @ slots.key.transpose(2, 3)).softmax(-1, dtype=torch.float32)
    output = probability.to(query.dtype) @ slots.value
    slots.add_and_evict(probability.sum(2))
    return output.view(query.shape)


def step_eager_expanded(slots: Slots, query: Tensor, new_key: Tensor, new_value: Tensor) -> Tensor:
    slots.insert(new_key, new_value)
    heads, kv_heads = query.shape[1], slots.key.shape[1]
    scaled = query * (1 / math.sqrt(query.shape[3]))
    logits = scaled @ expanded(slots.key, heads).transpose(2, 3)
    probability = logits.softmax(-1, dtype=torch.float32)
    output = probability.to(query.dtype) @ expanded(slots.value, heads)
    slots.add_and_evict(probability.view(query.shape[0], kv_heads, heads // kv_heads, -1).sum(2))
    return output


def _probability(slots: Slots, query: Tensor) -> Tensor:
    rows = grouped(query * (1 / math.sqrt(query.shape[3])), slots.key.shape[1])
    return (rows @ slots.key.transpose(2, 3)).softmax(-1, dtype=torch.float32).sum(2)


def sdpa_alone(slots: Slots, query: Tensor, new_key: Tensor, new_value: Tensor) -> Tensor:
    rows = grouped(query, slots.key.shape[1])
    return scaled_dot_product_attention(rows, slots.key, slots.value).view(query.shape)


def sdpa_alone_gqa(slots: Slots, query: Tensor, new_key: Tensor, new_value: Tensor) -> Tensor:
    gqa = query.shape[1] != slots.key.shape[1]
    return scaled_dot_product_attention(query, slots.key, slots.value, enable_gqa=gqa)


def step_sdpa(slots: Slots, query: Tensor, new_key: Tensor, new_value: Tensor) -> Tensor:
    slots.insert(new_key, new_value)
    output = sdpa_alone(slots, query, new_key, new_value)
    slots.add_and_evict(_probability(slots, query))
    return output


def step_sdpa_gqa(slots: Slots, query: Tensor, new_key: Tensor, new_value: Tensor) -> Tensor:
    slots.insert(new_key, new_value)
    output = sdpa_alone_gqa(slots, query, new_key, new_value)
    slots.add_and_evict(_probability(slots, query))
    return output


def step_published(slots: Slots, query: Tensor, new_key: Tensor, new_value: Tensor) -> Tensor:
    """Here the slots are in order of their positions and none is free: every step makes new tensors."""
    key = torch.cat((slots.key, new_key), 2)
    value = torch.cat((slots.value, new_value), 2)
    batch, kv_heads, tokens, dim = key.shape
    rows = grouped(query * (1 / math.sqrt(dim)), kv_heads)
    probability = (rows @ key.transpose(2, 3)).softmax(-1, dtype=torch.float32)
    output = probability.to(query.dtype) @ value
    scores = probability.sum(2)
    scores[:, :, :-1] += slots.scores
    heavy = tokens - 1 - slots.recent
    top = scores[:, :, : tokens - slots.recent].topk(heavy, dim=2).indices.sort().values
    newest = torch.arange(tokens - slots.recent, tokens, device=key.device).expand(batch, kv_heads, -1)
    keep = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, torch.cat((top, newest), 2), True)
    slots.key, slots.value = (x[keep].view(batch, kv_heads, tokens - 1, dim) for x in (key, value))
    slots.scores = scores[keep].view(batch, kv_heads, tokens - 1)
    slots.seen += 1
    return output.view(query.shape)
