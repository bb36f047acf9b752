"""`python -m lftpipe`, which `torchrun` needs."""

from lftpipe.cli import main

if __name__ == "__main__":
    main()
