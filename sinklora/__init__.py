"""Longer context for language models: training with SF-Attn in place of quadratic attention.

Importing sinklora imports nothing else: NumPy, the compiled extension, torch and transformers come when a
name that needs them is used, so that the command line shows its help at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import finetune, reference
    from .about import info
    from .cache.h2o_cache import H2OCache
    from .hf.patching import patch, patched, register, unpatch
    from .memory import memory_estimate
    from .ops import sf_attention
    from .pattern import SFPattern
    from .scores import attention_scores
    from .threads import get_num_threads, set_num_threads

__version__ = "0.1.0"

__all__ = [
    "H2OCache",
    "SFPattern",
    "__version__",
    "attention_scores",
    "finetune",
    "get_num_threads",
    "info",
    "memory_estimate",
    "patch",
    "patched",
    "reference",
    "register",
    "set_num_threads",
    "sf_attention",
    "unpatch",
]

# Public names by their modules, imported at first use.
_LAZY = {
    "H2OCache": "cache",
    "SFPattern": "pattern",
    "attention_scores": "scores",
    "get_num_threads": "threads",
    "info": "about",
    "memory_estimate": "memory",
    "patch": "hf",
    "patched": "hf",
    "register": "hf",
    "set_num_threads": "threads",
    "sf_attention": "ops",
    "unpatch": "hf",
}
_LAZY_MODULES = frozenset({"finetune", "reference"})


def __getattr__(name: str) -> Any:
    import importlib

    if name == "_C":
        value: Any = _extension()
    elif name in _LAZY_MODULES:
        value = importlib.import_module(f".{name}", __name__)
    elif name in _LAZY:
        value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def _extension() -> Any:
    """The compiled extension; `from . import _C` of any module comes by here."""
    import importlib

    try:
        return importlib.import_module("._C", __name__)
    except ImportError as error:
        raise ImportError(
            f"sinklora: its compiled extension cannot be imported from {__path__[0]} ({error}). If that is "
            "the source tree, start Python in another folder, so that the installed package is found, or "
            "build in place: python setup.py build_ext --inplace"
        ) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
