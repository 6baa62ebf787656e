"""Every config in configs/ parses with the command that its first lines name."""

import re
from pathlib import Path

import pytest

from lmerge.cli import main

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_config_parses_and_opens_with_its_command(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    text = path.read_text()
    commands = re.findall(rf"^#.*?(\w+) --config configs/{path.name}", text, flags=re.M)
    assert commands
    for command in dict.fromkeys(commands):
        with pytest.raises(SystemExit) as stop:
            main([command, "--config", str(path), "--print_config"])
        assert stop.value.code in (0, None)
        assert "source:" in capsys.readouterr().out
