"""Decorators and attributes of rules, for rule authors: `from fastlora.rule import dtype_of, rule, tag_of`."""

from fastlora.match.rule import Match, dtype_of, fuse, group, rule, tag_of

__all__ = ["Match", "dtype_of", "fuse", "group", "rule", "tag_of"]
