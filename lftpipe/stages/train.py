"""`lftpipe train`: learn flow layers for blocks, from the cache or from the live teacher."""

from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from lftpipe import runs
from lftpipe.compute import prepare_processor
from lftpipe.errors import RunError, SettingsError, StoreError, TeacherError
from lftpipe.loss import parse_loss
from lftpipe.settings import TrainSettings, loss_text, to_plain
from lftpipe.spans import parse_block
from lftpipe.store import Store
from lftpipe.teacher.source import Teacher, open_teacher
from lftpipe.training import Chain, Training, fit_linear, processes, train_together
from lftpipe.workspace import find_store, run_path


def train(settings: TrainSettings) -> dict[str, Any]:
    """Train a flow layer and write its run; or several, from the same batches.

    Returns
    -------
    dict
        Where the run is and how it ended, JSON-plain; of several, a list of such under `runs`.

    Raises
    ------
    LftpipeError
        If the store, block or settings do not allow it, or training diverges.
    """
    prepare_processor(settings.threads)
    settings = replace(settings, device=processes.join(settings.device))
    try:
        store_path = find_store(settings.workspace, settings.store)
        store = Store.open(store_path)
        teacher = teacher_of(store, settings.workspace)
        wanted = []
        for variant in variants_of(settings):
            blocks = [_block(each, variant, store_path, teacher) for each in variant.block.split(",")]
            for block in blocks:
                one = resolved(variant, store, block)
                name = variant.run or run_name(one, block)
                if variant.run and (settings.variants or len(blocks) > 1):  # a run holds one flow layer
                    name += f"-{block[0]}-{block[1]}"
                wanted.append((run_path(store_path, name), one, block))
        results = train_runs(wanted, store, teacher, joint=settings.joint)
    finally:
        processes.leave()
    given = {"store": str(store_path)}
    return results[0] | given if len(results) == 1 else {"runs": results} | given


def _block(text: str, settings: TrainSettings, store_path: Path, teacher: Teacher) -> tuple[int, int]:
    if text == "auto":
        from lftpipe.stages.recouple import choose_block

        return choose_block(store_path, settings)
    return parse_block(text, teacher.num_layers)


Wanted = tuple[Path, TrainSettings, tuple[int, int]]


def train_runs(
    wanted: list[Wanted], store: Store, teacher: Teacher, *, joint: bool = False
) -> list[dict[str, Any]]:
    """Train runs with `resolved` settings, or go on with them; finished ones are left as they are."""
    _check_together(wanted, joint)
    finished = processes.agree([_claim(*each, store) for each in wanted] if processes.rank() == 0 else None)
    if joint and any(finished) and not all(finished):
        raise RunError(
            "runs to be trained jointly, of which some are finished",
            "all or none",
            "name new ones, or --force",
        )
    results = {run: _finished(run) for (run, _, _), done in zip(wanted, finished, strict=True) if done}
    training = []
    for run, settings, block in wanted:
        if run in results:
            continue
        torch.manual_seed(settings.seed)
        if settings.objective == "linear":
            results[run] = fit_linear(run, settings, store, teacher, block)
        else:
            training.append(Training(run, settings, store, teacher, block))
    if training:
        chains = [Chain(training)] if joint else [Chain([each]) for each in training]
        done = train_together(chains, resume=training[0].settings.resume)
        results |= {Path(result["run"]): result for result in done}
    return [results[run] for run, _, _ in wanted]


def _finished(run: Path) -> dict[str, Any]:
    finished = runs.open_run(run)
    return {
        "run": str(run),
        "block": list(finished.block),
        "objective": finished.objective,
        "train_tokens": finished.train_tokens,
        "already_finished": True,
    }


#: What runs have in common that are trained from the same batches.
_SHARED = ("batch_tokens", "seed", "hold_back", "from_teacher", "resume", "device")


def _check_together(wanted: list[Wanted], joint: bool) -> None:
    (_, first, _), *others = wanted
    for run, settings, _ in others:
        for key in _SHARED:
            if getattr(settings, key) != getattr(first, key):
                raise SettingsError(
                    f"{key} = {getattr(settings, key)} for {run.name}, {getattr(first, key)} for another run",
                    "the same for all runs of one command",
                    "train them one after the other",
                )
    if len({run for run, _, _ in wanted}) < len(wanted):
        raise SettingsError("several runs of the same name", "a name for each", "name them with --run")
    blocks = [block for _, _, block in wanted]
    if joint and any(m < n for (_, n), (m, _) in pairwise(blocks)):
        raise SettingsError(
            f"--joint with blocks {', '.join(f'{m}:{n}' for m, n in blocks)}",
            "blocks in order that do not overlap",
            "give --block 6:12 --block 12:18",
        )
    if joint and any(
        settings.tokens != first.tokens or settings.loss != first.loss for _, settings, _ in others
    ):
        raise SettingsError("--joint with different tokens or losses", "the same", "train them apart")


def variants_of(settings: TrainSettings) -> list[TrainSettings]:
    """One settings for each `[train.variants.NAME]` of a recipe, or the settings themselves."""
    if not settings.variants:
        return [settings]
    chosen = settings.run.split(",") if settings.run else list(settings.variants)
    if unknown := [name for name in chosen if name not in settings.variants]:
        raise SettingsError(
            f"--run {unknown[0]}", f"one of the recipe's variants: {', '.join(settings.variants)}", "name one"
        )
    plain = {field.name: getattr(settings, field.name) for field in fields(settings)}
    return [
        TrainSettings(**plain | settings.variants[name] | {"variants": {}, "run": name}) for name in chosen
    ]


def teacher_of(store: Store, workspace: Path) -> Teacher:
    """The teacher that a store was made with.

    Raises
    ------
    TeacherError
        If it is not found, or is no longer as it was when the store was made.
    """
    recorded = store.identity["teacher"]
    teacher = open_teacher(recorded["model"], workspace, revision=recorded["revision"])
    for part, digest in (("weights", teacher.checkpoint.digest), ("config", teacher.config_digest)):
        before = recorded.get(f"{part}_digest", digest)
        if digest != before:
            raise TeacherError(
                f"teacher {recorded['model']} whose {part} changed since {store.path} was made",
                f"{part} with digest {before[:12]}…",
                f"put the old {part} back, or extract again with --force",
            )
    return teacher


def resolved(settings: TrainSettings, store: Store, block: tuple[int, int]) -> TrainSettings:
    """Settings with all that was left open chosen, and checked against the store.

    Raises
    ------
    LftpipeError
        If the store lacks a state of the block or has nothing to train on, or the settings contradict.
    """
    m, n = block
    if settings.condition == "source" and settings.objective in ("regression", "linear"):
        raise SettingsError(
            f"--condition source with --objective {settings.objective}",
            "a flow: this layer sees x_0 and nothing else",
            "use --objective fw",
        )
    if settings.objective == "hybrid" and settings.alpha == 0:
        raise SettingsError("--objective hybrid --alpha 0", "a positive --alpha", "use --objective fw")
    terms = _terms(settings)
    needed = range(m, n + 1) if "trajectory" in terms else (m, n)
    absent = [l for l in needed if l not in store.layers]  # noqa: E741
    if absent and not settings.from_teacher:
        raise SettingsError(
            f"block {m}:{n}, which needs state {absent[0]}",
            f"states that the store holds: {_ranges(store.layers)}",
            f"choose another block, or extract with --layers {','.join(map(str, needed))}",
        )
    if settings.loss is not None and (settings.objective in ("hybrid", "linear")):
        raise SettingsError(
            f"--loss with --objective {settings.objective}",
            "one of the two",
            "write the sum as --loss fw,sfm:0.001",
        )
    missing = [l for l in range(m, n) if l not in store.attention_layers]  # noqa: E741
    if "branches" in terms and missing and not settings.from_teacher:
        raise SettingsError(
            f"a loss with branches on a store without the attention context of layer {missing[0]}",
            f"contexts of layers {m} to {n - 1}",
            "extract with --attention",
        )
    if "top-logits" in terms and not store.spec.logits:
        raise SettingsError(
            "a loss with top-logits on a store without logits",
            "a store with the teacher's largest logits",
            "extract with --logits 64, or use the term logits",
        )
    timeless = settings.objective == "regression"
    if timeless and (walks := sorted(terms & {"fw", "sfm", "trajectory", "branches"})):
        raise SettingsError(
            f"--loss {settings.loss} with --objective regression",
            "terms without time: regression, logits, top-logits",
            f"use --objective fw for the term {walks[0]}",
        )
    if store.num_sequences("train") == 0:
        raise StoreError(
            f"store {store.path} without training sequences", "at least one", "extract with more --tokens"
        )
    # All settled here is recorded with the run, and compared when it is resumed.
    return replace(settings, block=f"{m}:{n}", threads=torch.get_num_threads())


def _terms(settings: TrainSettings) -> set[str]:
    """The terms of all stages of a loss."""
    if settings.objective == "linear":
        return set()
    return {term for stage in parse_loss(loss_text(settings)) for term in stage.weights}


def _ranges(layers: tuple[int, ...]) -> str:
    whole = layers == tuple(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} to {layers[-1]}" if whole and len(layers) > 1 else ", ".join(map(str, layers))


def run_name(settings: TrainSettings, block: tuple[int, int]) -> str:
    """What a run is called that was given no name: after block, objective and seed."""
    objective = settings.objective
    if objective in ("fw", "hybrid"):
        objective += str(settings.walk_steps) + ("" if settings.solver == "midpoint" else "-euler")
    return f"{block[0]}-{block[1]}-{objective}-seed{settings.seed}"


#: Settings that do not change a run's numbers, or that a resumed run may change.
_MAY_DIFFER = {
    "resume",
    "force",
    "workspace",
    "store",
    "log_every",
    "checkpoint_every",
    "run",
    "rank_by",
    "variants",
    "tensorboard",
}


def _claim(run: Path, settings: TrainSettings, block: tuple[int, int], store: Store) -> bool:
    """Make the run's folder ours: a new one, one to resume, or `--force`; True if it is finished already."""
    plain = to_plain(settings)
    if (run / runs.SETTINGS).exists() and not settings.force:
        for key, before, now in changed_settings(run, settings, store):
            raise RunError(
                f"{key} = {now} for {run}",
                f"{key} = {before}, as it was begun",
                "use the same settings, start another run with --run NAME, or overwrite it with --force",
            )
        finished = (run / runs.MANIFEST).exists()
        if not finished and not settings.resume:
            raise RunError(
                f"unfinished run {run}", "--resume, or a new name", "pass --resume, or --force to restart"
            )
        return finished
    if settings.force:
        for name in (runs.MANIFEST, runs.METRICS, runs.CHECKPOINT, runs.WEIGHTS):
            (run / name).unlink(missing_ok=True)
    runs.write_settings(run, plain, store.fingerprint)
    return False


def changed_settings(run: Path, settings: TrainSettings, store: Store) -> Iterator[tuple[str, Any, Any]]:
    """Setting, value with which the run was begun, and value now, of all that would give another run."""
    before, fingerprint = runs.read_settings(run)
    # What an older version did not know was then as it is by default now.
    before = to_plain(TrainSettings()) | before | {"store fingerprint": fingerprint}
    now = to_plain(settings) | {"store fingerprint": store.fingerprint}
    for key in sorted((before.keys() | now.keys()) - _MAY_DIFFER):
        if before.get(key) != now.get(key):
            yield key, before.get(key), now.get(key)


def summary(result: dict[str, Any]) -> str:
    """What was made, where, and what to type next."""
    if "runs" in result:
        return "\n".join(summary({**each, "store": result["store"]}) for each in result["runs"])
    m, n = result["block"]
    lines = [f"{result['run']}: {result['objective']} flow layer for layers {m} to {n - 1}"]
    if result.get("already_finished"):
        lines.append("  it was finished already: nothing was computed")
        return "\n".join(lines)
    speed = f", {result['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in result else ""
    loss = f", last loss {result['loss']:.4f}" if "loss" in result else ""
    lines.append(f"  {result['train_tokens']:,} tokens in {result['seconds']:.0f} s{speed}{loss}")
    lines.append(f"next: lftpipe evaluate {result['run']} --store {result['store']}")
    return "\n".join(lines)
