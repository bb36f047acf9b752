"""Cards: the README.md of a student, a run or a store on the Hub, with the Hub's metadata. No torch."""

import shlex
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lftpipe.base.errors import LftpipeError
from lftpipe.base.shape import SHOWN_BLOCKS
from lftpipe.reporting.runs import scores_of
from lftpipe.reporting.tables import escaped, markdown_lines, markdown_table, more_sections
from lftpipe.results.outcomes import Exported
from lftpipe.results.scores import Results, Score
from lftpipe.teacher.registry import REGISTERED

if TYPE_CHECKING:
    from lftpipe.runs import Run
    from lftpipe.teacher.source import Teacher

TAGS = ("lftpipe", "latent-flow-transformer")


def student_card(
    result: Exported,
    teacher: "Teacher",
    opened: Sequence["Run"],
    *,
    module: str,
    licence: str | None = None,
) -> str:
    """The README that goes with an export: from what, how good, how to load.

    `licence`: of the weights; None names none.
    """
    hub_id = _hub_id(teacher.identity())
    named, shape = escaped(hub_id), escaped(result.shape)
    parts = [part for run in opened for part in run.parts]
    layers = " and ".join(f"layers {part.start} to {part.stop - 1}" for part in parts)
    if len(parts) > SHOWN_BLOCKS:
        layers = f"{sum(part.stop - part.start for part in parts)} of them ({escaped(result.shape)})"
    lines = [
        *_metadata_of_model(hub_id, "transformers", licence),
        f"# {escaped(teacher.name)} as a latent flow: {shape}",
        "",
        f"The {teacher.num_layers} layers of {named} with {layers} replaced by "
        f"{'one flow layer' if len(parts) == 1 else 'flow layers'}, run in {result.k} "
        f"{result.solver} steps (Latent Flow Transformer, arXiv 2505.14513).",
        "",
        *_unrolled(result),
        *_trained(opened),
        "",
        "## Measured",
        "",
        *_measured(result, opened),
        "",
        *_usage(result, module),
        "",
        f"The terms of {named} hold for these weights, which are made from its.",
    ]
    return "\n".join(lines) + "\n"


def run_card(run: "Run", repository: str, *, licence: str | None = None) -> str:
    """The README of a run: one flow layer, its scores, and how to use it.

    `licence`: of the weights; None names none.
    """
    hub_id = _hub_id(run.teacher)
    m, n = run.block
    name = shlex.quote(run.path.name)
    scores = scores_of(run.path)
    lines = [
        *_metadata_of_model(hub_id, "lftpipe", licence),
        f"# {escaped(run.path.name)}: a flow layer for {escaped(hub_id)}",
        "",
        f"One layer in place of layers {m} to {n - 1} of {escaped(hub_id)} (Latent Flow Transformer, arXiv "
        "2505.14513), as a run of lftpipe: weights, settings, metrics and manifest. It needs its teacher.",
        "",
        *_trained([run]),
        "",
        "## Measured",
        "",
        *(_scores(scores) if scores else ["Not measured yet."]),
        "",
        "## Use",
        "",
        "```",
        f"lftpipe pull {repository} --run {name}",
        f'lftpipe generate {name} --prompt "Once"',
        f"lftpipe export {name}        # a model of transformers",
        "```",
        "",
        f"The terms of {escaped(hub_id)} hold for these weights, which are made from its.",
    ]
    return "\n".join(lines) + "\n"


def store_card(
    facts: Mapping[str, Any], identity: Mapping[str, Any], repository: str, *, licence: str | None = None
) -> str:
    """The README of a store: whose states of which text, in which arrays, and how to read them.

    `facts`: `layers`, `attention_layers`, `context`, `width`, `dtype`, `tokens` by split, and `fingerprint`.
    `licence`: of the data; None names none.
    """
    from huggingface_hub import DatasetCardData

    teacher = identity["teacher"]
    hub_id = _hub_id(teacher)
    data = DatasetCardData(
        license=licence,
        pretty_name=f"Hidden states of {teacher['name']}",
        tags=[*TAGS, "hidden-states", "activations", "zarr"],
        base_model=hub_id,
    )
    tokens = " and ".join(f"{count:,} {split}" for split, count in facts["tokens"].items())
    rows = [
        ["teacher", f"{hub_id}, revision {teacher['revision'] or '-'}, weights {teacher['weights_digest']}"],
        ["corpus", str(identity["corpus"])],
        ["tokens", f"{tokens}, in sequences of {facts['context']}"],
        ["hidden states", ", ".join(map(str, facts["layers"]))],
        ["attention outputs", ", ".join(map(str, facts["attention_layers"])) or "none"],
        ["features", f"{facts['width']}, {facts['dtype']}"],
        ["fingerprint", facts["fingerprint"]],
    ]
    lines = [
        *_front(data),
        f"# Hidden states of {escaped(teacher['name'])}",
        "",
        f"What {escaped(hub_id)} computes on a text, layer by layer, as a Zarr store made by lftpipe.",
        "",
        *markdown_lines(["of the store", ""], rows),
        "",
        "## Use",
        "",
        "```",
        f"lftpipe pull {repository}                          # bring it here, and check every byte",
        f"lftpipe train --from-cache --store {repository}/states.zarr   # or read it from the Hub",
        "```",
        "",
        "The terms of the corpus and of the teacher hold for this data, which is made from both.",
    ]
    return "\n".join(lines) + "\n"


def _hub_id(teacher: Mapping[str, Any]) -> str:
    """Its id on the Hub, or its short name where it is a folder of some machine."""
    model = str(teacher["model"])
    if model in REGISTERED:
        return REGISTERED[model].hub_id or model
    return str(teacher.get("name", "teacher")) if Path(model).is_absolute() else model


def _metadata_of_model(hub_id: str, library: str, licence: str | None) -> list[str]:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        license=licence,
        library_name=library,
        pipeline_tag="text-generation",
        tags=list(TAGS),
        base_model=hub_id,
    )
    return _front(data)


def _front(data: Any) -> list[str]:
    """The block of metadata that the Hub reads."""
    return ["---", *data.to_yaml().splitlines(), "---", ""]


def _unrolled(result: Exported) -> list[str]:
    """What a plain export is."""
    if result.form != "plain":
        return []
    return [
        f"The steps are unrolled exactly into ordinary layers: this is a {result.model_type} "
        f"checkpoint of {result.layers} layers that any runtime of that family loads. Its logits "
        f"differ from the flow's by at most {result.max_logit_difference:.1e} in float32, on random "
        "tokens.",
        "",
    ]


def _trained(opened: Sequence["Run"]) -> list[str]:
    """The table of the runs."""
    rows = [
        [
            run.path.name,
            f"{run.block[0]}:{run.block[1]}",
            run.label,
            str(run.seed),
            f"{run.train_tokens:,}",
            run.store_fingerprint[:12],
        ]
        for run in opened
    ]
    return markdown_lines(["run", "block", "objective", "seed", "training tokens", "store"], rows)


def _usage(result: Exported, module: str) -> list[str]:
    """How to load it."""
    plain = result.form == "plain"
    trust, distrust = ("", "") if plain else (", trust_remote_code=True", ", trust_remote_code=False")
    return [
        "## Use",
        "",
        *([] if plain else [f"`{module}.py` has the student's classes; lftpipe need not be installed.", ""]),
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder"{trust})',
        f'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder"{distrust})',
        *([] if plain else [f"model.set_steps({result.k})  # another number of steps, at run time"]),
        'tokens = tokenizer("Once", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**tokens, max_new_tokens=40)[0]))",
        "```",
    ]


def _measured(result: Exported, opened: Sequence["Run"]) -> list[str]:
    """Rows of Table 1 for this student, if `lftpipe evaluate` wrote them."""
    table = opened[0].path.parent.parent / "results.json"
    try:
        rows = Results.from_json(table).rows
    except (OSError, LftpipeError):
        rows = []  # no table, or a damaged one: the card says that there is none
    # A layer without time has one step of Euler's, whatever the others have.
    solvers = [result.solver if run.has_time else "euler" for run in opened if run.parts[0].kind != "skip"]
    asked = (
        [run.weights_digest for run in opened],
        result.k,
        " + ".join(dict.fromkeys(solvers)) or result.solver,
    )
    rows = [row for row in rows if row.method == "teacher" or (row.weights, row.k, row.solver) == asked]
    if len(rows) > 1:
        return _scores(rows)
    names = shlex.join(run.path.name for run in opened) + (" --together" if len(opened) > 1 else "")
    solver = "" if all(run.solver == result.solver for run in opened) else f" --solver {result.solver}"
    return [f"Not measured yet: `lftpipe evaluate {names} --k {result.k}{solver}` does."]


def _scores(rows: Sequence[Score]) -> list[str]:
    """Rows of Table 1, and what more is known of them."""
    more = chain.from_iterable(["", *each.lines("###")[:-1]] for each in more_sections(rows))
    return [*markdown_table(rows), *more]
