"""Runs the same command lines one after another in two processes, as torchrun would.

python two_processes.py '[["fit", "--trainer.strategy=ddp", ...], ...]'
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).parent
TIMEOUT = 400


def run_in_two(*commands: Sequence[str | Path]) -> list[str]:
    """Run command lines of lmerge in two processes that know of each other; all must succeed.

    Returns what each of the two printed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    env |= {"TORCHELASTIC_RUN_ID": "test", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    text = json.dumps([[str(arg) for arg in command] for command in commands])
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, text],
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        printed = [process.communicate(timeout=TIMEOUT)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(printed)
    return printed


if __name__ == "__main__":
    from cli_run import run

    for options in json.loads(sys.argv[1]):
        run(*options)
