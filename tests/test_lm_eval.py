"""An lm-eval run on an exported folder finds what lmerge finds, by the documented command."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from cli_run import fit
from conftest import tiny_model
from made_runs import export_unmerged
from support.lm_eval_tasks import write_tasks
from tokenizers import processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from vocabularies import TOKENIZERS

from lmerge.data.prompts import build_choice_batches
from lmerge.data.records import Scoring
from lmerge.data.stage import StageData, read_stage
from lmerge.score import PrefixCache, score_choices
from lmerge.source import load_model, load_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval (the extra `bench`)"
    ),
]

DOMAINS, NUM_SHOTS, NUM_QUESTIONS = ["medical", "humanities"], 2, 6
SCORINGS = get_args(Scoring)
TOLERANCE = {"letter": 1e-4, "cloze": 1e-3}
"""Nats; an answer text has some ten tokens, a letter one."""


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = TOKENIZERS["bpe"]()
    tokenizer.eos_token = tokenizer.pad_token = "<s>"
    return tokenizer


def sentencepiece() -> PreTrainedTokenizerFast:
    """With <s> before a text, as Llama 2."""
    tokenizer = TOKENIZERS["sentencepiece"]()
    bos = [("<s>", tokenizer.convert_tokens_to_ids("<s>"))]
    post = processors.TemplateProcessing(single="<s> $A", special_tokens=bos)
    tokenizer.backend_tokenizer.post_processor = post
    tokenizer.bos_token = tokenizer.eos_token = tokenizer.pad_token = "<s>"
    return tokenizer


@pytest.fixture(scope="module")
def asked() -> StageData:
    return read_stage(
        "validate",
        questions="bank",
        domains=DOMAINS,
        extra_domains=None,
        languages=["en"],
        num_shots=NUM_SHOTS,
        max_questions=NUM_QUESTIONS,
        calibration_text=None,
        eval_text=None,
        last_word=None,
    )


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on a tiny model that was asked these questions."""
    folder, tokenizer = tmp_path_factory.mktemp("lm_eval"), byte_level()
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(folder / "source")
    tokenizer.save_pretrained(folder / "source")
    options = {
        "domains": f"[{','.join(DOMAINS)}]",
        "num_shots": NUM_SHOTS,
        "max_questions": NUM_QUESTIONS,
        "scorings": "[letter]",
        "eval_text": "null",
    }
    arguments = [f"--data.{name}={value}" for name, value in options.items()]
    fit(folder / "source", folder / "run", *arguments)
    return folder / "run"


@pytest.fixture(scope="module")
def theirs(
    run_dir: Path, asked: StageData, tmp_path_factory: pytest.TempPathFactory
) -> dict[Scoring, Tensor]:
    return lm_eval(run_dir / "model", asked, tmp_path_factory.mktemp("tasks"))


def lm_eval(exported: Path, asked: StageData, folder: Path) -> dict[Scoring, Tensor]:
    """What the documented command says: log-probabilities (N, 4) of the choices."""
    tasks = [
        task
        for scoring in SCORINGS
        for task in write_tasks(
            folder, asked.questions, asked.examples, num_shots=NUM_SHOTS, scoring=scoring
        )
    ]
    command = f"-m lm_eval --model hf --tasks {','.join(tasks)} --device cpu --log_samples"
    paths = ("--include_path", folder, "--output_path", folder / "out")
    arguments = ("--model_args", f"pretrained={exported},dtype=float32")
    subprocess.run([sys.executable, *command.split(), *arguments, *paths], check=True)
    found = {scoring: unknown(asked) for scoring in SCORINGS}
    for path in (folder / "out").rglob("samples_*.jsonl"):
        for line in path.read_text().splitlines():
            sample = json.loads(line)
            answers = [float(answer[0][0]) for answer in sample["resps"]]
            row_4 = torch.tensor(answers, dtype=torch.float64)
            found[path.name.split("_")[1]][sample["doc"]["index"]] = row_4
    return found


def lmerge(exported: Path, asked: StageData, scoring: Scoring) -> Tensor:
    """The same by lmerge."""
    model, prefixes, found_N4 = load_model(str(exported)), PrefixCache(), unknown(asked)
    for batch in build_choice_batches(
        asked.questions,
        asked.examples,
        load_tokenizer(str(exported)),
        scoring=scoring,
        num_shots=NUM_SHOTS,
        max_tokens_per_batch=2048,
    ):
        found_N4[batch.index_B] = score_choices(model, batch, prefixes)
    return found_N4


def unknown(asked: StageData) -> Tensor:
    return torch.full((len(asked.questions), 4), torch.nan, dtype=torch.float64)


def test_lm_eval_chooses_the_letters_of_metrics_json(
    run_dir: Path, theirs: dict[Scoring, Tensor]
) -> None:
    metrics = json.loads((run_dir / "metrics.json").read_text())["validate"]
    ours = [row["letter_merged"] for row in metrics["questions"]]
    assert ours == theirs["letter"].argmax(dim=1).tolist()


@pytest.mark.parametrize("scoring", SCORINGS)
def test_lm_eval_finds_the_log_probabilities_of_an_exported_run(
    scoring: Scoring, run_dir: Path, asked: StageData, theirs: dict[Scoring, Tensor]
) -> None:
    ours_N4 = lmerge(run_dir / "model", asked, scoring)
    torch.testing.assert_close(ours_N4, theirs[scoring], rtol=0, atol=TOLERANCE[scoring])


def test_lm_eval_agrees_where_a_tokenizer_puts_bos_before_a_text(
    asked: StageData, tmp_path: Path
) -> None:
    tokenizer, exported = sentencepiece(), tmp_path / "model"
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    export_unmerged(tmp_path / "source", exported)
    theirs = lm_eval(exported, asked, tmp_path)
    for scoring in SCORINGS:
        ours_N4 = lmerge(exported, asked, scoring)
        torch.testing.assert_close(ours_N4, theirs[scoring], rtol=0, atol=TOLERANCE[scoring])
