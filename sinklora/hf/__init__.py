"""transformers: the attention name "sinklora", its masks, and switching a model to it and back."""

from .patching import patch, patched, register, unpatch

__all__ = ["patch", "patched", "register", "unpatch"]
