"""`lftpipe plan`: the best shape for a budget, of candidates that were trained alone."""

import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from lftpipe import runs
from lftpipe.base import progress
from lftpipe.base.device import on_device
from lftpipe.base.errors import SettingsError, StoreError
from lftpipe.base.outputs import making
from lftpipe.base.shape import Part, shape_text
from lftpipe.base.version import __version__
from lftpipe.base.workspace import find_store, require_json_name
from lftpipe.config.settings import Budgeted, PlanSettings, recorded
from lftpipe.planning.choice import Budget, Pool, cheapest, choose
from lftpipe.planning.library import candidates, groups, trained
from lftpipe.planning.scores import Costs, HeldBack, mean_and_error
from lftpipe.reporting.plots import draw_plan
from lftpipe.reporting.terminal import Column, FittedTable
from lftpipe.results.outcomes import Planning
from lftpipe.results.plan import Candidate, Choice, Plan
from lftpipe.store import Store
from lftpipe.teacher.source import Teacher, open_recorded, record_of

#: Keys by which a plan is known, whole or damaged.
MARKS = (b'"candidates"', b'"front"', b'"choice"')

#: Parameters over the teacher's, where no budget is given.
SIZE = 0.7

#: Sequences held back that shapes are scored on, at most.
SCORED = 32

#: Budgets of the front, between the smallest and the teacher's.
FRONT = 12

#: Of the time, what candidates may take; the rest is for whole shapes.
FOR_CANDIDATES = 0.8

#: Rounds of exchanges, and exchanges that are scored in each.
ROUNDS, EXCHANGES = 4, 6


@on_device
def plan(settings: PlanSettings) -> Planning:
    """Train candidates for the parts of a student, score them in place, and choose a shape within a budget.

    Candidates that were trained before are not trained again.

    `settings`: the budget, how long to search, and where the plan goes.
    Raises `LftpipeError` if no shape keeps the budget, the store lacks states, or the plan exists and `force`
    is not set.
    """
    check_budget(settings)
    store_path = find_store(settings.workspace, settings.store)
    out = settings.out or store_path.parent / "plan.json"
    require_json_name(out)
    picture = out.with_suffix(".png")
    cure = "pass --force (finished candidates are not trained again)"
    with making(out, [picture], marks=MARKS, force=settings.force, cure=cure) as staging:
        result = _planned(settings, store_path, store_path.parent / "candidates")
        draw_plan(result, staging.path(picture))
        result.write(staging.path(out))
    return Planning(plan=result, out=str(out))


def check_budget(settings: Budgeted) -> None:
    """Refuse two budgets at once."""
    given = [name for name in ("size", "layers", "speed") if getattr(settings, name) is not None]
    if len(given) > 1:
        raise SettingsError(f"--{given[0]} with --{given[1]}", "one of the two", "leave out the other")


def _planned(settings: PlanSettings, store_path: Path, folder: Path) -> Plan:
    began, store = time.monotonic(), Store.open(store_path)
    store.need_whole("plan")
    teacher = open_recorded(record_of(store.identity), settings.workspace, store.path)
    _check_states(store, teacher)
    total = store.num_sequences("train")
    held = math.ceil(settings.hold_back * total)  # as a candidate's run counts them
    if not 2 <= held < total:
        raise StoreError(
            f"--hold-back {settings.hold_back:g} of {total} training sequences",
            "two or more held back, and some left",
            "extract with more --tokens, or change --hold-back",
        )
    search = _Search(settings, store, teacher, range(total - held, total)[:SCORED], folder)
    deadline = began + 60 * settings.minutes
    search.fill(began + 60 * settings.minutes * FOR_CANDIDATES)
    budget = search.budget()
    first = choose(search.pool, budget)
    if first is None:
        raise _too_small(settings, search, budget)
    tried = search.repaired(first, budget, deadline)
    return Plan(
        teacher=teacher.name,
        store=store.fingerprint,
        num_layers=teacher.num_layers,
        cost=search.whole,
        candidates=list(search.pool.candidates),
        choice=min(tried, key=lambda choice: choice.score or 0.0),
        tried=tried,
        front=search.front(budget),
        settings=recorded(settings),
        lftpipe=__version__,
    )


def _check_states(store: Store, teacher: Teacher) -> None:
    absent = sorted(set(range(teacher.num_layers + 1)) - set(store.layers))
    if absent:
        raise StoreError(
            f"store {store.path} without state {absent[0]}",
            "the states between all layers",
            "extract with --layers all into another --store",
        )


def _too_small(settings: PlanSettings, search: "_Search", budget: Budget) -> SettingsError:
    least, whole = cheapest(search.pool, budget), budget.of(search.whole)
    if settings.layers is not None:
        return SettingsError(f"--layers {settings.layers}", f"at least {least:.0f}", "raise --layers")
    if settings.speed is not None:
        return SettingsError(
            f"--speed {settings.speed:g}",
            f"at most {whole / least:.3g}, the fastest shape's",
            "lower --speed",
        )
    return SettingsError(
        f"--size {_size(settings):g}", f"at least {least / whole:.3g}, the smallest shape's", "raise --size"
    )


def _size(settings: PlanSettings) -> float:
    return SIZE if settings.size is None else settings.size


class _Search:
    """The candidates so far, and shapes made of them."""

    def __init__(
        self, settings: PlanSettings, store: Store, teacher: Teacher, held: range, folder: Path
    ) -> None:
        self.settings, self.store, self.teacher, self.folder = settings, store, teacher, folder
        self.held_back = HeldBack(store, teacher, held, settings)
        self.costs = Costs(self.held_back, teacher)
        self.whole = sum(self.costs.layers, self.costs.around)
        self.runs: dict[Part, runs.Run] = {}
        self.pool = Pool([], self.costs.layers, self.costs.around)

    def fill(self, deadline: float) -> None:
        """Train and score candidates, group by group, until there is no time for another."""
        parts = candidates(self.teacher, self.store, self.settings)
        found: list[Candidate] = []
        with progress.task("plan", len(parts), "candidates") as task:
            for group in groups(self.teacher, parts):
                if found and time.monotonic() > deadline:
                    break
                opened = trained(group, self.folder, self.settings, self.store, self.teacher)
                modules = [runs.load_flow(run, self.teacher).to(self.settings.device) for run in opened]
                placed = [(module, run.block) for module, run in zip(modules, opened, strict=True)]
                scores, errors = mean_and_error(self.held_back.scores(placed))
                for run, module, score, error in zip(opened, modules, scores, errors, strict=True):
                    (part,) = run.parts
                    self.runs[part] = run
                    cost = self.costs.of(part, module)
                    found.append(Candidate(part=part, score=score.item(), stderr=error.item(), cost=cost))
                task.advance(len(group))
        self.pool = Pool(found, self.costs.layers, self.costs.around)

    def budget(self) -> Budget:
        """What the settings ask for, as the most of one cost."""
        settings = self.settings
        if settings.layers is not None:
            return Budget("layers", float(settings.layers))
        if settings.speed is not None:
            return Budget("decode", self.whole.decode / settings.speed)
        return Budget("parameters", _size(settings) * self.whole.parameters)

    def choice(self, chosen: Sequence[Candidate], scores: torch.Tensor | None = None) -> Choice:
        """A whole shape; with its KL by sequence, if it was scored."""
        parts, cost = [candidate.part for candidate in chosen], self.pool.cost(chosen)
        mean, error = (None, None) if scores is None else (each.item() for each in mean_and_error(scores))
        return Choice(
            shape=shape_text(parts, self.teacher.num_layers),
            parts=parts,
            predicted=sum(candidate.score for candidate in chosen),
            score=mean,
            stderr=error,
            cost=cost,
            size=cost.parameters / self.whole.parameters,
            speed=self.whole.decode / cost.decode,
        )

    def repaired(self, first: list[Candidate], budget: Budget, deadline: float) -> list[Choice]:
        """Shapes that were scored whole: the first choice, and exchanges while one of them gains.

        Errors of parts do not add up, so the programme's choice may be bettered. Each exchange forbids
        one part of the best shape, the one with the largest score first, and solves the programme again.
        """
        best = first
        tried = [self._scored(first)]
        for _ in range(ROUNDS):
            before = best
            for candidate in sorted(before, key=lambda each: -each.score)[:EXCHANGES]:
                if time.monotonic() > deadline:
                    return tried
                other = choose(self.pool, budget, [candidate.part])
                if other is None or any(_parts(other) == choice.parts for choice in tried):
                    continue
                tried.append(self._scored(other))
                if (tried[-1].score or 0.0) <= min(choice.score or 0.0 for choice in tried):
                    best = other
            if best is before:
                break
        return tried

    def _scored(self, chosen: list[Candidate]) -> Choice:
        parts = _parts(chosen)
        modules = [runs.load_flow(self.runs[part], self.teacher) for part in parts]
        blocks = [part.block for part in parts]
        if not blocks:
            return self.choice(chosen, torch.zeros(2))
        whole = runs.sequence_of(self.teacher, blocks, modules).to(self.settings.device)
        return self.choice(chosen, self.held_back.scores([(whole, (blocks[0][0], blocks[-1][1]))])[0])

    def front(self, budget: Budget) -> list[Choice]:
        """What would be chosen at other budgets of the same cost."""
        least, whole = cheapest(self.pool, budget), budget.of(self.whole)
        found: list[Choice] = []
        for step in range(FRONT):
            most = least + (whole - least) * step / FRONT
            chosen = choose(self.pool, Budget(budget.kind, float(most)))
            if chosen is not None and (not found or _parts(chosen) != found[-1].parts):
                found.append(self.choice(chosen))
        return found


def _parts(chosen: Sequence[Candidate]) -> list[Part]:
    return [candidate.part for candidate in chosen]


def summary(result: Planning) -> FittedTable:
    """The front, with the choice in it."""
    found = result.plan
    rows = [[*_row(choice), "front"] for choice in found.front]
    rows += [[*_row(choice), "tried"] for choice in found.tried if choice != found.choice]
    rows.append([*_row(found.choice), "chosen"])
    return FittedTable(
        [
            Column("shape", "left", folds=True, needed=True),
            Column("size", needed=True),
            Column("layers"),
            Column("speed"),
            Column("predicted"),
            Column("KL", needed=True),
            Column("", "left", needed=True),
        ],
        rows,
        title=f"{found.teacher}: {len(found.candidates)} candidates",
        caption=f"written to {result.out}\nnext: lftpipe train --plan {result.out}",
        complete=result.out,
    )


def _row(choice: Choice) -> list[str]:
    score = "" if choice.score is None else f"{choice.score:.4f}"
    return [
        choice.shape or "the teacher",
        f"{choice.size:.3f}",
        str(choice.cost.layers),
        f"{choice.speed:.2f}",
        f"{choice.predicted:.4f}",
        score,
    ]
