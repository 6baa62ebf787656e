"""Compress Llama-style language models by merging redundant layers.

>>> import lmerge
>>> result = lmerge.compress("smollm2-135m", budget="20%")  # doctest: +SKIP
>>> print(result.report)  # doctest: +SKIP
>>> result.save("merged")  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmerge.api import Compressed as Compressed
    from lmerge.api import compress as compress
    from lmerge.api import find_plan as find_plan
    from lmerge.api import validate as validate
    from lmerge.plan import Group as Group
    from lmerge.plan import MergePlan as MergePlan

__version__ = "0.1.0"

_PLACES = {
    "Compressed": "lmerge.api",
    "compress": "lmerge.api",
    "find_plan": "lmerge.api",
    "validate": "lmerge.api",
    "Group": "lmerge.plan",
    "MergePlan": "lmerge.plan",
}
"""Public name -> the file that has it; imported at the first use, since that takes seconds."""

__all__ = ["Compressed", "Group", "MergePlan", "__version__", "compress", "find_plan", "validate"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
