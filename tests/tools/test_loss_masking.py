"""Labels of encoded examples: only completions and assistant turns are in the loss."""

from typing import Any

import pytest

from fastlora.tools.builtin_model import build_tokenizer
from fastlora.tools.dataset import Conversation, Example, Instruction, PlainText
from fastlora.tools.encoding import IGNORED, collator, encode, encode_one
from fastlora.tools.errors import UsageError

CHATML = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Bye."},
]


@pytest.fixture
def tokenizer() -> Any:
    return build_tokenizer()


def text_and_labels(example: Example, tokenizer: Any) -> tuple[str, str]:
    """Return the text with special tokens, and the text of the labels with a dot for each ignored token."""
    row = encode_one(example, tokenizer)
    assert len(row["input_ids"]) == len(row["labels"])
    assert all(label in (IGNORED, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))
    labels = [tokenizer.decode([label]) if label != IGNORED else "." for label in row["labels"]]
    return tokenizer.decode(row["input_ids"]), "".join(labels)


def test_only_the_completion_has_labels(tokenizer: Any) -> None:
    text, labels = text_and_labels(Instruction(1, "1+1?", "two"), tokenizer)
    assert text == "<|begin|>1+1?\ntwo<|end|>"
    assert labels == "......two<|end|>"


@pytest.mark.parametrize(("prompt", "completion"), [("1+1? ", "two"), ("1+1?", " two")])
def test_no_newline_is_added_next_to_white_space(tokenizer: Any, prompt: str, completion: str) -> None:
    text, labels = text_and_labels(Instruction(1, prompt, completion), tokenizer)
    assert text == "<|begin|>1+1? two<|end|>"
    assert labels.lstrip(".") == completion + "<|end|>"


def test_all_tokens_of_plain_text_have_labels(tokenizer: Any) -> None:
    text, labels = text_and_labels(PlainText(1, "abc"), tokenizer)
    assert (text, labels) == ("<|begin|>abc<|end|>", ".abc<|end|>")


def test_only_assistant_turns_have_labels_without_a_chat_template(tokenizer: Any) -> None:
    text, labels = text_and_labels(Conversation(1, TURNS[1:]), tokenizer)
    assert text == "<|begin|>User: Hi\nAssistant: Yes?<|end|>\nUser: Bye\nAssistant: Bye.<|end|>"
    assert labels.replace(".", " ").split() == ["Yes?<|end|>", "Bye", "<|end|>"]
    assert labels.endswith("Bye.<|end|>")


def test_only_assistant_turns_have_labels_with_a_chat_template(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    text, labels = text_and_labels(Conversation(1, TURNS), tokenizer)
    assert text == "<system>Be brief.</><user>Hi</><assistant>Yes?</><user>Bye</><assistant>Bye.</>"
    before = len("<system>Be brief.</><user>Hi</><assistant>")
    between = len("<user>Bye</><assistant>")
    assert labels == "." * before + "Yes?</>" + "." * between + "Bye.</>"


def test_a_template_that_changes_earlier_turns_is_an_error(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages | length }}" + CHATML
    with pytest.raises(UsageError, match="line 4: the model's chat template changes earlier turns"):
        encode_one(Conversation(4, TURNS), tokenizer)


def test_examples_are_truncated_and_those_without_labels_dropped(tokenizer: Any) -> None:
    encoded = encode([Instruction(1, "a", "bcd"), Instruction(2, "a long prompt", "b")], tokenizer, 5)
    assert (encoded.examples, encoded.cut, encoded.dropped) == (2, 2, 1)
    assert [tokenizer.decode(row["input_ids"]) for row in encoded.rows] == ["<|begin|>a\nbc"]


def test_it_is_an_error_if_no_example_has_labels(tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="--max-length 3: no example has a token to learn"):
        encode([Instruction(1, "a long prompt", "b")], tokenizer, 3)


def test_padding_is_masked_and_has_no_labels(tokenizer: Any) -> None:
    rows = [encode_one(PlainText(1, text), tokenizer) for text in ("ab", "a")]
    batch = collator(tokenizer, 6)(rows)
    begin, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    a, b = tokenizer("ab", add_special_tokens=False)["input_ids"]
    assert batch["input_ids"].tolist() == [[begin, a, b, end, pad, pad], [begin, a, end, pad, pad, pad]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]]
    x = IGNORED
    assert batch["labels"].tolist() == [[x, a, b, end, x, x], [x, a, end, x, x, x]]
