"""One process, two with DDP and two with FSDP2: the same alphas, the same scores."""

import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cli_run import SMALL, fit, run
from models import same
from test_training import FAST, alphas, largest_difference, moves
from two_processes import run_in_two

from lmerge.data.batching import in_rounds, without_repeats
from lmerge.data.records import TextBatch
from lmerge.metrics import ChoiceMetric

FSDP2 = ("ModelParallelStrategy", "data_parallel_size=2", "tensor_parallel_size=1")
FSDP2 = (*FSDP2, "save_distributed_checkpoint=false")
STRATEGIES = {
    "ddp": ("--trainer.strategy=ddp",),
    "fsdp2": (f"--trainer.strategy={FSDP2[0]}", *(f"--trainer.strategy.{o}" for o in FSDP2[1:])),
}
OPTIMIZERS = {
    "sgd": ("--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.05"),
    "adam": ("--model.optimizer=torch.optim.Adam", "--model.optimizer.lr=0.01"),
}
# 27 blocks to train on: two processes have to repeat one in the last batch of an epoch.
STEPS = ("--trainer.max_steps=20", "--trainer.max_epochs=9", "--data.block_size=32")
SCORES = ("--data.eval_tokens=256", "--data.max_questions=5", "--data.block_size=32")


@pytest.mark.parametrize(
    ("size", "num_processes", "num_repeats"), [(2, 2, 1), (3, 4, 3), (1, 4, 3)]
)
def test_shares_average_each_sample_of_the_last_batch_once(
    size: int, num_processes: int, num_repeats: int
) -> None:
    loss_N = torch.rand(size * num_processes - num_repeats).double()
    total = 0.0
    for rank in range(num_processes):
        place_B = (torch.arange(size) * num_processes + rank) % len(loss_N)
        batch = without_repeats({"index": place_B}, num_repeats, rank, num_processes)
        total += float(loss_N[batch["index"]].mean() * batch["share"]) / num_processes
    assert total == pytest.approx(float(loss_N.mean()))


def test_a_batch_without_repeats_is_left_as_it_is() -> None:
    batch = without_repeats({"index": torch.arange(3)}, 0, 1, 2)
    assert batch["index"].tolist() == [0, 1, 2]
    assert batch["share"] == 1


def test_processes_that_take_turns_hold_batches_of_one_kind() -> None:
    text = TextBatch.__new__(TextBatch)
    kinds = in_rounds([text, text, text, "question"], 2)
    assert len(kinds) == 6
    assert all(type(a) is type(b) for a, b in zip(kinds[::2], kinds[1::2], strict=True))


def test_a_metric_on_a_device_still_gathers_float64() -> None:
    assert ChoiceMetric().to("cpu").dtype == torch.float64


class Runs(NamedTuple):
    """Runs of every strategy."""

    folder: Path
    """`one-sgd`, `ddp-sgd`, ... were trained, `one`, `ddp` and `fsdp2` validated."""
    printed: str
    """What the first of the two processes said."""

    def results(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / name / "metrics.json").read_text())
        return {key: found["validate"][key] for key in ("text", "choices", "questions")}


@pytest.fixture(scope="module")
def runs(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder, commands = tmp_path_factory.mktemp("runs"), []
    fit(tiny_dir, folder / "one", *FAST, *SCORES)
    for name, strategy in STRATEGIES.items():
        two = (*strategy, "--trainer.devices=2")
        shutil.copytree(folder / "one", folder / name)
        config, run_dir = folder / "one" / "config.yaml", f"--run_dir={folder / name}"
        commands.append(["validate", "--config", config, run_dir, *two])
        for kind, optimizer in OPTIMIZERS.items():
            common = (f"--model.source={tiny_dir}", *SMALL, *FAST, *STEPS, *optimizer)
            run_dir = f"--run_dir={folder / f'{name}-{kind}'}"
            commands.append(["fit", *common, run_dir, *two, "--data.batch_size=2"])
    printed, _ = run_in_two(*commands)
    for kind, optimizer in OPTIMIZERS.items():
        fit(tiny_dir, folder / f"one-{kind}", *FAST, *STEPS, *optimizer, "--data.batch_size=4")
    run("validate", "--config", folder / "one" / "config.yaml")
    return Runs(folder, printed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_two_processes_train_the_same_alphas_as_one(runs: Runs, name: str, kind: str) -> None:
    one = runs.folder / f"one-{kind}"
    assert largest_difference(one, runs.folder / f"{name}-{kind}") <= 1e-5
    assert max(moves(one).values()) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_two_processes_validate_to_the_bits_of_one(runs: Runs, name: str) -> None:
    assert runs.results(name) == runs.results("one")


@pytest.mark.slow
def test_fsdp2_splits_the_layers_and_one_process_finishes_the_run(runs: Runs) -> None:
    told = re.findall(r"2 processes: ([\d.]+) (\w+) of ([\d.]+) (\w+)", runs.printed)
    here, unit, both, same_unit = told[0]
    assert unit == same_unit
    assert float(here) < 0.6 * float(both)
    folder = runs.folder / "fsdp2-sgd"
    assert not (folder / "model").exists()
    alone = ("--trainer.strategy=auto", "--trainer.devices=1", "--evaluate_after=false")
    whole = ("--export.enabled=true", "--repair.config.method=down")
    checkpoint = f"--ckpt_path={folder}/checkpoints/last.ckpt"
    before = alphas(folder)
    run("fit", "--config", folder / "config.yaml", checkpoint, *alone, *whole)
    assert same(before, alphas(folder))
    assert (folder / "repair.safetensors").is_file()
    assert (folder / "model" / "model.safetensors").is_file()
