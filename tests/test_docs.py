"""The documentation's own promises: its links lead somewhere, and the files that it names exist."""

import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: Pages that the site makes.
GENERATED = {ROOT / "docs/reference/cli.md"}
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "data").glob("*.md")])


def prose(page: Path) -> str:
    """The page without its code, where brackets mean other things."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^(?: {4}|\t).*$", "", text, flags=re.M))


def anchors(page: Path) -> set[str]:
    """Anchors of the headings: lower case, hyphens for spaces, no other marks."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists() or file in GENERATED, f"{page.relative_to(ROOT)}: {target}"
        if anchor and file.suffix == ".md" and file not in GENERATED:
            assert anchor in anchors(file), f"{page.relative_to(ROOT)}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_of_the_repository_that_a_page_names_exists(page):
    if page.name == "CHANGELOG.md":  # it speaks of the past
        return
    named = re.findall(
        r"(?<![\w/])((?:tests|benchmarks|pipelines|lftpipe)/[\w/-]+\.(?:py|toml))", page.read_text()
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_test_that_a_page_names_exists():
    named = {
        (file, test)
        for page in PAGES
        for file, test in re.findall(r"`(?:tests/)?([\w/]*test_\w+\.py)::(\w+)`", page.read_text())
    }
    assert named
    missing = [each for each in named if f"def {each[1]}(" not in (ROOT / "tests" / each[0]).read_text()]
    assert missing == []


def test_the_table_of_rooms_names_every_room():
    table = (ROOT / "docs/design.md").read_text().split("## The rooms")[1].split("\n## ")[0]
    rooms = {path.stem for path in (ROOT / "lftpipe").glob("*.py")} | {
        path.name for path in (ROOT / "lftpipe").iterdir() if (path / "__init__.py").exists()
    }
    assert {
        room for room in rooms - {"__init__", "__main__"} if not re.search(rf"`{room}(/|\.py)`", table)
    } == set()


def test_every_page_is_in_the_sites_navigation():
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    there = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert there - listed == set()


def rendered() -> Iterator[tuple[str, Callable[..., object]]]:
    """Functions and methods that the site's Python reference renders."""
    page = (ROOT / "docs/reference/python.md").read_text()
    named = {name: pkgutil.resolve_name(name) for name in re.findall(r"^::: (\S+)$", page, re.M)}
    for module, inside in [each for each in named.items() if inspect.ismodule(each[1])]:
        public = {name: value for name, value in vars(inside).items() if not name.startswith("_")}
        named |= {
            f"{module}.{name}": value
            for name, value in public.items()
            if getattr(value, "__module__", None) == module
        }
    for name, value in named.items():
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value):
            for method, function in inspect.getmembers(value, callable):
                if not method.startswith("_") and (getattr(function, "__module__", "") or "").startswith(
                    "lftpipe"
                ):
                    yield f"{name}.{method}", function


def test_what_the_python_reference_renders_documents_all_parameters():
    """Ruff holds for all of the package that a public name has a docstring, its first line a sentence."""
    found = dict(rendered())
    assert len(found) > 30
    marks = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    for name, function in found.items():
        section = re.search(
            r"^Parameters\n-+\n(.*?)(?=^\w[\w ]*\n-+\n|\Z)", inspect.getdoc(function) or "", re.M | re.S
        )
        heads = re.findall(r"^(\S.*)$", section[1], re.M) if section else []
        documented = {word.strip() for head in heads for word in head.split(" : ")[0].split(",")}
        taken = inspect.signature(function).parameters.values()
        assert documented == {marks.get(p.kind, "") + p.name for p in taken} - {"self", "cls"}, name
