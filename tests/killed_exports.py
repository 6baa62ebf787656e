"""Kill exports at random moments and starve them of disk; print as JSON what they left.

    python killed_exports.py NUM_KILLS

Everything is imported once; each export runs in a fork of this process.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from cli_run import run
from made_runs import made_run, source
from tqdm.auto import tqdm

from lmerge.runs import read_run
from lmerge.streamed_export import export_streamed
from lmerge.streamed_merge import StreamedMerge


def digest(folder: Path) -> str:
    """Return what a folder holds, as one hash."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def forked(work: Callable[[], object], seconds: float | None = None) -> int:
    """Run something in a fork, kill it after so many seconds, return how it ended."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def export(made: Path, out: Path) -> None:
    """Do what the command does, without reading options."""
    folder = made.parent / "source"
    merge = StreamedMerge(folder, read_run(made))
    export_streamed(folder, merge, out, card="", max_shard_size="8kB", overwrite=True)


def export_forever(runs: list[Path], out: Path) -> None:
    while True:
        for made in runs:
            export(made, out)


def kill(runs: list[Path], out: Path, num_kills: int) -> dict[str, object]:
    """Kill exports over an older one, and into a free place; count what is found there."""
    kinds = {}
    for made in runs:
        start = time.perf_counter()
        export(made, out)
        kinds[digest(out)] = made.name
    duration = time.perf_counter() - start
    generator, found = random.Random(0), Counter()
    for i in range(num_kills):
        before = digest(out)
        if i % 5 == 0:
            out.rename(out.with_name(f"gone-{i}"))
            before = "nothing"
        forked(lambda: export_forever(runs, out), 2.5 * duration * generator.random())
        after = digest(out) if out.exists() else "nothing"
        kinds["nothing"] = "nothing" if before == "nothing" else "half"
        found[kinds.get(after, "half"), "replaced" if after != before else "kept"] += 1
        if not out.exists():
            export(runs[0], out)
    left = list(out.parent.glob(f".{out.name}.*"))
    for path in left:
        os.utime(path, (0, 0))
    export(runs[0], out)
    return {
        "found": {" ".join(key): count for key, count in sorted(found.items())},
        "left": len(left),
        "left_after_the_next_export": len(list(out.parent.glob(f".{out.name}.*"))),
    }


def refused(made: Path, out: Path, prepare: Callable[[], object]) -> dict[str, object]:
    """Export in a fork where something is wrong; return its last line, exit code and leftovers."""
    report = out.parent / "report.json"
    report.touch()
    report.chmod(0o666)

    def work() -> None:
        errors, code = io.StringIO(), 0
        with report.open("w") as file, contextlib.redirect_stderr(errors):
            prepare()
            try:
                run("export", made, "--out", out, "--overwrite=true")
            except SystemExit as stop:
                code = int(str(stop.code))
            lines = [line for line in errors.getvalue().splitlines() if "error:" in line]
            os.write(file.fileno(), json.dumps([code, lines]).encode())

    before = sorted(path.name for path in out.parent.iterdir()), digest(out)
    forked(work)
    code, lines = json.loads(report.read_text())
    after = sorted(path.name for path in out.parent.iterdir()), digest(out)
    return {"code": code, "lines": lines, "unchanged": before == after}


def full_disk() -> None:
    """Let no file grow beyond 10 kB, as a quota does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))


def nobody() -> None:
    """Become a user who may write nowhere: root may write in read-only folders."""
    if not os.getuid():
        os.setgid(65534)
        os.setuid(65534)


def main() -> None:
    # A child killed while it holds the lock that tqdm shares between processes would block all.
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0
    # In memory where there is such a disk: waiting for a slow one would be most of the test.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        folder = Path(name)
        folder.chmod(0o755)
        tiny, runs = source(folder / "source"), []
        for kind in ("none", "full"):
            runs.append(folder / kind)
            made_run(runs[-1], tiny, kind=kind)
        (tiny / "model.safetensors").chmod(0o644)
        (folder / "free").mkdir()
        result = kill(runs, folder / "free" / "out", int(sys.argv[1]))
        result["full"] = refused(runs[0], folder / "free" / "out", full_disk)
        (folder / "free").chmod(0o555)
        result["read_only"] = refused(runs[0], folder / "free" / "out", nobody)
        (folder / "free").chmod(0o755)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
