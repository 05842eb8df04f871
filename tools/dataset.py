"""Reading training examples from JSON lines, with errors that name the line."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias

from fastlora.tools.problems import UsageError

ACCEPTED = '"prompt" and "completion", or "messages", or "text"'
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Instruction:
    """A prompt to read and a completion to learn."""

    line: int
    prompt: str
    completion: str


@dataclass(frozen=True)
class Conversation:
    """Chat turns, each a dict of `role` and `content`; what the assistant says is learned."""

    line: int
    messages: list[dict[str, str]]


@dataclass(frozen=True)
class PlainText:
    """Text that is learned from its beginning to its end."""

    line: int
    text: str


Example: TypeAlias = Instruction | Conversation | PlainText


def builtin_data() -> Path:
    """The instructions that are shipped with fastlora."""
    return Path(str(files("fastlora.tools") / "data" / "instructions.jsonl"))


def read_examples(path: Path) -> list[Example]:
    """The examples of a JSON-lines file, all of the one format which its first line has."""
    examples = [_example(path, line, value) for line, value in _objects(path)]
    if not examples:
        raise UsageError(f"--data {path}: the file holds no examples; give one JSON object per line with {ACCEPTED}")
    for example in examples:
        if type(example) is not type(examples[0]):
            raise _wrong(path, example.line, f"another format than line {examples[0].line}; use one format per file")
    return examples


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and JSON object of every line that is not blank."""
    # A JSON string may hold characters such as U+2028, at which str.splitlines would cut it in two.
    for line, text in enumerate(_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except json.JSONDecodeError as problem:
            raise _wrong(path, line, f"not valid JSON ({problem.msg} at column {problem.colno})") from problem
        except (RecursionError, ValueError) as problem:
            raise _wrong(path, line, "JSON nested too deeply or with a number too long to read") from problem
        if not isinstance(value, dict):
            raise _wrong(path, line, f"expected a JSON object with {ACCEPTED}")
        yield line, value


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError as problem:
        raise UsageError(f"--data {path}: no such file; give the path of a .jsonl file") from problem
    except OSError as problem:
        raise UsageError(
            f"--data {path}: cannot be read ({problem.strerror}); give a readable .jsonl file"
        ) from problem
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = data[: problem.start].count(b"\n") + 1
        raise _wrong(path, line, "not valid UTF-8; save the file as UTF-8") from problem


def _example(path: Path, line: int, value: dict[str, Any]) -> Example:
    if "messages" in value:
        return Conversation(line, _messages(path, line, value["messages"]))
    if "prompt" in value and "completion" in value:
        return Instruction(
            line, _string(path, line, "prompt", value["prompt"]), _string(path, line, "completion", value["completion"])
        )
    if "text" in value:
        return PlainText(line, _string(path, line, "text", value["text"]))
    found = ", ".join(f'"{key}"' for key in value) or "no fields"
    raise _wrong(path, line, f"found {found}, expected {ACCEPTED}")


def _messages(path: Path, line: int, messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise _wrong(path, line, '"messages" must be a list of objects with "role" and "content"')
    turns = []
    for message in messages:
        role = message.get("role")
        if role not in ROLES:
            raise _wrong(path, line, f'"role" is {role!r}, expected one of {", ".join(ROLES)}')
        turns.append({"role": role, "content": _string(path, line, "content", message.get("content"))})
    if not any(turn["role"] == "assistant" for turn in turns):
        raise _wrong(path, line, 'no message has the role "assistant", so there is nothing to learn')
    return turns


def _string(path: Path, line: int, field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(path, line, f'"{field}" must be a string, not {type(value).__name__}')
    if not value.strip():
        raise _wrong(path, line, f'"{field}" is empty; fill it in or remove the line')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as problem:
        raise _wrong(path, line, f'"{field}" holds half of a surrogate pair, which is not text') from problem
    return value


def _wrong(path: Path, line: int, what: str) -> UsageError:
    return UsageError(f"--data {path}, line {line}: {what}")
