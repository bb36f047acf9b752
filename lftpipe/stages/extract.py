"""`lftpipe extract`: run the frozen teacher once and write its states to the store."""

import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lftpipe
from lftpipe import progress
from lftpipe.config.settings import ExtractSettings
from lftpipe.corpus.packing import SPLITS, Packing
from lftpipe.device import dtype_name, prepare
from lftpipe.errors import CorpusError, StoreError, TeacherError
from lftpipe.extraction.bf16_error import measured_trunk
from lftpipe.extraction.forward import Tokens, forward
from lftpipe.extraction.plan import Plan, check_disk, dry_run, make_plan
from lftpipe.store import StoreSpec, StoreWriter, verify_store
from lftpipe.teacher.source import load_tokenizer
from lftpipe.teacher.trunk import Trunk

#: More than a token has on average: with so many for each that is wanted, a corpus has enough text.
CHARACTERS_OF_A_TOKEN = 8


def extract(settings: ExtractSettings) -> dict[str, Any]:
    """Run the teacher over a corpus and store its states; resumes what was interrupted.

    Returns
    -------
    dict
        The plan's figures for `--dry-run`, else what was stored, JSON-plain.

    Raises
    ------
    LftpipeError
        If teacher, corpus, settings, disk or an older store do not allow it.
    """
    prepare(settings.device, settings.threads)
    plan = make_plan(settings)
    tokenizer = load_tokenizer(plan.teacher)
    packing = _packing(plan, tokenizer)
    if settings.dry_run:
        return dry_run(_fitted(plan, packing))
    try:
        check_disk(plan)
    except StoreError:  # the text may end before the disk does, which is only then worth a look
        check_disk(_fitted(plan, packing))
    return _run(plan, packing, _pack(packing, plan), settings)


def _run(plan: Plan, packing: Packing, tokens: Tokens, settings: ExtractSettings) -> dict[str, Any]:
    spec = _spec(plan, packing, settings)
    started = time.monotonic()
    repair = verify_store(plan.path) if settings.repair else None
    with StoreWriter.open(
        plan.path, spec, resume=settings.resume, force=settings.force, repair=repair
    ) as writer:
        for split in SPLITS:
            writer.put_tokens(split, *tokens[split])  # compares those that the store holds already
        pending = writer.pending()
        computed = sum(len(key.sequences) for key in pending) * plan.context
        if pending:
            forward(plan, writer, _trunk(plan, writer, tokens), tokens)
        if not writer.complete:
            writer.finish()
    seconds = time.monotonic() - started
    return {
        "store": str(plan.path),
        "teacher": plan.teacher.name,
        "already_complete": not computed,
        "tokens": {split: packing.made[split] * plan.context for split in SPLITS},
        "tokens_asked": {split: count * plan.context for split, count in plan.wanted.items()},
        "documents": packing.num_documents,
        "layers": list(plan.layers),
        "attention_layers": list(plan.attention_layers),
        "logits": plan.logits,
        "compute_dtype": dtype_name(plan.compute_dtype),
        "bytes": sum(file.stat().st_size for file in plan.path.rglob("*") if file.is_file()),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(computed / max(seconds, 1e-9), 1),
    }


def _trunk(plan: Plan, writer: StoreWriter, tokens: Tokens) -> Trunk:
    """The teacher's trunk; what its compute dtype costs is measured once in a store's life, and noted."""
    known = plan.compute_dtype == torch.float32 or "compute_error" in writer.spec.details
    if known or not len(tokens["train"][0]):
        return plan.load_trunk()
    trunk, error = measured_trunk(plan, tokens)
    writer.note(compute_error=error)
    return trunk


def _packing(plan: Plan, tokenizer: Any) -> Packing:
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()

    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts)]

    return Packing(plan.corpus, encode, tokenizer.eos_token_id, plan.context, plan.wanted)


def _fitted(plan: Plan, packing: Packing) -> Plan:
    """The plan with no more sequences than the corpus has text for, if it is a short local one."""
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


def _pack(packing: Packing, plan: Plan) -> Tokens:
    """Token ids and document numbers of each split, `(sequence, position)`, in files mapped to memory."""
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


def _spec(plan: Plan, packing: Packing, settings: ExtractSettings) -> StoreSpec:
    import tokenizers
    import transformers
    import zarr

    identity = {
        "teacher": plan.teacher.identity(),
        "tokenizer_digest": plan.teacher.tokenizer_digest,
        "corpus": plan.corpus.name,
        "packing": "isolated",
        "seed": settings.seed,
        "compute_dtype": dtype_name(plan.compute_dtype),
        "batch_sequences": plan.batch_sequences,
    }
    # What a grown store may add to: the writer compares the tokens themselves with those it holds.
    details = {
        "corpus_digest": packing.digest,
        "corpus_documents": packing.num_documents,
        "versions": {
            "lftpipe": lftpipe.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "zarr": zarr.__version__,
        },
    }
    return StoreSpec(
        identity=identity,
        details=details,
        layers=plan.layers,
        attention_layers=plan.attention_layers,
        context=plan.context,
        width=plan.teacher.width,
        dtype=settings.dtype,
        sequences_per_shard=plan.sequences_per_shard,
        sequences=packing.made,
        logits=plan.logits,
    )


def summary(result: dict[str, Any]) -> str:
    """What was made, where, and what to type next."""
    size = progress.human_bytes(result["bytes"])
    tokens = " and ".join(f"{count:,} {split}" for split, count in result["tokens"].items())
    layers = f"{len(result['layers'])} states and {len(result['attention_layers'])} attention contexts"
    if result["logits"]:
        layers += f" and {result['logits']} logits"
    if result.get("dry_run"):
        arrays = ", ".join(
            f"{name} {progress.human_bytes(n)}" for name, n in result["bytes_by_array"].items()
        )
        free = progress.human_bytes(result["free_bytes"])
        return (
            f"{result['store']} would hold {tokens} tokens x {layers}\n"
            f"  {size} as {result['dtype']} ({arrays}); {free} are free\n"
            f"  about {result['seconds']:.0f} s at {result['probe_tokens_per_second']:,.0f} tokens/s "
            f"({result['compute_dtype']})"
        )
    lines = [f"{result['store']} holds {tokens} tokens of {result['teacher']} x {layers}, {size}"]
    if result["already_complete"]:
        lines.append("  it was complete already: nothing was computed")
    else:
        lines.append(f"  {result['seconds']:.0f} s, {result['tokens_per_second']:,.0f} tokens/s")
    for split, asked in result["tokens_asked"].items():
        if result["tokens"][split] < asked:
            lines.append(f"  the corpus ended before the {asked:,} {split} tokens asked for")
    lines.append(f"next: lftpipe recouple --store {result['store']}")
    return "\n".join(lines)
