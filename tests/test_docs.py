"""The documentation's own promises: its links lead somewhere, and the files that it names exist."""

import re
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
