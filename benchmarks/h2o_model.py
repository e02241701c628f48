"""A whole model's prompt and steps under each cache: time, and memory in a process of its own.

usage: python h2o_model.py WAY THREADS SHAPE_AS_JSON    (prints the bytes as JSON)
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import memory
import timing
import torch
from h2o_rows import DYNAMIC, FIFTH, GENERATE, PREFILL, Row, add_ratios
from h2o_ways import Case

DYNAMIC_OURS = "DynamicCache, sinklora"
PERCENTAGES = (100, 50, 20, 10, 5)
WAYS = (DYNAMIC, DYNAMIC_OURS, *(f"H2O {percent} %" for percent in PERCENTAGES))


@dataclasses.dataclass(frozen=True)
class Shape:
    """A random LLaMA (few words, so that the logits do not rule), its prompt and the tokens after it."""

    dtype: str = "bfloat16"
    layers: int = 4
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 128
    prompt: int = 4096
    new_tokens: int = 32

    def case(self) -> Case:
        return Case(self.dtype, self.num_heads, self.num_kv_heads, self.prompt, self.head_dim)


def build_model(shape: Shape, way: str) -> Any:
    import transformers

    torch.manual_seed(0)
    hidden = shape.num_heads * shape.head_dim
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 5 // 2,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=512,
        max_position_embeddings=2 * shape.prompt,
    )
    auto: Any = transformers.AutoModelForCausalLM
    dtype = getattr(torch, shape.dtype)
    model = auto.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    if way != DYNAMIC:
        import sinklora

        sinklora.patch(model, sinklora.SFPattern())
    return model


def make_cache(way: str, model: Any) -> Any:
    if way.startswith("DynamicCache"):
        import transformers

        return transformers.DynamicCache(config=model.config)
    import sinklora

    half = float(way.removeprefix("H2O ").removesuffix(" %")) / 200
    return sinklora.H2OCache(model.config, heavy=half, recent=half)


def tensors(thing: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor that a cache holds, however deep in its own objects."""
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, list | tuple | set):
        for item in thing:
            yield from tensors(item, seen)
    elif isinstance(thing, dict):
        yield from tensors(list(thing.values()), seen)
    elif (
        type(thing).__module__.startswith(("transformers.cache_utils", "sinklora")) and id(thing) not in seen
    ):
        seen.add(id(thing))  # of lasting objects only: an id of a list made here would come again
        names = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
        held = [getattr(thing, name) for name in names if hasattr(thing, name)]
        yield from tensors([*held, *getattr(thing, "__dict__", {}).values()], seen)


def storage_bytes(cache: Any) -> int:
    """Real bytes of the storages behind everything a cache holds, each counted once."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors(cache, set())}
    return sum(storages.values())


class Run:
    """One way's model and its cache, fresh for each prompt and carried on by steps."""

    def __init__(self, shape: Shape, way: str, model: Any) -> None:
        self.shape, self.way, self.model = shape, way, model
        generator = torch.Generator().manual_seed(1)
        self.prompt = torch.randint(512, (1, shape.prompt), generator=generator)
        self.cache: Any = None
        self.next = self.prompt[:, -1:]

    def _forward(self, tokens: torch.Tensor) -> None:
        with torch.inference_mode():
            logits = self.model(
                input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1
            ).logits
        self.next = logits[:, -1:].argmax(-1)

    def prefill(self, tokens: int | None = None) -> None:
        self.cache = make_cache(self.way, self.model)
        self._forward(self.prompt[:, :tokens])

    def steps(self) -> None:
        for _ in range(self.shape.new_tokens):
            self._forward(self.next)


def measure(shape: Shape, options: Any) -> list[Row]:
    """Rows of both sections; the reference of over_ours is the cache with a 20 % budget."""
    models = {attention: build_model(shape, attention) for attention in (DYNAMIC, DYNAMIC_OURS)}
    runs = {
        way: Run(shape, way, models[DYNAMIC if way == DYNAMIC else DYNAMIC_OURS]) for way in options.caches
    }
    rows: list[Row] = []
    cached: dict[str, int] = {}
    for section in (PREFILL, GENERATE):
        calls: dict[str, Callable[[], object]] = {
            way: run.prefill if section == PREFILL else run.steps for way, run in runs.items()
        }
        if section == GENERATE:
            cached = {way: storage_bytes(run.cache) for way, run in runs.items()}
        timings = timing.interleave(
            calls, rounds=max(2, options.rounds // 2), warmup=0, drop_disturbed=not options.keep_disturbed
        )
        here = []
        for way, taken in timings.items():
            row = Row.of(section, shape.case(), way)
            steps = 1 if section == PREFILL else shape.new_tokens
            row.seconds = taken.median / steps
            row.first_quartile, row.third_quartile = (seconds / steps for seconds in taken.quartiles)
            row.samples, row.dropped = len(taken.seconds), taken.dropped
            row.note = "" if taken.quiet else timing.BUSY
            if section == GENERATE:
                row.cache_bytes = cached[way]
            here.append(row)
        add_ratios(here, FIFTH)
        rows += here
    if not options.no_memory:
        for row in rows:
            if row.section == GENERATE:
                _add_memory(row, shape, options.threads)
    return rows


def _add_memory(row: Row, shape: Shape, threads: int) -> None:
    try:
        arguments = [row.way, str(threads), json.dumps(dataclasses.asdict(shape))]
        row.extra_bytes = int(memory.run_alone(__file__, arguments, threads))
    except (OSError, RuntimeError) as error:
        row.note = f"{row.note} {error}".strip()


def main(arguments: list[str]) -> None:
    way, threads, shape_text = arguments
    torch.set_num_threads(int(threads))
    shape = Shape(**json.loads(shape_text))
    run = Run(shape, way, build_model(shape, way))
    run.prefill(min(256, shape.prompt))
    run.steps()
    run.cache = None

    def whole() -> None:
        run.prefill()
        run.steps()

    print(memory.peak_extra_bytes(whole))


if __name__ == "__main__":
    main(sys.argv[1:])
