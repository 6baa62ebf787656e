"""Runs `lmerge`, and notes for each process what its alignment did (for a test)."""

import json
import os
from pathlib import Path

import torch

from lmerge import alignment
from lmerge.align import motion_parts
from lmerge.cli import main
from lmerge.module import AlphaModule

calls: list[object] = []
align_tasks, configure_model = alignment.align_tasks, AlphaModule.configure_model


def noted_tasks(*args, **options):  # type: ignore[no-untyped-def]
    calls.append(args)
    return align_tasks(*args, **options)


def noted_model(self: AlphaModule) -> None:
    configure_model(self)
    assert self.state is not None
    orders = {i: motion_parts(motion) for i, motion in self.state.orders.items()}
    weights = [t.double().sum() for m in self.merged.merged_layers() for t in m.stacked().values()]
    note = {
        "solved": bool(calls),
        "orders": {i: {n: t.tolist() for n, t in parts.items()} for i, parts in orders.items()},
        "merged": torch.stack(weights).tolist(),
    }
    folder = Path(os.environ["ALIGNMENT_NOTES"])
    (folder / f"{self.trainer.global_rank}.json").write_text(json.dumps(note))


if __name__ == "__main__":
    alignment.align_tasks = noted_tasks
    AlphaModule.configure_model = noted_model  # type: ignore[method-assign]
    main()
