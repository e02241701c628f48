"""SF-Attn on a CUDA device: the CPU's test matrix, the same bits every time, and a device's manners.

pytest -m gpu runs these; without a device, or a build with CUDA, each is skipped with the reason.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import NAMES, Yardstick, assert_close, assert_same_bits, assert_within_rule, exact, kernel
from cases import DTYPES, SHAPES, Case, case
from device_support import Repeats, moved, run
from test_attention_forward import LAYOUTS, POISONED, poison_values, visible_rows
from test_attention_sequences import LENGTHS, offsets, random_inputs, take
from test_determinism import SHAPES as REPEATED
from torch import Tensor

import sinklora
from sinklora import SFPattern, torch_ops

pytestmark = pytest.mark.gpu
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
RUNS = 1000


def generator_of(name: object) -> torch.Generator:
    """The same draws on every machine, as the accuracy rule's tests on the CPU have them."""
    return torch.Generator().manual_seed(zlib.crc32(str(name).encode()))


# ---- what the CPU's tests ask ----


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_dtype
def test_accuracy_rule(shape: Case, dtype: torch.dtype, cuda: torch.device) -> None:
    inputs = shape.inputs(dtype, generator_of(shape))
    arguments = (*inputs[:3], shape.pattern, inputs.grad)
    actual = run(shape, inputs, cuda)
    assert_within_rule(
        actual, exact(*arguments, **shape.options), Yardstick(*arguments, **shape.options), where="device "
    )


@pytest.mark.parametrize("dim", (8, 40, 64, 72, 96, 128, 136, 192, 200, 256))
@every_dtype
def test_tiles_meet_every_edge(dim: int, dtype: torch.dtype, cuda: torch.device) -> None:
    """Groups, sinks and ends of the sequence before, at and after the edges of tiles of 32, 64 and 128."""
    for tokens in (127, 129, 257):
        for group_size, sinks in ((63, 1), (64, 64), (128, 4), (130, 65)):
            shape = case((1, 2, 1, tokens, dim), group_size, sinks, 0.5)
            inputs = shape.inputs(dtype, generator_of(shape))
            arguments = (*inputs[:3], shape.pattern, inputs.grad)
            assert_within_rule(
                run(shape, inputs, cuda), exact(*arguments), Yardstick(*arguments), where=f"{shape} "
            )


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@every_dtype
def test_packed_sequences(lengths: list[int], dtype: torch.dtype, cuda: torch.device) -> None:
    shape = case((1, 4, 2, sum(lengths), 16), 16, 4, 0.5)
    inputs = random_inputs(1, sum(lengths), dtype, generator_of(lengths))
    starts = offsets(lengths)
    check_options(shape, inputs, cuda, cu_seqlens=starts)
    together = run(shape, inputs, cuda, cu_seqlens=starts)
    for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        alone = run(shape, take(inputs, 0, slice(begin, end)), cuda)
        for name in (*NAMES, "lse"):
            got = getattr(together, name)[:, :, begin:end]
            assert_same_bits(got, getattr(alone, name), f"tokens {begin} to {end}: {name}")


def padding(kind: str, batch: int, tokens: int) -> Tensor:
    place = torch.arange(tokens)
    kept = torch.arange(batch)[:, None] * (tokens // 2) + 1
    return {
        "left": place >= tokens - kept,
        "right": place < kept,
        "holes": torch.rand(batch, tokens, generator=generator_of(kind)) > 0.4,
        "all": torch.zeros(batch, tokens, dtype=torch.bool),
    }[kind]


@pytest.mark.parametrize("kind", ("left", "right", "holes", "all"))
@every_dtype
def test_padding(kind: str, dtype: torch.dtype, cuda: torch.device) -> None:
    shape = case((3, 4, 2, 130, 24), 32)
    inputs = shape.inputs(dtype, generator_of(kind))
    mask = padding(kind, 3, 130)
    check_options(shape, inputs, cuda, padding_mask=mask)
    clean = run(shape, inputs, cuda, padding_mask=mask)
    gone = ~mask[:, None].expand(3, 4, 130)
    assert not clean.output[gone].any() and not clean.grad_query[gone].any()
    assert (clean.lse[gone] == float("-inf")).all()
    poisoned = [x.masked_fill(~mask[:, None, :, None], float("nan")) for x in inputs]
    dirty = run(shape, poisoned, cuda, padding_mask=mask)
    for name in (*NAMES, "lse"):
        assert_same_bits(getattr(dirty, name), getattr(clean, name), f"NaN in padding: {name}")


@every_dtype
def test_restarting_positions(dtype: torch.dtype, cuda: torch.device) -> None:
    shape = case((2, 4, 2, 77, 16), 16)
    positions = torch.stack((torch.arange(77) % 20, torch.arange(77) + 5))
    check_options(shape, shape.inputs(dtype, generator_of(shape)), cuda, position_ids=positions)


def check_options(shape: Case, inputs: Any, device: torch.device, **options: Tensor) -> None:
    """The accuracy rule for a call with tensors that say which sequences there are."""
    arguments = (*inputs[:3], shape.pattern, inputs[3])
    actual = run(shape, inputs, device, **options)
    want, yardstick = exact(*arguments, **options), Yardstick(*arguments, **options)
    assert_within_rule(actual, want, yardstick, where=f"{', '.join(options)} ")


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@every_dtype
def test_layouts(layout: Callable[[Tensor], Tensor], dtype: torch.dtype, cuda: torch.device) -> None:
    shape = case((2, 4, 2, 65, 24), 20)
    query, key, value, grad = moved(shape.inputs(dtype, generator_of(layout.__name__)), cuda)
    want = kernel(query, key, value, shape.pattern, grad)
    got = kernel(*(layout(x) for x in (query, key, value)), shape.pattern, layout(grad))
    for name in (*NAMES, "lse"):
        assert_same_bits(getattr(got, name), getattr(want, name), name)


@pytest.mark.parametrize("offset", (1, 3, 7))
@every_dtype
def test_odd_addresses(offset: int, dtype: torch.dtype, cuda: torch.device) -> None:
    """Rows that do not begin at a multiple of 16 bytes."""
    shape = case((1, 2, 2, 65, 16), 16)
    tensors = moved(shape.inputs(dtype, generator_of(shape)), cuda)

    def shift(x: Tensor) -> Tensor:
        return torch.cat((x.new_zeros(offset), x.flatten()))[offset:].view(x.shape)

    want = kernel(*tensors[:3], shape.pattern, tensors.grad)
    got = kernel(*map(shift, tensors[:3]), shape.pattern, shift(tensors.grad))
    for name in (*NAMES, "lse"):
        assert_same_bits(getattr(got, name), getattr(want, name), name)


@pytest.mark.parametrize("shape", POISONED, ids=str)
@every_dtype
def test_no_bit_leaks_from_what_a_row_may_not_see(
    shape: Case, dtype: torch.dtype, cuda: torch.device
) -> None:
    query, key, value, _ = moved(shape.inputs(dtype, generator_of(shape)), cuda)
    clean, clean_lse = torch_ops.sf_attention(query, key, value, shape.pattern)
    group = shape.pattern.group_size
    tokens = {0, 1, group // 2, group - 1, group, 63, 64, shape.tokens // 2, shape.tokens - 1}
    for token in sorted(t for t in tokens if t < shape.tokens):
        head = token % shape.kv_heads
        blind = ~visible_rows(shape, head, token).to(cuda)
        for poison in poison_values(dtype):
            for which in (key, value):
                saved = which[:, head, token].clone()
                which[:, head, token] = poison
                output, lse = torch_ops.sf_attention(query, key, value, shape.pattern)
                which[:, head, token] = saved
                where = f"token {token} of head {head} = {poison:g}: "
                assert_same_bits(output[:, blind], clean[:, blind], where + "output")
                assert_same_bits(lse[:, blind], clean_lse[:, blind], where + "lse")
                if which is value:
                    assert (output[:, ~blind] != clean[:, ~blind]).any(), where + "reached no row"


# ---- the same bits ----


@pytest.mark.parametrize("shape", REPEATED, ids=str)
@every_dtype
def test_a_thousand_runs_give_the_same_bits(shape: Case, dtype: torch.dtype, cuda: torch.device) -> None:
    query, key, value, grad = moved(shape.inputs(dtype, generator_of(shape)), cuda)
    repeats = Repeats()
    for _ in range(RUNS):
        repeats.add(*kernel(query, key, value, shape.pattern, grad))
    assert repeats.count() == 0


@every_dtype
def test_many_blocks_give_the_same_bits(dtype: torch.dtype, cuda: torch.device) -> None:
    """More blocks than the device holds at once, in an order that changes."""
    shape = case((2, 8, 2, 2048, 64), 512)
    query, key, value, grad = moved(shape.inputs(dtype, generator_of(shape)), cuda)
    repeats = Repeats()
    for _ in range(100):
        repeats.add(*kernel(query, key, value, shape.pattern, grad))
    assert repeats.count() == 0


@every_dtype
def test_a_batch_row_equals_itself_alone(dtype: torch.dtype, cuda: torch.device) -> None:
    shape = case((3, 4, 2, 77, 24), 20, sinks=5)
    inputs = shape.inputs(dtype, generator_of(shape))
    together = run(shape, inputs, cuda)
    for row in range(3):
        alone = run(shape, [x[row : row + 1] for x in inputs], cuda)
        for name in (*NAMES, "lse"):
            assert_same_bits(getattr(together, name)[row : row + 1], getattr(alone, name), f"{row}: {name}")


# ---- sizes ----


@pytest.mark.parametrize("direction", ("forward", "backward"))
def test_offsets_beyond_2_31_elements(direction: str, cuda: torch.device) -> None:
    """The last rows of a tensor of more than 2^31 elements equal those of a short one."""
    heads, dim, group, tail = 32, 128, 64, 1024
    tokens = 2**31 // (heads * dim) + tail
    needed = tokens * heads * dim * 2 * (2.2 if direction == "forward" else 7)
    if torch.cuda.mem_get_info(cuda)[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of device memory")
    rng = torch.Generator(cuda).manual_seed(1)
    pattern = SFPattern(group, num_sink_tokens=0)

    def rows(n_head: int) -> Tensor:
        x = torch.empty(1, tokens, n_head, dim, dtype=torch.bfloat16, device=cuda)
        return x.normal_(generator=rng).transpose(1, 2)

    query, key, value = rows(heads), rows(1), rows(1)
    last = [x[:, :, -tail:] for x in (query, key, value)]
    shown = slice(group, None)  # the first group of a shifted head is cut off in the short one
    if direction == "forward":
        output, lse = torch_ops.sf_attention(query, key, value, pattern)
        want, want_lse = torch_ops.sf_attention(*last, pattern)
        assert_close(output[:, :, -tail:][:, :, shown], want[:, :, shown], 1e-2)
        assert_close(lse[:, :, -tail:][:, :, shown], want_lse[:, :, shown], 1e-4)
        return
    grad = rows(heads)
    got = kernel(query, key, value, pattern, grad)
    want = kernel(*last, pattern, grad[:, :, -tail:])
    for name in NAMES:
        rule = {"grad_key": 0.25, "grad_value": 0.25}.get(name, 2e-2)  # sums over 32 query heads
        assert_close(
            getattr(got, name)[:, :, -tail:][:, :, shown], getattr(want, name)[:, :, shown], rule, name=name
        )


# ---- errors ----


def test_errors_leave_the_process_alive(cuda: torch.device) -> None:
    shape = case((1, 4, 2, 65, 16), 16)
    inputs = shape.inputs(torch.bfloat16, generator_of(shape))
    want = run(shape, inputs, cuda)
    query, key, value, _ = moved(inputs, cuda)
    pattern = shape.pattern
    with pytest.raises(ValueError, match="key"):
        sinklora.sf_attention(query, key[:, :, 1:], value, pattern)
    with pytest.raises(NotImplementedError, match="head"):
        sinklora.sf_attention(query[..., :12], key[..., :12], value[..., :12], pattern)
    with pytest.raises(TypeError):
        sinklora.sf_attention(query, key.float(), value, pattern)
    with pytest.raises(ValueError, match="device"):
        sinklora.sf_attention(query, key.cpu(), value, pattern)
    with pytest.raises(ValueError, match="device"):
        sinklora.sf_attention(query, key, value, pattern, cu_seqlens=offsets([65]))
    got = run(shape, inputs, cuda)
    for name in (*NAMES, "lse"):
        assert_same_bits(getattr(got, name), getattr(want, name), name)


@pytest.mark.parametrize(
    "starts", ([0, 99, 65], [5, 3, 65], [-7, 20, 65], [0, 2**31 - 1, 65], [0, 0, 0], [-(2**31)] * 3), ids=str
)
def test_wrong_cu_seqlens_touch_no_other_memory(starts: list[int], cuda: torch.device) -> None:
    """Their values are not read on the host: what comes out is unspecified, what comes next is right."""
    shape = case((1, 4, 2, 65, 16), 16)
    inputs = shape.inputs(torch.float16, generator_of(shape))
    wrong = torch.tensor(starts, dtype=torch.int32)
    run(shape, inputs, cuda, cu_seqlens=wrong)
    torch.cuda.synchronize(cuda)
    actual, arguments = run(shape, inputs, cuda), (*inputs[:3], shape.pattern, inputs.grad)
    assert_within_rule(actual, exact(*arguments), Yardstick(*arguments))
