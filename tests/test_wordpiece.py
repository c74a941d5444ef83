"""BERT's tokenizer against Transformers'."""

from __future__ import annotations

import pytest

from peftc.models import WordPieceTokenizer

TEXTS = [
    "A film of quiet, unhurried power -- and it's funny, too!",
    "don't can't won't I'm  tabs\tand\nnew lines",
    "Crème brûlée, naïve façade; ÀÉÎÕÜ ß Ǆ İstanbul",
    "unaffable antidisestablishmentarianism " + "x" * 150,
    "日本語のテキスト 中文 한국어 русский العربية עברית",
    "email@example.com http://t.co/x?y=1&z #hashtag @user $5.00 100% <b>",
    "emoji 😀👍🏽 and zero\u200bwidth \u00a0nbsp \ufeffbom \x00nul \ufffd soft\u00adhyphen",
    "“curly” ‘quotes’ — dash … ellipsis «guillemets» ¿qué?",
    "",
    "   ",
    "_underscore_ ^caret^ `tick` ~tilde~ |pipe| +plus+ =equals=",
]


@pytest.fixture(scope="module")
def tokenizer(minilm):
    return WordPieceTokenizer.from_pretrained(minilm)


def test_ids_are_those_of_transformers(tokenizer, minilm):
    reference = pytest.importorskip("transformers").BertTokenizerFast(str(minilm / "vocab.txt"), do_lower_case=True)
    for text in TEXTS:
        assert tokenizer.encode(text) == reference(text, add_special_tokens=False)["input_ids"], text


@pytest.mark.parametrize("length", [2, 5, 512])
def test_batches(tokenizer, minilm, length):
    reference = pytest.importorskip("transformers").BertTokenizerFast(str(minilm / "vocab.txt"), do_lower_case=True)
    want = reference(TEXTS, padding=True, truncation=True, max_length=length, return_tensors="np")
    got = tokenizer(TEXTS, max_length=length)
    assert got.keys() == {"input_ids", "attention_mask"}
    for name, values in got.items():
        assert (values == want[name]).all()


def test_one_text_and_none(tokenizer):
    assert tokenizer("good")["input_ids"].tolist() == [[101, 2204, 102]]
    assert tokenizer([])["input_ids"].shape == (0, 0)
    with pytest.raises(ValueError, match="max_length is 1"):
        tokenizer("x", max_length=1)


def test_a_vocabulary_that_is_not_berts(tmp_path):
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"lacks \[UNK\]"):
        WordPieceTokenizer.from_pretrained(tmp_path)
