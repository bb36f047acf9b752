"""The map over a store: drawn as recorded, equal to a plain loop with POT, and honest about bad input."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import ot
import pytest
from rich.console import Console
from scipy.spatial.distance import cdist

from lftpipe.artefacts.recoupling import RecouplingMap
from lftpipe.config.settings import RecoupleSettings, TrainSettings
from lftpipe.errors import SettingsError, StoreError
from lftpipe.recoupling import map as pairs
from lftpipe.recoupling.artefact import choose_block
from lftpipe.recoupling.coupling import directions, recoupled, standardised, tie_groups
from lftpipe.recoupling.sampling import draw_samples
from lftpipe.stages.recouple import recouple, summary
from lftpipe.store import Store, StoreSpec, StoreWriter

LAYERS, CONTEXT, WIDTH, VOCABULARY = 4, 16, 24, 30


def walk(tokens: np.ndarray) -> np.ndarray:
    """`(layer, sequence, position, feature)`: embeddings (with ties), then ever smaller random steps."""
    rng = np.random.default_rng(0)
    states = [rng.normal(size=(VOCABULARY, WIDTH))[tokens]]
    for layer in range(LAYERS):
        states.append(states[-1] + rng.normal(size=states[0].shape) / (layer + 0.5))
    states[3][:, 0, 5] += 20_000
    states[4][:, 0, 5] += 20_500
    return np.stack(states).astype(np.float32)


def write_store(path: Path, sequences=24, layers=tuple(range(LAYERS + 1))) -> Store:
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (sequences, CONTEXT)).astype(np.int32)
    document = np.repeat(np.arange(sequences * 2, dtype=np.int32), CONTEXT // 2).reshape(tokens.shape)
    spec = StoreSpec(
        identity={"teacher": {"name": "walk", "layers": LAYERS}},
        layers=layers,
        attention_layers=(),
        context=CONTEXT,
        width=WIDTH,
        dtype="float16",
        sequences_per_shard=8,
        sequences={"train": sequences},
    )
    states = walk(tokens)
    with StoreWriter.open(path, spec) as writer:
        writer.put_tokens("train", tokens, document)
        for key in writer.pending():
            with writer.shard(key) as shard:
                for layer in layers:
                    shard.put("hidden", layer, 0, states[layer, key.sequences.start : key.sequences.stop])
        writer.finish()
    return Store.open(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return write_store(tmp_path_factory.mktemp("walk") / "states.zarr")


@pytest.fixture
def run(store, tmp_path):
    """`recouple` with few tokens, into a new file."""

    def call(**changes):
        given = {
            "store": store.path,
            "tokens": 24,
            "batches": 3,
            "sequences": 6,
            "out": tmp_path / "map.json",
        }
        return recouple(RecoupleSettings(**(given | changes)))

    return call


def plain_loop(store: Store, result: dict, prepare=None, metric: Any = "euclidean") -> dict[str, np.ndarray]:
    """The map from the recorded draw, as POT's manual would do it: one pair after the other, in float64."""
    size = len(result["layers"])
    found = {
        name: np.full((len(result["samples"]), size, size), np.nan) for name in ("ratio", "ratio_raw", "cost")
    }
    for batch, drawn in enumerate(result["samples"]):
        sequence, position = np.array(drawn).T
        states = [
            store.read("train", layer, sequence.tolist())[np.arange(len(drawn)), position]
            for layer in result["layers"]
        ]
        groups = [tie_groups(state) for state in states]
        states = [prepare(state) if prepare else state.astype(np.float64) for state in states]
        weights = np.full(len(drawn), 1 / len(drawn))
        for m in range(size):
            for n in range(m + 1, size):
                cost = cdist(states[m], states[n], metric)
                plan = ot.emd(weights, weights, cost)
                found["cost"][batch, m, n] = (plan * cost).sum()
                ratios = recoupled(plan.argmax(1), groups[m], groups[n])
                found["ratio"][batch, m, n], found["ratio_raw"][batch, m, n] = ratios
    return found


def matrix(result, name) -> np.ndarray:
    return np.array(result[name], np.float64)


@pytest.mark.parametrize(
    ("changes", "prepare", "metric"),
    [
        ({}, None, "euclidean"),
        ({"metric": "sqeuclidean"}, None, "sqeuclidean"),
        ({"metric": "cosine"}, directions, "cosine"),
        ({"standardise": True}, standardised, "euclidean"),
        ({"skip_first": True, "layers": "1,3,4"}, None, "euclidean"),
    ],
)
def test_the_map_equals_the_plain_loop_over_the_recorded_draw(store, run, changes, prepare, metric):
    result = run(**changes)
    expected = plain_loop(store, result, prepare, metric)
    np.testing.assert_allclose(matrix(result, "ratio"), expected["ratio"].mean(0), atol=1e-12)
    np.testing.assert_allclose(matrix(result, "ratio_raw"), expected["ratio_raw"].mean(0), atol=1e-12)
    np.testing.assert_allclose(matrix(result, "transport_cost"), expected["cost"].mean(0), rtol=1e-5)
    spread = expected["ratio"].std(0, ddof=1) / np.sqrt(3)
    np.testing.assert_allclose(matrix(result, "ratio_stderr"), spread, atol=1e-12)


def test_the_file_holds_what_is_returned_and_null_below_the_diagonal(run, tmp_path, store):
    result = run()
    written = json.loads((tmp_path / "map.json").read_text())
    assert written.pop("digest")
    assert written == {
        key: result[key] for key in result if key not in ("store", "out", "pictures", "seconds")
    }
    assert written["layers"] == [0, 1, 2, 3, 4]
    assert written["store_fingerprint"] == store.fingerprint
    assert written["settings"]["tokens"] == 24
    for name in ("ratio", "ratio_raw", "ratio_stderr", "relative_gap", "relative_displacement", "partners"):
        filled = [[entry is not None for entry in row] for row in written[name]]
        assert filled == [[m < n for n in range(5)] for m in range(5)]
    assert [len(batch) for batch in written["samples"]] == [24, 24, 24]


def test_equal_tokens_have_equal_embeddings_and_get_credit(run):
    result = run()
    assert result["ratio"][0][1] < result["ratio_raw"][0][1]
    assert result["ratio"][1][2] == result["ratio_raw"][1][2]


def test_costs_gap_and_displacement_are_consistent(run, store):
    result = run()
    upper = np.triu_indices(5, 1)
    transport, identity, random, gap = (
        matrix(result, name)[upper]
        for name in ("transport_cost", "identity_cost", "random_cost", "relative_gap")
    )
    assert (transport <= identity * (1 + 1e-12)).all()
    assert (transport < random).all()
    np.testing.assert_allclose(gap, 1 - transport / identity, atol=1e-12)
    sequence, position = np.array(result["samples"]).transpose(2, 0, 1)
    x_0, x_1 = (
        np.stack(
            [
                store.read("train", layer, s.tolist())[np.arange(24), p]
                for s, p in zip(sequence, position, strict=True)
            ]
        )
        for layer in (1, 2)
    )
    x_0, x_1 = x_0.astype(np.float64), x_1.astype(np.float64)
    per_batch = ((x_1 - x_0) ** 2).sum((1, 2)) / (x_1**2).sum((1, 2))
    assert result["relative_displacement"][1][2] == pytest.approx(per_batch.mean(), rel=1e-6)


def test_influence_is_one_minus_the_mean_cosine(run, store):
    result = run()
    cosines = []
    for drawn in result["samples"]:
        sequence, position = np.array(drawn).T
        x_0, x_1 = (
            store.read("train", layer, sequence.tolist())[np.arange(24), position].astype(np.float64)
            for layer in (1, 3)
        )
        cosines.append(1 - np.diagonal(cdist(x_0, x_1, "cosine")).mean())
    assert result["influence"][1][3] == pytest.approx(1 - np.mean(cosines))
    ranked = run(rank_by="influence", force=True)["ranking"][0]["blocks"]
    assert ranked == sorted(ranked, key=lambda block: result["influence"][block[0]][block[1]])


def test_the_same_seed_gives_the_same_file_whatever_threads_and_memory(run, tmp_path, monkeypatch):
    run(threads=1)
    monkeypatch.setattr(pairs, "HELD_BYTES", 1)
    run(threads=3, out=tmp_path / "other.json")
    one, other = (json.loads((tmp_path / name).read_text()) for name in ("map.json", "other.json"))
    del one["settings"], other["settings"], one["digest"], other["digest"]
    assert one == other
    assert run(seed=1, out=tmp_path / "seed.json")["samples"] != one["samples"]


def test_no_position_is_drawn_twice_and_batches_have_their_own_sequences(store):
    samples = draw_samples(store, tokens=20, batches=4, sequences=6, seed=0, skip_first=False)
    assert len(np.unique(samples.reshape(-1, 2), axis=0)) == 80
    owners = [set(batch[:, 0]) for batch in samples]
    assert not any(a & b for i, a in enumerate(owners) for b in owners[:i])
    assert all(4 <= len(owner) <= 6 for owner in owners)


def test_a_small_store_is_drawn_from_as_a_whole(store):
    samples = draw_samples(store, tokens=96, batches=4, sequences=16, seed=0, skip_first=False)
    everything = samples.reshape(-1, 2)
    assert len(np.unique(everything, axis=0)) == 24 * CONTEXT
    assert sorted(map(tuple, everything)) == [(s, p) for s in range(24) for p in range(CONTEXT)]


def test_positions_are_drawn_uniformly(store):
    counts = np.zeros(CONTEXT)
    for seed in range(100):
        samples = draw_samples(store, tokens=24, batches=4, sequences=6, seed=seed, skip_first=False)
        counts += np.bincount(samples[..., 1].ravel(), minlength=CONTEXT)
    assert (np.abs(counts / counts.sum() * CONTEXT - 1) < 5 / np.sqrt(counts.mean())).all()


def test_skip_first_leaves_out_where_a_document_begins(store):
    samples = draw_samples(store, tokens=40, batches=4, sequences=6, seed=0, skip_first=True)
    assert not set(samples[..., 1].ravel()) & {0, CONTEXT // 2}


def test_one_batch_has_no_standard_error(run):
    assert run(batches=1)["ratio_stderr"][0][1] is None


def test_more_tokens_than_the_store_has(run):
    with pytest.raises(SettingsError, match=r"3 of --tokens 200, 600 samples.*384 positions.*lower --tokens"):
        run(tokens=200)
    with pytest.raises(SettingsError, match=r"384 positions, fewer without first ones"):
        run(tokens=128, skip_first=True)


def test_layers_that_the_store_lacks(run, tmp_path):
    few = write_store(tmp_path / "few.zarr", layers=(0, 2, 4))
    with pytest.raises(SettingsError, match=r"lacks 1, 3 .*states among 0, 2, 4"):
        run(store=few.path, layers="0:4")
    assert run(store=few.path)["layers"] == [0, 2, 4]


def test_one_state_is_no_pair(run):
    with pytest.raises(SettingsError, match=r"one state, 2 .*at least two"):
        run(layers="2")


def test_a_pair_to_show_must_be_on_the_map(run):
    with pytest.raises(SettingsError, match=r"--show 1:3 .*two of the states 0, 1, 2"):
        run(layers="0:3", show="1:3")
    with pytest.raises(SettingsError, match=r"block '1-2'.*m:n, as in 6:12"):
        run(show="1-2")


def test_a_map_is_not_overwritten_unasked(run):
    run()
    with pytest.raises(SettingsError, match=r"map.json, which exists .*--force"):
        run()
    run(force=True)


def test_values_that_are_not_finite_are_named(run, monkeypatch):
    read = Store.read

    def damaged(self, split, layer, sequences, **options):
        states = read(self, split, layer, sequences, **options)
        if layer == 2:
            states[..., 7] = np.nan
        return states

    monkeypatch.setattr(Store, "read", damaged)
    with pytest.raises(
        StoreError, match=r"state 2 that is not finite at sequence \d+, position \d+, channel 7"
    ):
        run()


def test_too_large_for_exact_transport(run):
    with pytest.raises(SettingsError, match=r"--tokens 4097 .*at most 4096 .*--approximate"):
        run(tokens=4097)


def test_the_approximate_map_is_marked_and_near(run, tmp_path):
    exact, rough = run(), run(approximate=True, out=tmp_path / "rough.json")
    assert rough["approximate"] and not exact["approximate"]
    assert rough["solver"] == "POT sinkhorn_log"
    upper = np.triu_indices(5, 1)
    difference = matrix(rough, "ratio")[upper] - matrix(exact, "ratio")[upper]
    assert (difference > -0.1).all()
    assert difference.max() < 0.25
    assert (
        matrix(rough, "transport_cost")[upper] >= matrix(exact, "transport_cost")[upper] * (1 - 1e-6)
    ).all()
    assert "APPROXIMATE" in printed(rough)


def printed(result) -> str:
    console = Console(width=200, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    with console.file:
        console.print(summary(result))
    return console.export_text()


def test_the_summary_recommends_blocks_for_common_shares(run):
    result = run()
    text = printed(result)
    assert "10 pairs of states of walk: 3 batches of 24 tokens, euclidean" in text
    best = result["ranking"][1]["blocks"][0]
    assert f"50% {best[0]}:{best[1]}" in " ".join(text.split())
    assert "map.html" in text


def test_auto_makes_the_map_and_takes_its_best_block(tmp_path):
    path = tmp_path / "walk" / "states.zarr"
    write_store(path, sequences=160)
    settings = TrainSettings(store=path, replace=0.5)
    m, n = choose_block(path, settings)
    made = json.loads((path.parent / "recoupling.json").read_text())
    assert made["settings"]["tokens"] == 256
    assert [m, n] == made["ranking"][1]["blocks"][0]
    assert choose_block(path, settings) == (m, n)


def test_auto_refuses_the_map_of_another_store(run, store):
    path = store.path.parent / "recoupling.json"
    run(out=path)
    dataclasses.replace(RecouplingMap.from_json(path), store_fingerprint="0" * 32).write(path)
    try:
        with pytest.raises(SettingsError, match=r"recoupling.json, made from another.*recouple --force"):
            choose_block(store.path, TrainSettings(store=store.path))
    finally:
        path.unlink()
