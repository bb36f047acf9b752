"""Every JSON file that is read again: what is written is read, older files too, and nothing else."""

import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_maps import make_map
from fuzz.mutations import edited

from lftpipe.base.errors import LftpipeError
from lftpipe.base.files import read_json, seal
from lftpipe.base.shape import Part
from lftpipe.results.base import Artefact
from lftpipe.results.recoupling import RecouplingMap
from lftpipe.results.run import RunManifest, Sample, keep_sample, read_metrics, read_samples
from lftpipe.results.scores import AdaptiveScore, Results, Score, TaskRecord, TaskScore


def results() -> Results:
    flow = {"method": "fw", "block": "1:3", "solver": "euler", "nfe": 2, "kl": 0.5, "parameters": 7}
    known = {"metric": "acc", "stderr": 0.1, "kept": 0.9, "kept_above_chance": 0.8, "chance": 0.5}
    task = TaskScore(**known, value=0.63, teacher=0.7, documents=9)
    row = Score(**flow, k=2, run="a|b", seed=0, train_tokens=64, tasks={"piqa": task}, tasks_mean=task)
    chosen = AdaptiveScore(**flow | {"nfe": 1.5}, k=2, run="a|b", nfe_with_keys=1.7, threshold=0.1)
    return Results(
        teacher="tiny",
        store="data/tiny/states.zarr",
        store_fingerprint="f" * 32,
        validation_tokens=64,
        compute_dtype="float32",
        settings={"k": [1, 2]},
        rows=[Score(method="teacher", parameters=9, ppl=3.0), row],
        adaptive=[chosen],
    )


def manifest() -> RunManifest:
    teacher: Any = {"model": "tiny", "revision": None, "name": "tiny"}
    teacher |= dict.fromkeys(("weights_digest", "config_digest", "tokenizer_digest"), "0")
    return RunManifest(
        block=(1, 3),
        objective="fw",
        solver="euler",
        walk_steps=3,
        seed=0,
        train_tokens=64,
        store_fingerprint="f" * 32,
        weights_digest="0" * 32,
        teacher=teacher,
        parts=(Part(1, 3),),
        shape="1:3>flow",
    )


def record() -> TaskRecord:
    known = {"task": "piqa", "metric": "acc", "higher_is_better": True}
    return TaskRecord(**known, value=0.5, documents=2, scores=[0.0, 1.0], chance=[0.5, 0.5])


ARTEFACTS: dict[str, Artefact] = {
    "map": make_map(4, 8),
    "results": results(),
    "manifest": manifest(),
    "record": record(),
}


@pytest.fixture(params=list(ARTEFACTS))
def artefact(request) -> Artefact:
    return ARTEFACTS[request.param]


def test_what_is_written_is_read(artefact, tmp_path):
    artefact.write(tmp_path / "file.json")
    assert type(artefact).from_json(tmp_path / "file.json") == artefact


def test_a_file_with_newer_keys_is_read_and_one_without_a_digest_is_not(artefact, tmp_path):
    value = artefact.to_json() | {"of a newer version": [1]}
    (tmp_path / "file.json").write_text(json.dumps(seal(value), indent=4))
    assert type(artefact).from_json(tmp_path / "file.json") == artefact
    (tmp_path / "file.json").write_text(json.dumps(value, indent=4))
    with pytest.raises(LftpipeError, match="its digest does not match its content"):
        type(artefact).from_json(tmp_path / "file.json")


def test_a_change_of_any_value_is_found(artefact, tmp_path):
    file = tmp_path / "file.json"
    artefact.write(file)
    sealed = json.loads(file.read_text())
    for key in sealed:
        for value in ("x", 10**30, None, [], {}):
            if sealed[key] != value:
                file.write_text(json.dumps(sealed | {key: value}))
                with pytest.raises(LftpipeError, match=r"given: .*file\.json: .* / expected: .* / do: "):
                    type(artefact).from_json(file)


def test_every_flipped_byte_is_found_or_changes_nothing(artefact, tmp_path):
    file = tmp_path / "file.json"
    artefact.write(file)
    whole, rng, refused = file.read_bytes(), random.Random(0), []
    for _ in range(300):
        place = rng.randrange(len(whole))
        file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << rng.randrange(8))]) + whole[place + 1 :])
        try:
            assert type(artefact).from_json(file) == artefact
        except LftpipeError as error:
            refused.append(str(error))
    assert len(refused) > 200
    assert not any("\n" in line for line in refused)


def test_mutations_that_are_sealed_are_read_or_refused_in_one_line(artefact, tmp_path):
    """Types and laws alone: whatever is read has them."""
    file, rng, refused = tmp_path / "file.json", random.Random(1), []
    for _ in range(400):
        file.write_text(json.dumps(seal(edited(artefact.to_json(), rng))))
        try:
            type(artefact).from_json(file).to_json()
        except LftpipeError as error:
            refused.append(str(error))
    assert len(refused) > 100
    assert not any("\n" in line or len(line) > 600 for line in refused)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value"),
        (b"[]", "no JSON object"),
        (b"\xff\xfe{}", "no UTF-8"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b'{"a": ' + b"1" * 10_000 + b"}", "limit|digits"),
        (b'{"digest": "0"}', "its digest does not match"),
    ],
)
def test_what_is_no_json_object_is_refused(tmp_path, content, reason):
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(LftpipeError, match=rf"file\.json: .*({reason})"):
        Results.from_json(tmp_path / "file.json")


def test_pipes_folders_and_endless_files_are_no_artefacts(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**40)
    for name, reason in (("pipe", "regular"), ("folder", "regular"), ("large", "larger than")):
        with pytest.raises(ValueError, match=reason):
            read_json(tmp_path / name)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layers": [0, 2, 1, 3]}, "layers do not ascend"),
        ({"num_layers": 2}, "more than num_layers"),
        ({"ratio": [[None]]}, "ratio is not 4 x 4"),
        ({"partners": [[None] * 4] * 4}, r"partners\.0\.1 is out of place"),
    ],
)
def test_a_map_has_laws_beyond_its_types(tmp_path, changes, reason):
    replace(make_map(4, 8), **changes).write(tmp_path / "map.json")
    with pytest.raises(LftpipeError, match=reason):
        RecouplingMap.from_json(tmp_path / "map.json")


def test_damaged_lines_of_metrics_are_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "tokens": 10 * step, "loss": 0.5}) for step in (1, 2, 3)]
    path.write_text("\n".join([lines[0], lines[1][:-3], lines[2], '{"step": 4}', "[]", ""]))
    found = read_metrics(path)
    assert [row["step"] for row in found.rows] == [1, 3]
    assert found.damage == f"{path}: 3 damaged line(s), left out: 2, 4, 5"
    path.write_text("\n".join(lines) + "\n")
    assert read_metrics(path).damage is None
    assert "not as the run wrote it" in str(read_metrics(path, "0" * 32).damage)
    path.unlink()
    assert read_metrics(path).damage is None
    assert "missing" in str(read_metrics(path, "0").damage)


def test_the_map_of_81_states_is_read_in_seconds(tmp_path):
    large = make_map(81, 256)
    large.write(tmp_path / "map.json")
    assert RecouplingMap.from_json(Path(tmp_path / "map.json")) == large


def test_a_damaged_sample_is_left_out_and_said(tmp_path):
    path = tmp_path / "samples.jsonl"
    sample = Sample(
        run="a", prompt="def", teacher="t", teacher_text="x\n", student_text="y", common_tokens=0, k=3
    )
    keep_sample(path, sample)
    path.write_bytes(path.read_bytes() + b'{"run": 1}\n[[[\n\xff\n')
    samples, damage = read_samples(path)
    assert samples == [sample]
    assert [line.split(" is damaged")[0] for line in damage] == [
        f"{path}: line {number}" for number in (2, 3, 4)
    ]
    assert read_samples(tmp_path / "nowhere") == ([], [])
