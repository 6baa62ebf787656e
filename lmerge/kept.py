"""Plans that runs share: under which name each is kept, and who makes it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from filelock import FileLock
from torch import Tensor

from lmerge.plan import MergePlan
from lmerge.runs import read_plan, write_plan

logger = logging.getLogger(__name__)

PLAN_VERSION = 1
"""Raised when a way to choose layers changes, so that older kept plans are not reused."""


def kept_plan(
    folder: Path,
    source: str,
    options: object,
    prompts: Iterable[Tensor],
    make: Callable[[], MergePlan],
) -> MergePlan:
    """Return a plan that other runs may have made; one process makes it while others wait.

    Args:
        folder: Where plans are kept.
        source: Fingerprint of the source model.
        options: All that decides how layers are chosen.
        prompts: Token ids that they are chosen on.
        make: Makes the plan where there is none.
    """
    digest = hashlib.sha256(repr((PLAN_VERSION, source, options)).encode())
    for prompt_T in prompts:
        digest.update(prompt_T.cpu().numpy().tobytes())
    path = folder / f"{digest.hexdigest()[:16]}.plan.json"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.is_file():
            write_plan(folder, make(), path)
        else:
            logger.info("plan read from %s", path)
    return read_plan(path)
