"""Every config in configs/ parses."""

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
    assert text.startswith("#")
    assert f"fit --config configs/{path.name}" in text
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(path), "--print_config"])
    assert stop.value.code in (0, None)
    assert "model:" in capsys.readouterr().out
