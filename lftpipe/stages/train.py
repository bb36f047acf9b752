"""`lftpipe train`: learn flow layers for blocks, from the cache or from the live teacher."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lftpipe import runs
from lftpipe.device import prepare
from lftpipe.errors import RunError, TeacherError
from lftpipe.settings import TrainSettings
from lftpipe.spans import parse_block
from lftpipe.store import Store
from lftpipe.teacher.source import Teacher, open_teacher
from lftpipe.training import Chain, Training, fit_linear, processes, train_together
from lftpipe.training.claiming import claim
from lftpipe.training.settling import Wanted, check_together, resolved, run_name, variants_of
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
    prepare(settings.device, settings.threads)
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
                if settings.variants:  # the same recipe may be trained with several seeds
                    name += f"-seed{settings.seed}"
                wanted.append((run_path(store_path, name), one, block))
        results = train_runs(wanted, store, teacher, joint=settings.joint)
    finally:
        processes.leave()
    given = {"store": str(store_path)}
    return results[0] | given if len(results) == 1 else {"runs": results} | given


def _block(text: str, settings: TrainSettings, store_path: Path, teacher: Teacher) -> tuple[int, int]:
    if text == "auto":
        from lftpipe.stages.recouple import choose_block

        return processes.agree(choose_block(store_path, settings) if processes.rank() == 0 else None)
    return parse_block(text, teacher.num_layers)


def train_runs(
    wanted: list[Wanted], store: Store, teacher: Teacher, *, joint: bool = False
) -> list[dict[str, Any]]:
    """Train runs with `resolved` settings, or go on with them; finished ones are left as they are."""
    check_together(wanted, joint)
    claimed = None
    if processes.rank() == 0:
        claimed = [claim(run, settings, store) for run, settings, _ in wanted]
    finished = processes.agree(claimed)
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
            fitted = fit_linear(run, settings, store, teacher, block) if processes.rank() == 0 else None
            results[run] = processes.agree(fitted)
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
