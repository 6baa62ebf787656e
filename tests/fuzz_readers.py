"""Readers of files that people write, fed with what nobody should write.

python tests/fuzz_readers.py SECONDS [READER...]   # so long for each of them; `make fuzz`
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from lmerge.alpha_files import load_alphas
from lmerge.data.questions import load_questions
from lmerge.llama import MATRICES
from lmerge.plan import Group, MergePlan
from lmerge.runs import read_plan

PLAN = MergePlan(num_layers=4, groups=(Group(members=(1, 2), anchor=1),))
GROUP = {"members": [1, 2], "anchor": 1}

GOOD_PLAN = {"schema": 1, "num_layers": 4, "groups": [GROUP], "method": "file", "source": ""}
GOOD_ALPHAS = {
    "schema": 1,
    "groups": [{**GROUP, "alphas": {name: [[0.5, 1.0], [0.5, 0.0]] for name in MATRICES}}],
}
GOOD_LINE = {
    **{"id": "1", "subject": "anatomy", "split": "val", "language": "en"},
    **{"question": "What?", "choices": ["a", "b", "c", "d"], "answer": "B"},
}
GOOD_ROW = ["What?", "a", "b", "c", "d", "B"]

NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -1, 0, 2**63, 1e308])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@st.composite
def damaged(draw: st.DrawFn, good: Any) -> Any:
    """A good document in which one place, however deep, holds something else or nothing."""
    if isinstance(good, dict) and good and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(sorted(good)))
        rest = {name: value for name, value in good.items() if name != key}
        return rest if not draw(st.integers(0, 5)) else {**rest, key: draw(damaged(good[key]))}
    if isinstance(good, list) and good and draw(st.integers(0, 5)):
        i = draw(st.integers(0, len(good) - 1))
        return [*good[:i], draw(damaged(good[i])), *good[i + 1 :]]
    return draw(VALUES)


@st.composite
def contents(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> bytes:
    """Bytes of a text, as they are or with a piece replaced by any bytes."""
    content = draw(texts).encode("utf-8", "surrogatepass")
    if draw(st.booleans()):
        return content
    start = draw(st.integers(0, len(content)))
    stop = draw(st.integers(start, len(content)))
    return content[:start] + draw(st.binary(max_size=8)) + content[stop:]


def documents(good: object) -> st.SearchStrategy[bytes]:
    return contents(damaged(good).map(json.dumps) | st.text())


LINES = st.lists(damaged(GOOD_LINE).map(json.dumps) | st.text(), max_size=4).map("\n".join)
CELLS = damaged(GOOD_ROW).map(
    lambda row: ",".join(map(str, row)) if isinstance(row, list) else str(row)
)
ROWS = st.lists(CELLS | st.text(), max_size=4).map("\r\n".join)


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def read_csv(folder: Path, content: bytes) -> object:
    write(folder / "val" / "anatomy_val.csv", content)
    return load_questions(str(folder), "val")


READERS: dict[str, tuple[st.SearchStrategy[bytes], Callable[[Path, bytes], object]]] = {
    "plan": (documents(GOOD_PLAN), lambda f, c: read_plan(write(f / "plan.json", c))),
    "alphas": (
        documents(GOOD_ALPHAS),
        lambda f, c: load_alphas(write(f / "alphas.json", c), PLAN),
    ),
    "jsonl": (contents(LINES), lambda f, c: load_questions(str(write(f / "val.jsonl", c)), "val")),
    "csv": (contents(ROWS), read_csv),
}
"""Name -> what it is fed with, and a function that writes that into a folder and reads it."""


def fuzz(name: str, folder: Path, *, examples: int, start: int) -> None:
    """Feed a reader; it may raise a ValueError of one line and nothing else."""
    strategy, read = READERS[name]

    @seed(start)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def feed(content: bytes) -> None:
        try:
            read(folder, content)
        except ValueError as error:
            assert type(error) is ValueError, repr(error)  # noqa: PT017 - not its subclasses
            assert str(error).splitlines() == [str(error)], str(error)  # noqa: PT017

    feed()


def main() -> None:
    for name in sys.argv[2:] or READERS:
        stop, rounds = time.monotonic() + float(sys.argv[1]), 0
        with tempfile.TemporaryDirectory() as folder:
            while time.monotonic() < stop:
                fuzz(name, Path(folder), examples=500, start=rounds)
                rounds += 1
        sys.stdout.write(f"{name}: {500 * rounds} inputs, no other error\n")


if __name__ == "__main__":
    main()
