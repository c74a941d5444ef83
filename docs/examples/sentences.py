"""Four sets of sentences that people have rated, each from another kind of text: what the demo trains on.

Source: Hutto and Gilbert, "VADER: a parsimonious rule-based model for sentiment analysis of social media text", ICWSM 2014
(MIT licence). They are part of the source distribution of the package vaderSentiment, which pip fetches once into `.cache/`.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "sentences"
PACKAGE, ARCHIVE = "vaderSentiment==3.3.2", "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
FILES = {
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "products": "amazonReviewSnippets_GroundTruth.txt",
    "news": "nytEditorialSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}
DOMAINS = tuple(FILES)
#: Sentences whose mean rating (from -4 to 4) is nearer to 0 say nothing clear and are left out.
CLEAR = 0.5
#: Of each domain, for measuring; no training sees them.
HELD_OUT = 300


class FetchError(Exception):
    """The sentences cannot be had; the text says why."""


def fetch() -> Path:
    """The archive, downloaded if it is not there yet.

    Raises:
        FetchError: pip cannot download it, or it is not what it should be.
    """
    path = CACHE / ARCHIVE
    if not path.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "download", "--no-deps"]
        command += ["--no-binary", ":all:", "--dest", str(CACHE), PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not path.is_file():
            reason = done.stderr.strip().splitlines()[-1:] or ["pip has downloaded something else"]
            raise FetchError(f"pip cannot download the sentences ({PACKAGE}): {reason[0]}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        raise FetchError(f"{path} has the SHA-256 {found}, not {SHA256}; remove it to download it again")
    return path


def read() -> dict[str, list[tuple[str, int]]]:
    """domain → (sentence, 1 if people find it positive, 0 if negative), in a fixed random order."""
    sentences: dict[str, list[tuple[str, int]]] = {}
    with tarfile.open(fetch()) as outer:
        member = outer.extractfile(INNER)
        assert member is not None
        with tarfile.open(fileobj=io.BytesIO(member.read())) as inner:
            for i, (domain, name) in enumerate(FILES.items()):
                file = inner.extractfile(f"hutto_ICWSM_2014/{name}")
                assert file is not None
                rows = (line.split("\t") for line in file.read().decode("utf-8", "replace").splitlines())
                rated = [(row[2].strip(), float(row[1])) for row in rows if len(row) == 3]
                clear = [(text, int(rating > 0)) for text, rating in rated if abs(rating) >= CLEAR]
                order = np.random.default_rng(i).permutation(len(clear))
                sentences[domain] = [clear[j] for j in order]
    return sentences


def split(sentences: list[tuple[str, int]], train: int) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """(those to train on, those held out). Copies of a held-out sentence are not trained on."""
    held_out = sentences[:HELD_OUT]
    known = {text for text, _ in held_out}
    rest = [row for row in sentences[HELD_OUT:] if row[0] not in known]
    return rest[:train], held_out
