"""The shipped data set keeps what its users count on."""

import json
import unicodedata
from importlib.resources import files

import pytest

from fastlora.tools.builtin_model import build_tokenizer
from fastlora.tools.dataset import Instruction, builtin_data, read_examples
from fastlora.tools.encoding import encode_one
from fastlora.tools.settings import Settings


@pytest.fixture(scope="module")
def examples() -> list[Instruction]:
    found = read_examples(builtin_data())
    return [example for example in found if isinstance(example, Instruction)]


def test_the_data_set_has_enough_instructions_and_nothing_else(examples: list[Instruction]) -> None:
    assert len(examples) >= 240
    assert len(examples) == len(read_examples(builtin_data()))


def test_no_prompt_and_no_completion_occurs_twice(examples: list[Instruction]) -> None:
    assert len({example.prompt.lower() for example in examples}) == len(examples)
    assert len({example.completion.lower() for example in examples}) == len(examples)


def test_text_is_clean(examples: list[Instruction]) -> None:
    for example in examples:
        for text in (example.prompt, example.completion):
            assert text == text.strip()
            assert text == unicodedata.normalize("NFC", text)
            assert all(character == "\n" or unicodedata.category(character)[0] != "C" for character in text), text


def test_every_line_holds_the_two_documented_fields_only() -> None:
    for line in builtin_data().read_text(encoding="utf-8").splitlines():
        assert set(json.loads(line)) == {"prompt", "completion"}


def test_nearly_all_examples_fit_the_default_length(examples: list[Instruction]) -> None:
    tokenizer = build_tokenizer()
    lengths = [len(encode_one(example, tokenizer)["input_ids"]) for example in examples]
    assert sum(length > Settings().max_length for length in lengths) <= len(lengths) // 50


def test_the_licence_travels_with_the_data() -> None:
    assert "CC0-1.0" in (files("fastlora.tools") / "data" / "LICENSE").read_text(encoding="utf-8")
