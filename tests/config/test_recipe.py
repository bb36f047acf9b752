from pathlib import Path

import pytest
import tomli_w

from lftpipe.config.recipe import RECIPE_TABLES, check, from_recipe
from lftpipe.config.settings import EvaluateSettings, ExtractSettings, TrainSettings, to_plain
from lftpipe.errors import SettingsError

PIPELINES = Path(__file__).parents[2] / "pipelines"


@pytest.fixture
def recipe(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "recipe.toml"
        path.write_text(text)
        return path

    return write


def test_a_recipe_sets_what_is_not_given_on_the_command_line(recipe):
    path = recipe('[train]\nseed = 3\nlearning_rate = 1\nstore = "a/b"\n[evaluate]\nk = [1, 5]\nruns = ["x"]')
    train = from_recipe(TrainSettings, path, "train", {"seed": 4, "clip": None})
    assert (train.seed, train.learning_rate, train.clip, train.store) == (4, 1.0, 1.0, Path("a/b"))
    assert isinstance(train.learning_rate, float)
    evaluate = from_recipe(EvaluateSettings, path, "evaluate", {})
    assert (evaluate.k, evaluate.runs) == ((1, 5), ("x",))
    assert from_recipe(ExtractSettings, path, "extract", {}) == ExtractSettings()


def test_settings_survive_the_way_through_a_recipe(recipe):
    settings = TrainSettings(block="1:3", store=Path("x"), threads=2, learning_rate=3e-4, from_teacher=True)
    path = recipe(tomli_w.dumps({"train": to_plain(settings), "store": {"fingerprint": "0"}}))
    assert from_recipe(TrainSettings, path, "train", {}) == settings


@pytest.mark.parametrize("path", sorted(PIPELINES.glob("*.toml")), ids=lambda path: path.name)
def test_the_recipes_of_the_repository_are_valid(path):
    kinds = {"extract": ExtractSettings, "train": TrainSettings, "evaluate": EvaluateSettings}
    for table, kind in kinds.items():
        from_recipe(kind, path, table, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nsede = 3", r"'sede' in \[train\] of .*recipe\.toml / expected: one of .*seed.*"),
        ("[trian]\nseed = 3", rf"\[trian\] in .* / expected: tables {', '.join(RECIPE_TABLES)}"),
        ("train = 3", r"\[train\] in .* / expected: tables"),
        ("[train", r"recipe .* / expected: TOML / do: mend it"),
        ("[train]\nseed = '3'", "seed = '3' in the recipe / expected: a whole number"),
        ("[train]\nseed = true", "seed = True in the recipe / expected: a whole number"),
        ("[train]\nseed = 1.5", "seed = 1.5 in the recipe / expected: a whole number"),
        ("[train]\nclip = 'x'", "clip = 'x' in the recipe / expected: a number"),
        ("[train]\nclip = nan", "--clip nan / expected: a finite number"),
        ("[train]\nstore = 3", "store = 3 in the recipe / expected: a path"),
        ("[train]\nfrom_teacher = 1", "from_teacher = 1 in the recipe / expected: true or false"),
        (
            "[train]\nobjective = 'x'",
            "objective = 'x' in the recipe / expected: one of fw, sfm, hybrid, regression",
        ),
        ("[train]\nobjective = 3", "objective = 3 in the recipe / expected: one of fw, sfm"),
    ],
)
def test_a_wrong_recipe_names_what_is_wrong(recipe, text, message):
    with pytest.raises(SettingsError, match=message):
        from_recipe(TrainSettings, recipe(text), "train", {})


@pytest.mark.parametrize("value", ["3", "'123'", "['1']", "[1.5]"])
def test_a_list_holds_what_it_is_a_list_of(recipe, value):
    with pytest.raises(SettingsError, match=r"k = .* in the recipe / expected: (a list|a whole number)"):
        from_recipe(EvaluateSettings, recipe(f"[evaluate]\nk = {value}"), "evaluate", {})


def test_a_recipe_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(
        SettingsError, match=r"none\.toml / expected: a readable TOML file / do: check the path"
    ):
        from_recipe(TrainSettings, tmp_path / "none.toml", "train", {})
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match=r"binary\.toml / expected: TOML"):
        from_recipe(TrainSettings, tmp_path / "binary.toml", "train", {})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (TrainSettings(tokens=0), "--tokens 0 / expected: at least 1 / do: raise --tokens"),
        (TrainSettings(learning_rate=-1.0), "--learning-rate -1.0 / expected: at least 0"),
        (TrainSettings(learning_rate=float("inf")), "--learning-rate inf / expected: a finite number"),
        (TrainSettings(replace=1.5), "--replace 1.5 / expected: a share of at most 1"),
        (TrainSettings(seed=-1), "--seed -1 / expected: at least 0"),
        (TrainSettings(walk_steps=0), "--walk-steps 0 / expected: at least 1"),
        (EvaluateSettings(k=(1, 0)), r"--k 1,0 / expected: at least 1"),
        (ExtractSettings(context=1), "--context 1 / expected: at least 2"),
    ],
)
def test_values_out_of_range_are_refused(settings, message):
    with pytest.raises(SettingsError, match=message):
        check(settings)
