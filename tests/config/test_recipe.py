import tomllib
import tracemalloc
from pathlib import Path

import pytest
import tomli_w

from lftpipe.base.errors import SettingsError
from lftpipe.config.recipe import RECIPE_TABLES, from_recipe
from lftpipe.config.settings import EvaluateSettings, ExtractSettings, TrainSettings, to_json

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
    path = recipe(tomli_w.dumps({"train": to_json(settings), "store": {"fingerprint": "0"}}))
    assert from_recipe(TrainSettings, path, "train", {}) == settings


@pytest.mark.parametrize("path", sorted(PIPELINES.glob("*.toml")), ids=lambda path: path.name)
def test_the_recipes_of_the_repository_are_valid(path):
    kinds = {"extract": ExtractSettings, "train": TrainSettings, "evaluate": EvaluateSettings}
    given = tomllib.loads(path.read_text())
    assert given.keys() & kinds.keys()
    for table, kind in kinds.items():
        read = to_json(from_recipe(kind, path, table, {}))
        assert {key: read[key] for key in given.get(table, {})} == given.get(table, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nsede = 3", r"'sede' in \[train\] of .*recipe\.toml / expected: one of .*seed.*"),
        ("[trian]\nseed = 3", rf"\[trian\] in .* / expected: tables {', '.join(RECIPE_TABLES)}"),
        ("train = 3", r"\[train\] in .* / expected: tables"),
        ("[train", r"recipe .* / expected: TOML / do: correct it"),
        ("[train]\nseed = '3'", r"seed = '3' in \[train\] of .*recipe.toml / expected: a whole number"),
        ("[train]\nseed = true", r"seed = True in \[train\] of .* / expected: a whole number"),
        ("[train]\nseed = 1.5", r"seed = 1.5 in \[train\] of .* / expected: a whole number"),
        ("[train]\nclip = 'x'", r"clip = 'x' in \[train\] of .* / expected: a number"),
        ("[train]\nclip = nan", r"clip = nan in \[train\] of .* / expected: a finite number"),
        ("[train]\nstore = 3", r"store = 3 in \[train\] of .* / expected: a path"),
        ("[train]\nfrom_teacher = 1", r"from_teacher = 1 in \[train\] of .* / expected: true or false"),
        (
            "[train]\nobjective = 'x'",
            r"objective = 'x' in \[train\] of .* / expected: one of fw, sfm, hybrid, regression, traj",
        ),
        ("[train]\nobjective = 3", r"objective = 3 in \[train\] of .* / expected: one of fw, sfm"),
    ],
)
def test_a_wrong_recipe_names_what_is_wrong(recipe, text, message):
    with pytest.raises(SettingsError, match=message):
        from_recipe(TrainSettings, recipe(text), "train", {})


@pytest.mark.parametrize("value", ["3", "'123'", "['1']", "[1.5]"])
def test_a_list_holds_what_it_is_a_list_of(recipe, value):
    with pytest.raises(
        SettingsError, match=r"k = .* in \[evaluate\] of .* / expected: (a list|a whole number)"
    ):
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
    ("text", "message"),
    [
        ("", r"empty recipe .*recipe\.toml / expected: tables compress, extract, recouple, plan, train"),
        ("# nothing\n", r"empty recipe"),
        ("[store]\nfingerprint = 'x'\n", r"empty recipe"),
        ("[train]\nseed = " + "9" * 5000, r"recipe .* / expected: TOML / do: correct it"),
        (
            "[train]\nseed = " + "9" * 500,
            r"seed = 9{79}… in \[train\] of .* / expected: less than 4294967296",
        ),
        ("[train]\n" + ".".join("a" * 50_000) + " = 1", r"recipe .* / expected: .* 200 dots in a line"),
        ("[train]\nvariants = " + "[" * 5000 + "]" * 5000, r"expected: tables and lists of a few levels"),
        ("a" * (2**20 + 1), r"expected: at most 1,048,576 bytes"),
        (
            "[train.variants.x]\nseed = -1",
            r"seed = -1 in \[train\.variants\.x\] of .* / expected: at least 0",
        ),
        ("[train.variants]\nx = 3", r"variants = 3 in \[train\] of .* / expected: a table"),
        (
            "[train.variants.'../../x']",
            r"expected: names of letters, digits and -_\.\+ / do: rename '\.\./\.\./x'",
        ),
        ("[train.variants.'..']", r"rename '\.\.'"),
        ('[train]\nrun = "a\\u0000b"', r"expected: one line of text, without control characters"),
        ('[train]\nstore = "a\\u0000b"', r"expected: a path in UTF-8 without control characters"),
    ],
)
def test_a_hostile_recipe_is_refused_in_one_line(recipe, text, message):
    with pytest.raises(SettingsError, match=message) as raised:
        from_recipe(TrainSettings, recipe(text), "train", {})
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 1000


def test_a_deep_key_costs_no_memory(recipe):
    """50,000 dotted parts took 5.6 GB."""
    path = recipe("[train]\n" + ".".join("a" * 50_000) + " = 1")
    tracemalloc.start()
    with pytest.raises(SettingsError, match="dots in a line"):
        from_recipe(TrainSettings, path, "train", {})
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()
