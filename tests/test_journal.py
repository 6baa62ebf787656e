"""A killed evaluation goes on where it stopped, and ends in the same numbers."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_run import SMALL, fit, run
from conftest import tiny_model
from models import plan_of, tokens

from lmerge.alphas import AlphaConfig
from lmerge.data.records import TextBatch
from lmerge.data.text import block_batches
from lmerge.evaluate import Evaluation
from lmerge.journal import Entry, Journal, evaluation_key
from lmerge.merged import MergedLlama

ENTRY = Entry("texts/en", [[[3.0, 0.1, 7.0, -1.0, -1.0]], [[3.0, 0.2, 7.0, 0.0, 6.0]]])
BATCHES = block_batches("en", tokens(5), 2)


def merged_model(value: float = 0.5) -> MergedLlama:
    config = AlphaConfig(start="fixed", value=value)
    return MergedLlama(tiny_model(), plan_of([1, 2]), {}, config)


def evaluate(journal: Journal | None, batches: list[TextBatch] | None = None) -> Evaluation:
    merged, evaluation = merged_model(), Evaluation({"en": None}, journal=journal)
    for batch in BATCHES if batches is None else batches:
        evaluation.update(tiny_model(), merged.causal_lm, batch)
    return evaluation


# The file.


def test_an_entry_reads_back_bit_for_bit(tmp_path: Path) -> None:
    Journal(tmp_path, "test-1").append(ENTRY)
    assert list(Journal(tmp_path, "test-1").read()) == [ENTRY]


def test_entries_of_all_processes_are_read(tmp_path: Path) -> None:
    for rank in (0, 1, 10):
        Journal(tmp_path, "test-1", rank).append(ENTRY)
    assert list(Journal(tmp_path, "test-1").read()) == [ENTRY] * 3


def test_a_line_that_was_cut_off_is_skipped_and_others_follow(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "test-1")
    journal.append(ENTRY)
    whole = journal.path.read_bytes()
    for length in range(len(whole)):
        journal.path.write_bytes(whole + whole[:length])
        journal.append(ENTRY)
        assert list(journal.read()) == [ENTRY, ENTRY], length


def test_another_key_has_another_journal(tmp_path: Path) -> None:
    Journal(tmp_path, "test-1").append(ENTRY)
    assert list(Journal(tmp_path, "test-2").read()) == []


def test_removing_takes_the_files_of_all_processes_and_leaves_other_keys(tmp_path: Path) -> None:
    for name, rank in (("test-1", 0), ("test-1", 1), ("test-2", 0)):
        Journal(tmp_path / "journal", name, rank).append(ENTRY)
    Journal(tmp_path / "journal", "test-1").remove()
    assert [p.name for p in (tmp_path / "journal").iterdir()] == ["test-2.0.jsonl"]
    Journal(tmp_path / "journal", "test-2").remove()
    assert not (tmp_path / "journal").exists()


# The key.


def changed_batches() -> list[TextBatch]:
    token_BT = BATCHES[-1].token_BT.clone()
    token_BT[-1, -1] += 1
    return [*BATCHES[:-1], replace(BATCHES[-1], token_BT=token_BT)]


def other_source() -> MergedLlama:
    return MergedLlama(tiny_model(seed=1), plan_of([1, 2]), {}, AlphaConfig(start="uniform"))


CHANGES: dict[str, Callable[[], tuple[MergedLlama, list[TextBatch]]]] = {
    "alphas": lambda: (merged_model(0.5 + 1e-6), BATCHES),
    "a token": lambda: (merged_model(), changed_batches()),
    "composition of the batches": lambda: (merged_model(), block_batches("en", tokens(5), 3)),
    "name of the text": lambda: (merged_model(), block_batches("de", tokens(5), 2)),
    "source": lambda: (other_source(), BATCHES),
    "plan": lambda: (
        MergedLlama(tiny_model(), plan_of([0, 1]), {}, AlphaConfig(start="uniform")),
        BATCHES,
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_key_changes_with_what_decides_a_score(change: str) -> None:
    source = tiny_model(seed=1) if change == "source" else tiny_model()
    merged, batches = CHANGES[change]()
    assert evaluation_key(source, merged, batches) != evaluation_key(
        tiny_model(), merged_model(), BATCHES
    )


def test_a_refit_changes_the_key() -> None:
    merged = merged_model()
    before = evaluation_key(tiny_model(), merged, BATCHES)
    layer = merged.merged_layers()[0]
    layer.refit("down_proj", layer.tensors()["down_proj"] + 1e-6)
    assert evaluation_key(tiny_model(), merged, BATCHES) != before


def test_equal_models_and_batches_have_equal_keys() -> None:
    keys = {evaluation_key(tiny_model(), merged_model(), BATCHES) for _ in range(2)}
    assert len(keys) == 1


# Evaluations.


def test_a_known_batch_is_not_scored_again(tmp_path: Path) -> None:
    evaluate(Journal(tmp_path, "a"), BATCHES[:2])
    second = Evaluation({"en": None}, journal=Journal(tmp_path, "a"))
    refuse: Any = None  # scoring with it would fail
    for batch in BATCHES[:2]:
        second.update(refuse, refuse, batch)
    assert len(second.known) == 2


@pytest.mark.parametrize("done", range(len(BATCHES) + 1))
def test_results_are_those_of_an_evaluation_in_one_go(done: int, tmp_path: Path) -> None:
    evaluate(Journal(tmp_path, "a"), BATCHES[:done])
    resumed = evaluate(Journal(tmp_path, "a", rank=1)).results([], {})
    assert resumed == evaluate(None).results([], {})


# The program.


def scores(run_dir: Path, stage: str = "test") -> dict[str, Any]:
    """What a stage wrote, without the times."""
    path = run_dir / "metrics.json"
    found = json.loads(path.read_text()).get(stage, {}) if path.is_file() else {}
    return {k: v for k, v in found.items() if k not in ("cost", "provenance")}


MANY = ("--data.domains=[medical,legal]", "--data.max_questions=null", "--data.eval_tokens=1")
"""A batch for each of the questions."""


@pytest.fixture(scope="module")
def run_dir(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    fit(tiny_dir, folder, "--evaluate_after=false")
    return folder


def journals(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "journal").glob("test-*.jsonl"))


def start_and_kill(run_dir: Path, *options: str) -> None:
    """Start `lmerge test` in two processes of its own and kill both in the middle."""
    command = [sys.executable, "-m", "lmerge", "test", "--config", str(run_dir / "config.yaml")]
    child = subprocess.Popen(
        [*command, "--gate.enforce=false", *options],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a kill of the group reaches both processes
    )
    deadline = time.monotonic() + 240
    while len(journals(run_dir)) < 2 or min(map(num_lines, journals(run_dir))) < 10:
        assert child.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")


@pytest.mark.slow
def test_a_test_killed_in_two_processes_resumes_in_one_to_the_same_metrics(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start_and_kill(run_dir, *MANY, "--trainer.strategy=ddp", "--trainer.devices=2")
    assert scores(run_dir) == {}
    for path in journals(run_dir):
        path.write_bytes(path.read_bytes()[:-30])  # as if the last line was not written out
    caplog.set_level("INFO")
    run("test", "--config", run_dir / "config.yaml", *MANY)
    assert "batches were scored before" in caplog.text
    resumed = scores(run_dir)
    assert not journals(run_dir)
    caplog.clear()
    run("test", "--config", run_dir / "config.yaml", *MANY)
    assert "batches were scored before" not in caplog.text
    assert scores(run_dir) == resumed


def test_a_journal_of_other_options_is_not_used(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Journal(run_dir / "journal", "test-0123456789abcdef").append(ENTRY)
    caplog.set_level("INFO")
    run("test", "--config", run_dir / "config.yaml", *SMALL[:4])
    assert "batches were scored before" not in caplog.text
    assert [path.name for path in journals(run_dir)] == ["test-0123456789abcdef.0.jsonl"]
