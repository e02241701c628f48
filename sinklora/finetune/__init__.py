"""Extending a model's context: `prepare` makes a model ready for anyone's Trainer."""

from __future__ import annotations

from .prepare import prepare
from .rope import extend_positions, plan_positions
from .throughput import ThroughputCallback

__all__ = ["ThroughputCallback", "extend_positions", "plan_positions", "prepare"]
