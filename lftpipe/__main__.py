"""The `lftpipe` command, and `python -m lftpipe`, which `torchrun` needs."""

from lftpipe import interrupt


def main() -> None:
    """Parse and run the command line; an interrupt is one line from the first import on."""
    interrupt.leave_at_once()
    from lftpipe.cli import app

    app(prog_name="lftpipe")


if __name__ == "__main__":
    main()
