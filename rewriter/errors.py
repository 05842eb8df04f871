"""Errors that users see; each says what to do."""


class FastLoRAError(Exception):
    """Base of every error that fastlora raises on purpose."""


class RuleError(FastLoRAError):
    """A rewrite rule is malformed; raised where the rule is defined, with its source line."""


class StrictError(FastLoRAError):
    """`strict=True` and a site that is a candidate for fusion stayed as it was."""
