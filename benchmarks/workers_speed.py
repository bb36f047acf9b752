"""`extract --workers 2` with a thread each against one process with two threads, in turn; and a resume.

    python benchmarks/workers_speed.py [--model pythia-tiny] [--tokens 65536] [--rounds 3]
    python benchmarks/workers_speed.py --resume [--tokens 2000000]

Each extraction is a command of its own. Its rate is what it says itself: from its start after imports to the
complete store, with the start of the workers. The ratio is of each round's two, whose stores must be equal to
the byte. With `--resume`, a store of a teacher of two narrow layers is made, and the
seconds are printed that the same extraction takes when all is there, after imports. Prints JSON.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lftpipe.base.files import file_digest

HERE = Path(__file__).resolve().parent
WAYS = {
    "one process, two threads": ["--threads", "2"],
    "two workers, a thread each": ["--threads", "2", "--workers", "2"],
}


def extract(folder: Path, *options: str) -> dict[str, Any]:
    """What the command says of itself."""
    command = [sys.executable, "-m", "lftpipe", "extract", "--json", "--force", "--workspace", str(folder)]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def contents(folder: Path) -> dict[str, str]:
    """The digest of every file of the store, but the lock."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "writer.lock")
    return {str(path.relative_to(folder)): file_digest(path) for path in files}


def compare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both ways, `rounds` times in turn."""
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    equal = True
    for _ in range(options.rounds):
        for way, given in WAYS.items():
            tokens = ["--tokens", str(options.tokens), "--validation-tokens", "4096"]
            found = extract(
                folder / way.split(",")[0],
                "--model",
                options.model,
                "--corpus",
                options.corpus,
                "--layers",
                options.layers,
                *tokens,
                *given,
            )
            rates[way].append(found["tokens_per_second"])
            print(f"{way}: {rates[way][-1]} tokens/s, load {os.getloadavg()[0]}", file=sys.stderr, flush=True)
        one, two = (contents(folder / way.split(",")[0]) for way in WAYS)
        equal &= one == two
    one, two = rates.values()
    return {
        "tokens_per_second": {way: round(statistics.median(found)) for way, found in rates.items()},
        "ratio": [round(theirs / ours, 3) for ours, theirs in zip(one, two, strict=True)],
        "equal_to_the_byte": equal,
        "load_average": os.getloadavg()[0],
    }


def resume(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of an extraction whose store is complete, in this process, after imports."""
    from lftpipe.commands.extract import extract as run
    from lftpipe.config.settings import ExtractSettings

    teacher = folder / "narrow"
    command = [sys.executable, str(HERE / "random_teacher.py"), "--out", str(teacher)]
    subprocess.run(
        [*command, "--layers", "2", "--width", "32", "--heads", "2"], check=True, stdout=subprocess.DEVNULL
    )
    settings = ExtractSettings(
        workspace=folder,
        model=str(teacher),
        corpus="python-stdlib",
        tokens=options.tokens,
        layers="0,1",
        attention=False,
    )
    made = run(settings)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        assert run(settings)["already_complete"]
        seconds.append(round(time.perf_counter() - started, 3))
    return {"tokens": made["tokens"], "bytes": made["bytes"], "seconds_when_complete": seconds}


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pythia-tiny")
    parser.add_argument("--corpus", default="python-stdlib")
    parser.add_argument("--layers", default="all")
    parser.add_argument("--tokens", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--resume", action="store_true", help="the resume, not the comparison")
    options = parser.parse_args()
    options.tokens = options.tokens or (2_000_000 if options.resume else 65_536)
    folder = Path(tempfile.mkdtemp())
    try:
        print(json.dumps((resume if options.resume else compare)(options, folder), indent=1))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
