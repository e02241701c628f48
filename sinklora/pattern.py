"""The attention pattern as a value; what it means is defined once, in csrc/core/pattern.h."""
