import logging
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from cli_run import run

from lmerge import cli
from lmerge.verbosity import LOGGERS

ROOT = Path(__file__).parents[1]


@pytest.fixture
def first_import(monkeypatch: pytest.MonkeyPatch) -> list[logging.Handler]:
    """Lightning's own handlers; importing a command does to its loggers what Lightning does."""
    lightning = logging.getLogger("lightning")
    levels = {name: logging.getLogger(name).level for name in LOGGERS}

    def importing(name: str) -> ModuleType:
        module = import_module(name)
        lightning.addHandler(logging.StreamHandler())
        for name in LOGGERS[1:]:
            logging.getLogger(name).setLevel(logging.INFO)
        return module

    monkeypatch.setattr(cli, "import_module", importing)
    yield lightning.handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.parametrize(("flags", "level"), [([], logging.WARNING), (["-v"], logging.INFO)])
def test_lightning_says_no_more_than_is_asked_for_and_nothing_twice(
    first_import: list[logging.Handler], flags: list[str], level: int
) -> None:
    run("plan", *flags, "--memory", f"--model.source={ROOT / 'configs' / 'shapes' / 'llama-3-8b'}")
    assert logging.getLogger("lightning.pytorch").level == level
    assert first_import == []
