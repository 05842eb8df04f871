"""Reading the three data formats, and errors with the line number for invalid lines."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastlora.tools.dataset import Conversation, Instruction, PlainText, read_examples
from fastlora.tools.errors import UsageError

GOOD = {"prompt": "Say hello.", "completion": "Hello."}
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_prompts_and_completions_are_read_with_line_numbers(tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", GOOD, "", {"prompt": "Add 1 and 2.", "completion": "3", "id": 7})
    assert read_examples(data) == [Instruction(1, "Say hello.", "Hello."), Instruction(3, "Add 1 and 2.", "3")]


def test_messages_are_read(tmp_path: Path) -> None:
    assert read_examples(write(tmp_path / "data.jsonl", {"messages": TURNS})) == [Conversation(1, TURNS)]


def test_text_is_read(tmp_path: Path) -> None:
    assert read_examples(write(tmp_path / "data.jsonl", {"text": "Once"})) == [PlainText(1, "Once")]


def test_line_separators_inside_strings_do_not_split_a_line(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "one\u2028two"}\r\n{"text": "three"}', encoding="utf-8")
    assert read_examples(data) == [PlainText(1, "one\u2028two"), PlainText(2, "three")]


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a"}', encoding="utf-8-sig")
    assert read_examples(data) == [PlainText(1, "a")]


@pytest.mark.parametrize(
    ("second_line", "expected"),
    [
        ('{"prompt": "a", ', "not valid JSON"),
        ('["a", "b"]', "expected a JSON object"),
        ({"question": "a", "answer": "b"}, 'found "question", "answer", expected "prompt" and "completion"'),
        ({"prompt": "a"}, 'found "prompt", expected "prompt" and "completion"'),
        ({}, "found no fields"),
        ({"prompt": "a", "completion": 3}, '"completion" must be a string, not int'),
        ({"prompt": None, "completion": "b"}, '"prompt" must be a string, not NoneType'),
        ({"prompt": "a", "completion": "  "}, '"completion" is empty'),
        ('{"prompt": "a", "completion": "\\ud800"}', "surrogate"),
        ({"text": "a"}, "another format than line 1"),
        ({"messages": "a"}, '"messages" must be a list'),
        ({"messages": [{"role": "robot", "content": "a"}]}, "\"role\" is 'robot'"),
        ({"messages": [{"role": "user"}]}, '"content" must be a string'),
        ({"messages": [{"role": "user", "content": "a"}]}, "nothing to learn"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, '"role" is'),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_errors_name_the_invalid_line_and_the_reason(tmp_path: Path, second_line: Any, expected: str) -> None:
    data = write(tmp_path / "data.jsonl", GOOD, second_line)
    with pytest.raises(UsageError) as problem:
        read_examples(data)
    assert f"--data {data}, line 2: " in str(problem.value)
    assert expected in str(problem.value)


def test_errors_name_a_line_that_is_not_utf8(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(UsageError, match="line 2: not valid UTF-8"):
        read_examples(data)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_examples_is_an_error(tmp_path: Path, content: str) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(content)
    with pytest.raises(UsageError, match="holds no examples"):
        read_examples(data)


def test_missing_files_and_folders_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_examples(tmp_path / "missing.jsonl")
    with pytest.raises(UsageError, match="cannot be read"):
        read_examples(tmp_path)
