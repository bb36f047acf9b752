"""From documents to packed token sequences, split into train and validation by document.

Documents are laid end to end, each closed by the end-of-text token, and cut into sequences of
`context` tokens, so no position is padding. Every token carries the number of its document;
a run of one number inside a sequence is a *segment*. Attention stays inside a segment, and position
ids restart with it: see `positions`.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from jaxtyping import Int32

from lftpipe.base.errors import CorpusError
from lftpipe.corpus.readers import Corpus
from lftpipe.corpus.rows import Document

SPLITS: tuple[str, ...] = ("train", "validation")

#: Fraction of the documents that are held out, by the hash of their text. One in sixteen is
#: enough for the usual ten-to-one budgets, and a teacher trained on the rest never saw them.
VALIDATION_FRACTION = 1 / 16

#: Documents tokenised in one call, which the tokenizer spreads over the processors.
DOCUMENTS_PER_CALL = 64

#: And at most so many characters: a tokenizer needs hundreds of bytes for each of them. Only a longer
#: document is tokenised in parts.
CHARACTERS_PER_CALL = 2**20

Encode = Callable[[list[str]], list[list[int]]]
EncodeChat = Callable[[list[dict[str, Any]]], list[int]]


def text_hash(document: Document) -> int:
    """64 bits of the text's BLAKE2b: equal texts always land in the same split."""
    digest = hashlib.blake2b(document.text.encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest())


def default_threshold() -> int:
    """Documents whose hash is below this are held out for validation."""
    return int(VALIDATION_FRACTION * 2**64)


@dataclass
class _Packer:
    """Fills sequences of one split from a stream of documents."""

    context: int
    wanted: int
    made: int = 0
    tokens: list[int] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)
    hash: hashlib.blake2b = field(default_factory=lambda: hashlib.blake2b(digest_size=16))
    num_documents: int = 0

    @property
    def full(self) -> bool:
        return self.made >= self.wanted

    def begin(self, text_hash: int) -> None:
        """A document comes."""
        self.hash.update(text_hash.to_bytes(8))
        self.num_documents += 1

    def add(self, number: int, ids: list[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The next tokens of a document, and the sequences that they fill."""
        self.tokens += ids
        self.documents += [number] * len(ids)
        start = 0
        while len(self.tokens) - start >= self.context and not self.full:
            window = slice(start, start + self.context)
            self.made += 1
            start += self.context
            yield np.array(self.tokens[window], np.int32), np.array(self.documents[window], np.int32)
        del self.tokens[:start], self.documents[:start]  # once: a document may be a whole book


@dataclass(frozen=True)
class PackedSequence:
    """One sequence: `tokens[position]` and the number of the document each came from."""

    split: str
    tokens: Int32[np.ndarray, "position"]
    document: Int32[np.ndarray, "position"]


class Packing:
    """The packed sequences of a corpus; after iteration, `digest` and `made` say what was used.

    Parameters
    ----------
    encode
        Texts to token ids, with nothing around them.
    opening
        Tokens that begin every text.
    encode_chat
        A chat's messages to token ids, with all that the template puts around them.
    wanted
        Sequences wanted of each split. Fewer are made if the corpus ends first.
    """

    def __init__(
        self,
        corpus: Corpus,
        encode: Encode,
        end_of_text: int,
        context: int,
        wanted: dict[str, int],
        *,
        opening: Sequence[int] = (),
        encode_chat: EncodeChat | None = None,
    ) -> None:
        self.corpus = corpus
        self.encode = encode
        self.encode_chat = encode_chat
        self.opening = list(opening)
        self.end_of_text = end_of_text
        self.context = context
        self.wanted = wanted
        self.threshold = default_threshold()
        self._packers: dict[str, _Packer] = {}

    @property
    def made(self) -> dict[str, int]:
        """Sequences made of each split so far."""
        return {split: packer.made for split, packer in self._packers.items()}

    @property
    def num_documents(self) -> dict[str, int]:
        """Documents used for each split so far."""
        return {split: packer.num_documents for split, packer in self._packers.items()}

    @property
    def digest(self) -> dict[str, str]:
        """Digest of the texts used for each split so far, in order."""
        return {split: packer.hash.hexdigest() for split, packer in self._packers.items()}

    def split_of(self, text_hash: int) -> str:
        """The split of a document, `train` or `validation`."""
        return "validation" if text_hash < self.threshold else "train"

    def __iter__(self) -> Iterator[PackedSequence]:
        self._packers = {split: _Packer(self.context, self.wanted.get(split, 0)) for split in SPLITS}
        numbered = -1
        for group in _groups(self.corpus.documents()):
            hashed = [
                (number, text_hash(document), document)
                for number, document in enumerate(group, start=numbered + 1)
            ]
            numbered += len(group)
            # Once a split is full its documents need no tokens.
            needed = [row for row in hashed if row[2].text and not self._packers[self.split_of(row[1])].full]
            encoded = self._encoded([document for _, _, document in needed])
            for (number, hash_, _), parts in zip(needed, encoded, strict=True):
                packer = self._packers[self.split_of(hash_)]
                if packer.full:
                    continue
                packer.begin(hash_)
                for ids in parts:
                    for tokens, documents in packer.add(number, ids):
                        yield PackedSequence(self.split_of(hash_), tokens, documents)
                    if packer.full:
                        break
            if all(packer.full for packer in self._packers.values()):
                return

    def _encoded(self, documents: list[Document]) -> Iterator[Iterable[list[int]]]:
        """Token ids of each document, opened and closed once, in parts: the longest texts have many."""
        end = [self.end_of_text]
        if len(documents) == 1 and len(documents[0].text) > CHARACTERS_PER_CALL and _is_text(documents[0]):
            yield chain([self.opening], self._encoded_in_parts(documents[0].text), [end])
            return
        texts = iter(self.encode([document.text for document in documents if _is_text(document)]))
        for document in documents:
            if _is_text(document):
                yield self.opening, next(texts), end
            else:
                yield self._without_end(self._others_tokens(document)), end

    def _others_tokens(self, document: Document) -> list[int]:
        """A chat by the tokenizer's template, or tokens that were made before: both are opened already."""
        if document.chat is not None:
            assert self.encode_chat is not None
            return self.encode_chat(document.chat)
        tokens = document.tokens or []
        return tokens if tokens[: len(self.opening)] == self.opening else self.opening + tokens

    def _without_end(self, tokens: list[int]) -> list[int]:
        return tokens[:-1] if tokens[-1:] == [self.end_of_text] else tokens

    def _encoded_in_parts(self, text: str) -> Iterator[list[int]]:
        """As long texts as a tokenizer takes at once, which needs hundreds of bytes for each character."""
        start = 0
        while start < len(text):
            stop = _cut(text, start)
            yield from self.encode([text[start:stop]])
            start = stop

    def fit_to_small_corpus(self) -> None:
        """Move the hold-out threshold if the corpus is too small for the usual fraction.

        Of a corpus that ends before `validation` is full, or with nothing left to train on, the
        documents with the lowest hashes are held out, just as many as it takes, and never all.

        Raises `CorpusError` if the corpus has no text, or too little of it for one sequence of each split.
        """
        wanted = self.context * self.wanted.get("validation", 0)
        least = {split: self.context if self.wanted.get(split, 0) else 0 for split in SPLITS}
        sizes: list[tuple[int, int]] = []  # (hash, tokens) of every document, while it is small
        held_out = total = 0
        for group in _groups(self.corpus.documents()):
            group = [document for document in group if document.text]
            encoded = self._encoded(group)
            for document, parts in zip(group, encoded, strict=True):
                size = sum(map(len, parts))
                sizes.append((text_hash(document), size))
                total += size
                held_out += size * (sizes[-1][0] < self.threshold)
            if held_out >= wanted and total - held_out >= least["train"]:
                return
        if not total:
            raise CorpusError(
                f"corpus {self.corpus.name} without any text",
                "at least one document with text",
                "check the path and the kinds of files in it",
            )
        if total < sum(least.values()):
            raise CorpusError(
                f"corpus {self.corpus.name} of {total} tokens",
                f"at least {sum(least.values())}: one sequence of {self.context} tokens for each split",
                "give more text or a shorter --context",
            )
        self.threshold = _threshold_for(sizes, wanted)


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents to be tokenised in one call: some short ones, or one that is long."""
    group: list[Document] = []
    size = 0
    for document in documents:
        if group and (len(group) == DOCUMENTS_PER_CALL or size + len(document.text) > CHARACTERS_PER_CALL):
            yield group
            group, size = [], 0
        group.append(document)
        size += len(document.text)
    if group:
        yield group


def _is_text(document: Document) -> bool:
    return document.chat is None and document.tokens is None


def _cut(text: str, start: int) -> int:
    """Where a part of a long text ends: behind a line end, else before a space, else anywhere."""
    stop = start + CHARACTERS_PER_CALL
    if stop >= len(text):
        return len(text)
    least = start + CHARACTERS_PER_CALL // 2
    if (line := text.rfind("\n", least, stop)) > 0:
        return line + 1
    space = text.rfind(" ", least, stop)
    return space if space > 0 else stop


def _threshold_for(sizes: list[tuple[int, int]], wanted: int) -> int:
    """The lowest threshold that holds out `wanted` tokens, but at most about half of all."""
    budget = min(wanted, sum(size for _, size in sizes) // 2)
    by_text: dict[int, int] = {}
    for hash_, size in sorted(sizes):
        by_text[hash_] = by_text.get(hash_, 0) + size
    threshold = held_out = 0
    for hash_, size in list(by_text.items())[:-1]:  # at least one text is left to train on
        if held_out >= budget:
            break
        held_out += size
        threshold = hash_ + 1
    return threshold


def positions(document: Int32[np.ndarray, "*batch position"]) -> Int32[np.ndarray, "*batch position"]:
    """Position ids that restart at 0 with each segment."""
    starts = np.ones(document.shape, bool)
    starts[..., 1:] = document[..., 1:] != document[..., :-1]
    index = np.arange(document.shape[-1], dtype=np.int32)
    return index - np.maximum.accumulate(np.where(starts, index, 0), axis=-1).astype(np.int32)
