"""Runs with random flows, for the tests of students: far from their teacher, different at every time."""

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lftpipe import runs
from lftpipe.base.files import seal
from lftpipe.base.shape import Part, shape_text
from lftpipe.config.settings import ExportSettings
from lftpipe.teacher.source import Teacher


def save_run(path: Path, teacher: Teacher, block: tuple[int, int], **overrides: Any) -> runs.Run:
    """A finished run of this teacher and block, with a random flow layer."""
    shift = {"shift": teacher.family.name == "gpt_neox"}
    part = Part(*block, **(shift | overrides.pop("part", {})))
    flow = runs.build_flow(teacher, [part]).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(block[0])
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            parameter.normal_(std=0.1, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    path.mkdir(parents=True)
    manifest = {
        "store_fingerprint": "0" * 32,
        "teacher": teacher.identity() | {"tokenizer_digest": teacher.tokenizer_digest},
        "block": list(block),
        "parts": [part.to_json()],
        "shape": shape_text([part], teacher.num_layers),
        "objective": "fw",
        "solver": "midpoint",
        "walk_steps": 3,
        "seed": 0,
        "train_tokens": 1000,
    }
    runs.save_run(path, flow, manifest | overrides)
    return runs.open_run(path)


def change_manifest(run: runs.Run, **changes: Any) -> None:
    """Other values, and a seal that fits them."""
    file = run.path / runs.MANIFEST
    value = {key: entry for key, entry in json.loads(file.read_text()).items() if key != "digest"}
    file.write_text(json.dumps(seal(value | changes)))


def tokens(count: int, *, sequences: int = 1, seed: int = 0) -> Int[Tensor, "sequence position"]:
    """Random tokens, never the end of text."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 320, (sequences, count), generator=generator)


def export_settings(run: runs.Run, tmp_path: Path, **options: Any) -> ExportSettings:
    """`export` of a run into `tmp_path / "out"`."""
    return ExportSettings(
        workspace=tmp_path, **({"runs": (str(run.path),), "out": tmp_path / "out"} | options)
    )


def greedy(model: Any, prompt: torch.Tensor, count: int = 8, **options: Any) -> torch.Tensor:
    """What a model writes after a prompt, without an end of text."""
    return model.generate(
        prompt,
        **({"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | options),
    )
