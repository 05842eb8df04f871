"""Write `api.md` from the docstrings of what users call: `python docs/make_api.py`.

A test fails if the page is out of date.
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fastlora
from fastlora.frontend.dynamo_backend import fastlora_backend
from fastlora.graph.canonical_ops import spell
from fastlora.kernels import register_op
from fastlora.kernels.core.implementations import only
from fastlora.kernels.core.semantic_op import Policy, SemanticOp
from fastlora.match import dsl
from fastlora.match.match import Match, dtype_of, tag_of
from fastlora.match.pattern import Pattern
from fastlora.match.rule import Rule
from fastlora.tools import cli

PAGE = Path(__file__).with_name("api.md")
HEAD = """\
# API

Generated from docstrings by `python docs/make_api.py`; edit those, and run it again.

Everything in the first three parts is an attribute of `fastlora`, loaded at its first use: `import fastlora` imports
nothing else. The rest is imported from the modules that the headings name.
"""
PATTERNS = ("either", "cast", "widened", "kept", "seeded", "raised", "cat", "flatten_pairs")
PATTERNS += ("first_half", "second_half", "evens", "odds", "piece", "Op", "Param", "Scalar", "Constant", "Opt")


def page() -> str:
    lines = [HEAD, "## Models", ""]
    for name in ("compile", "disable", "explain", "report", "check", "default_rules"):
        lines += described(f"fastlora.{name}", getattr(fastlora, name))
    lines += ['### `torch.compile(model, backend="fastlora", options=..., mode=...)`', ""]
    lines += [*prose(fastlora_backend.__doc__), ""]
    lines += ["## Results", ""]
    lines += described("fastlora.Report", fastlora.Report, "to_json", "to_html", "program")
    for name in ("Coverage", "Site", "Miss"):
        lines += described(f"fastlora.{name}", getattr(fastlora, name))
    lines += described("fastlora.Agreement", fastlora.Agreement)
    lines += ["## Errors", ""]
    for name in ("FastLoRAError", "RuleError", "StrictError"):
        lines += described(f"fastlora.{name}", getattr(fastlora, name))
    lines += ["## Rules", "", "See [writing-rules.md](writing-rules.md).", ""]
    for name in ("rule", "fuse", "group"):
        lines += described(f"fastlora.{name}", getattr(fastlora, name))
    lines += described("fastlora.match.rule.Rule", Rule, "where", "otherwise")
    lines += described("fastlora.match.rule.dtype_of", dtype_of)
    lines += described("fastlora.match.rule.tag_of", tag_of)
    lines += described("fastlora.match.rule.Match", Match, "value", "tensor", "dtype", "tag", "slice_of")
    lines += described("fastlora.spelling.spell", spell)
    lines += ["### `fastlora.pattern`", "", *prose(dsl.__doc__), "", "| name | |", "| --- | --- |"]
    lines += [f"| `{name}` | {summary(getattr(dsl, name))} |" for name in PATTERNS]
    lines += [f"| `pattern.named(name)` | {summary(Pattern.named)} |", ""]
    lines += ["## Ops", "", "See [writing-ops.md](writing-ops.md).", ""]
    lines += described("fastlora.kernels.register_op", register_op)
    lines += described("fastlora.kernels.core.semantic_op.SemanticOp", SemanticOp, "__call__", "implementation")
    lines += described("fastlora.kernels.core.semantic_op.Policy", Policy)
    lines += described("fastlora.kernels.core.implementations.only", only)
    lines += ["## Commands", "", "`fastlora COMMAND --help` lists the options.", "", "| command | |", "| --- | --- |"]
    for prefix, app in (("fastlora", cli.app), ("fastlora bench", cli.bench)):
        for command in app.registered_commands:
            lines.append(f"| `{prefix} {command.callback.__name__}` | {summary(command.callback)} |")
    return "\n".join(lines) + "\n"


def described(name: str, value: Any, *methods: str) -> Iterator[str]:
    """A heading, the signature of a function, the docstring, and the same of some methods."""
    yield from (f"### `{name}`", "")
    if not isinstance(value, type):
        yield from signature(name.rpartition(".")[2], value)
    yield from (*prose(value.__doc__), "")
    for method in methods:
        yield from (f"#### `{name.rpartition('.')[2]}.{method}`", "")
        yield from signature(method, getattr(value, method))
        if (text := getattr(value, method).__doc__) is not None:
            yield from (*prose(text), "")


def signature(name: str, function: Callable[..., Any]) -> Iterator[str]:
    """The signature as a block, one parameter a line if it is long."""
    parts, star = [], False
    for each in inspect.signature(function).parameters.values():
        if each.name == "self":
            continue
        text = {each.VAR_POSITIONAL: "*", each.VAR_KEYWORD: "**"}.get(each.kind, "") + each.name
        if each.kind is each.VAR_POSITIONAL:
            star = True
        if each.kind is each.KEYWORD_ONLY and not star:
            parts.append("*")
            star = True
        if each.annotation is not each.empty:
            text += f": {annotation(each.annotation)}"
        if each.default is not each.empty:
            text += f" = {each.default!r}"
        parts.append(text)
    returned = inspect.signature(function).return_annotation
    end = "" if returned is inspect.Signature.empty else f" -> {annotation(returned)}"
    line = f"{name}({', '.join(parts)}){end}"
    block = [line] if len(line) <= 100 else [f"{name}(", *(f"    {part}," for part in parts), f"){end}"]
    yield from ("```", *block, "```", "")


def annotation(value: Any) -> str:
    return value if isinstance(value, str) else getattr(value, "__name__", str(value))


def prose(text: str | None) -> Iterator[str]:
    """A docstring as Markdown: sections of Google's style become lists, indented code becomes blocks."""
    text = "\n" + inspect.cleandoc(text or "") + "\n"
    parts = re.split(r"\n(Args|Attributes|Returns|Raises):\n", text)
    yield from paragraphs(parts[0])
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        section, rest = [], []
        for line in textwrap.dedent(body).splitlines():
            (rest if rest or (line and not body.startswith(" ")) else section).append(line)
        yield from ("", f"**{title}**", "", *items("\n".join(section), title))


def paragraphs(text: str) -> Iterator[str]:
    previous = ""
    for line in text.strip().splitlines():
        if line.startswith("    ") != previous.startswith("    ") and line and previous:
            yield ""
        yield line
        previous = line


def items(text: str, title: str) -> Iterator[str]:
    """The entries of a section, each with the lines that are indented below it."""
    found: list[list[str]] = []
    for line in text.strip().splitlines():
        if line.startswith(" ") and found:
            found[-1].append(line.strip())
        elif line:
            found.append([line.strip()])
    for lines in found:
        entry = " ".join(lines)
        name, colon, rest = entry.partition(": ")
        if title == "Returns" or not colon:
            yield entry
        else:
            yield f"- `{name}`: {rest}"


def summary(value: Any) -> str:
    return " ".join(inspect.cleandoc(value.__doc__ or "").split("\n\n")[0].split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}", file=sys.stderr)
