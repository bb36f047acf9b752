"""`lftpipe extract`: run the frozen teacher once and write its states to the store."""

import time
from typing import Any

import torch

from lftpipe import progress
from lftpipe.config.settings import ExtractSettings
from lftpipe.corpus.packing import SPLITS, Packing
from lftpipe.device import dtype_name, prepare
from lftpipe.errors import StoreError
from lftpipe.extraction.bf16_error import measured_trunk
from lftpipe.extraction.forward import Tokens, forward
from lftpipe.extraction.plan import Plan, check_disk, dry_run, make_plan
from lftpipe.extraction.tokens import fitted, pack, packing_of, spec_of
from lftpipe.objects import storage_of
from lftpipe.store import StoreWriter, verify_store
from lftpipe.teacher.source import load_tokenizer
from lftpipe.teacher.trunk import Trunk


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
    packing = packing_of(plan, tokenizer)
    if settings.dry_run:
        return dry_run(fitted(plan, packing))
    try:
        check_disk(plan)
    except StoreError:  # the text may end before the disk does, which is only then worth a look
        check_disk(fitted(plan, packing))
    return _run(plan, packing, pack(packing, plan), settings)


def _run(plan: Plan, packing: Packing, tokens: Tokens, settings: ExtractSettings) -> dict[str, Any]:
    spec = spec_of(plan, packing)
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
        "bytes": storage_of(plan.path).total_bytes(),
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


def summary(result: dict[str, Any]) -> str:
    """What was made, where, and what to type next."""
    size = progress.human_bytes(result["bytes"])
    tokens = " and ".join(f"{count:,} {split}" for split, count in result["tokens"].items())
    layers = f"{len(result['layers'])} states and {len(result['attention_layers'])} attention outputs"
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
