"""New operations and new ways to write known ones, for rule authors: `from fastlora.spelling import spell`."""

from fastlora.graph.canonical_ops import spell

__all__ = ["spell"]
