"""From a corpus to the tokens of a store, committed while the text is packed."""

from dataclasses import replace
from importlib.metadata import version

import numpy as np

from lftpipe.base import progress
from lftpipe.base.device import device_kind, dtype_name
from lftpipe.base.errors import CorpusError, TeacherError
from lftpipe.base.version import __version__
from lftpipe.corpus.packing import SPLITS, Packing
from lftpipe.extraction.plan import Plan
from lftpipe.store import StoreSpec, StoreWriter
from lftpipe.teacher.source import chat_encoder, load_tokenizer, opening, text_encoder

#: More than a token has on average: with so many for each that is wanted, a corpus has enough text.
CHARACTERS_OF_A_TOKEN = 8

#: Whose versions a store records.
LIBRARIES = ("torch", "transformers", "tokenizers", "zarr")


def packing_of(plan: Plan) -> Packing:
    """The corpus as sequences of the teacher's tokens; nothing is read yet."""
    tokenizer = load_tokenizer(plan.teacher)
    return Packing(
        plan.corpus,
        text_encoder(tokenizer),
        tokenizer.eos_token_id,
        plan.context,
        plan.wanted,
        opening=opening(tokenizer),
        encode_chat=chat_encoder(tokenizer, plan.teacher.model),
    )


def fitted(plan: Plan) -> Plan:
    """The plan with no more sequences than the corpus has text for, if it is a short local one."""
    enough = CHARACTERS_OF_A_TOKEN * sum(plan.wanted.values()) * plan.context
    seen = 0
    for document in plan.corpus.documents() if plan.corpus.local else ():
        seen += len(document.text)
        if seen >= enough:
            break
    if seen >= enough or not plan.corpus.local:
        return plan
    packing = packing_of(plan)
    packing.fit_to_small_corpus()
    for _ in packing:
        pass
    return replace(plan, wanted=packing.made)


def are_stored(writer: StoreWriter) -> bool:
    """Whether all tokens are stored that are asked for, and the corpus was read to the end for them."""
    return "corpus_digest" in writer.spec.details and writer.missing_tokens() is None


def store_tokens(plan: Plan, writer: StoreWriter, packing: Packing) -> None:
    """Pack the corpus, and commit the tokens shard by shard; those that are stored are compared.

    `writer`: the store, begun for as many sequences as are asked for; it then knows how many there are.
    Raises `LftpipeError` if the text is too little, or other than that of the stored tokens.
    """
    if not writer.complete:  # what it says of the corpus is no longer true until all is packed
        writer.note(corpus_digest=None, corpus_documents=None, asked=None)
    shards = {split: _Shard(writer, split, plan.context) for split in SPLITS}
    vocabulary = plan.teacher.config.vocab_size
    total = sum(plan.wanted.values()) * plan.context
    with progress.task(f"tokenise {plan.corpus.name}", total, "tokens") as task:
        for sequence in packing:
            if (largest := sequence.tokens.max()) >= vocabulary:
                raise TeacherError(
                    f"a tokenizer or a corpus with token {largest} beside {plan.teacher.model}",
                    f"tokens below {vocabulary}, the model's vocabulary",
                    "use the model's own tokenizer.json, and token ids of it",
                )
            shards[sequence.split].add(sequence.tokens, sequence.document)
            task.advance(plan.context)
    for split in SPLITS:
        if plan.wanted[split] and not packing.made[split]:
            raise CorpusError(
                f"corpus {plan.corpus.name} with too little text for {split}",
                f"at least one sequence of {plan.context} tokens of it, from other documents than the rest",
                "give more documents, a shorter --context, or --validation-tokens 0",
            )
    if not writer.complete:
        # A corpus that ended early need not be read again by whoever asks for just as much.
        asked = plan.wanted if packing.made != plan.wanted else None
        writer.note(packing.made, asked=asked)
    for shard in shards.values():
        shard.put()
    if not writer.complete:
        writer.note(corpus_digest=packing.digest, corpus_documents=packing.num_documents)


class _Shard:
    """The sequences of a split that fill a shard together."""

    def __init__(self, writer: StoreWriter, split: str, context: int) -> None:
        self._writer, self._split, self._first = writer, split, 0
        shape = (writer.spec.sequences_per_shard, context)
        self._rows = np.empty(shape, np.int32), np.empty(shape, np.int32)
        self._filled = 0

    def add(self, *rows: np.ndarray) -> None:
        """Append a sequence's tokens and documents, and put the shard if it is full."""
        for kept, row in zip(self._rows, rows, strict=True):
            kept[self._filled] = row
        self._filled += 1
        if self._filled == len(self._rows[0]):
            self.put()

    def put(self) -> None:
        """Commit what there is."""
        if self._filled:
            tokens, document = (rows[: self._filled] for rows in self._rows)
            self._writer.put_tokens(self._split, tokens, document, self._first)
        self._first, self._filled = self._first + self._filled, 0


def spec_of(plan: Plan) -> StoreSpec:
    """What the store is to hold: its identity, as many sequences as are asked for, and who makes it."""
    identity = {
        "teacher": plan.teacher.identity(),
        "tokenizer_digest": plan.teacher.tokenizer_digest,
        "corpus": plan.corpus.name,
        "packing": "isolated",
        "seed": plan.seed,
        "compute_dtype": dtype_name(plan.compute_dtype),
        "batch_sequences": plan.batch_sequences,
    }
    if plan.text_field is not None:
        identity["text_field"] = plan.text_field
    if (kind := device_kind(plan.device)) != "cpu":  # what processors computed was never marked
        identity["device"] = kind
    return StoreSpec(
        identity=identity,
        details={"versions": {"lftpipe": __version__} | {name: version(name) for name in LIBRARIES}},
        layers=plan.layers,
        attention_layers=plan.attention_layers,
        context=plan.context,
        width=plan.teacher.width,
        dtype=plan.dtype,
        compression=plan.compression,
        sequences_per_shard=plan.sequences_per_shard,
        sequences=plan.wanted,
        logits=plan.logits,
    )
