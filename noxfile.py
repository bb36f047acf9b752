"""The tests on every supported Python: `nox`, or `nox -s tests-3.12`."""

import nox

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["tests"]

#: What the command line, the store and the corpora need.
NO_TORCH = [
    "typer",
    "rich",
    "tomli-w",
    "pydantic",
    "xxhash",
    "numpy",
    "zarr",
    "numcodecs",
    "google-crc32c",
    "jaxtyping",
    "pyarrow",
    "pytest",
    "pytest-timeout",
    "hypothesis",
    "xarray",
]


@nox.session(python=["3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    """Install the package with the pinned versions and run the fast tests."""
    session.install("--constraint", "constraints.txt", ".[dev]")
    session.run(
        "pytest",
        "-n",
        "2",
        "--dist",
        "worksteal",
        "-m",
        "not slow and not network and not gpu",
        *session.posargs,
    )


@nox.session(python=["3.11", "3.12", "3.13"])
def light(session: nox.Session) -> None:
    """Without torch: the command line answers, and the store is written and read."""
    session.install("--no-deps", ".")
    session.install("--constraint", "constraints.txt", *NO_TORCH)
    session.run(
        "python",
        "-c",
        "import lftpipe.cli.app, lftpipe.base.files, lftpipe.config.recipe, lftpipe.base.workspace",
    )
    for command in ([], ["extract"], ["train"], ["evaluate"]):
        session.run("lftpipe", *command, "--help", silent=True)
    session.run(
        "pytest", "--noconftest", "tests/store/test_codec.py", "tests/store/test_reader.py", *session.posargs
    )
