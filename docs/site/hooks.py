"""What the site adds to the pages: the reference of the command line, equations as MathML, links to sources.

mkdocs calls these functions by their names (`mkdocs.yml`, hooks).
"""

import re
from pathlib import PurePosixPath
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

from lftpipe.cli import app as cli

#: A link to a file that is no page of the site.
SOURCE = re.compile(r"\[([^\]]+)\]\((\.\.?/[^)#\s]+?)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the page that is made from the settings.

    Parameters
    ----------
    files
        The pages of `docs/`.
    config
        The site's configuration.
    """
    files.append(File.generated(config, "reference/cli.md", content=command_line()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Equations between `$$` or `$` as MathML; links that leave `docs/` as the file's name.

    Parameters
    ----------
    markdown
        The page.
    page
        Where it is.
    config
        The site's configuration.
    files
        All pages.
    """

    def link(match: re.Match[str]) -> str:
        depth = len(PurePosixPath(page.file.src_uri).parts) - 1
        leaves = match[2].startswith("../" * (depth + 1))
        return f"`{match[2].lstrip('./')}`" if leaves else match[0]

    markdown = SOURCE.sub(link, markdown)
    if page.file.src_uri != "method.md":
        return markdown
    markdown = re.sub(
        r"\$\$(.+?)\$\$", lambda found: f"<p>{convert(found[1], display='block')}</p>", markdown, flags=re.S
    )
    return re.sub(r"\$([^$\n]+)\$", lambda found: f"<span>{convert(found[1])}</span>", markdown)


def command_line() -> str:
    """One section for each command, with a table of options for each panel of its help."""
    parts = [
        "# Command line\n",
        "This page is made from the settings, as `--help` is. Every option can also stand in a recipe "
        "(`--recipe FILE`), in the command's table, with underscores: `batch_tokens = 1024`.\n",
        "Exit status: 0 done, 1 refused or failed, 2 wrong usage.\n",
    ]
    for name, command in cli.COMMANDS.items():
        made = cli.command_of(name)
        shown = [each for each in made.params if not getattr(each, "hidden", False)]
        arguments = [each for each in shown if each.param_type_name == "argument"]
        usage = " ".join(["lftpipe", name, *(f"[{each.name.upper()}]" for each in arguments), "[OPTIONS]"])
        parts += [f"## {name}\n", f"{command.help}\n", f"    {usage}\n"]
        panels: dict[str, list[Any]] = {}
        for each in shown:
            panels.setdefault(getattr(each, "rich_help_panel", None) or "Arguments", []).append(each)
        for panel, options in panels.items():
            parts.append(f"**{panel}**\n\n| option | meaning |\n|---|---|\n" + "".join(map(_row, options)))
    return "\n".join(parts)


def _row(option: Any) -> str:
    names = [*getattr(option, "opts", []), *getattr(option, "secondary_opts", [])]
    if option.param_type_name == "argument":
        names = [option.name.upper()]
    parts = (getattr(option, "help", "") or "").replace("|", r"\|").split("`")
    parts[::2] = [part.replace("<", "&lt;") for part in parts[::2]]  # what is not code
    text = "`".join(parts)
    return f"| {' '.join(f'`{each}`' for each in names)} | {text} |\n"
