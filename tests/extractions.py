"""What the tests of extraction ask for, and what a store's files hold."""

import dataclasses
from pathlib import Path
from typing import Any

from conftest import CONTEXT

from lftpipe.config.settings import ExtractSettings


def small_extraction(workspace: Path, teacher: Path, text: Path) -> ExtractSettings:
    """Forty training sequences in float32, in batches of four."""
    return ExtractSettings(
        workspace=workspace,
        model=str(teacher),
        corpus=str(text),
        context=CONTEXT,
        tokens=40 * CONTEXT,
        validation_tokens=6 * CONTEXT,
        batch_tokens=4 * CONTEXT,
        compute_dtype="float32",
        dtype="float32",
        threads=1,
    )


def change(settings: ExtractSettings, **values: Any) -> ExtractSettings:
    return dataclasses.replace(settings, **values)


def contents(store: Path) -> dict[str, bytes]:
    """Every file of a store that is data or metadata, by its path."""
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.is_file() and path.name != "writer.lock"
    }
