"""What a release and a checkout promise besides their code."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import lftpipe

ROOT = Path(__file__).parents[1]


def test_the_version_is_the_same_wherever_it_stands():
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^version: (.*)$", citation, re.M) == [lftpipe.__version__]


def test_every_tool_that_the_checks_use_has_its_version_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.split(r"[\[<>=]", each)[0].lower() for each in wanted} - {"lftpipe"}
    pinned = {
        line.split("==")[0].lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    }
    assert names - pinned == set()


def test_a_workspace_with_only_its_readme_is_an_empty_one(tmp_path):
    """The checkout's `data/` holds a README.md; every command must say that there is no store, and no more."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/README.md").write_bytes((ROOT / "data/README.md").read_bytes())
    for command in ("info", "verify", "recouple", "evaluate", "report"):
        done = subprocess.run(
            [sys.executable, "-m", "lftpipe", command],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 1, command
        assert re.match(r"error: given: .*without a store", done.stderr), (command, done.stderr)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["README.md"]
