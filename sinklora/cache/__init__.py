"""The H2O cache for transformers: the class that users hold, and a layer's memory behind it."""

from .h2o_cache import H2OCache

__all__ = ["H2OCache"]
