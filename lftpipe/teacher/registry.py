"""Registered teachers: short names for models that many experiments share."""

from dataclasses import dataclass
from pathlib import Path

#: The embedded teacher travels inside the package, so that it is there however lftpipe was installed.
PYTHIA_TINY = Path(__file__).parent / "pythia-tiny"

PYTHIA_SIZES = ("14m", "31m", "70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")


@dataclass(frozen=True)
class Registered:
    """Where a registered teacher comes from, and the corpus it goes with."""

    corpus: str
    hub_id: str | None = None
    folder: Path | None = None
    """A folder that the package ships."""
    gguf: str | None = None
    """A file that must be put into `<workspace>/<name>/`."""
    how: str = ""
    """How that file gets there."""


REGISTERED: dict[str, Registered] = {
    **{f"pythia-{size}": Registered("pile", hub_id=f"EleutherAI/pythia-{size}") for size in PYTHIA_SIZES},
    "pythia-tiny": Registered("python-stdlib", folder=PYTHIA_TINY),
    "smollm2-135m": Registered(
        "python-stdlib",
        gguf="teacher.gguf",
        how="run `make smollm2` in a checkout of lftpipe, or pass --model HuggingFaceTB/SmolLM2-135M",
    ),
    "qwen2.5-coder-0.5b": Registered(
        "python-stdlib",
        gguf="teacher.gguf",
        how="run `make qwen` in a checkout of lftpipe, or pass --model Qwen/Qwen2.5-Coder-0.5B-Instruct",
    ),
    "gemma3-270m": Registered(
        "python-stdlib",
        gguf="teacher.gguf",
        how="run `make gemma` in a checkout of lftpipe, or pass --model google/gemma-3-270m",
    ),
}
