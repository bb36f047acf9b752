from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lftpipe.base.errors import CorpusError
from lftpipe.corpus.packing import SPLITS, Packing, positions, text_hash
from lftpipe.corpus.readers import Corpus
from lftpipe.corpus.rows import Document

END = 1_000_000  # no character has this number

documents = st.lists(st.text(st.characters(codec="utf-8"), max_size=40), max_size=40)
contexts = st.integers(2, 30)


def encode(texts: list[str]) -> list[list[int]]:
    """One token a character."""
    return [[ord(character) for character in text] for text in texts]


def packing(texts: list[str], context: int, train: int, validation: int) -> Packing:
    corpus = Corpus("test", lambda: (Document(str(i), text) for i, text in enumerate(texts)), local=True)
    return Packing(corpus, encode, END, context, {"train": train, "validation": validation})


def by_split(packing: Packing) -> dict[str, tuple[list[int], list[int]]]:
    """All tokens and document numbers of each split, in order."""
    found: dict[str, tuple[list[int], list[int]]] = {split: ([], []) for split in SPLITS}
    for sequence in packing:
        assert len(sequence.tokens) == len(sequence.document) == packing.context
        found[sequence.split][0].extend(sequence.tokens.tolist())
        found[sequence.split][1].extend(sequence.document.tolist())
    return found


@given(documents, contexts)
def test_no_token_is_lost_or_invented(texts, context):
    made = packing(texts, context, 1000, 1000)
    for split, (tokens, document) in by_split(made).items():
        expected = [
            (number, token)
            for number, text in enumerate(texts)
            if text and made.split_of(text_hash(Document("", text))) == split
            for token in (*encode([text])[0], END)
        ]
        # All of it, but for the last tokens that fill no sequence.
        assert list(zip(document, tokens, strict=True)) == expected[: len(tokens)]
        assert 0 <= len(expected) - len(tokens) < context


@given(documents, contexts)
def test_a_document_and_its_copies_are_in_one_split(texts, context):
    found = by_split(packing(texts * 2, context, 1000, 1000))
    splits = defaultdict(set)
    for split, (_, document) in found.items():
        for number in document:
            splits[(texts * 2)[number]].add(split)
    assert all(len(each) == 1 for each in splits.values())


@given(documents, contexts, st.integers(0, 5), st.integers(0, 5), st.integers(0, 5))
def test_asking_for_more_gives_the_same_first_sequences(texts, context, train, validation, more):
    few = by_split(packing(texts, context, train, validation))
    many = by_split(packing(texts, context, train + more, validation + more))
    for split in SPLITS:
        for some, all_ in zip(few[split], many[split], strict=True):
            assert some == all_[: len(some)]


@given(documents, contexts, st.integers(0, 3), st.integers(0, 3))
def test_never_more_than_asked_for_and_again_the_same(texts, context, train, validation):
    made = packing(texts, context, train, validation)
    first, counts, digest = by_split(made), made.made, made.digest
    assert counts["train"] <= train
    assert counts["validation"] <= validation
    assert {split: len(tokens) for split, (tokens, _) in first.items()} == {
        split: count * context for split, count in counts.items()
    }
    assert (by_split(made), made.made, made.digest) == (first, counts, digest)


def test_a_full_corpus_is_read_no_further():
    def endless():
        number = 0
        while True:
            yield Document(str(number), f"document {number}")
            number += 1

    made = Packing(Corpus("endless", endless, local=False), encode, END, 8, {"train": 30, "validation": 3})
    by_split(made)
    assert made.made == {"train": 30, "validation": 3}


def test_the_digest_names_the_texts_and_their_order():
    texts = [f"document {i}" for i in range(50)]
    digest = {}
    for name, changed in {
        "as is": texts,
        "reversed": texts[::-1],
        "edited": [*texts[:2], "xyz", *texts[3:]],
    }.items():
        made = packing(changed, 8, 10, 0)
        by_split(made)
        digest[name] = made.digest["train"]
    assert len(set(digest.values())) == 3


@given(documents, contexts, st.integers(0, 6))
def test_a_small_corpus_fills_both_splits_or_says_why_not(texts, context, validation):
    made = packing(texts, context, 1000, validation)
    total = sum(len(text) + 1 for text in texts if text)
    if total < context * (1 + (validation > 0)):
        with pytest.raises(CorpusError, match="without any text" if total == 0 else f"of {total} tokens"):
            made.fit_to_small_corpus()
        return
    made.fit_to_small_corpus()
    found = by_split(made)
    if validation == 0:
        assert len(found["train"][0]) >= context
    texts_of = {split: {texts[number] for number in found[split][1]} for split in SPLITS}
    assert not texts_of["train"] & texts_of["validation"]


@given(st.integers(2, 40), st.integers(1, 10), st.integers(1, 5))
def test_equal_documents_are_shared_out_so_that_each_split_gets_its_sequence(count, context, validation):
    texts = [f"{i:>{2 * context}}" for i in range(count)]  # each longer than a sequence
    made = packing(texts, context, 1000, validation)
    made.fit_to_small_corpus()
    by_split(made)
    assert made.made["train"] >= 1
    assert made.made["validation"] >= 1
    # Half goes to validation at most, but for one document.
    assert made.made["validation"] * context <= count * (2 * context + 1) / 2 + 2 * context + 1


def test_a_large_corpus_keeps_the_usual_fraction_whatever_is_asked_for():
    texts = [f"document {i} of many" for i in range(2000)]
    thresholds = set()
    for train, validation in ((10, 2), (100, 20), (20, 0)):
        made = packing(texts, 16, train, validation)
        made.fit_to_small_corpus()
        thresholds.add(made.threshold)
    assert thresholds == {2**64 // 16}


def test_a_long_held_out_document_at_the_start_is_no_end_of_the_corpus():
    held_out = next(
        text for text in (f"{i}" * 12 for i in range(1000)) if text_hash(Document("", text)) < 2**64 // 16
    )
    texts = [held_out, *[""] * 100, *(f"document {i}" for i in range(20))]
    made = packing(texts, 12, 5, 1)
    made.fit_to_small_corpus()
    by_split(made)
    assert made.made == {"train": 5, "validation": 1}


def test_the_only_document_is_trained_on_if_nothing_is_held_out():
    for text in (f"the only document {i}" for i in range(100)):  # some of them hash below the threshold
        made = packing([text], 8, 2, 0)
        made.fit_to_small_corpus()
        by_split(made)
        assert made.made["train"] == 2


def test_a_corpus_without_text_or_with_too_little_is_refused():
    with pytest.raises(CorpusError, match="corpus test without any text / expected: at least one document"):
        packing([], 8, 1, 1).fit_to_small_corpus()
    with pytest.raises(CorpusError, match="without any text"):
        packing(["", ""], 8, 1, 1).fit_to_small_corpus()
    with pytest.raises(
        CorpusError, match=r"corpus test of 10 tokens / expected: at least 16: .* / do: give more"
    ):
        packing(["abcd", "efgh"], 8, 1, 1).fit_to_small_corpus()


@given(st.lists(st.integers(1, 6), min_size=1, max_size=8))
def test_positions_restart_with_each_segment(lengths):
    document = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    expected = np.concatenate([np.arange(length) for length in lengths])
    assert positions(document).tolist() == expected.tolist()
    # Each sequence of a batch for itself: a segment cut by a sequence's end starts anew.
    both = positions(np.stack([document, document]))
    assert both.tolist() == [expected.tolist()] * 2
