"""The built-in model is reproducible, and its tokenizer exact."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastlora.tools.builtin_model import build_model, build_tokenizer

TEXTS = [
    "plain",
    "  two  spaces \n\ttab\r\n",
    "Grüße, 東京, 🙂, \u0301",
    "".join(map(chr, range(256))),
    "don't , stop . <|not special|>",
]


def test_decoding_returns_the_encoded_text() -> None:
    tokenizer = build_tokenizer()
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(text.encode("utf-8"))
        assert tokenizer.decode(ids) == text


def test_the_tokenizer_can_be_saved_and_loaded(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == len(tokenizer) == 259
    for text in TEXTS:
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True) == text
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == (
        tokenizer.bos_token,
        tokenizer.eos_token,
        tokenizer.pad_token,
    )


def test_the_weights_depend_only_on_the_seed() -> None:
    first, again, other = (build_model(seed, hidden_size=16, layers=1).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_the_model_can_be_saved_and_loaded(tmp_path: Path) -> None:
    model = build_model(0, hidden_size=16, layers=1).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(12).reshape(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
