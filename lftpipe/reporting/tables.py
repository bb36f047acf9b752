"""Table 1's columns, and how a table of results reads as Markdown. No torch."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

from lftpipe.results.scores import JOINED, AdaptiveScore, Comparison, Results, Score, TaskScore

#: Keys of a row of `results.json` and their headings.
COLUMNS = {
    "method": "method",
    "run": "run",
    "block": "block",
    "k": "k",
    "solver": "solver",
    "nfe": "NFE",
    "kl_latent": "KL_x",
    "nmse": "NMSE",
    "nmse_without_first": "NMSE w/o first",
    "kl": "KL",
    "ppl": "PPL",
    "word_ppl": "word PPL",
    "ppl_ratio": "PPL ratio",
    "agreement": "agreement",
    "parameters": "parameters",
    "ms_per_token": "ms/token",
    "seed": "seed",
    "train_tokens": "train tokens",
}

#: Of the table of steps chosen token by token, fixed steps beside them.
ADAPTIVE_COLUMNS = {
    "method": "method",
    "run": "run",
    "block": "block",
    "threshold": "threshold",
    "k": "k at most",
    "solver": "solver",
    "nfe": "mean NFE",
    "nfe_with_keys": "NFE with keys",
    "kl_latent": "KL_x",
    "nmse": "NMSE",
    "nmse_without_first": "NMSE w/o first",
    "kl": "KL",
    "ppl": "PPL",
    "seed": "seed",
    "train_tokens": "train tokens",
}


def markdown_lines(heading: Sequence[str], table: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table. Names can neither end a cell nor become HTML."""
    lines = ["| " + " | ".join(map(escaped, heading)) + " |", "|" + "---|" * len(heading)]
    return lines + ["| " + " | ".join(map(escaped, row)) + " |" for row in table]


def escaped(text: str) -> str:
    """A text as Markdown shows it literally, on one line, in a cell or outside."""
    shown = " ".join(text.split())
    for character, written in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "&#124;")):
        shown = shown.replace(character, written)
    return re.sub(r"([\\`*\[\]])", r"\\\1", shown)


def markdown_table(rows: Iterable[Any], columns: dict[str, str] = COLUMNS) -> list[str]:
    """The lines of a Markdown table of some attributes of rows, under their headings.

    `columns`: names of the columns, and how each shows a row.
    """
    rows = list(rows)
    known = {key for row in rows for key in row.to_json()}
    shown = {key: name for key, name in columns.items() if key in known}
    table = ([cell(getattr(row, key, None)) for key in shown] for row in rows)
    return markdown_lines(list(shown.values()), table)


#: Of the table of means over seeds.
MEAN_COLUMNS = {
    "run": "run",
    "block": "block",
    "k": "k",
    "solver": "solver",
    "nfe": "NFE",
    "seeds": "seeds",
    "nmse": "NMSE",
    "kl": "KL",
    "kl_low": "lowest",
    "kl_high": "highest",
    "ppl": "PPL",
    "train_tokens": "train tokens",
}


#: The end of a run's name that says its seed, also of each run of a student.
SEED = re.compile(rf"-seed\d+(?={re.escape(JOINED)}|$)")


@dataclass(frozen=True, kw_only=True)
class Mean(Score):
    """Runs that differ by nothing but their seed, as one: means, and the range of KL."""

    seeds: int
    kl_low: float | None
    kl_high: float | None


def means_over_seeds(rows: Sequence[Score]) -> list[Mean]:
    """Of the runs, and students of several runs, whose names end in `-seedS`, those of several seeds."""
    groups: dict[tuple[Any, ...], list[Score]] = {}
    for row in rows:
        name = SEED.sub("", row.run or "")
        if name != (row.run or ""):
            alike = (row.method, row.block, row.k, row.solver, row.nfe, row.train_tokens)
            groups.setdefault((name, *alike), []).append(row)
    return [_mean(name, group) for (name, *_), group in groups.items() if len(group) > 1]


def _mean(name: str, group: list[Score]) -> Mean:
    averaged = {}
    for key in ("kl_latent", "nmse", "nmse_without_first", "kl", "ppl", "ppl_ratio", "agreement"):
        values = [value for row in group if (value := getattr(row, key)) is not None]
        averaged[key] = sum(values) / len(values) if len(values) == len(group) else None
    kls = [row.kl for row in group if row.kl is not None]
    shared = {field.name: getattr(group[0], field.name) for field in fields(Score)}
    shared |= averaged | {"run": name, "seed": None}
    low, high = (min(kls), max(kls)) if kls else (None, None)
    return Mean(**shared, seeds=len(group), kl_low=low, kl_high=high)


def means_section(rows: Sequence[Score]) -> list[str]:
    """The lines of the table of means over seeds; none if no two runs differ by their seed alone."""
    means = means_over_seeds(rows)
    return ["## Means over seeds", "", *markdown_table(means, MEAN_COLUMNS), ""] if means else []


def adaptive_section(result: Results) -> list[str]:
    """The lines that compare steps chosen token by token with fixed ones; none if nothing was measured."""
    if not result.adaptive:
        return []
    runs = {row.run for row in result.adaptive}
    fixed = (row for row in result.rows if row.run in runs)
    rows: list[Score] = sorted([*fixed, *result.adaptive], key=lambda row: (row.run or "", row.nfe or 0))
    return [
        "## Steps per token",
        "",
        "A token is finished once an evaluation changes its predicted end by less than the threshold "
        "(relative); `-` is a fixed number of steps. A finished token is counted as evaluated no more, in "
        "`NFE with keys` as paying for keys and values until the last step. Nothing is faster on the clock.",
        "",
        *markdown_lines(list(ADAPTIVE_COLUMNS.values()), map(_adaptive_cells, rows)),
        "",
    ]


def _adaptive_cells(row: Score) -> list[str]:
    """A fixed number of steps has no threshold, and its keys cost what its evaluations do."""
    given = {"nfe_with_keys": row.nfe} if not isinstance(row, AdaptiveScore) else {}
    return [cell(given.get(key, getattr(row, key, None))) for key in ADAPTIVE_COLUMNS]


@dataclass(frozen=True)
class Section:
    """A table of its own on a page of results, as Markdown and as HTML have it."""

    title: str
    note: str
    heading: list[str]
    cells: list[list[str]]

    def lines(self, level: str = "##") -> list[str]:
        """As Markdown."""
        return [f"{level} {self.title}", "", self.note, "", *markdown_lines(self.heading, self.cells), ""]


def more_sections(rows: Sequence[Score], comparisons: Sequence[Comparison] = ()) -> list[Section]:
    """Tasks, continuations, intervals and comparisons: those that rows have."""
    found = (_tasks(rows), _continuations(rows), _intervals(rows), _comparisons(comparisons))
    return [each for each in found if each.cells]


def _named(row: Score) -> list[str]:
    return [row.run or row.method, cell(row.k)]


def _tasks(rows: Sequence[Score]) -> Section:
    scored = [(row, row.tasks) for row in rows if row.tasks]
    names = list(dict.fromkeys(name for _, tasks in scored for name in tasks))
    metrics = {name: score.metric for _, tasks in scored for name, score in tasks.items()}
    return Section(
        "Tasks",
        "Scores and their standard errors. The mean counts each task of which more is better the same. Kept "
        "is its fraction of the teacher's, with a 95 % interval; above chance is the same after what "
        "guessing reaches is taken from both.",
        ["model", "k", *(f"{name} ({metrics[name]})" for name in names), "mean", "kept", "above chance"],
        [
            [
                *_named(row),
                *(_with_error(tasks.get(name)) for name in names),
                _with_error(mean := row.tasks_mean),
                _kept(mean),
                "-" if mean is None else percent(mean.kept_above_chance),
            ]
            for row, tasks in scored
        ],
    )


def _with_error(score: TaskScore | None) -> str:
    if score is None:
        return "-"
    return f"{score.value:.4g}" + ("" if score.stderr is None else f" ± {score.stderr:.2g}")


def _kept(score: TaskScore | None) -> str:
    if score is None or score.kept_interval is None:
        return "-" if score is None else percent(score.kept)
    low, high = (percent(each) for each in score.kept_interval)
    return f"{percent(score.kept)} ({low} to {high})"


def _continuations(rows: Sequence[Score]) -> Section:
    keys = ("passages", "exact", "as_teacher", "distinct_2", "repetition")
    found = [(row, row.continuations) for row in rows if row.continuations]
    return Section(
        "Continuations",
        "Held-out passages continued greedily: the fraction whose first four tokens are the passage's own, "
        "the tokens until a text leaves the teacher's, different pairs of neighbours over all, and the "
        "fraction of runs of four tokens that were there before in the text.",
        ["model", "k", "passages", "first 4 exact", "tokens as teacher", "distinct-2", "repetition"],
        [[*_named(row), *(cell(getattr(each, key)) for key in keys)] for row, each in found],
    )


def _intervals(rows: Sequence[Score]) -> Section:
    keys = ("kl_interval", "ppl_interval", "ppl_ratio_interval")
    return Section(
        "Intervals",
        "95 %, by a bootstrap over the documents that were scored; none where they are fewer than ten.",
        ["model", "k", "KL", "PPL", "PPL ratio"],
        [
            [*_named(row), *(_interval(getattr(row, key)) for key in keys)]
            for row in rows
            if any(getattr(row, key) for key in keys)
        ],
    )


def _interval(value: tuple[float, float] | None) -> str:
    return "-" if value is None else f"{value[0]:.4g} to {value[1]:.4g}"


#: What the difference of a comparison is of.
MEASURED = {"kl": "KL (less is better)", "tasks_mean": "mean of tasks (more is better)"}


def _comparisons(comparisons: Sequence[Comparison]) -> Section:
    return Section(
        "Who is ahead",
        "The best run against each other run on the same documents: the difference with its 95 % interval, "
        "and the probability of one as large by chance (signs of documents flipped), before and after Holm's "
        "correction for all rows of a measure. A difference whose interval has zero in it is no win.",
        ["measure", "best", "against", "difference", "95 % interval", "p", "p, corrected"],
        [
            [
                MEASURED.get(one.measure, one.measure),
                one.run,
                one.against,
                cell(one.difference),
                _interval(one.interval),
                f"{one.p:.2g}",
                f"{one.p_holm:.2g}",
            ]
            for one in comparisons
        ],
    )


def percent(value: float | None) -> str:
    """A fraction as a percentage; `-` where there is none."""
    return "-" if value is None else f"{100 * value:.1f} %"


def results_page(result: Results, title: str, introduction: str) -> list[str]:
    """The lines of a page with the table of results and what follows from it."""
    return [
        f"# {escaped(title)}",
        "",
        escaped(introduction),
        "",
        *markdown_table(result.rows),
        "",
        *chain.from_iterable(each.lines() for each in more_sections(result.rows, result.comparisons or ())),
        *means_section(result.rows),
        *adaptive_section(result),
    ]


def cell(value: Any) -> str:
    """A number as it reads best; `-` where there is none.

    `value`: a number, a text or None.
    """
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
