"""Measure the memory of a fit stage by stage, beside what `lmerge plan --memory` expects.

    python benchmarks/memory.py --config configs/demo.yaml --trainer.max_steps 2

Takes the options of `lmerge fit` for a run on one process without a GPU. What is measured is the
resident memory beyond that after the imports, sampled every 5 ms; pages of mapped files count.
The last line is JSON: {"measured_gib", "expected_gib", "ratio"} of the peak.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import psutil
import transformers.models.llama.modeling_llama  # noqa: F401 - part of the baseline
from lightning.pytorch import Trainer

from lmerge.callbacks import ExportCheckpoint, Repair
from lmerge.cli import main
from lmerge.memory import expected_bytes, sizes_of
from lmerge.module import AlphaModule
from lmerge.planning import job_of

GIB = 2**30
STAGES: dict[str, tuple[type, str]] = {
    "load": (AlphaModule, "check"),
    "plan": (AlphaModule, "_planned"),
    "states": (AlphaModule, "cache"),
    "training": (AlphaModule, "on_train_start"),
    "evaluation": (AlphaModule, "on_validation_epoch_start"),
    "repair": (Repair, "on_fit_end"),
    "export": (ExportCheckpoint, "on_fit_end"),
}
"""Stage -> the method that begins it; load, plan and states end with it."""


class Watch:
    """Samples this process's memory in a thread and keeps the peak of each stage."""

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.baseline = self.process.memory_info().rss
        self.stage = "start"
        self.peak: dict[str, int] = defaultdict(int)
        self.modules: list[AlphaModule] = []
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            used = self.process.memory_info().rss - self.baseline
            self.peak[self.stage] = max(self.peak[self.stage], used)
            time.sleep(0.005)

    def mark(self, stage: str, owner: type, name: str) -> None:
        """Let a method begin a stage."""
        method: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(method)
        def marked(this: Any, *args: Any, **kwargs: Any) -> Any:
            before, self.stage = self.stage, stage
            if isinstance(this, AlphaModule) and this not in self.modules:
                self.modules.append(this)
            found = method(this, *args, **kwargs)
            if stage in ("load", "plan", "states"):
                self.stage = before
            return found

        setattr(owner, name, marked)

    def expected(self) -> dict[str, int]:
        """Return what was to be expected of the run that is over."""
        module = self.modules[0]
        trainer: Trainer = module.trainer
        assert module.state is not None
        job = job_of(trainer, module, module.data(), module.state.plan)
        return expected_bytes(sizes_of(module.source.config), job, "cpu")


def run(options: list[str]) -> None:
    """Run a fit and print both columns."""
    watch = Watch()
    for stage, (owner, name) in STAGES.items():
        watch.mark(stage, owner, name)
    with tempfile.TemporaryDirectory() as folder:
        main(["fit", *options, f"--run_dir={folder}/run", "--wandb=disabled"])
        expected = watch.expected()
    print(f"after the imports {watch.baseline / GIB:.3f} GiB; beyond that, in GiB:")
    print(f"{'':12}{'measured':>10}{'expected':>10}{'ratio':>8}")
    for stage, used in watch.peak.items():
        known = expected.get(stage, 0)
        ratio = f"{known / used:.2f}" if known and used else ""
        print(f"{stage:12}{used / GIB:10.3f}{known / GIB:10.3f}{ratio:>8}")
    measured, known = max(watch.peak.values()), expected["peak"]
    found = {"measured_gib": measured / GIB, "expected_gib": known / GIB, "ratio": known / measured}
    print(json.dumps({name: round(value, 3) for name, value in found.items()}))


if __name__ == "__main__":
    run(sys.argv[1:])
