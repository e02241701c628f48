"""The shapes that are measured, their inputs, and the candidates by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import rivals
import torch

FORWARD, BOTH = "forward", "forward+backward"
# FLOPs of one allowed pair, in head_dims: two products forward, five more backward.
FLOPS_PER_PAIR = {FORWARD: 4, BOTH: 14}
OURS = "sinklora"
S2_FORMS = ("s2_one_batch", "s2_parts")
NAMES = (OURS, *S2_FORMS, "dense", "flex")


@dataclass(frozen=True)
class Case:
    dtype: str
    num_heads: int
    num_kv_heads: int
    num_tokens: int
    head_dim: int
    group_size: int

    @classmethod
    def parse(cls, dtype: str, shape: str) -> Case:
        """From "H/Hkv/N/D/G"."""
        numbers = [int(part) for part in shape.split("/")]
        if len(numbers) != 5 or min(numbers) < 1:
            raise ValueError(f"shape: expected H/Hkv/N/D/G, five positive numbers, got {shape!r}")
        return cls(dtype, *numbers)

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def smaller(self, num_tokens: int) -> Case:
        """The same case over fewer tokens: whole groups, at least two where the case has two."""
        group_size = min(self.group_size, max(1, num_tokens // 2))
        tokens = min(self.num_tokens, 2 * group_size)
        return Case(
            self.dtype, self.num_heads, self.num_kv_heads, tokens, self.head_dim, min(group_size, tokens)
        )

    def gradient_bytes(self) -> int:
        rows = self.num_tokens * self.head_dim * (self.num_heads + 2 * self.num_kv_heads)
        return rows * self.torch_dtype.itemsize

    def output_bytes(self) -> int:
        return self.num_tokens * self.head_dim * self.num_heads * self.torch_dtype.itemsize

    def row_bytes(self) -> int:
        """One float32 for every query row: the size of lse, and of the backward's delta."""
        return 4 * self.num_heads * self.num_tokens


@dataclass(frozen=True)
class Inputs:
    """query (1, H, N, D), key, value (1, Hkv, N, D), grad_output like query; in memory (1, N, H, D)."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    grad_output: torch.Tensor

    @classmethod
    def of(cls, case: Case, seed: int = 0, device: str = "cpu") -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)

        def make(heads: int) -> torch.Tensor:
            shape = (1, case.num_tokens, heads, case.head_dim)
            x = torch.empty(shape, dtype=case.torch_dtype, device=device)
            return x.normal_(generator=generator).transpose(1, 2)

        heads, kv_heads = case.num_heads, case.num_kv_heads
        return cls(make(heads), make(kv_heads), make(kv_heads), make(heads))


@dataclass(frozen=True)
class Candidate:
    """One implementation on one case: ``attention(query, key, value)`` and the number of pairs it allows."""

    attention: rivals.Attention
    pairs: int
    backward: bool = True


def candidate(name: str, case: Case) -> Candidate:
    """The candidate of that name. ValueError where the case's shape is not for it, or the name is unknown."""
    import sinklora

    pattern = sinklora.SFPattern(group_size=case.group_size)
    heads, tokens, group = case.num_heads, case.num_tokens, case.group_size
    if name == OURS:
        pairs = pattern.flops(heads, tokens, 1) // FLOPS_PER_PAIR[FORWARD]
        return Candidate(functools.partial(sinklora.sf_attention, pattern=pattern), pairs)
    if name in S2_FORMS:
        if tokens % group:
            raise ValueError(f"needs num_tokens a multiple of group_size, got {tokens} and {group}")
        attention = functools.partial(
            getattr(rivals, name), group_size=group, fraction=pattern.shifted_fraction
        )
        return Candidate(attention, rivals.s2_pairs(heads, tokens, group))
    if name == "dense":
        return Candidate(rivals.dense, rivals.dense_pairs(heads, tokens))
    if name == "flex":
        pairs = pattern.flops(heads, tokens, 1) // FLOPS_PER_PAIR[FORWARD]
        return Candidate(
            rivals.flex(pattern, heads, case.num_kv_heads, tokens), pairs, backward=False
        )  # torch: no backward on CPUs
    raise ValueError(f"candidate: expected one of {', '.join(NAMES)}, got {name!r}")


def make_call(attention: rivals.Attention, inputs: Inputs, direction: str) -> Callable[[], object]:
    """A call without arguments that runs the attention once in that direction and drops what it made."""
    if direction == FORWARD:

        def forward() -> None:
            with torch.no_grad():
                attention(inputs.query, inputs.key, inputs.value)

        return forward

    leaves = tuple(x.detach().requires_grad_() for x in (inputs.query, inputs.key, inputs.value))

    def both() -> None:
        # autograd.grad hands the gradients over as they are; .backward() may add a copy into .grad's layout.
        torch.autograd.grad(attention(*leaves), leaves, inputs.grad_output)

    return both
