"""What can go wrong in a command, sorted by who can put it right."""


class UsageError(Exception):
    """An argument or an input file is wrong; the one-line message names it and the remedy."""

    exit_code = 2


class RunError(Exception):
    """The arguments are fine, but the run could not be finished."""

    exit_code = 1


def one_line(problem: BaseException) -> str:
    """The message of `problem` on one line, cut to a length that still reads as a sentence."""
    text = " ".join(str(problem).split()) or type(problem).__name__
    return text if len(text) <= 300 else text[:297] + "..."
