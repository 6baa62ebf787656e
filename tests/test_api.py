"""The Python API runs the commands themselves, and gives back what they leave."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_run import SMALL
from transformers import AutoModelForCausalLM

import lmerge

OPTIONS = dict(
    option.removeprefix("--").split("=") for option in SMALL if "num_removed" not in option
)
OPTIONS |= {"model.plan_method": "block", "gate.enforce": "false", "repair.config.method": "down"}
OPTIONS |= {"repair.heal.method": "none"}


@pytest.fixture(scope="module")
def result(tiny_dir: Path) -> lmerge.Compressed:
    return lmerge.compress(tiny_dir, num_removed=1, options=OPTIONS)


def test_compress_gives_model_plan_and_cost(result: lmerge.Compressed) -> None:
    assert result.model.config.num_hidden_layers == 3
    assert result.plan.num_removed == 1
    assert result.results["text"]
    assert result.report.startswith("| what | source | merged |")
    assert len(result.report.splitlines()) == 2 + len(result.rows)


def test_saved_model_is_the_one_in_memory(result: lmerge.Compressed, tmp_path: Path) -> None:
    folder = result.save(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(loaded(tokens).logits, result.model(tokens).logits)


def test_compress_leaves_the_run_of_fit(tiny_dir: Path, tmp_path: Path) -> None:
    run_dir, plan = (
        tmp_path / "run",
        lmerge.MergePlan(num_layers=4, groups=(lmerge.Group(members=(1, 2), anchor=1),)),
    )
    result = lmerge.compress(tiny_dir, plan=plan, run_dir=run_dir, evaluate=False, options=OPTIONS)
    assert json.loads((run_dir / "plan.json").read_text())["groups"] == [
        {"members": [1, 2], "anchor": 1}
    ]
    assert (run_dir / "model" / "config.json").is_file()
    assert result.results == {}
    assert result.rows == []


def test_find_plan_gives_the_plan_of_compress(result: lmerge.Compressed, tiny_dir: Path) -> None:
    found = lmerge.find_plan(tiny_dir, num_removed=1, options=_of_plan())
    assert found.groups == result.plan.groups


def _of_plan() -> dict[str, object]:
    """Those of the options that `lmerge plan` reads."""
    return {name: value for name, value in OPTIONS.items() if name != "wandb"}


def test_mistakes_are_value_errors_of_one_line(tiny_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"Did you mean `--model\.measure`") as error:
        lmerge.compress(tiny_dir, options={"model.measur": "cosine"})
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="`num_removed` or `budget`"):
        lmerge.compress(tiny_dir, num_removed=1, budget="20%")
    with pytest.raises(ValueError, match="num_removed"):
        lmerge.compress(tiny_dir, num_removed=4, options=OPTIONS)


def test_every_public_name_is_there_and_typed() -> None:
    for name in lmerge.__all__:
        assert getattr(lmerge, name) is not None
        assert name in dir(lmerge)
    with pytest.raises(AttributeError, match="no attribute"):
        lmerge.nothing  # noqa: B018
    assert (Path(lmerge.__file__).parent / "py.typed").is_file()


LOADED = "import sys; sys.exit(' '.join(sorted(n for n in sys.modules if '.' not in n)))"


@pytest.mark.parametrize(
    "code",
    [
        "import lmerge",
        "from lmerge.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "from lmerge.cli import main\ntry: main(['--version'])\nexcept SystemExit: pass",
        "from lmerge.cli import main\ntry: main(['fitt'])\nexcept SystemExit: pass",
    ],
)
def test_what_answers_at_once_imports_no_other_package(code: str) -> None:
    args = [sys.executable, "-c", f"{code}\n{LOADED}"]
    done = subprocess.run(args, capture_output=True, text=True, check=False)
    loaded = set(done.stderr.splitlines()[-1].split())
    assert "lmerge" in loaded
    assert not loaded & {"torch", "lightning", "transformers", "numpy", "jsonargparse", "yaml"}
