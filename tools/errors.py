"""Exceptions that a command reports as one line, with its exit code."""


class UsageError(Exception):
    """An argument or an input file is invalid; the message names it and the remedy."""

    exit_code = 2


class RunError(Exception):
    """The arguments are valid, but the run failed."""

    exit_code = 1


def one_line(problem: BaseException) -> str:
    """Return an exception's message on one line, cut to 300 characters; its type if it has no message."""
    text = " ".join(str(problem).split()) or type(problem).__name__
    return text if len(text) <= 300 else text[:297] + "..."
