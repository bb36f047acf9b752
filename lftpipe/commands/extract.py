"""`lftpipe extract`: run the frozen teacher once and write its states to the store."""

import time
from dataclasses import replace

from lftpipe.base import progress
from lftpipe.base.device import dtype_name, on_device
from lftpipe.base.errors import LftpipeError, SettingsError, StoreError
from lftpipe.base.workspace import next_command
from lftpipe.config.settings import ExtractSettings
from lftpipe.corpus.packing import SPLITS
from lftpipe.extraction.array_job import (
    Part,
    absorb_parts,
    all_done,
    complete_when_free,
    compute_part,
    open_when_free,
    parse_part,
)
from lftpipe.extraction.compute import compute, freeze
from lftpipe.extraction.plan import Plan, check_disk, dry_run, make_plan
from lftpipe.extraction.rolling import check_rolling, roll, rolling_spec
from lftpipe.extraction.tokens import are_stored, fitted, packing_of, spec_of, store_tokens
from lftpipe.results.outcomes import Extraction, PlannedExtraction
from lftpipe.storage import storage_of
from lftpipe.store import StoreSpec, StoreWriter, abandon, planned_spec, verify_store
from lftpipe.teacher.compare import check_logits


@on_device
def extract(settings: ExtractSettings) -> PlannedExtraction | Extraction:
    """Run the teacher over a corpus and store its states; resumes what was interrupted.

    Raises `LftpipeError` if teacher, corpus, settings, disk or an older store do not allow it.
    """
    check(settings)
    plan = make_plan(settings)
    spec = rolling_spec(plan, force=settings.force) if settings.rolling else spec_of(plan)
    if settings.dry_run:
        return dry_run(fitted(plan))
    _check_shared(plan, settings)
    if settings.force or planned_spec(plan.path) is None:
        check_logits(plan.teacher)  # before the store's folder is claimed
    started = time.monotonic()
    if settings.part is not None:
        return _part(plan, settings, parse_part(settings.part), started)
    repair = verify_store(plan.path) if settings.repair else None
    _check_disk(plan)
    with StoreWriter.open(
        plan.path,
        spec,
        resume=settings.resume,
        force=settings.force,
        repair=repair,
        recheck=settings.check_corpus,
    ) as writer:
        before = writer.complete
        _tokens(plan, writer, settings)
        if settings.rolling:
            rolled, computed = roll(plan, writer, settings)
            return replace(_result(plan, writer.spec, computed, started), rolling=rolled._asdict())
        if not writer.complete:
            absorb_parts(writer)
        computed = compute(plan, writer, settings)
        writer.finish()
    return _result(plan, writer.spec, computed, started, before=before)


def check(settings: ExtractSettings) -> None:
    """Refuse settings that contradict."""
    spread = [f"--{name}" for name in ("part", "ray") if getattr(settings, name) is not None]
    spread += ["--workers"] if settings.workers > 1 else []
    if len(spread) > 1:
        raise SettingsError(" with ".join(spread), "one way to spread the work", "leave one out")
    if settings.part is not None and (settings.force or settings.repair):
        raise SettingsError(
            f"--part with --{'force' if settings.force else 'repair'}",
            "one process that does that",
            "run it once without --part first",
        )
    if settings.rolling:
        check_rolling(settings)
    if settings.tokens_only and settings.logits:
        raise SettingsError("--tokens-only with --logits", "one of the two", "leave out --logits")


def _check_shared(plan: Plan, settings: ExtractSettings) -> None:
    """Refuse to share the work with other machines where they would not see one another's files."""
    elsewhere = settings.ray if settings.ray not in (None, "local") else None
    given = f"--part {settings.part}" if settings.part is not None else f"--ray {elsewhere}"
    if storage_of(plan.path).remote and (settings.part is not None or elsewhere):
        raise SettingsError(
            f"{given} with a store at {storage_of(plan.path).where}",
            "a folder that all machines share",
            "use --workers or --ray local, or extract into a shared folder and copy the store",
        )


def _check_disk(plan: Plan) -> None:
    try:
        check_disk(plan)
    except StoreError:  # the text may end before the disk does, which is only then worth a look
        check_disk(fitted(plan))


def _tokens(plan: Plan, writer: StoreWriter, settings: ExtractSettings) -> None:
    """Store the tokens, unless they are stored: then they are trusted."""
    if are_stored(writer) and not settings.check_corpus:
        return
    try:
        packing = packing_of(plan)
        packing.fit_to_small_corpus()
        store_tokens(plan, writer, packing)
    except LftpipeError:
        if writer.fresh:
            writer.close()
            abandon(plan.path)
        raise


def _part(plan: Plan, settings: ExtractSettings, part: Part, started: float) -> Extraction:
    """Compute one part; complete the store if all parts are there."""
    found = open_when_free(plan, settings)
    before = True
    if isinstance(found, StoreWriter):
        with found as writer:
            _check_disk(plan)
            before = are_stored(writer)
            _tokens(plan, writer, settings)
            if writer.complete:
                return _result(plan, writer.spec, 0, started, before=True)
            found = freeze(plan, writer, settings)
    computed = compute_part(plan, found, settings, part)
    spec = found.spec
    whole = all_done(found, part.count)
    if whole:
        spec = complete_when_free(plan, settings)
    told = _result(plan, spec, computed, started, before=before and not computed)
    return replace(told, part=[part.index, part.count], complete=whole)


def _result(
    plan: Plan, spec: StoreSpec, computed: int, started: float, *, before: bool = False
) -> Extraction:
    """What there is now; `before`: it was all there."""
    seconds = time.monotonic() - started
    return Extraction(
        store=str(plan.path),
        teacher=plan.teacher.name,
        already_complete=before,
        tokens={split: spec.sequences[split] * plan.context for split in SPLITS},
        tokens_asked={split: count * plan.context for split, count in plan.wanted.items()},
        documents=spec.details["corpus_documents"],
        layers=list(plan.layers),
        attention_layers=list(plan.attention_layers),
        logits=plan.logits,
        compute_dtype=dtype_name(plan.compute_dtype),
        batch_sequences=plan.batch_sequences,
        batch_asked=plan.batch_asked,
        bytes=storage_of(plan.path).total_bytes(),
        seconds=round(seconds, 3),
        tokens_per_second=round(computed / max(seconds, 1e-9), 1),
    )


def summary(result: PlannedExtraction | Extraction) -> str:
    """What was made, where, and what to type next."""
    if isinstance(result, PlannedExtraction):
        return "\n".join([*_planned(result), *_batch_lines(result)])
    lines = []
    if result.complete is False and result.part:
        index, count = result.part
        lines.append(f"part {index} of {count} of {result.store} is done; others are not yet")
    else:
        size = progress.human_bytes(result.bytes)
        held = f"{_tokens_text(result)} of {result.teacher} x {_layers(result)}, {size}"
        lines.append(f"{result.store} holds {held}")
        if result.rolling:
            lines.append("  {made} shards computed, {made_again} of them again".format(**result.rolling))
            peak = progress.human_bytes(result.rolling["peak_bytes"])
            lines.append(f"  {result.rolling['dropped']} dropped; never more than {peak} of states")
        if result.already_complete:
            lines.append("  it was complete already: nothing was computed")
        else:
            speed = f", {result.tokens_per_second:,.0f} tokens/s" if result.layers else ""
            lines.append(f"  {result.seconds:.0f} s{speed}")
        for split, asked in result.tokens_asked.items():
            if result.tokens[split] < asked:
                lines.append(f"  the corpus ended before the {asked:,} {split} tokens asked for")
    lines += _batch_lines(result)
    if result.rolling:
        lines.append(next_command("evaluate", "--store", result.store))
    elif result.complete is not False:
        step = ["recouple"] if result.layers else ["train", "--from-teacher", "--block", "M:N"]
        lines.append(next_command(*step, "--store", result.store))
    return "\n".join(lines)


def _planned(result: PlannedExtraction) -> list[str]:
    arrays = ", ".join(f"{name} {progress.human_bytes(n)}" for name, n in result.bytes_by_array.items())
    size, free = progress.human_bytes(result.bytes), progress.human_bytes(result.free_bytes)
    return [
        f"{result.store} would hold {_tokens_text(result)} x {_layers(result)}",
        f"  {size} as {result.dtype} ({arrays}); {free} are free",
        f"  about {result.seconds:.0f} s at {result.probe_tokens_per_second:,.0f} tokens/s "
        f"({result.compute_dtype})",
    ]


def _tokens_text(result: PlannedExtraction | Extraction) -> str:
    return " and ".join(f"{count:,} {split}" for split, count in result.tokens.items()) + " tokens"


def _layers(result: PlannedExtraction | Extraction) -> str:
    if not result.layers:
        return "no states"
    layers = f"{len(result.layers)} states and {len(result.attention_layers)} attention outputs"
    return layers + (f" and {result.logits} logits" if result.logits else "")


def _batch_lines(result: PlannedExtraction | Extraction) -> list[str]:
    if not result.layers or result.batch_sequences >= result.batch_asked:
        return []
    return [
        f"  a batch has {result.batch_sequences} sequences, not {result.batch_asked}: a shard "
        "holds no more; a new store with a larger --shard-bytes does"
    ]
