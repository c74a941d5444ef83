"""BERT's tokenizer: text to the ids that BERT models take.

Source: Devlin et al. 2019 and the rules that the authors published with it: clean, lower-case, split at spaces and
punctuation, then the longest pieces of the vocabulary from the left.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import numpy as np

#: A word of more characters is unknown.
LONGEST_WORD = 100


class WordPieceTokenizer:
    """Made by `from_pretrained`; called with texts it gives the inputs of a BERT model.

    Args:
        vocabulary: token → id; has [UNK], [CLS], [SEP] and [PAD].
        lower_case: lower-case the text and take its accents off.
        split_chinese: every Chinese character is a word.
    """

    def __init__(self, vocabulary: dict[str, int], *, lower_case: bool = True, split_chinese: bool = True) -> None:
        missing = [token for token in ("[UNK]", "[CLS]", "[SEP]", "[PAD]") if token not in vocabulary]
        if missing:
            raise ValueError(f"the vocabulary lacks {', '.join(missing)}")
        self.vocabulary = vocabulary
        self.lower_case, self.split_chinese = lower_case, split_chinese
        self._known: dict[str, list[int]] = {}

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> WordPieceTokenizer:
        """The tokenizer in a checkpoint folder: vocab.txt, and tokenizer_config.json if there is one.

        Raises:
            OSError: no vocab.txt.
            ValueError: a vocabulary without BERT's special tokens.
        """
        folder = Path(path)
        # Not splitlines: a vocabulary has lines of unusual spaces.
        lines = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
        vocabulary = {line.rstrip("\r"): i for i, line in enumerate(lines) if line or i + 1 < len(lines)}
        options = {}
        if (folder / "tokenizer_config.json").is_file():
            options = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        return cls(
            vocabulary,
            lower_case=options.get("do_lower_case", True),
            split_chinese=options.get("tokenize_chinese_chars", True),
        )

    def __call__(self, texts: str | Iterable[str], max_length: int = 512) -> dict[str, np.ndarray]:
        """Encode texts as one batch.

        Args:
            texts: one text, or several.
            max_length: tokens of a row at most, [CLS] and [SEP] included; at least 2.

        Returns:
            input_ids and attention_mask, int64 (texts, longest row), padded on the right.
        """
        if max_length < 2:
            raise ValueError(f"max_length is {max_length}, and [CLS] and [SEP] alone take 2")
        first, last = self.vocabulary["[CLS]"], self.vocabulary["[SEP]"]
        rows = [
            [first, *self.encode(text)[: max_length - 2], last]
            for text in ([texts] if isinstance(texts, str) else texts)
        ]
        longest = max(map(len, rows), default=0)
        ids = np.full((len(rows), longest), self.vocabulary["[PAD]"], np.int64)
        mask = np.zeros((len(rows), longest), np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def encode(self, text: str) -> list[int]:
        """The ids of a text without [CLS] and [SEP]."""
        ids: list[int] = []
        for word in self._words(text):
            pieces = self._known.get(word)
            if pieces is None:
                pieces = self._known[word] = self._pieces(word)
            ids += pieces
        return ids

    def _words(self, text: str) -> list[str]:
        kept = []
        for char in text:
            category = unicodedata.category(char)
            if char in "\t\n\r" or category == "Zs":
                kept.append(" ")
            elif char not in "\0�" and not category.startswith("C"):
                kept.append(f" {char} " if self.split_chinese and _is_chinese(ord(char)) else char)
        text = "".join(kept)
        if self.lower_case:
            text = "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn").lower()
        return "".join(f" {char} " if _is_punctuation(char) else char for char in text).split()

    def _pieces(self, word: str) -> list[int]:
        if len(word) > LONGEST_WORD:
            return [self.vocabulary["[UNK]"]]
        ids: list[int] = []
        start = 0
        while start < len(word):
            for end in range(len(word), start, -1):
                found = self.vocabulary.get(word[start:end] if start == 0 else f"##{word[start:end]}")
                if found is not None:
                    break
            else:
                return [self.vocabulary["[UNK]"]]
            ids.append(found)
            start = end
        return ids


def _is_punctuation(char: str) -> bool:
    code = ord(char)
    ascii_mark = 33 <= code <= 47 or 58 <= code <= 64 or 91 <= code <= 96 or 123 <= code <= 126
    return ascii_mark or unicodedata.category(char).startswith("P")


def _is_chinese(code: int) -> bool:
    return (
        0x4E00 <= code <= 0x9FFF
        or 0x3400 <= code <= 0x4DBF
        or 0x20000 <= code <= 0x2A6DF
        or 0x2A700 <= code <= 0x2CEAF
        or 0xF900 <= code <= 0xFAFF
        or 0x2F800 <= code <= 0x2FA1F
    )
