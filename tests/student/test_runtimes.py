"""Plain exports in other people's runtimes. `make runtimes` installs those and runs this file."""

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import make_decoders
from runtime_matrix import Cell, matrix
from runtimes import DOCUMENTS, byte_perplexities, llama_cpp_likelihoods, log_likelihood, usable_prompts
from tiny_students import save_run, tokens
from transformers import PreTrainedTokenizerFast

from lftpipe.commands.export import export
from lftpipe.config.settings import ExportSettings
from lftpipe.student.assemble import build_student
from lftpipe.teacher.source import Teacher, load_tokenizer

pytestmark = pytest.mark.long


@pytest.fixture
def exported(neox_teacher: Teacher, tmp_path: Path) -> tuple[Path, Any]:
    """A plain export of three Euler steps, and the student that it must equal."""
    run = save_run(tmp_path / "run", neox_teacher, (1, 3), solver="euler")
    export(ExportSettings(workspace=tmp_path, runs=(str(run.path),), form="plain", out=tmp_path / "plain"))
    return tmp_path / "plain", build_student(neox_teacher, [run])


@pytest.mark.skipif(not find_spec("lm_eval"), reason="lm_eval is not installed: `make runtimes`")
def test_lm_eval_finds_our_perplexity(
    exported: tuple[Path, Any], neox_teacher: Teacher, tmp_path: Path
) -> None:
    folder, student = exported
    [theirs] = byte_perplexities([folder], tmp_path)
    tokenizer = load_tokenizer(neox_teacher)
    nats = sum(log_likelihood(student, tokenizer, text) for text in DOCUMENTS)
    assert theirs == pytest.approx(math.exp(-nats / sum(map(len, DOCUMENTS))), rel=1e-4)


@pytest.mark.skipif(not find_spec("xllamacpp"), reason="xllamacpp is not installed: `make runtimes`")
def test_llama_cpp_agrees(exported: tuple[Path, Any], neox_teacher: Teacher, tmp_path: Path) -> None:
    from gguf_plain import convert

    folder, student = exported
    convert(folder, tmp_path / "plain.gguf")
    # Token ids, and text, which the server's own tokenizer splits.
    candidates = [tokens(24, seed=seed)[0].tolist() for seed in range(20)] + DOCUMENTS
    prompts, expected = usable_prompts(student, load_tokenizer(neox_teacher), candidates)
    assert {type(prompt) for prompt in prompts} == {list, str}
    theirs = llama_cpp_likelihoods(tmp_path / "plain.gguf", prompts, student.config.vocab_size)
    # llama.cpp looks GELU up in a table of half precision.
    assert (torch.tensor(theirs) - expected).abs().max() < 5e-3


@pytest.fixture(scope="module")
def cells(
    teachers: dict[str, Path], tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[Any, ...], Cell]:
    work = tmp_path_factory.mktemp("matrix")
    tried = {name: teachers[name] for name in ("neox", "llama")}
    rows = matrix(tried | make_decoders(work, ("qwen2", "qwen3"), tokenizer), work)
    return {
        (row.family, row.solver, row.k, row.form, runtime): cell
        for row in rows
        for runtime, cell in row.cells.items()
    }


def test_what_works_agrees_and_what_cannot_is_refused(cells: dict[tuple[Any, ...], Cell]) -> None:
    """The whole matrix: plain exports run wherever their family does, flows wherever transformers runs."""
    assert len(cells) == 4 * 2 * 3 * 2 * 5
    for (family, solver, k, form, runtime), cell in cells.items():
        if not cell.installed:
            continue
        exact = solver == "euler" and (family == "neox" or k == 1)
        works = exact if form == "plain" else runtime != "llama.cpp"
        where = (family, solver, k, form, runtime)
        assert (cell.refusal is None) == works, (where, cell)
        if works:
            # llama.cpp looks GELU, which only GPT-NeoX has, up in a table of half precision.
            allowed = 5e-3 if (runtime, family) == ("llama.cpp", "neox") else 1e-4
            assert cell.difference is not None, (where, cell)
            assert cell.difference < allowed, (where, cell)
        elif form == "plain":
            assert "expected: " in str(cell.refusal)
        else:
            assert "no architecture for latent_flow" in str(cell.refusal), (where, cell)
