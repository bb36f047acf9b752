"""The map over a store: drawn as recorded, equal to a plain loop with POT, and honest about bad input."""

import json
from functools import partial
from typing import Any

import numpy as np
import ot
import pytest
from rich.console import Console
from scipy.spatial.distance import cdist
from walk_store import CONTEXT, short_map, write_store

from lftpipe.commands.recouple import summary
from lftpipe.recoupling import map as pairs
from lftpipe.recoupling.coupling import recoupled
from lftpipe.recoupling.map import draw_samples
from lftpipe.recoupling.point_clouds import directions, standardised, tie_groups
from lftpipe.store import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return write_store(tmp_path_factory.mktemp("walk") / "states.zarr")


@pytest.fixture
def run(store, tmp_path):
    """`recouple` with few tokens, into a new file."""
    return partial(short_map, store, tmp_path / "map.json")


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


def test_the_approximate_map_is_marked_and_near(run, tmp_path):
    exact, rough = run(), run(approximate=True, out=tmp_path / "rough.json")
    assert rough["approximate"]
    assert not exact["approximate"]
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
