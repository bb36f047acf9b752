"""Training flow layers: what a step minimises, runs in progress, and the loop that feeds them."""

from lftpipe.training.closed_form import fit_closed_form
from lftpipe.training.loop import Learner, train_together
from lftpipe.training.run import TrainingRun

__all__ = ["Learner", "TrainingRun", "fit_closed_form", "train_together"]
