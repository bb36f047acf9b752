"""Several runs from the same batches, several flow layers in one student, several processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import extracted
from training_runs import assert_same_weights, change, log_of, short_run, stop_before, weights_of

from lftpipe import runs
from lftpipe.base.errors import DivergenceError, RunError, SettingsError
from lftpipe.commands.train import summary, train
from lftpipe.config.recipe import from_recipe
from lftpipe.config.settings import TrainSettings
from lftpipe.training.run import TrainingRun


@pytest.fixture
def settings(store_with_logits, tmp_path) -> TrainSettings:
    return short_run(store_with_logits, tmp_path, walk_steps=2)


# Several runs


def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(
        "[train]\nwalk_steps = 2\n[train.variants.a]\nobjective = 'regression'\n"
        "[train.variants.b]\nsolver = 'euler'\nloss = 'fw@0.5/sfm'\n"
        "[train.variants.c]\nobjective = 'linear'\n"
    )
    return path


def test_variants_trained_from_the_same_batches_equal_runs_on_their_own(
    settings, tmp_path, store_with_logits
):
    given = {
        key: getattr(settings, key)
        for key in ("store", "block", "tokens", "batch_tokens", "compute_dtype", "log_every")
    }
    together = train(from_recipe(TrainSettings, recipe(tmp_path), "train", given))
    assert [Path(result["run"]).name for result in together["runs"]] == [
        "a-1-3-seed0",
        "b-1-3-seed0",
        "c-1-3-seed0",
    ]
    folder = settings.store.parent / "runs"
    for name, changes in (
        ("a", {"objective": "regression", "solver": "midpoint"}),
        ("b", {"loss": "fw@0.5/sfm"}),
        ("c", {"objective": "linear"}),
    ):
        train(change(settings, run=str(tmp_path / name), **changes))
        assert_same_weights(folder / f"{name}-1-3-seed0", tmp_path / name)
    again = train(from_recipe(TrainSettings, recipe(tmp_path), "train", given | {"run": "a,c"}))
    assert [result["already_finished"] for result in again["runs"]] == [True, True]


def test_a_variant_that_is_not_there_or_misspelt_is_refused(settings, tmp_path):
    with pytest.raises(SettingsError, match=r"--run d / expected: one of the recipe's variants: a, b, c"):
        train(from_recipe(TrainSettings, recipe(tmp_path), "train", {"run": "d", "store": settings.store}))
    path = recipe(tmp_path)
    path.write_text(path.read_text().replace("objective", "objctive"))
    with pytest.raises(SettingsError, match=r"'objctive' in \[train\.variants\.a\] of .* / expected: one of"):
        from_recipe(TrainSettings, path, "train", {})
    path.write_text("[train.variants.a]\nseed = 1\n[train.variants.b]\nseed = 2\n")
    with pytest.raises(
        SettingsError, match=r"seed = 2 for b-1-3-seed2, 1 for another run / expected: the same"
    ):
        train(from_recipe(TrainSettings, path, "train", {"store": settings.store, "block": "1:3"}))


def test_a_variant_s_own_seed_is_in_its_name(settings, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text("[train.variants.a]\nseed = 1\n")
    given = {"store": settings.store, "block": "1:3", "tokens": 1, "objective": "skip"}
    run = train(from_recipe(TrainSettings, path, "train", given))
    assert Path(run["run"]).name == "a-1-3-seed1"
    assert runs.open_run(Path(run["run"])).seed == 1


def test_what_all_variants_have_in_common_is_refused_in_one(settings, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('[train.variants.a]\nstore = "/nowhere"\n')
    with pytest.raises(SettingsError, match=r"store in variant a / .* put it into \[train\]"):
        train(from_recipe(TrainSettings, path, "train", {"store": settings.store, "block": "1:3"}))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_variants_own_device_is_refused(settings, tmp_path, device):
    """Under torchrun `cuda` would be the same card in every process."""
    path = tmp_path / "recipe.toml"
    path.write_text(f"[train.variants.a]\ndevice = '{device}'\n[train.variants.b]\ndevice = '{device}'\n")
    with pytest.raises(SettingsError, match=r"device in variant a / .* put it into \[train\]"):
        train(from_recipe(TrainSettings, path, "train", {"store": settings.store, "block": "1:3"}))


def test_a_variant_out_of_range_is_refused(settings, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text("[train.variants.a]\nema = 3.0\n")
    with pytest.raises(SettingsError, match=r"ema = 3.0 in \[train.*variants.* / expected: at most 1"):
        train(from_recipe(TrainSettings, path, "train", {"store": settings.store, "block": "1:3"}))


def test_a_variant_that_diverges_leaves_the_others_alone(settings, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(
        "[train.variants.wild]\nlearning_rate = 1e30\nclip = 0\n[train.variants.tame]\nseed = 0\n"
    )
    given = {
        key: getattr(settings, key) for key in ("store", "block", "tokens", "batch_tokens", "compute_dtype")
    }
    with pytest.raises(DivergenceError, match=r"of .*wild-1-3-seed0 / expected: finite ones"):
        train(from_recipe(TrainSettings, path, "train", given))
    assert runs.open_run(settings.store.parent / "runs" / "tame-1-3-seed0").train_tokens == settings.tokens


def test_several_blocks_give_a_run_each(settings):
    result = train(change(settings, block="0:2,2:3"))
    assert [each["block"] for each in result["runs"]] == [[0, 2], [2, 3]]
    assert all(runs.open_run(Path(each["run"])).train_tokens == settings.tokens for each in result["runs"])


def test_jointly_the_second_part_learns_from_where_the_first_ends(settings, tmp_path):
    apart = train(change(settings, block="0:1,2:3", run=str(tmp_path / "apart")))["runs"]
    joint = change(settings, block="0:1,2:3", joint=True, run=str(tmp_path / "joint"))
    train(joint)
    train(change(joint, objective="regression", loss="local", run=str(tmp_path / "local")))
    train(change(joint, objective="regression", run=str(tmp_path / "chained")))
    # At the first step both second layers are the teacher's; only their inputs differ.
    alone = sum(log_of(each["run"])[0]["loss"] for each in apart)
    first = {name: log_of(tmp_path / name)[0]["loss"] for name in ("joint", "local", "chained")}
    assert alone < first["joint"]
    assert first["local"] < first["chained"]


def test_a_student_of_several_parts_is_one_run(settings, tmp_path):
    joint = change(settings, block="0:1,2:3", joint=True)
    made = train(joint)
    assert (made["run"], made["block"], made["shape"]) == (settings.run, [0, 3], "0:1>flow, 2:3>flow")
    shown = [line for line in summary(made).splitlines() if line.startswith("next:")]
    assert shown == [f"next: lftpipe evaluate {settings.run} --store {settings.store}"]
    assert train(joint)["already_finished"]
    assert [part.block for part in runs.open_run(Path(settings.run)).parts] == [(0, 1), (2, 3)]


def test_jointly_logits_are_compared_at_the_students_end_and_teach_every_part(settings, tmp_path):
    joint = change(settings, block="0:1,2:4", joint=True, loss="logits", log_every=1, objective="regression")
    run = train(joint)["run"]
    losses = [row["loss"] for row in log_of(run)]
    assert losses[-1] < losses[0]
    start = train(change(joint, tokens=settings.batch_tokens, learning_rate=0.0, run=str(tmp_path / "start")))
    before, after = weights_of(start["run"]), weights_of(run)
    assert {name.split(".")[1] for name in after if not torch.equal(before[name], after[name])} == {"0", "1"}


@pytest.mark.slow
def test_each_variant_is_a_joint_student_of_its_own(settings, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(
        "[train]\njoint = true\n[train.variants.a]\nobjective = 'regression'\n"
        "[train.variants.b]\nwalk_steps = 2\n"
        "[train.variants.apart]\nobjective = 'linear'\njoint = false\n"
    )
    keys = ("store", "tokens", "batch_tokens", "compute_dtype", "log_every")
    given = {key: getattr(settings, key) for key in keys} | {"block": "0:1,2:4"}
    together = train(from_recipe(TrainSettings, path, "train", given))["runs"]
    names = ["a-0-1-2-4-seed0", "b-0-1-2-4-seed0", "apart-0-1-seed0", "apart-2-4-seed0"]
    assert [Path(each["run"]).name for each in together] == names
    alone = change(settings, block="0:1,2:4", joint=True, run=str(tmp_path / "alone"), objective="regression")
    assert_same_weights(together[0]["run"], train(alone)["run"])


def test_a_killed_joint_run_goes_on_and_ends_the_same(settings, tmp_path, monkeypatch):
    joint = change(settings, block="0:1,2:3", joint=True)
    unbroken = train(joint)["run"]
    broken = change(joint, run=str(tmp_path / "broken"))
    with monkeypatch.context() as patch:
        stop_before(patch, 8)
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    assert_same_weights(train(change(broken, resume=True))["run"], unbroken)


@pytest.mark.parametrize("second", ["regression,logits", "top-logits"])
def test_runs_resumed_from_checkpoints_apart_enter_their_stages_with_what_these_need(
    settings, tmp_path, monkeypatch, second
):
    """A stage of the run that is further on begins before the other one's ends."""
    path = tmp_path / "recipe.toml"
    path.write_text(
        "[train.variants.early]\nloss = 'regression'\ncheckpoint_every = 6\n"
        f"[train.variants.late]\nloss = 'regression@0.75/{second}'\ncheckpoint_every = 8\n"
    )
    keys = ("store", "block", "tokens", "batch_tokens", "compute_dtype", "log_every")
    given = {key: getattr(settings, key) for key in keys} | {"objective": "regression", "resume": True}
    given["seed"] = len(second)  # the store is shared, and its runs lie beside it
    both = from_recipe(TrainSettings, path, "train", given)
    unbroken = {run["run"]: weights_of(run["run"]) for run in train(both)["runs"]}
    anew = from_recipe(TrainSettings, path, "train", given | {"force": True, "resume": False})
    with monkeypatch.context() as patch:
        stop_before(patch, 9)
        with pytest.raises(KeyboardInterrupt):
            train(anew)
    for run in train(both)["runs"]:
        assert "already_finished" not in run
        torch.testing.assert_close(weights_of(run["run"]), unbroken[run["run"]], rtol=0, atol=0)


def test_a_batch_that_lacks_what_a_stage_needs_is_an_error(settings, monkeypatch):
    """Whatever reads it: the loop here forgets the last stage's fields."""
    monkeypatch.setattr(TrainingRun, "stage_end", property(lambda run: run.num_steps))
    with pytest.raises(LookupError, match=r"batch 6 was read without h\[4\]"):
        train(change(settings, objective="regression", loss="regression@0.5/logits"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": "0:2,1:3", "joint": True}, r"--joint with blocks 0:2, 1:3 / expected: blocks in order"),
        ({"block": "1:3,1:3"}, r"several runs of the same name"),
        ({"block": "0:1,2:3", "joint": True, "objective": "linear"}, r"--joint with --objective linear"),
        ({"device": "nonsense"}, r"--device nonsense / expected: cpu, cuda, cuda:N or mps"),
        ({"objective": "regression", "loss": "fw"}, r"--loss fw with --objective regression"),
        ({"objective": "hybrid", "loss": "fw"}, r"--loss with --objective hybrid / expected: one of the two"),
        ({"patience": 3, "evaluate_every": 1}, r"--patience without --hold-back"),
    ],
)
def test_what_makes_no_sense_together_is_refused(settings, changes, message):
    with pytest.raises(SettingsError, match=message):
        train(change(settings, **changes))


def test_terms_that_the_store_cannot_serve_are_refused(settings, teachers, text_folder, tmp_path):
    bare = extracted(tmp_path, teachers["neox"], text_folder, attention=False)
    with pytest.raises(SettingsError, match=r"without the attention output of layer 1 .* with --attention"):
        train(change(settings, store=bare, loss="branches"))
    with pytest.raises(SettingsError, match=r"without logits .* extract with --logits 64"):
        train(change(settings, store=bare, loss="top-logits"))


# Several processes


@pytest.mark.slow
@pytest.mark.parametrize("loss_scale", ["token", pytest.param("none", marks=pytest.mark.slow)])
def test_two_processes_have_the_loss_of_one_at_the_same_batch(settings, tmp_path, loss_scale):
    arguments = [
        *("train", "--store", str(settings.store), "--block", "1:3", "--tokens", str(settings.tokens)),
        *("--batch-tokens", str(settings.batch_tokens), "--compute-dtype", "float32", "--solver", "euler"),
        *("--walk-steps", "2", "--log-every", "1", "--loss-scale", loss_scale, "--threads", "1"),
        *("--optimizer", "adamw", "--learning-rate", "0.001"),  # Muon rounds to bfloat16: they would part
    ]
    alone = change(settings, loss_scale=loss_scale, threads=1, optimizer="adamw", learning_rate=1e-3)
    train(alone)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "--", "lftpipe", *arguments, "--run", str(tmp_path / "two")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("next: lftpipe evaluate") == 1  # one of the two speaks
    ours, theirs = ([row["loss"] for row in log_of(run)] for run in (settings.run, tmp_path / "two"))
    assert theirs == pytest.approx(ours, rel=1e-5)
    ours, theirs = ([row["nmse"] for row in log_of(run)] for run in (settings.run, tmp_path / "two"))
    assert theirs == pytest.approx(ours, rel=1e-4)  # of the whole batch, not of the first process's part
    two, one = weights_of(tmp_path / "two"), weights_of(settings.run)
    # Keys' biases have no gradient but rounding, which AdamW scales to whole steps.
    for weights in (two, one):
        weights["layer.layer.attention.query_key_value.bias"].view(4, 3, -1)[:, 1] = 0
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-5)


def test_a_batch_that_processes_cannot_share_is_refused(settings, monkeypatch):
    monkeypatch.setattr("lftpipe.training.distributed.count", lambda: 3)
    with pytest.raises(RunError, match=r"a batch of 4 sequences for 3 processes / expected: a multiple"):
        train(settings)
