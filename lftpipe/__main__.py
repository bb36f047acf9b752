"""The `lftpipe` command, and `python -m lftpipe`, which `torchrun` needs."""

import io
import sys

from lftpipe.cli import interrupt


def main() -> None:
    """Parse and run the command line; an interrupt is one line from the first import on."""
    interrupt.leave_at_once()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal of ASCII shows what it cannot as \u2026
            stream.reconfigure(errors="backslashreplace")
    from lftpipe.base.files import raise_file_limit
    from lftpipe.cli import app

    raise_file_limit()
    app.main()


if __name__ == "__main__":
    main()
