# ruff: noqa: N999
"""The C extension: functions that fill buffers given to them, with positional arguments only.

An array is a torch tensor, a NumPy array or another DLPack producer; nothing is copied, and nothing is
written before all checks have passed. The GIL is released around compute.

On CUDA a call works on the current stream that the first array's library tells of (torch's), on the legacy
default stream where it tells of none, and returns before the work is done; values are not checked there.
"""

from collections.abc import Callable
from typing import Any, TypedDict

class CudaState(TypedDict):
    driver: int  # the newest CUDA that it supports, 1000 * major + 10 * minor; 0: none
    devices: tuple[tuple[str, tuple[int, int]], ...]  # name, compute capability
    problem: str | None  # why there are no devices

class BuildInfo(TypedDict):
    compiler: str
    cuda: bool
    cuda_archs: str  # compute capabilities, oldest first: "8.0 9.0"; later ones run the newest's PTX
    cuda_toolkit: str | None  # nvcc's release
    cuda_absent: str | None  # why CUDA was not built in
    max_head_dim: int
    max_threads: int

def attention_forward(
    query: Any,  # [B, H, N, D], last dimension contiguous, like every array of D
    key: Any,  # [B, Hkv, N, D]
    value: Any,
    output: Any,  # like query, written
    lse: Any,  # float32 [B, H, N], contiguous, written
    cu_seqlens: Any | None,  # int32 [S + 1]
    padding_mask: Any | None,  # bool [B, N]
    position_ids: Any | None,  # int64 [B or 1, N]
    group_size: int,
    shift: int,
    num_sink_tokens: int,
    shifted_fraction: float,
    causal: bool,
    scale: float,
    num_threads: int,
    allocate: Callable[[int], Any],  # num_bytes -> writable uint8 [>= num_bytes] on the arrays' device
    /,
) -> None: ...
def attention_backward(
    grad_output: Any,  # like query
    query: Any,
    key: Any,
    value: Any,
    output: Any,  # what the forward wrote
    lse: Any,
    grad_query: Any,  # like query, written
    grad_key: Any,  # like key, written
    grad_value: Any,
    cu_seqlens: Any | None,
    padding_mask: Any | None,
    position_ids: Any | None,
    group_size: int,
    shift: int,
    num_sink_tokens: int,
    shifted_fraction: float,
    causal: bool,
    scale: float,
    num_threads: int,
    allocate: Callable[[int], Any],
    /,
) -> None: ...
def check_cu_seqlens(cu_seqlens: Any, num_tokens: int, /) -> None: ...  # values are read on the CPU only
def causal_forward(
    query: Any,  # [B, H, n_query, D]: the last n_query of n_key tokens
    key: Any,  # [B, Hkv, n_key, D]
    value: Any | None,  # like key; None, and output None: lse alone
    output: Any | None,  # like query, written
    lse: Any,  # float32 [B, H, n_query], contiguous, written
    padding_mask: Any | None,  # bool [B, n_key]; the last n_query columns are the queries'
    scale: float,
    num_threads: int,
    allocate: Callable[[int], Any],
    /,
) -> None: ...
def h2o_decode(
    query: Any,  # [B, H, n_query, D], n_query 1 to 8
    key: Any,  # [B, Hkv, n_key, D]; written with new_key
    value: Any,
    output: Any,  # like query, written
    lse: Any | None,  # float32 [B, H, n_query], contiguous, written
    padding_mask: Any | None,  # bool [B, n_key]
    scores: Any | None,  # float32 [B, Hkv, n_key], contiguous, added to
    window: int,  # only the last so many kept queries add to scores; 0: all
    mean: bool,  # scores are divided by H / Hkv
    new_key: Any | None,  # [B, Hkv, 1, D]; from here to rows: one step of a cache, all but new_mask or none
    new_value: Any | None,
    new_mask: Any | None,  # bool [B, 1]
    positions: Any | None,  # int32 [B, Hkv, n_key], contiguous, written
    free_slot: Any | None,  # int32 [B, Hkv], contiguous, written
    rows: Any | None,  # int32 [B, 4], contiguous: seen, used, budget, recent; the first two are written
    num_sinks: int,
    scale: float,
    num_threads: int,
    allocate: Callable[[int], Any],  # as above
    /,
) -> None: ...
def h2o_select(
    key: Any,  # [B, Hkv, n_key, D]
    value: Any,
    scores: Any,  # float32 [B, Hkv, n_key], contiguous
    positions: Any,  # int32 [B, Hkv, n_key], contiguous; -1: not used
    rows: Any,  # int32 [B, 4], contiguous: seen, used (written), budget, recent
    key_out: Any,  # [B, Hkv, n_slot, D], written; the outputs may be the inputs
    value_out: Any,
    scores_out: Any,  # float32 [B, Hkv, n_slot], contiguous, written
    positions_out: Any,  # int32 [B, Hkv, n_slot], contiguous, written
    num_sinks: int,
    num_threads: int,
    allocate: Callable[[int], Any],
    /,
) -> None: ...
def h2o_score(
    query: Any,  # [B, H, n_query, D]: the last n_query of n_key tokens
    key: Any,  # [B, Hkv, n_key, D]
    lse: Any,  # float32 [B, H, n_query], contiguous, what causal_forward wrote for them
    scores: Any,  # float32 [B, Hkv, n_key], contiguous, written; padding gets 0
    padding_mask: Any | None,  # bool [B, n_key]
    window: int,  # only the last so many kept queries of each row count; 0: all
    mean: bool,  # over the H / Hkv query heads, not their sum
    scale: float,
    num_threads: int,
    allocate: Callable[[int], Any],
    /,
) -> None: ...
def pattern_mask(
    output: Any,  # bool [num_heads, num_tokens, num_tokens], written
    group_size: int,
    shift: int,
    num_sink_tokens: int,
    shifted_fraction: float,
    causal: bool,
    /,
) -> None: ...
def pattern_pairs(
    num_heads: int,
    num_tokens: int,
    group_size: int,
    shift: int,
    num_sink_tokens: int,
    shifted_fraction: float,
    causal: bool,
    /,
) -> int: ...

# Available ones, worst first.
def cpu_levels() -> tuple[str, ...]: ...

# ValueError where SINKLORA_CPU names a level that is not available, as from the attention functions.
def cpu_level() -> str: ...

# None is the best. Not while another thread computes.
def select_cpu_level(name: str | None, /) -> None: ...
def default_threads() -> int: ...
def build_info() -> BuildInfo: ...

# Starts the driver: a process that forks afterwards cannot use CUDA in the child.
def cuda_state() -> CudaState: ...
