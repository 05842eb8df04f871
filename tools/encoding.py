"""Turning examples into token ids and labels, with the loss only on what the model should say."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastlora.tools.dataset import Conversation, Example, Instruction
from fastlora.tools.problems import UsageError

IGNORED = -100  # the label that PyTorch's cross entropy leaves out


@dataclass(frozen=True)
class Piece:
    """A stretch of an example's text. `ends` asks for the end-of-text token after it."""

    text: str
    learned: bool
    ends: bool = False


@dataclass(frozen=True)
class Encoded:
    """Rows of `input_ids` and `labels`, and what became of the examples on the way."""

    rows: list[dict[str, list[int]]]
    examples: int
    cut: int
    dropped: int

    @property
    def longest(self) -> int:
        return max(len(row["input_ids"]) for row in self.rows)


def encode(examples: Sequence[Example], tokenizer: Any, max_length: int) -> Encoded:
    """Encode all examples, cut to `max_length` tokens; those with no learned token left are dropped."""
    rows, cut, dropped = [], 0, 0
    for example in examples:
        row = encode_one(example, tokenizer)
        cut += len(row["input_ids"]) > max_length
        row = {name: values[:max_length] for name, values in row.items()}
        # The first label is never predicted: a causal model reads a token before it says one.
        if all(label == IGNORED for label in row["labels"][1:]):
            dropped += 1
        else:
            rows.append(row)
    if not rows:
        raise UsageError(f"--max-length {max_length}: no example has a token to learn within it; use a larger number")
    return Encoded(rows, len(examples), cut, dropped)


def encode_one(example: Example, tokenizer: Any) -> dict[str, list[int]]:
    """`input_ids` and `labels` of one example at full length."""
    templated = isinstance(example, Conversation) and bool(tokenizer.chat_template)
    # A chat template writes the beginning-of-text token itself.
    ids = [] if templated else _beginning(tokenizer)
    labels = [IGNORED] * len(ids)
    for piece in pieces(example, tokenizer):
        new = tokenizer(piece.text, add_special_tokens=False)["input_ids"]
        if piece.ends and tokenizer.eos_token_id is not None:
            new = [*new, tokenizer.eos_token_id]
        ids += new
        labels += new if piece.learned else [IGNORED] * len(new)
    return {"input_ids": ids, "labels": labels}


def pieces(example: Example, tokenizer: Any) -> list[Piece]:
    """The text of an example, split where learning starts and stops."""
    if isinstance(example, Instruction):
        seam = "" if example.prompt[-1].isspace() or example.completion[0].isspace() else "\n"
        return [Piece(example.prompt + seam, False), Piece(example.completion, True, ends=True)]
    if isinstance(example, Conversation):
        return _templated(example, tokenizer) if tokenizer.chat_template else _role_prefixed(example)
    return [Piece(example.text, True, ends=True)]


def _role_prefixed(example: Conversation) -> list[Piece]:
    """`User: ...` and `Assistant: ...` lines, for tokenizers without a chat template."""
    result = []
    for message in example.messages:
        learned = message["role"] == "assistant"
        label = message["role"].capitalize() + ": "
        if learned:
            result += [Piece(label, False), Piece(message["content"], True, ends=True), Piece("\n", False)]
        else:
            result.append(Piece(f"{label}{message['content']}\n", False))
    return result[:-1] if result[-1].text == "\n" else result


def _templated(example: Conversation, tokenizer: Any) -> list[Piece]:
    """The template's text; each assistant turn is what its rendering adds to that of the turns before it."""
    result, done = [], ""
    for index, message in enumerate(example.messages):
        if message["role"] != "assistant":
            continue
        before = _render(example, tokenizer, index, reply=True)
        after = _render(example, tokenizer, index + 1, reply=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise UsageError(
                f"--data, line {example.line}: the model's chat template rewrites earlier turns, so the answers "
                "cannot be told apart; give conversations with a single assistant turn at the end"
            )
        result += [Piece(before[len(done) :], False), Piece(after[len(before) :], True)]
        done = after
    return result


def _render(example: Conversation, tokenizer: Any, turns: int, *, reply: bool) -> str:
    try:
        return tokenizer.apply_chat_template(example.messages[:turns], tokenize=False, add_generation_prompt=reply)
    except Exception as problem:  # templates are programs of their own and may raise anything
        raise UsageError(
            f"--data, line {example.line}: the model's chat template refuses these messages ({problem})"
        ) from problem


def _beginning(tokenizer: Any) -> list[int]:
    """The beginning-of-text token for tokenizers that put one before every text."""
    begins = tokenizer.bos_token_id is not None and tokenizer.bos_token_id in tokenizer("")["input_ids"]
    return [tokenizer.bos_token_id] if begins else []


def collator(tokenizer: Any, length: int) -> Any:
    """A collator that pads every batch to `length`, so that the model is compiled for one shape only."""
    from transformers import DataCollatorForSeq2Seq

    return DataCollatorForSeq2Seq(
        tokenizer, padding="max_length", max_length=length, label_pad_token_id=IGNORED, return_tensors="pt"
    )
