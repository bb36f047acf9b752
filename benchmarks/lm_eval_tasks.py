"""A run's student and its teacher on lm_eval's tasks: the scores, and how much of the teacher's is kept.

python benchmarks/lm_eval_tasks.py RUN --limit 200         # with the Hub: PIQA, ARC, HellaSwag, ...
python benchmarks/lm_eval_tasks.py RUN --tasks FOLDER      # offline: every task of a folder of YAML files

`make lm-eval RUN=NAME` installs lm_eval and runs it. The student is exported first: as plain layers where
that is exact, else as a latent flow, which this process registers with transformers.
"""

import argparse
import json
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from lftpipe import runs
from lftpipe.config.settings import ExportSettings
from lftpipe.config.settings.base import default_workspace
from lftpipe.errors import RunError
from lftpipe.files import write_atomic
from lftpipe.stages.export import export
from lftpipe.student.loading import teacher_of_run
from lftpipe.workspace import find_run

#: What readers of this field expect, and the metric that counts of each.
TASKS = {
    "piqa": "acc_norm",
    "arc_easy": "acc_norm",
    "arc_challenge": "acc_norm",
    "hellaswag": "acc_norm",
    "winogrande": "acc",
    "boolq": "acc",
    "openbookqa": "acc_norm",
    "lambada_openai": "acc",
}

#: Metrics of which less is better.
LOWER = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")


def scores(folder: Path, tasks: list[str], manager: Any, limit: int | None) -> dict[str, dict[str, float]]:
    """By task and metric, without their standard errors."""
    # By its name: what is not installed everywhere has no types.
    evaluate: Any = import_module("lm_eval").simple_evaluate
    found: Any = evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=tasks,
        task_manager=manager,
        device="cpu",
        limit=limit,
        bootstrap_iters=0,
    )
    return {
        task: {
            name.partition(",")[0]: value
            for name, value in metrics.items()
            if isinstance(value, float) and "stderr" not in name
        }
        for task, metrics in found["results"].items()
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """One row a task, and the mean of what is kept."""
    lines = ["| task | metric | teacher | student | kept |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['task']} | {row['metric']} | {row['teacher']:.4g} | {row['student']:.4g} "
        f"| {100 * row['kept']:.1f} % |"
        for row in rows
    ]
    lines.append(f"| mean | | | | {100 * sum(row['kept'] for row in rows) / len(rows):.1f} % |")
    return lines


def compare(teacher: dict[str, Any], student: dict[str, Any]) -> list[dict[str, Any]]:
    """The fraction of the teacher's score that is kept; of a perplexity, the teacher's over the student's."""
    rows = []
    for task, metrics in teacher.items():
        wanted = TASKS.get(task)
        for metric in [wanted] if wanted in metrics else metrics:
            a, b = metrics[metric], student[task][metric]
            kept = (a / b if b else 0.0) if metric in LOWER else (b / a if a else 0.0)
            rows.append({"task": task, "metric": metric, "teacher": a, "student": b, "kept": kept})
    return rows


def main() -> None:
    """Export, evaluate both, and write `lm-eval.json` and `lm-eval.md` into the run's folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", help="name or path of a run")
    parser.add_argument("--tasks", default="", help="names with commas between, or a folder of YAML files")
    parser.add_argument("--limit", type=int, help="documents of each task; left out, all")
    parser.add_argument("--k", type=int, help="steps; left out, those of training")
    parser.add_argument("--workspace", type=Path, default=default_workspace())
    given = parser.parse_args()

    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    run = runs.open_run(find_run(given.workspace, None, given.run))
    teacher = teacher_of_run(run, given.workspace)
    folder = Path(given.tasks) if given.tasks and Path(given.tasks).is_dir() else None
    if folder is None and "/" in given.tasks:
        parser.error(f"--tasks {given.tasks}: there is no such folder")
    manager = TaskManager(include_path=str(folder) if folder else None, include_defaults=folder is None)
    names = list(manager.all_tasks) if folder else [t for t in given.tasks.split(",") if t] or list(TASKS)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown or not names:
        parser.error(f"--tasks {given.tasks}: no task {', '.join(unknown) or 'there'}")
    with tempfile.TemporaryDirectory() as out:
        settings = {"workspace": given.workspace, "runs": (str(run.path),), "k": given.k}
        try:
            form = export(ExportSettings(**settings, form="plain", out=Path(out) / "plain"))
        except RunError as refusal:
            print(f"no plain form ({refusal}): a latent flow instead")
            form = export(ExportSettings(**settings, out=Path(out) / "flow"))
        student = scores(Path(form["out"]), names, manager, given.limit)
    rows = compare(scores(teacher.folder, names, manager, given.limit), student)
    result = {"run": run.path.name, "teacher": teacher.name, "limit": given.limit, "rows": rows}
    write_atomic(run.path / "lm-eval.json", (json.dumps(result, indent=1) + "\n").encode())
    lines = [f"# {run.path.name} on lm_eval's tasks", "", *table(rows)]
    write_atomic(run.path / "lm-eval.md", ("\n".join(lines) + "\n").encode())
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
