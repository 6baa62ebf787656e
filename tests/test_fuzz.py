"""No file that people write makes a reader fail other than by a ValueError of one line."""

from pathlib import Path

import pytest
from fuzz_readers import READERS, fuzz


@pytest.mark.parametrize("name", READERS)
def test_readers_refuse_in_one_line(name: str, tmp_path: Path) -> None:
    fuzz(name, tmp_path, examples=60, start=0)
