"""Training flow layers: what a step minimises, runs in progress, and the loop that feeds them."""

from lftpipe.training.linear import fit_linear
from lftpipe.training.loop import Chain, train_together
from lftpipe.training.run import TrainingRun

__all__ = ["Chain", "TrainingRun", "fit_linear", "train_together"]
