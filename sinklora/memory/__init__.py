"""How much memory training takes, before it is run."""

from __future__ import annotations

from .estimate import memory_estimate

__all__ = ["memory_estimate"]
