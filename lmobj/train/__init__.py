"""Training: one pure step, one loop, and what surrounds them.

from lmobj import config, train

result = train.fit(config.load("configs/quickstart.yaml"))
"""

from lmobj.train.assemble import Assembly, Experiment, assemble
from lmobj.train.bad_batches import Halted
from lmobj.train.config import TrainConfig
from lmobj.train.loop import FitResult, fit
from lmobj.train.run_folder import RunFolder
from lmobj.train.signals import Stopped
from lmobj.train.step import Program, State

__all__ = [
    "Assembly",
    "Experiment",
    "FitResult",
    "Halted",
    "Program",
    "RunFolder",
    "State",
    "Stopped",
    "TrainConfig",
    "assemble",
    "fit",
]
