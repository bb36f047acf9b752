"""What works for which model type of the installed transformers, tried on a tiny random model of each.

python benchmarks/families.py --out docs/families.md
python benchmarks/families.py --only qwen2,mamba2        # prints a line for each
"""

import argparse
import copy
import json
import re
import signal
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_configs import VOCABULARY, tiny_configs
from transformers import AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lftpipe import runs
from lftpipe.base.errors import LftpipeError, RunError, TeacherError
from lftpipe.base.shape import Part, shape_text
from lftpipe.families.attention import attention_context
from lftpipe.families.structure import check_attention, check_kind
from lftpipe.flow.velocity import Velocity
from lftpipe.student.assemble import build_student, load_teacher
from lftpipe.student.plain import unroll
from lftpipe.teacher.capture import close
from lftpipe.teacher.compare import check_logits
from lftpipe.teacher.layers import load_layer, load_rotary
from lftpipe.teacher.source import Teacher, open_teacher
from lftpipe.teacher.tail import Tail
from lftpipe.teacher.trunk import Trunk

#: Seconds after which a model counts as failed.
PATIENCE = 120

CONTEXT = 12

#: Parameters of a tiny model at most.
LARGEST = 50_000_000

#: What comes after it in a document is the table's.
MARK = "<!-- made by `make families`; do not edit -->"


@dataclass
class Line:
    """What worked for one model type."""

    model_type: str
    states: bool = False
    attention: bool = False
    flow: str = ""
    """`branches` or `whole`, once a flow layer was trained."""
    student: bool = False
    plain: bool = False
    without_first: str = ""
    """The student without its first layer, as a plain export: equal to it, or refused in words."""
    heads: str = ""
    """How many ways to hold embedding and head in a file are read as transformers reads them."""
    gguf: bool = False
    """Whether transformers reads its GGUF files, so that they can be named as teachers."""
    why: str = ""
    """What stopped it, at the first thing that did not work."""


def try_family(model_type: str, folder: Path) -> Line:
    """Build, extract, train, generate and unroll one family.

    Parameters
    ----------
    model_type
        Of transformers.
    folder
        Empty, for its files.
    """
    line = Line(model_type, gguf=model_type in GGUF_SUPPORTED_ARCHITECTURES)
    model = teacher = tokens = states = logits = None
    try:
        model = _tiny(model_type)
        model.save_pretrained(folder / "teacher")
        teacher = open_teacher(str(folder / "teacher"), folder)
        tokens = torch.randint(1, VOCABULARY, (2, CONTEXT), generator=torch.Generator().manual_seed(0))
        states = _states(teacher, tokens)
        line.states = True
        with torch.no_grad():
            logits = model(tokens, use_cache=False).logits
        check_attention(model_type, teacher.family, teacher.config, tuple(range(teacher.num_layers)))
        line.attention = True
    except Exception as error:
        line.why = _reason(error)
        if not line.states:
            return line
    assert teacher is not None
    assert tokens is not None
    assert states is not None
    assert logits is not None
    try:
        run = _train(teacher, states, logits, folder / "run")
        line.flow = "whole" if load_layer(teacher, 1).whole else "branches"
        student = build_student(teacher, [run], steps=2, solver="euler")
        with torch.inference_mode():
            student(tokens)
            made = student.generate(
                tokens[:1], max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        line.student = made.shape == (1, CONTEXT + 3)
        line.without_first = _without_first(teacher, tokens, states[0], folder / "skip")
        line.heads = _heads(model, folder)
        student = build_student(teacher, [run], steps=1, solver="euler")
        with torch.inference_mode():
            line.plain = bool((unroll(student)(tokens).logits - student(tokens).logits).abs().max() < 1e-3)
    except Exception as error:
        line.why = line.why if line.flow and line.why else _reason(error)
    return line


@torch.no_grad()
def _without_first(teacher: Teacher, tokens: torch.Tensor, first: torch.Tensor, folder: Path) -> str:
    """Whether the other layers do as before, in a student and in its plain export, with other numbers."""
    part = Part(0, 1, "skip")
    empty = runs.build_flow(teacher, [part])
    student = build_student(teacher, [_saved(teacher, empty, folder, part)], steps=1, solver="euler")
    context = attention_context(load_rotary(teacher), torch.arange(CONTEXT).expand(2, -1))
    ours = student(tokens).logits
    assert close(ours, Tail(teacher, 1)(first.clone(), context), 1e-3), "a student without layer 0 is another"
    try:
        plain = unroll(student)
    except RunError:
        return "refused"
    assert close(plain(tokens).logits, ours, 1e-3), "a plain form without layer 0 is another"
    return "equal"


@torch.no_grad()
def _heads(model: Any, folder: Path) -> str:
    """Tied in the config or not; in the file both tensors, equal or not, the head alone, or the embedding.

    The law is transformers' own loading, or a refusal by name where it would draw a head at random.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or not model._tied_weights_keys or head.weight.shape != embedding.weight.shape:
        return ""
    path = {id(part): name for name, part in model.named_modules()}
    head, embedding = f"{path[id(head)]}.weight", f"{path[id(embedding)]}.weight"
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    untied = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    untied.load_state_dict(model.state_dict())
    untied.get_parameter(head).copy_(-model.get_parameter(embedding).roll(1, 0))
    untied.save_pretrained(folder / "untied")
    tensors = load_file(folder / "untied" / "model.safetensors")
    names = {
        part: next(key for key, value in tensors.items() if torch.equal(value, untied.get_parameter(part)))
        for part in (head, embedding)
    }
    ways = {  # by name: what the config says, and what becomes of the file
        "tied": (True, {names[head]: tensors[names[embedding]].clone()}),
        "untied": (False, {}),
        "tied, another head": (True, {}),
        "tied, the head alone": (True, {names[embedding]: None}),
        "untied, no head": (False, {names[head]: None}),
    }
    wrong = [way for way, given in ways.items() if not _is_read(folder / "untied", tensors, *given)]
    assert not wrong, f"embedding and head read as others than transformers reads them: {', '.join(wrong)}"
    return f"{len(ways)} of {len(ways)}"


def _is_read(folder: Path, tensors: dict[str, torch.Tensor], tied: bool, changes: dict[str, Any]) -> bool:
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config))
    given = {name: value for name, value in (tensors | changes).items() if value is not None}
    save_file(given, folder / "model.safetensors", metadata={"format": "pt"})
    lacking = None in changes.values() and not tied
    try:
        teacher = open_teacher(str(folder), folder)
    except TeacherError as error:
        return lacking and " without " in str(error)
    check_logits(teacher)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.arange(1, CONTEXT + 1)[None]
    return not lacking and close(
        load_teacher(teacher)(tokens, use_cache=False).logits, theirs(tokens, use_cache=False).logits, 1e-3
    )


def _tiny(model_type: str) -> Any:
    """A model with random weights that runs."""
    error: Exception | None = None
    default = CONFIG_MAPPING[model_type]()
    if default.get_text_config(decoder=True) is not default:
        check_kind(default, "")
    for config in tiny_configs(CONFIG_MAPPING[model_type]):
        try:
            with torch.device("meta"):
                size = AutoModelForCausalLM.from_config(config).num_parameters()
            if size > LARGEST:
                raise ValueError(f"{size:,} parameters, most of them not of its text part")
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    noise = torch.randn(weight.shape, generator=generator)
                    weight.copy_(1 + 0.1 * noise if "norm" in name and weight.ndim == 1 else 0.1 * noise)
                if not model.eval()(torch.arange(1, 5)[None], use_cache=False).logits.isfinite().all():
                    raise ValueError("logits that are not finite")
            return model
        except Exception as raised:
            error = error or raised
    raise ValueError(f"no tiny model of it runs: {error}")


def _states(teacher: Teacher, tokens: torch.Tensor) -> dict[int, torch.Tensor]:
    states: dict[int, torch.Tensor] = {}
    trunk = Trunk(teacher, teacher.num_layers, torch.float32)
    trunk.run(
        tokens, torch.arange(CONTEXT).expand(2, -1), hidden=lambda at, x: states.update({at: x.clone()})
    )
    assert all(state.isfinite().all() for state in states.values()), "states that are not finite"
    assert sorted(states) == list(range(teacher.num_layers + 1)), "states are missing"
    return states


def _train(teacher: Teacher, states: dict[int, torch.Tensor], logits: torch.Tensor, folder: Path) -> runs.Run:
    """A few steps on block 1:3, once the tail is known to give the model's own logits."""
    context = attention_context(load_rotary(teacher), torch.arange(CONTEXT).expand(2, -1))
    states = {layer: state.clone() for layer, state in states.items()}
    tail = Tail(teacher, 0)
    for start in (0, 1, teacher.num_layers):
        with torch.no_grad():
            off = (tail(states[start], context, start=start) - logits).abs().max()
        assert off <= 1e-3 * logits.abs().max() + 1e-4, "the tail does not give the model's own logits"
    flow = Velocity(load_layer(teacher, 1), teacher.width).requires_grad_(True)
    optimizer, losses = torch.optim.Adam(flow.parameters(), 1e-3), []
    for _ in range(8):
        change = flow(states[1], torch.zeros(2), context)
        loss = (states[1] + change - states[3]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], "training does not lower the loss"
    return _saved(teacher, flow, folder, Part(1, 3, "flow", shift=flow.shift))


def _saved(teacher: Teacher, flow: torch.nn.Module, folder: Path, part: Part) -> runs.Run:
    manifest = {
        "store_fingerprint": "0" * 32,
        "teacher": teacher.identity() | {"tokenizer_digest": "0" * 32},  # it has no tokenizer
        "block": list(part.block),
        "parts": [part.to_json()],
        "shape": shape_text([part], teacher.num_layers),
        "objective": "fw",
        "solver": "euler",
        "walk_steps": 2,
        "seed": 0,
        "train_tokens": 8 * CONTEXT,
    }
    folder.mkdir()
    runs.save_run(folder, flow, manifest)
    return runs.open_run(folder)


def _reason(error: Exception) -> str:
    text = f"{error.given}; {error.expected}" if isinstance(error, LftpipeError) else str(error)
    text = re.sub(r"model \S*/teacher,? ?", "", text.strip() or type(error).__name__)
    text = re.sub(r"/\S*/(teacher|untied)\b", r"\1", text)  # not in which folder they were tried
    return re.sub(r"\s+", " ", text)[:160]


def _with_patience(function: Callable[[], Line], model_type: str) -> Line:
    def late(*_: object) -> None:
        raise TimeoutError(f"took more than {PATIENCE} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(PATIENCE)
    try:
        return function()
    except Exception as error:
        return Line(model_type, why=_reason(error))
    finally:
        signal.alarm(0)


def table(lines: list[Line]) -> str:
    """The lines as Markdown, with their sums."""
    sums = {
        name: sum(bool(getattr(line, name)) for line in lines)
        for name in ("states", "attention", "flow", "student", "plain", "heads", "gguf")
    }
    equal, refused = (sum(line.without_first == found for line in lines) for found in ("equal", "refused"))
    rows = [
        MARK,
        "",
        f"transformers {transformers.__version__}: {len(lines)} model types with a `*ForCausalLM` class. "
        f"{sums['states']} extract and map, {sums['attention']} of them with attention outputs; "
        f"{sums['flow']} train a flow layer, {sums['student']} generate with it, "
        f"{sums['plain']} unroll to a plain checkpoint. Without layer 0, {equal} plain forms "
        f"equal their student and {refused} are refused. Of {sums['heads']} types that can tie embedding and "
        "head, all ways are read right.",
        "",
        "| model type | states | attention outputs | flow | student | plain | without layer 0 | heads | GGUF "
        "| why not |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        marks = [
            "yes" if mark is True else mark or "-"
            for mark in (
                line.states,
                line.attention,
                line.flow,
                line.student,
                line.plain,
                line.without_first,
                line.heads,
                line.gguf,
            )
        ]
        rows.append(f"| {line.model_type} | {' | '.join(marks)} | {line.why.replace('|', '/')} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    """Try all model types, or some, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", help="model types, with commas between them")
    parser.add_argument(
        "--log", type=Path, help="a JSON line for each; those that are there are not tried again"
    )
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    types = sorted(
        {
            name
            for name, kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
            if "CausalLM" in str(kind) or name == "gpt2"
        }
    )
    if arguments.only:
        types = arguments.only.split(",")
    known: dict[str, Line] = {}
    if arguments.log and arguments.log.exists():
        known = {
            line["model_type"]: Line(**line)
            for line in map(json.loads, arguments.log.read_text().splitlines())
        }
    for model_type in types:
        if model_type not in known:
            with tempfile.TemporaryDirectory() as folder:
                known[model_type] = _with_patience(
                    lambda at=folder, kind=model_type: try_family(kind, Path(at)), model_type
                )
            text = json.dumps(asdict(known[model_type]))
            print(text, flush=True)
            if arguments.log:
                with arguments.log.open("a") as log:
                    log.write(text + "\n")
    if arguments.out:
        prose = arguments.out.read_text().partition(MARK)[0] if arguments.out.exists() else ""
        arguments.out.write_text(prose + table([known[name] for name in types]))


if __name__ == "__main__":
    main()
