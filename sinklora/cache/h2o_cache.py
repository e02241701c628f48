"""The H2O cache for transformers: heavy hitters and recent tokens stay, the rest is evicted and freed.

SPEC.md, section 2. Sources: H2O (arXiv 2306.14048), StreamingLLM (arXiv 2309.17453).
"""

from __future__ import annotations

import copy
import operator
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from . import file as cache_file
from . import link as cache_link
from .layer import H2OLayer
from .moves import check_crop, crop, move, select_rows
from .record import moments
from .rotary import refuse_config
from .settings import Entries, check_shape, decoder_config, make_budgets, make_layers, make_settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers.configuration_utils import PreTrainedConfig

NAME = "sinklora"


class H2OCache(Cache):
    """A key/value cache of constant size for a model patched by sinklora, in eval mode.

    Each key/value head of each batch row keeps `recent` newest tokens, `num_sink_tokens` first ones, and of
    the others the `heavy` ones that got the most attention so far. What is evicted is freed. Give it to
    `model.generate(..., past_key_values=cache)` or to the model itself.

    Args:
        config: the live `model.config` of the model (of a multimodal one too).
        heavy: entries kept for their score. An int counts entries (0: none); a float in (0, 1] is a fraction
            of the row's tokens in all forwards of more than one token, rounded down. A list gives each layer
            its own.
        recent: newest entries, never evicted, at least 1; int, float or list as heavy.
        num_sink_tokens: first tokens of a row, never evicted; on top of heavy and recent.
        score_window: count only the last so many queries of a forward of more than one token; None: all.
        group_reduction: "sum" or "mean" of the query heads that share a key/value head.
        positions: "original": tokens keep their position. "cache": tokens are at their rank among the kept
            ones, as StreamingLLM has it, so that a dialogue may run on beyond the trained length.
        record: remember when each token was evicted, for `plot`; this grows by 4 bytes a token and head.

    Raises:
        ValueError: settings out of range (recent 0, heavy 0.0, negative, NaN, above 1.0), a list that has
            not one value a layer. TypeError: of another kind. NotImplementedError: a model that cannot have
            such a cache.

    Used with a model whose attention is not sinklora's, or in training mode, it raises a RuntimeError at the
    first forward.

    On a GPU a forward of one token waits for nothing, so it does not see a mask that hides earlier tokens.
    It does read its mask with record=True and in assisted generation. Longer forwards wait once for all
    layers; beam search, crop and save wait too.
    """

    layers: list[H2OLayer]  # type: ignore[assignment]

    def __init__(
        self,
        config: PreTrainedConfig,
        heavy: Entries | Sequence[Entries],
        recent: Entries | Sequence[Entries],
        num_sink_tokens: int = 0,
        score_window: int | None = None,
        group_reduction: str = "sum",
        positions: str = "original",
        record: bool = False,
    ) -> None:
        text = decoder_config(config)
        settings = make_settings(score_window, group_reduction, positions, record)
        budgets = make_budgets(heavy, recent, num_sink_tokens, text.num_hidden_layers)
        if positions == "cache":
            refuse_config(text)
        super().__init__(layers=list(make_layers(budgets, settings)))
        self._config: PreTrainedConfig | None = text
        self._last: H2OLayer | None = None

    @classmethod
    def streaming(
        cls, config: PreTrainedConfig, sinks: int = 4, *, recent: Entries | Sequence[Entries]
    ) -> H2OCache:
        """StreamingLLM's cache: the first `sinks` tokens and the `recent` newest, positions by rank."""
        return cls(config, heavy=0, recent=recent, num_sink_tokens=sinks, positions="cache")

    # ---- what transformers calls ----

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Notes one layer's new keys and values, (B, Hkv, n, D), and returns them for its attention.

        Raises RuntimeError where the model's attention is not sinklora's or an earlier forward broke off,
        ValueError for a model of more layers. Nothing is changed then.
        """
        cache_link.refuse_graphs()
        self._check_attention()
        if not 0 <= layer_idx < len(self.layers):
            raise ValueError(
                f"past_key_values: expected a model of {len(self.layers)} layers, as the H2OCache's config "
                f"says, got keys of layer {layer_idx}"
            )
        layer = self.layers[layer_idx]
        self._check_whole(layer, key_states.shape[2])
        found: tuple[Tensor, Tensor] = layer.update(key_states, value_states)
        self._last = layer
        cache_link.leave(layer, key_states)
        return found

    @property
    def is_croppable(self) -> bool:
        """May `crop` still take tokens back? No more once anything was evicted."""
        return all(layer.is_croppable for layer in self.layers)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last -tokens_to_remove tokens back (a negative number, as transformers counts).

        What their queries added to the scores of earlier tokens goes too if the last forward brought them and
        `activate_past_recording` was called before it, as assisted generation does; else it stays.

        Raises RuntimeError once anything was evicted; ValueError for a positive number, or more tokens than
        there are, or where one of them is padding.
        """
        self._check_whole(None)
        number = operator.index(tokens_to_remove)
        if number > 0:
            raise ValueError(f"tokens_to_remove: expected a negative number of tokens, got {number}")
        for layer in self.layers:
            check_crop(layer, -number)
        for layer in self.layers:
            crop(layer, -number)

    def reset(self) -> None:
        """Forgets all tokens and frees their memory; the settings stay."""
        super().reset()
        self._last = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Makes row b what row beam_idx[b] was, as beam search asks."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows of the batch that indices names, in its order; rows may come more than once."""
        self._check_whole(None)
        for layer in self.layers:
            select_rows(layer, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Makes each row of the batch `repeats` rows."""
        self._check_whole(None)
        for layer in self.layers:
            batch = len(layer.counts.seen)
            select_rows(layer, torch.arange(batch).repeat_interleave(repeats))

    def activate_past_recording(self) -> None:
        """From now on the last forward's queries are kept, so that `crop` takes their scores back too."""
        for layer in self.layers:
            layer.recording = True

    def __deepcopy__(self, memo: dict[int, Any]) -> H2OCache:
        """An independent copy for another continuation; the model's config is shared, not copied."""
        self._check_whole(None)
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        memo[id(self._config)] = self._config
        with torch.inference_mode(False), torch.no_grad():
            new.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return new

    # ---- what a user asks ----

    def kept_positions(self, layer: int) -> Tensor:
        """int64 (B, Hkv, kept): the kept tokens of each head, ascending, counted from the row's first kept
        token.

        Rows that hold fewer end with -1.
        """
        return self._layer(layer).entries()[0]

    def scores(self, layer: int) -> Tensor:
        """float32 (B, Hkv, kept): the attention each kept token received so far, in kept_positions' order."""
        return self._layer(layer).entries()[1]

    def memory_bytes(self) -> int:
        """Bytes of memory of all layers: keys, values, scores, positions and counts, free slots included."""
        rotary = self.layers[0].rotary
        table = 0 if rotary is None else rotary.memory_bytes()
        return table + sum(layer.memory_bytes() for layer in self.layers)

    def plot(self, layer: int, row: int = 0) -> Figure:
        """A picture of what a layer keeps of a batch row: with record=True when which position was kept, else
        the kept positions with their scores.

        Returns a matplotlib Figure. Raises MissingExtraError without matplotlib, ValueError where there is
        nothing to draw.
        """
        from ..plots import plot_kept

        chosen = self._layer(layer)
        seen, kept, scores = moments(chosen, row)
        return plot_kept(seen, kept, scores=scores, title=f"kept positions, layer {chosen.index}")

    # ---- files ----

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything to a safetensors file, whole or not at all. Raises OSError."""
        self._check_whole(None)
        cache_file.write(path, self.layers)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        config: PreTrainedConfig | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> H2OCache:
        """The cache that was saved to path; it continues with the same bits.

        Args:
            config: the live config of the model that will use it, to check the cache against it here and at
                each forward. Without one, what does not fit shows at the first forward.
            device: where the model that will use it is; the CPU by default.

        Raises:
            ValueError: a file that is not a whole one of `save`, has unknown or inconsistent contents, or is
                of a model of another shape; says what. OSError: it cannot be read.
        """
        layers = cache_file.read(path)
        if device is not None:
            for layer in layers:
                move(layer, device)
        cache = cls.__new__(cls)
        Cache.__init__(cache, layers=list(layers))
        cache._config, cache._last = None, None
        if config is not None:
            cache._config = decoder_config(config)
            check_shape(path, layers, cache._config)
        return cache

    # ---- checks ----

    def _layer(self, index: int) -> H2OLayer:
        number = operator.index(index)
        if not 0 <= number < len(self.layers):
            raise ValueError(f"layer: expected from 0 to {len(self.layers) - 1}, got {number}")
        return self.layers[number]

    def _check_attention(self) -> None:
        name = getattr(self._config, "_attn_implementation", None)
        if name is not None and name != NAME:
            raise RuntimeError(
                f'past_key_values: an H2OCache needs a model whose attention is "{NAME}", got "{name}" in '
                "the config that it was given: call sinklora.patch(model) first, and make the cache with "
                "the live model.config"
            )

    def _check_whole(self, layer: H2OLayer | None, num_new: int = 0) -> None:
        """RuntimeError where an earlier forward stopped short of its end; layer: the one to be updated
        next.
        """
        last, first = self._last, self.layers[0]
        if last is not None and last.unfinished:
            if layer is not None and (layer.index == last.index + 1 or layer is last):
                raise RuntimeError(
                    f"past_key_values: the H2OCache's keys of layer {last.index} reached no attention of "
                    "sinklora's: the forward before broke off, or the model is not patched (call "
                    "sinklora.patch(model)), or changes keys between its cache and its attention; "
                    "cache.reset() starts anew"
                )
            raise RuntimeError(_broken(last.index))
        if layer is not None and layer is not first:
            expected, others = first.columns - num_new, [layer]
        else:
            expected, others = first.columns, self.layers
        for other in others:
            if other.columns != expected:
                raise RuntimeError(_broken(other.index))


def _broken(index: int) -> str:
    return (
        f"past_key_values: an earlier forward with this H2OCache broke off at layer {index}, so that its "
        "layers hold different tokens (or the model has fewer layers than the config says); start anew with "
        "cache.reset(), or go on from a copy made before"
    )
