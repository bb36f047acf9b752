"""Errors of recognised texts: edits over the length of the truth, by characters and by words."""

from collections.abc import Sequence

import numpy as np


def edits(truth: Sequence[str], text: Sequence[str]) -> int:
    """The least insertions, deletions and substitutions between two sequences (Levenshtein)."""
    names = {each: number for number, each in enumerate({*truth, *text})}
    there = np.array([names[each] for each in text], dtype=np.int64)
    steps = np.arange(len(text) + 1)
    row = steps.copy()
    for number, each in enumerate(truth, start=1):
        changed = np.minimum(row[1:] + 1, row[:-1] + (there != names[each]))
        # Insertions run along the row: the least of what stands to the left, plus the distance.
        row = np.minimum.accumulate(np.concatenate([[number], changed]) - steps) + steps
    return int(row[-1])


def character_errors(truth: str, text: str) -> tuple[int, int]:
    """Edits and the number of characters of the truth."""
    return edits(truth, text), len(truth)


def word_errors(truth: str, text: str) -> tuple[int, int]:
    """Edits and the number of words of the truth."""
    return edits(truth.split(), text.split()), len(truth.split())
