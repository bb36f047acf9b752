"""Tables of results."""

from typing import Any

from lftpipe.reporting.tables import markdown_table, means_over_seeds, means_section, more_sections
from lftpipe.results.scores import Comparison, Continuations, Score, TaskScore


def row(run: str | None, **values: Any) -> Score:
    known = {"method": "fw", "block": "1:3", "k": 1, "solver": "euler", "nfe": 1, "train_tokens": 64}
    figures = dict.fromkeys(("kl_latent", "nmse", "nmse_without_first", "kl", "ppl"), 1.0)
    return Score(**known | figures | {"run": run, "parameters": 7} | values)


def test_runs_that_differ_by_their_seed_alone_are_averaged():
    rows = [
        row(None),
        row("walk-seed0", kl=1.0, nmse=0.5),
        row("walk-seed1", kl=3.0, nmse=0.7),
        row("walk-seed2", kl=2.0, nmse=0.6, k=2),
        row("other-seed0", kl=9.0),
        row("mine", kl=9.0),
    ]
    (mean,) = means_over_seeds(rows)
    assert (mean.run, mean.seeds, mean.kl, mean.nmse) == ("walk", 2, 2.0, 0.6)
    assert (mean.kl_low, mean.kl_high) == (1.0, 3.0)
    assert means_section(rows)[0] == "## Means over seeds"
    assert means_section(rows[:1]) == []


def test_students_of_several_runs_are_averaged_over_seeds_too():
    rows = [row(f"a-seed{seed} + b-seed{seed}", kl=float(seed)) for seed in (1, 3)]
    (mean,) = means_over_seeds(rows)
    assert (mean.run, mean.seeds, mean.kl) == ("a + b", 2, 2.0)


def test_every_row_of_the_table_names_its_run():
    lines = markdown_table([row("walk-seed0")])
    assert "| run |" in lines[0]
    assert "walk-seed0" in lines[2]


def test_a_name_is_a_cell_and_nothing_else():
    (line,) = markdown_table([row("a|b\n<img src=x> [l](javascript:x)")])[2:]
    assert line.count("|") == markdown_table([row("a")])[2].count("|")
    assert "<" not in line
    assert "[l]" not in line.replace("\\[l\\]", "")
    assert "a&#124;b &lt;img src=x&gt;" in line


def test_scores_on_tasks_have_a_table_with_their_errors_and_what_is_kept():
    known = {"teacher": 0.7, "kept": 6 / 7, "kept_above_chance": 0.5, "chance": 0.5, "documents": 100}
    score = TaskScore(metric="acc", value=0.6, stderr=0.0492, **known, kept_interval=(0.7, 1.02))
    tasks = {"piqa": score, "wiki": TaskScore(metric="ppl", value=17.25, stderr=None, **known)}
    rows = [row(None), row("walk", tasks=tasks, tasks_mean=score), row("b", tasks={"piqa": score})]
    (section,) = more_sections(rows)
    table = [line for line in section.lines() if line.startswith("|")]
    assert table[0] == "| model | k | piqa (acc) | wiki (ppl) | mean | kept | above chance |"
    assert table[2] == (
        "| walk | 1 | 0.6 ± 0.049 | 17.25 | 0.6 ± 0.049 | 85.7 % (70.0 % to 102.0 %) | 50.0 % |"
    )
    assert table[3] == "| b | 1 | 0.6 ± 0.049 | - | - | - | - |"
    assert more_sections([row(None)]) == []


def test_intervals_continuations_and_comparisons_have_tables_of_their_own():
    written = Continuations(passages=5, exact=0.25, as_teacher=12.5, distinct_2=0.9, repetition=0.1)
    rows = [row("walk", kl_interval=(0.5, 1.5), continuations=written)]
    known = {"measure": "kl", "run": "walk", "against": "other", "difference": -0.1}
    sections = more_sections(rows, [Comparison(**known, interval=(-0.2, 0.01), p=0.03, p_holm=0.06)])
    assert [each.title for each in sections] == ["Continuations", "Intervals", "Who is ahead"]
    last = [each.lines()[-2] for each in sections]
    assert last[0] == "| walk | 1 | 5 | 0.25 | 12.5 | 0.9 | 0.1 |"
    assert last[1] == "| walk | 1 | 0.5 to 1.5 | - | - |"
    assert last[2] == "| KL (less is better) | walk | other | -0.1 | -0.2 to 0.01 | 0.03 | 0.06 |"
