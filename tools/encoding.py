"""Encoding examples as token ids and labels, with the loss on completions and assistant turns only."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastlora.tools.dataset import Conversation, Example, Instruction
from fastlora.tools.errors import UsageError

IGNORED = -100  # ignore_index of PyTorch's cross-entropy


@dataclass(frozen=True)
class Segment:
    """A part of an example's text.

    Attributes:
        in_loss: whether its tokens are labels.
        add_eos: whether to append the end-of-text token.
    """

    text: str
    in_loss: bool
    add_eos: bool = False


@dataclass(frozen=True)
class Encoded:
    """Encoded examples.

    Attributes:
        rows: `input_ids` and `labels` of each example.
        examples, cut, dropped: numbers of all examples, of truncated ones, and of those without labels.
    """

    rows: list[dict[str, list[int]]]
    examples: int
    cut: int
    dropped: int

    @property
    def longest(self) -> int:
        return max(len(row["input_ids"]) for row in self.rows)


def encode(examples: Sequence[Example], tokenizer: Any, max_length: int) -> Encoded:
    """Encode all examples, truncated to `max_length` tokens. Those without labels are dropped.

    Raises:
        UsageError: if none is left.
    """
    rows, cut, dropped = [], 0, 0
    for example in examples:
        row = encode_one(example, tokenizer)
        cut += len(row["input_ids"]) > max_length
        row = {name: values[:max_length] for name, values in row.items()}
        # A causal model does not predict the first token.
        if all(label == IGNORED for label in row["labels"][1:]):
            dropped += 1
        else:
            rows.append(row)
    if not rows:
        raise UsageError(f"--max-length {max_length}: no example has a token to learn within it; use a larger number")
    return Encoded(rows, len(examples), cut, dropped)


def encode_one(example: Example, tokenizer: Any) -> dict[str, list[int]]:
    """Return `input_ids` and `labels` of one example, not truncated."""
    templated = isinstance(example, Conversation) and bool(tokenizer.chat_template)
    ids = [] if templated else _bos(tokenizer)  # a chat template adds the beginning-of-text token itself
    labels = [IGNORED] * len(ids)
    for segment in segments(example, tokenizer):
        new = tokenizer(segment.text, add_special_tokens=False)["input_ids"]
        if segment.add_eos and tokenizer.eos_token_id is not None:
            new = [*new, tokenizer.eos_token_id]
        ids += new
        labels += new if segment.in_loss else [IGNORED] * len(new)
    return {"input_ids": ids, "labels": labels}


def segments(example: Example, tokenizer: Any) -> list[Segment]:
    """Split the text of an example where the loss starts and stops."""
    if isinstance(example, Instruction):
        separator = "" if example.prompt[-1].isspace() or example.completion[0].isspace() else "\n"
        return [Segment(example.prompt + separator, False), Segment(example.completion, True, add_eos=True)]
    if isinstance(example, Conversation):
        return _templated(example, tokenizer) if tokenizer.chat_template else _role_prefixed(example)
    return [Segment(example.text, True, add_eos=True)]


def _role_prefixed(example: Conversation) -> list[Segment]:
    """Return lines `User: ...` and `Assistant: ...`, for tokenizers without a chat template."""
    result = []
    for message in example.messages:
        is_assistant = message["role"] == "assistant"
        label = message["role"].capitalize() + ": "
        if is_assistant:
            result += [Segment(label, False), Segment(message["content"], True, add_eos=True), Segment("\n", False)]
        else:
            result.append(Segment(f"{label}{message['content']}\n", False))
    return result[:-1] if result[-1].text == "\n" else result


def _templated(example: Conversation, tokenizer: Any) -> list[Segment]:
    """Return the rendered chat template. An assistant turn is what the rendering with it adds to the one without it."""
    result, rendered = [], ""
    for index, message in enumerate(example.messages):
        if message["role"] != "assistant":
            continue
        before = _render(example, tokenizer, index, reply=True)
        after = _render(example, tokenizer, index + 1, reply=False)
        if not (before.startswith(rendered) and after.startswith(before)):
            raise UsageError(
                f"--data, line {example.line}: the model's chat template changes earlier turns, so the assistant turns "
                "cannot be located; give conversations with a single assistant turn at the end"
            )
        result += [Segment(before[len(rendered) :], False), Segment(after[len(before) :], True)]
        rendered = after
    return result


def _render(example: Conversation, tokenizer: Any, turns: int, *, reply: bool) -> str:
    try:
        return tokenizer.apply_chat_template(example.messages[:turns], tokenize=False, add_generation_prompt=reply)
    except Exception as problem:  # templates can raise anything
        raise UsageError(
            f"--data, line {example.line}: the model's chat template fails for these messages ({problem})"
        ) from problem


def _bos(tokenizer: Any) -> list[int]:
    """Return the beginning-of-text token if the tokenizer adds one to every text."""
    adds_bos = tokenizer.bos_token_id is not None and tokenizer.bos_token_id in tokenizer("")["input_ids"]
    return [tokenizer.bos_token_id] if adds_bos else []


def collator(tokenizer: Any, length: int) -> Any:
    """Return a collator that pads every batch to `length`, so that the model is compiled for a single shape."""
    from transformers import DataCollatorForSeq2Seq

    return DataCollatorForSeq2Seq(
        tokenizer, padding="max_length", max_length=length, label_pad_token_id=IGNORED, return_tensors="pt"
    )
