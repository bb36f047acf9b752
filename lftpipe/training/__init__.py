"""Training flow layers: what a step minimises, runs in progress, and the loop that feeds them."""

from lftpipe.training.chain import Chain
from lftpipe.training.linear import fit_linear
from lftpipe.training.loop import train_together
from lftpipe.training.run import Training

__all__ = ["Chain", "Training", "fit_linear", "train_together"]
