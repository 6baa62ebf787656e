"""Ending a run on many processes when one of them is told to stop.

Independent of the rest of lmerge, so that other programs can copy it.
"""

from __future__ import annotations

import logging
import signal
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

logger = logging.getLogger(__name__)


class StopTogether(Callback):
    """Ends all processes after the same training step when one has got SIGTERM.

    A W&B agent's stop, and many a job scheduler's, reaches the first process alone. Lightning
    2.6 then talks to the others from inside its signal handler, while they may be in the middle
    of something else, and all can wait for ever (its issue 20806). Here the handler only takes a
    note, and the processes compare notes after each step. Alone, a process does as Lightning does.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._before: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace Lightning's handler, which is set shortly before."""
        if trainer.world_size > 1:
            self._before = signal.signal(signal.SIGTERM, self._note)

    def _note(self, _signum: int, _frame: FrameType | None) -> None:
        self.stopped = True

    def on_train_batch_end(self, trainer: Trainer, *_args: Any, **_kwargs: Any) -> None:
        """Stop where any process was told to."""
        if trainer.world_size > 1 and trainer.strategy.reduce_boolean_decision(
            self.stopped, all=False
        ):
            logger.warning("stopped after step %d (SIGTERM)", trainer.global_step)
            raise SIGTERMException

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None
