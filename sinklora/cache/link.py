"""How a cache's layer and the attention function meet: by the key tensor that the cache returned.

transformers hands its attention function no cache. It does hand it the very tensor that `Cache.update`
returned: the layer leaves a note with that tensor, and the attention function takes it. No hook on the model
is needed. One note a thread: two threads may run one model, each with its own cache.
"""

from __future__ import annotations

import weakref
from threading import get_ident
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .layer import H2OLayer

# Thread -> (layer, key), held weakly, so that a forward that breaks off keeps no keys alive. A plain dict:
# under torch.compile its emptiness is guarded on, and a model without such a cache compiles as if this were
# not here.
_notes: dict[int, tuple[weakref.ref[H2OLayer], weakref.ref[torch.Tensor]]] = {}


def refuse_graphs() -> None:
    """RuntimeError within torch.compile or torch.export."""
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "past_key_values: an H2OCache changes with every token, which a compiled graph cannot follow; "
            "run "
            "the model without torch.compile (compiled_model._orig_mod is the model itself), or use a "
            "DynamicCache"
        )


def leave(layer: H2OLayer, key: torch.Tensor) -> None:
    """Notes that the next attention call with this key tensor is for layer."""
    thread = get_ident()
    # A note that nobody takes goes with its key: it must not stand in the way of graphs later.
    _notes[thread] = weakref.ref(layer), weakref.ref(key, lambda gone: _forget(thread, gone))


def _forget(thread: int, gone: weakref.ref[torch.Tensor]) -> None:
    note = _notes.get(thread)
    if note is not None and note[1] is gone:
        del _notes[thread]


def take(key: torch.Tensor) -> H2OLayer | None:
    """The layer that left a note with this very key tensor in this thread, or None. The note is gone then."""
    if not _notes:
        return None
    refuse_graphs()
    note = _notes.get(get_ident())
    if note is None or note[1]() is not key:
        return None
    del _notes[get_ident()]
    return note[0]()
