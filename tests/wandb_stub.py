"""A stand-in for W&B's API on this machine, for `wandb sweep`, `wandb agent` and their runs.

W&B's own engine proposes the values. All that the programs send is kept, to be asserted on.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

from lmerge.trials import Trial, metric_name, propose_wandb

OPTIONAL = {"OrganizationCoreWeaveOrganizationID"}
"""Operations whose error the programs ignore."""

ENTITY, PROJECT, SWEEP = "nobody", "lmerge", "sweep1"
OWNER = {"id": "p", "name": PROJECT, "entity": {"id": "e", "name": ENTITY}}
FLAGS = json.dumps({"code_saving_enabled": False})


@dataclass
class Run:
    """What the stub told the agent to try, and what the run then sent."""

    params: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    sweep: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None


class Stub:
    """Serves the API while its `with` block runs, and tells an agent to start `num_trials` runs.

    Attributes:
        sweeps: The sweep files as they arrived, parsed.
        runs: Each run by its id.
        artifacts: Name of each artifact that was logged.
        unknown: Names of operations that no method answers.
        stop_after: History rows after which the agent is told to stop a run; 0 is never.
    """

    def __init__(self, num_trials: int = 0, *, stop_after: int = 0) -> None:
        self.num_trials, self.stop_after = num_trials, stop_after
        self.sweeps: list[dict[str, Any]] = []
        self.runs: dict[str, Run] = {}
        self.unknown: set[str] = set()
        self.artifacts: list[str] = []
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"stub": self})
        self.server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Stub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        """Answer a GraphQL operation; one that has no method gets an error."""
        snake = re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
        found = getattr(self, f"_on_{snake}", None)
        if found is None:
            self.unknown.add(name)
            return {"errors": [{"message": f"no operation {name}"}]}
        with self.lock:
            return {"data": found(given)}

    def _on_viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        viewer = {"id": "u", "entity": ENTITY, "username": ENTITY, "email": "", "flags": FLAGS}
        return {"viewer": {**viewer, "teams": {"edges": [{"node": {"name": ENTITY}}]}}}

    def _on_server_features_query(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _on_upsert_sweep(self, given: dict[str, Any]) -> dict[str, Any]:
        self.sweeps.append(yaml.safe_load(given["config"]))
        return {"upsertSweep": {"sweep": {"name": SWEEP, "project": OWNER}}}

    def _on_sweep_with_runs(self, _: dict[str, Any]) -> dict[str, Any]:
        sweep = {"id": "s", "name": SWEEP, "state": "RUNNING", "runs": {"edges": []}}
        sweep |= {"config": yaml.safe_dump(self.sweeps[-1])}
        return {"project": {"sweep": sweep}}

    def _on_create_agent(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"createAgent": {"agent": {"id": "agent"}}}

    def _on_heartbeat(self, given: dict[str, Any]) -> dict[str, Any]:
        commands = self._commands(json.loads(given["runState"]))
        return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(commands)}}

    def _commands(self, running: dict[str, bool]) -> list[dict[str, Any]]:
        if running:
            late = [i for i in running if 0 < self.stop_after <= len(self.runs[i].history)]
            return [{"type": "stop", "run_id": i} for i in late]
        if len(self.runs) == self.num_trials:
            return [{"type": "exit"}]
        params = propose_wandb(self.sweeps[-1], self.trials(), seed=0)
        assert params is not None
        run_id = f"run{len(self.runs)}"
        self.runs[run_id] = Run(params)
        args = {key: {"value": value} for key, value in params.items()}
        program = self.sweeps[-1]["program"]
        return [{"type": "run", "run_id": run_id, "program": program, "args": args}]

    def trials(self) -> list[Trial]:
        """Return the runs as the engine sees them."""
        name = metric_name(self.sweeps[-1])
        return [
            Trial(index=i, params=r.params, folder="", state="finished", metric=r.summary.get(name))
            for i, r in enumerate(self.runs.values())
        ]

    def _on_run_resume_status(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"model": {**OWNER, "bucket": None}}

    def _on_upsert_bucket(self, given: dict[str, Any]) -> dict[str, Any]:
        run = self.runs[given["name"]]
        run.config |= json.loads(given.get("config") or "{}")
        run.sweep = given.get("sweep") or run.sweep
        bucket = {"id": given["name"], "name": given["name"], "displayName": given["name"]}
        bucket |= {"config": "{}", "sweepName": run.sweep, "project": OWNER, "historyLineCount": 0}
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}

    def _on_create_run_files(self, given: dict[str, Any]) -> dict[str, Any]:
        files = [
            {"name": name, "uploadUrl": f"{self.url}/upload/{given['run']}/{name}"}
            for name in given["files"]
        ]
        return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}

    def _on_artifact_type(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}  # there is none of this name yet

    def _on_create_artifact(self, given: dict[str, Any]) -> dict[str, Any]:
        """Keep the name of an artifact, such as a table; COMMITTED says that its files are here."""
        self.artifacts.append(given["input"]["artifactCollectionName"])
        sequence = {"id": "c", "latestArtifact": {"id": "a", "versionIndex": 0}}
        artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": sequence}
        return {"createArtifact": {"artifact": artifact}}

    def stream(self, run_id: str, sent: dict[str, Any]) -> None:
        """Keep the lines of history and summary, and the exit code, of a `file_stream` call."""
        with self.lock:
            run = self.runs[run_id]
            for name, part in sent.get("files", {}).items():
                lines = [json.loads(line) for line in part["content"] if line[:1] == "{"]
                if name == "wandb-history.jsonl":
                    run.history += lines
                elif name == "wandb-summary.json":
                    run.summary = lines[-1]
            run.exit_code = sent.get("exitcode", run.exit_code)


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """Say nothing: a program that ends resets its open connections."""


class _Handler(BaseHTTPRequestHandler):
    """GraphQL, the stream of a run's rows, and uploads of its files."""

    protocol_version = "HTTP/1.1"
    stub: Stub

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body, found = self._body(), {}
        if self.path == "/graphql":
            asked = json.loads(body)
            name = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
            found = self.stub.answer(name[1] if name else "", asked.get("variables") or {})
        elif self.path.endswith("/file_stream"):
            self.stub.stream(self.path.split("/")[-2], json.loads(body))
        self._send(found)

    def do_PUT(self) -> None:
        _, _, run_id, name = self.path.split("/", 3)
        self.stub.runs[run_id].files[name] = self._body()
        self._send({})

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _send(self, data: dict[str, Any]) -> None:
        body = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
