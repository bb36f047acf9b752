"""A corpus to packed tokens of whole sequences, and the specification of the store that will hold them."""

import os
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import lftpipe
from lftpipe import progress
from lftpipe.corpus.packing import SPLITS, Packing
from lftpipe.device import dtype_name
from lftpipe.errors import CorpusError, TeacherError
from lftpipe.extraction.forward import Tokens
from lftpipe.extraction.plan import Plan
from lftpipe.store import StoreSpec

#: More than a token has on average: with so many for each that is wanted, a corpus has enough text.
CHARACTERS_OF_A_TOKEN = 8

#: Whose versions a store records.
LIBRARIES = ("torch", "transformers", "tokenizers", "zarr")


def packing_of(plan: Plan, tokenizer: Any) -> Packing:
    """The corpus as sequences of this tokenizer's tokens; nothing is read yet.

    Parameters
    ----------
    plan
        What is extracted.
    tokenizer
        The teacher's fast tokenizer, of transformers.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()

    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts)]

    return Packing(plan.corpus, encode, tokenizer.eos_token_id, plan.context, plan.wanted)


def fitted(plan: Plan, packing: Packing) -> Plan:
    """The plan with no more sequences than the corpus has text for, if it is a short local one.

    Parameters
    ----------
    plan
        What is extracted.
    packing
        The corpus as sequences; it may be read once for this.
    """
    enough = CHARACTERS_OF_A_TOKEN * sum(plan.wanted.values()) * plan.context
    seen = 0
    for document in plan.corpus.documents() if plan.corpus.local else ():
        seen += len(document.text)
        if seen >= enough:
            break
    if seen >= enough or not plan.corpus.local:
        return plan
    packing.fit_to_small_corpus()
    for _ in packing:
        pass
    return replace(plan, wanted=packing.made)


def pack(packing: Packing, plan: Plan) -> Tokens:
    """Token ids and document numbers of each split, `(sequence, position)`, in files mapped to memory.

    Parameters
    ----------
    packing
        The corpus as sequences.
    plan
        What is extracted.
    """
    packing.fit_to_small_corpus()
    plan.path.parent.mkdir(parents=True, exist_ok=True)
    rows = {
        split: [_on_disk(plan.path.parent, (count, plan.context)) for _ in ("tokens", "document")]
        for split, count in plan.wanted.items()
    }
    vocabulary = plan.teacher.config.vocab_size
    made = dict.fromkeys(SPLITS, 0)
    total = sum(plan.wanted.values()) * plan.context
    with progress.task(f"tokenise {plan.corpus.name}", total, "tokens") as task:
        for sequence in packing:
            if (largest := sequence.tokens.max()) >= vocabulary:
                raise TeacherError(
                    f"a tokenizer with token {largest} beside {plan.teacher.model}",
                    f"tokens below {vocabulary}, the model's vocabulary",
                    "put the model's own tokenizer.json into its folder",
                )
            tokens, document = rows[sequence.split]
            tokens[made[sequence.split]] = sequence.tokens
            document[made[sequence.split]] = sequence.document
            made[sequence.split] += 1
            task.advance(plan.context)
    for split in SPLITS:
        if plan.wanted[split] and not made[split]:
            raise CorpusError(
                f"corpus {plan.corpus.name} with too little text for {split}",
                f"at least one sequence of {plan.context} tokens of it, from other documents than the rest",
                "give more documents, a shorter --context, or --validation-tokens 0",
            )
    return {
        split: (tokens[: made[split]], document[: made[split]]) for split, (tokens, document) in rows.items()
    }


def _on_disk(folder: Path, shape: tuple[int, int]) -> np.ndarray:
    """Whole numbers mapped to a file without a name: no other run meets it, and nothing remains of it."""
    if not shape[0]:
        return np.zeros(shape, np.int32)
    with tempfile.TemporaryFile(dir=folder) as file:
        # All of its room at once: a disk that fills up later would kill the process at a mere assignment.
        os.posix_fallocate(file.fileno(), 0, 4 * shape[0] * shape[1])
        return np.memmap(file, np.int32, "r+", shape=shape)


def spec_of(plan: Plan, packing: Packing) -> StoreSpec:
    """What the store will hold: its identity, and the details that may change as it grows.

    Parameters
    ----------
    plan
        What is extracted.
    packing
        The corpus, after `pack` has read it.
    """
    identity = {
        "teacher": plan.teacher.identity(),
        "tokenizer_digest": plan.teacher.tokenizer_digest,
        "corpus": plan.corpus.name,
        "packing": "isolated",
        "seed": 0,  # of the format: extraction draws no random numbers
        "compute_dtype": dtype_name(plan.compute_dtype),
        "batch_sequences": plan.batch_sequences,
    }
    # What a grown store may add to: the writer compares the tokens themselves with those it holds.
    details = {
        "corpus_digest": packing.digest,
        "corpus_documents": packing.num_documents,
        "versions": {"lftpipe": lftpipe.__version__} | {name: version(name) for name in LIBRARIES},
    }
    return StoreSpec(
        identity=identity,
        details=details,
        layers=plan.layers,
        attention_layers=plan.attention_layers,
        context=plan.context,
        width=plan.teacher.width,
        dtype=plan.dtype,
        compression=plan.compression,
        sequences_per_shard=plan.sequences_per_shard,
        sequences=packing.made,
        logits=plan.logits,
    )
