"""Every `lftpipe` command that README and docs show is one that the command line understands."""

import re
import shlex
from pathlib import Path

import pytest

from lftpipe.cli import app as cli
from lftpipe.cli.options import parse
from lftpipe.config import settings as settings_module
from lftpipe.config.recipe import from_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

#: What stands for something that the reader fills in.
FILLED_IN = {"M:N": "1:3", "I/N": "1/2", "N": "2", "...": ""}


def blocks(text: str) -> list[str]:
    """Indented and fenced code."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return [*fenced, *re.findall(r"(?:^(?: {4,}|\t).*\n)+", rest, re.M)]


def commands(page: Path) -> list[str]:
    found = []
    for block in blocks(page.read_text() + "\n"):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            match = re.match(r"\s*(?:srun |torchrun .* -m (?:-- )?)?(lftpipe .*)", line)
            if match and "$" not in line:  # a loop of the shell
                found.append(re.split(r"\s#\s|\s+# |;", match[1])[0].strip())
    return found


SHOWN = [(page, command) for page in PAGES for command in commands(page)]


def test_there_are_many() -> None:
    assert len(SHOWN) > 60


@pytest.mark.parametrize(
    ("page", "command"), SHOWN, ids=[f"{page.name}: {command[:60]}" for page, command in SHOWN]
)
def test_the_command_line_understands(page: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = [FILLED_IN.get(word, word) for word in cli.with_values(shlex.split(command)[1:])]
    words = [word for word in words if word]
    if words[0].startswith("-"):
        assert words[0] in ("--help", "--version", "--install-completion", "--show-completion")
        return
    name, *arguments = words
    context = cli.command_of(name).make_context(name, arguments)
    given = dict(context.params)
    recipe = given.pop("recipe")
    if recipe is not None and not recipe.is_file():  # one that the reader writes
        recipe = None
    for key in ("json_output", "debug"):
        given.pop(key)
    kind = getattr(settings_module, cli.COMMANDS[name].settings)
    from_recipe(kind, recipe, name, parse(kind, given))
