"""The version of lftpipe, where every file may import it, and where the build reads it."""

__version__ = "0.1.0"
