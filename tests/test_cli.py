"""Mistakes of a user end in one clear line, a non-zero exit and nothing written."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from cli_run import SMALL, fit, run
from conftest import byte_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel


def expect_error(
    capsys: pytest.CaptureFixture[str], run_dir: Path, *words: str, args: tuple[str | Path, ...]
) -> None:
    """Run, and check exit code, the one line with its words, and that no run folder came to be."""
    with pytest.raises(SystemExit) as stop:
        run(*args)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0]
    assert not run_dir.exists()


CSV_ROW = '"What is 1+1?","1","2","3","4","{}"\n'


def write_csvs(folder: Path, **rows: str) -> Path:
    """Write MMLU folders dev, val and test of one subject; `rows` replaces a split's content."""
    for split in ("dev", "val", "test"):
        (folder / split).mkdir(parents=True)
        content = rows.get(split, CSV_ROW.format("B") * 5)
        (folder / split / f"anatomy_{split}.csv").write_text(content)
    return folder


MISTAKES = (
    "unknown model",
    "a path that is not there",
    "a directory without a config",
    "an architecture that is no Llama",
    "a pickle checkpoint",
    "an unknown domain",
    "an unknown language",
    "a CSV with five columns",
    "an answer E",
    "an empty split",
    "too many shots",
    "too many removals",
    "a negative number of removals",
    "a plan for another model",
    "a plan that is not there",
    "an unknown option",
    "an option under its old name",
    "an abbreviated option",
    "a value outside a closed set",
    "a value of the wrong type",
    "a config that is not there",
    "a block longer than the context",
    "a negative holdout",
)
"""Keys of `bad_options`, which needs a folder to make its files in."""


def bad_options(tmp_path: Path) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Return, for each mistake, the options and words of its error line."""
    five_columns = write_csvs(tmp_path / "five", val='"What?","1","2","3","B"\n')
    answer_e = write_csvs(tmp_path / "e", val=CSV_ROW.format("E"))
    empty = write_csvs(tmp_path / "empty", val="")
    no_config = tmp_path / "no_config"
    no_config.mkdir()
    gpt2 = tmp_path / "gpt2"
    GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=32, bos_token_id=0, eos_token_id=0)
    ).save_pretrained(gpt2)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text(json.dumps({"model_type": "llama"}))
    torch.save({}, pickled / "pytorch_model.bin")
    byte_tokenizer().save_pretrained(pickled)
    other_plan = tmp_path / "other_plan.json"
    other_plan.write_text(
        json.dumps({"schema": 1, "num_layers": 30, "groups": [{"members": [1, 2], "anchor": 1}]})
    )
    anatomy = ("--data.domains=[anatomy]", "--data.num_shots=0")
    return {
        "unknown model": (("--model.source=no/such-model",), ("no/such-model",)),
        "a path that is not there": (("--model.source=./nowhere",), ("nowhere",)),
        "a directory without a config": ((f"--model.source={no_config}",), ("config.json",)),
        "an architecture that is no Llama": ((f"--model.source={gpt2}",), ("gpt2", "llama")),
        "a pickle checkpoint": ((f"--model.source={pickled}",), ("safetensors",)),
        "an unknown domain": (("--data.domains=[medicla]",), ("medicla", "medical")),
        "an unknown language": (("--data.languages=[xx]",), ("xx", "es")),
        "a CSV with five columns": (
            (f"--data.questions={five_columns}", *anatomy),
            ("anatomy_val.csv", "5"),
        ),
        "an answer E": ((f"--data.questions={answer_e}", *anatomy), ("anatomy_val.csv", "E")),
        "an empty split": ((f"--data.questions={empty}", *anatomy), ("empty",)),
        "too many shots": (("--data.num_shots=6",), ("5", "6")),
        "too many removals": (("--model.num_removed=4",), ("num_removed", "4 layers")),
        "a negative number of removals": (("--model.num_removed=-1",), ("num_removed", "-1")),
        "a plan for another model": ((f"--model.plan={other_plan}",), ("30", "4")),
        "a plan that is not there": (("--model.plan=nowhere.json",), ("nowhere.json",)),
        "an unknown option": (("--model.num_remove=1",), ("num_remove", "--model.num_removed")),
        "an option under its old name": (("--model.num_merges=1",), ("--model.num_removed",)),
        "an abbreviated option": (("--trainer.max_epoch=1",), ("--trainer.max_epochs",)),
        "a value outside a closed set": (("--model.measure=cosin",), ("cosin", "cosine")),
        "a value of the wrong type": (("--model.num_removed=two",), ("num_removed", "two")),
        "a config that is not there": (("--config=nowhere.yaml",), ("nowhere.yaml",)),
        "a block longer than the context": (
            ("--data.block_size=4096", "--data.num_calibration_tokens=9000"),
            ("block_size",),
        ),
        "a negative holdout": (("--data.holdout=-1",), ("holdout",)),
    }


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_ends_in_one_line_and_writes_nothing(
    mistake: str, tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = bad_options(tmp_path)
    assert tuple(table) == MISTAKES
    options, words = table[mistake]
    run_dir = tmp_path / "run"
    args = ("fit", f"--model.source={tiny_dir}", f"--run_dir={run_dir}", *SMALL, *options)
    expect_error(capsys, run_dir, *words, args=args)


def test_existing_run_folder_is_refused_without_overwrite(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        fit(tiny_dir, tmp_path)
    assert stop.value.code == 2
    assert "--overwrite" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_output_folder_below_a_file_is_refused(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file.txt").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        fit(tiny_dir, tmp_path / "file.txt" / "run")
    assert stop.value.code == 2
    assert "--run_dir" in capsys.readouterr().err


def test_validate_without_a_run_says_to_fit_first(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    args = ("validate", f"--model.source={tiny_dir}", f"--run_dir={run_dir}", "--wandb=disabled")
    expect_error(capsys, run_dir, "lmerge fit", args=args)


def test_misspelt_command_gets_a_hint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expect_error(capsys, tmp_path / "run", "fitt", "lmerge fit", args=("fitt",))


def test_fit_without_a_config_stops_by_itself(tiny_dir: Path, tmp_path: Path) -> None:
    options = [o for o in SMALL if "max_steps" not in o]
    run("fit", f"--model.source={tiny_dir}", f"--run_dir={tmp_path / 'run'}", *options)
    assert (tmp_path / "run" / "metrics.json").is_file()


def test_checkpoint_that_is_a_pickle_is_refused(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "evil.ckpt"
    path.write_bytes(pickle.dumps({"lmerge": print}))
    run_dir = tmp_path / "run"
    args = ("fit", f"--model.source={tiny_dir}", f"--run_dir={run_dir}", *SMALL)
    expect_error(capsys, run_dir, "evil.ckpt", args=(*args, f"--ckpt_path={path}"))
