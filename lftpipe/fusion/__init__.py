"""Generative Fusion Decoding (arXiv 2405.14259): language models of bytes, joined with recognisers.

A room of mathematics: it is handed models and tokenizers, and knows no stores, no teachers and no students.
"""

from lftpipe.fusion.byte_model import ByteModel
from lftpipe.fusion.processor import FusionLogitsProcessor
from lftpipe.fusion.vocabulary import Vocabulary

__all__ = ["ByteModel", "FusionLogitsProcessor", "Vocabulary"]
