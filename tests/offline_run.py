"""What W&B was told, read back from the files of an offline run."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


class Offline:
    """An offline run: its summary, the records of its log, the files of its tables and images."""

    def __init__(self, folder: Path) -> None:
        (self.folder,) = (folder / "wandb").glob("offline-run-*")
        self.data: dict[str, Any] = json.loads(self._inspect("--summary"))
        self.records = [json.loads(line) for line in self._inspect().splitlines()]

    def _inspect(self, *args: str) -> str:
        command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json"]
        done = subprocess.run(
            [*command, *args, str(self.folder)], check=True, capture_output=True, text=True
        )
        return done.stdout

    @property
    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = self.data["summary"]
        return found

    def table(self, key: str) -> dict[str, Any]:
        path = self.folder / "files" / self.summary[key]["path"]
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def of_type(self, kind: str) -> list[dict[str, Any]]:
        return [record[kind] for record in self.records if record["type"] == kind]
