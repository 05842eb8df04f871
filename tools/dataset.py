"""Reading training examples from JSON Lines files, with errors that name the line."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias

from fastlora.tools.errors import UsageError

ACCEPTED = '"prompt" and "completion", or "messages", or "text"'
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Instruction:
    """A prompt and a completion; the loss is on the completion."""

    line: int
    prompt: str
    completion: str


@dataclass(frozen=True)
class Conversation:
    """Chat turns, each a dict of `role` and `content`; the loss is on the assistant's turns."""

    line: int
    messages: list[dict[str, str]]


@dataclass(frozen=True)
class PlainText:
    """Text with the loss on all tokens."""

    line: int
    text: str


Example: TypeAlias = Instruction | Conversation | PlainText


def builtin_data() -> Path:
    """Return the path of the instruction data that is shipped with fastlora."""
    return Path(str(files("fastlora.tools") / "data" / "instructions.jsonl"))


def read_examples(path: Path) -> list[Example]:
    """Read the examples of a JSON Lines file.

    Raises:
        UsageError: if the file cannot be read or is empty, or a line is invalid or has another format than the first.
    """
    examples = [_example(path, line, value) for line, value in _objects(path)]
    if not examples:
        raise UsageError(f"--data {path}: the file holds no examples; give one JSON object per line with {ACCEPTED}")
    for example in examples:
        if type(example) is not type(examples[0]):
            raise _error(path, example.line, f"another format than line {examples[0].line}; use one format per file")
    return examples


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number and JSON object of every line that is not blank."""
    # str.splitlines would also split at characters such as U+2028, which a JSON string may contain.
    for line, text in enumerate(_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except json.JSONDecodeError as problem:
            raise _error(path, line, f"not valid JSON ({problem.msg} at column {problem.colno})") from problem
        except (RecursionError, ValueError) as problem:
            raise _error(path, line, "JSON nested too deeply or with a number too long to read") from problem
        if not isinstance(value, dict):
            raise _error(path, line, f"expected a JSON object with {ACCEPTED}")
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
        raise _error(path, line, "not valid UTF-8; save the file as UTF-8") from problem


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
    raise _error(path, line, f"found {found}, expected {ACCEPTED}")


def _messages(path: Path, line: int, messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise _error(path, line, '"messages" must be a list of objects with "role" and "content"')
    turns = []
    for message in messages:
        role = message.get("role")
        if role not in ROLES:
            raise _error(path, line, f'"role" is {role!r}, expected one of {", ".join(ROLES)}')
        turns.append({"role": role, "content": _string(path, line, "content", message.get("content"))})
    if not any(turn["role"] == "assistant" for turn in turns):
        raise _error(path, line, 'no message has the role "assistant", so there is nothing to learn')
    return turns


def _string(path: Path, line: int, field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _error(path, line, f'"{field}" must be a string, not {type(value).__name__}')
    if not value.strip():
        raise _error(path, line, f'"{field}" is empty; fill it in or remove the line')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as problem:
        raise _error(path, line, f'"{field}" holds half of a surrogate pair, which is not text') from problem
    return value


def _error(path: Path, line: int, problem: str) -> UsageError:
    return UsageError(f"--data {path}, line {line}: {problem}")
