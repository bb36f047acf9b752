"""What a release and a checkout promise besides their code."""

import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lftpipe
from lftpipe.cli import app as cli

ROOT = Path(__file__).parents[1]


def test_the_version_is_the_same_wherever_it_stands():
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^version: (.*)$", citation, re.M) == [lftpipe.__version__]


def test_every_dependency_has_its_version_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())}
    names = {re.split(r"[\[<>=]", each)[0].lower() for each in wanted} - {"lftpipe"}
    pinned = {
        line.split("==")[0].lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    }
    assert names - pinned == set()


@pytest.mark.parametrize("command", ["info", "verify", "recouple", "evaluate", "report"])
def test_a_workspace_with_only_its_readme_is_an_empty_one(command, tmp_path, monkeypatch, capsys):
    """The checkout has `data/README.md`: a command still says that there is no store, and leaves it alone."""
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "data/README.md", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="1"):
        cli.app([command], prog_name="lftpipe")
    assert capsys.readouterr().err.startswith("error: given: workspace data without a store")
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "README.md"]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "--batch-tokens" in (tmp_path / "reference/cli/index.html").read_text()
    assert "<math" in (tmp_path / "method/index.html").read_text()
