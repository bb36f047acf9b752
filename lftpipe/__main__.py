"""`python -m lftpipe`, as `torchrun -m lftpipe` needs it."""

from lftpipe.cli import main

main()
