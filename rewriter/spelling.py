"""Declaring operations and further spellings of them, for rule authors: `from fastlora.spelling import spell`."""

from fastlora.graph.canonical_ops import spell

__all__ = ["spell"]
