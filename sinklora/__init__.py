"""Longer context for language models: training with SF-Attn in place of quadratic attention.

Importing sinklora needs NumPy only; torch and transformers are imported when a name that needs them is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    from . import _C  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"sinklora: its compiled extension cannot be imported from {__path__[0]} ({error}). If that is the "
        "source tree, start Python in another folder, so that the installed package is found, or build in "
        "place: python setup.py build_ext --inplace"
    ) from error

from .about import info
from .ops import sf_attention
from .pattern import SFPattern
from .scores import attention_scores
from .threads import get_num_threads, set_num_threads

if TYPE_CHECKING:
    from . import finetune, reference
    from .cache.h2o_cache import H2OCache
    from .hf.patching import patch, patched, register, unpatch

__version__ = "0.1.0"

__all__ = [
    "H2OCache",
    "SFPattern",
    "__version__",
    "attention_scores",
    "finetune",
    "get_num_threads",
    "info",
    "patch",
    "patched",
    "reference",
    "register",
    "set_num_threads",
    "sf_attention",
    "unpatch",
]

# Names whose modules import torch or transformers: name -> module, resolved at first use.
_LAZY = {"H2OCache": "cache", "register": "hf", "patch": "hf", "unpatch": "hf", "patched": "hf"}
_LAZY_MODULES = frozenset({"reference", "finetune"})


def __getattr__(name: str) -> Any:
    import importlib

    if name in _LAZY_MODULES:
        value: Any = importlib.import_module(f".{name}", __name__)
    elif name in _LAZY:
        value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
