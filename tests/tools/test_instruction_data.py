"""Properties of the data set that is shipped with fastlora."""

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


def test_the_data_set_has_at_least_240_instructions(examples: list[Instruction]) -> None:
    assert len(examples) >= 240
    assert len(examples) == len(read_examples(builtin_data()))


def test_prompts_and_completions_are_unique(examples: list[Instruction]) -> None:
    assert len({example.prompt.lower() for example in examples}) == len(examples)
    assert len({example.completion.lower() for example in examples}) == len(examples)


def test_text_is_normalized_and_has_no_control_characters(examples: list[Instruction]) -> None:
    for example in examples:
        for text in (example.prompt, example.completion):
            assert text == text.strip()
            assert text == unicodedata.normalize("NFC", text)
            assert all(character == "\n" or unicodedata.category(character)[0] != "C" for character in text), text


def test_every_line_has_only_prompt_and_completion() -> None:
    for line in builtin_data().read_text(encoding="utf-8").splitlines():
        assert set(json.loads(line)) == {"prompt", "completion"}


def test_most_examples_fit_the_default_length(examples: list[Instruction]) -> None:
    tokenizer = build_tokenizer()
    lengths = [len(encode_one(example, tokenizer)["input_ids"]) for example in examples]
    assert sum(length > Settings().max_length for length in lengths) <= len(lengths) // 50


def test_the_license_is_shipped_with_the_data() -> None:
    assert "CC0-1.0" in (files("fastlora.tools") / "data" / "LICENSE").read_text(encoding="utf-8")
