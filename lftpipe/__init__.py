"""lftpipe: train Latent Flow Transformers from a cache of the teacher's hidden states."""

__version__ = "0.1.0"
