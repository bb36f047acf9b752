"""The commands that lftpipe tells its user to type are typed as they stand."""

import shlex
from pathlib import Path

import pytest

from lftpipe.base.workspace import next_command


@pytest.mark.parametrize("name", ["5-8-fw3-seed0", "run [1] a", "it's", "$(rm -r x)", "a;b"])
def test_a_shell_takes_the_next_command_apart_into_the_words_it_was_made_of(name: str) -> None:
    words = ["evaluate", name, "--store", Path("my data") / name / "states.zarr"]
    line = next_command(*words)
    assert line.startswith("next: lftpipe evaluate ")
    assert shlex.split(line.removeprefix("next: ")) == ["lftpipe", *map(str, words)]
