"""Last words: read, tokenised, scored and compared like a straight loop does."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_run import fit, run
from conftest import byte_tokenizer, tiny_model
from models import logits, plan_of
from transformers import PreTrainedModel

from lmerge.alphas import AlphaConfig
from lmerge.data.records import IGNORE, WordBatch
from lmerge.data.words import read_last_words, word_batches
from lmerge.evaluate import Evaluation
from lmerge.merged import MergedLlama
from lmerge.statistics import mcnemar_exact
from lmerge.words import LastWordMetric, score_last_words

TEXTS = [
    "He opened the door",
    "a b",
    "Two  spaces\nand a break",
    "It was he said, over.",
    "Sí señor",
]
WORDS = [" door", " b", " break", " over.", " señor"]


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def batches(texts: list[str], max_tokens: int = 60, max_length: int = 99) -> list[WordBatch]:
    return word_batches(
        "mine", texts, byte_tokenizer(), max_tokens=max_tokens, max_length=max_length
    )


def ids_of(text: str) -> list[int]:
    found: list[int] = byte_tokenizer()(text)["input_ids"]
    return found


def text_of(ids: torch.Tensor) -> str:
    return str(byte_tokenizer().decode(ids.tolist()))


def model_that_says(text: str) -> PreTrainedModel:
    """A model of one layer whose next byte depends on the last one alone, as in `text`."""
    model = tiny_model(num_hidden_layers=1, hidden_size=264, tie_word_embeddings=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight.copy_(torch.eye(260, 264))
        ids = ids_of(text)
        for now, then in pairwise(ids):
            model.lm_head.weight[then, now] = 1
    return model


# Reading.

BAD = {
    "one word": ('{"text": "alone"}', "a word before its last one"),
    "no text": ('{"question": "a b"}', "`text` must be a text"),
    "a number": ('{"text": 3}', "`text` must be a text"),
    "no JSON": ("a plain line", "must be a JSON object"),
    "a list": ('["a b"]', "must be a JSON object"),
}


@pytest.mark.parametrize("mistake", BAD)
def test_a_bad_line_is_named_with_file_line_and_rule(mistake: str, tmp_path: Path) -> None:
    line, rule = BAD[mistake]
    path = write(tmp_path / "words.jsonl", '{"text": "a b"}', "", line)
    with pytest.raises(ValueError, match=rf"words\.jsonl, line 3: .*{rule}") as error:
        read_last_words(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["nowhere.jsonl", "words.txt"])
def test_a_file_that_is_no_jsonl_is_refused(name: str, tmp_path: Path) -> None:
    write(tmp_path / "words.txt", "a b")
    with pytest.raises(ValueError, match=r"must be an existing \.jsonl file"):
        read_last_words(str(tmp_path / name))


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one text"):
        read_last_words(str(write(tmp_path / "words.jsonl", "")))


def test_files_go_by_their_stems(tmp_path: Path) -> None:
    paths = [str(write(tmp_path / f"{n}.jsonl", '{"text": " a b "}')) for n in ("x", "y")]
    assert read_last_words(paths) == {"x": ["a b"], "y": ["a b"]}


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'x' twice"):
        read_last_words([str(tmp_path / "x.jsonl"), str(tmp_path / "other" / "x.jsonl")])


# Batches.


def test_the_targets_are_the_last_word_with_the_space_before_it() -> None:
    found = {}
    for batch in batches(TEXTS):
        for index, target_T in zip(batch.index_B.tolist(), batch.target_BT, strict=True):
            found[index] = text_of(target_T[target_T != IGNORE])
    assert [found[i] for i in range(len(TEXTS))] == WORDS


def test_rows_hold_the_text_up_to_its_last_token() -> None:
    for batch in batches(TEXTS):
        for index, token_T, target_T in zip(
            batch.index_B.tolist(), batch.token_BT, batch.target_BT, strict=True
        ):
            ids = ids_of(TEXTS[index])
            assert token_T[: len(ids) - 1].tolist() == ids[:-1]
            assert target_T[len(ids) - 2] == ids[-1]
            assert (target_T[len(ids) - 1 :] == IGNORE).all()


def test_a_batch_holds_at_most_the_tokens_that_are_allowed() -> None:
    assert all(batch.token_BT.numel() <= 60 for batch in batches(TEXTS * 9))
    assert sorted(i for b in batches(TEXTS * 9) for i in b.index_B.tolist()) == list(range(45))


def test_of_a_long_text_the_end_is_kept() -> None:
    (batch,) = batches(["x" * 50 + " end"], max_length=10)
    assert text_of(batch.token_BT[0]) == "xxxxxxx en"
    assert text_of(batch.target_BT[0][-4:]) == " end"


# Scores.


@torch.no_grad()
def straight(model: PreTrainedModel, text: str, word: str) -> tuple[bool, float]:
    """Greedy decoding and log-probability, token by token, without batches."""
    ids, num = ids_of(text), len(ids_of(word))
    said, nats = True, 0.0
    for place in range(len(ids) - num, len(ids)):
        logp_V = logits(model, torch.tensor([ids[:place]]))[0, -1].double().log_softmax(dim=-1)
        said &= int(logp_V.argmax()) == ids[place]
        nats -= float(logp_V[ids[place]])
    return said, nats


def pair() -> dict[str, PreTrainedModel]:
    source = tiny_model()
    merged = MergedLlama(source, plan_of([1, 2]), {}, AlphaConfig(start="uniform"))
    return {"source": source, "merged": merged.causal_lm}


def evaluate(models: dict[str, PreTrainedModel], texts: list[str]) -> dict[str, Any]:
    evaluation = Evaluation({}, last_words=["mine"])
    for batch in batches(texts):
        evaluation.update(models["source"], models["merged"], batch)
    found: dict[str, Any] = evaluation.results([], {})["last_word"]["mine"]
    return found


def test_scores_are_those_of_a_straight_loop() -> None:
    models = pair()
    # Texts whose last byte each model says by itself, so that some are right.
    texts, words = list(TEXTS), list(WORDS)
    for model in models.values():
        for text in TEXTS:
            nexts_V = logits(model, torch.tensor([ids_of(f"{text} ")]))[0, -1]
            char = max("abcdefghijklmnopqrstuvwxyz", key=lambda c: float(nexts_V[ids_of(c)[0]]))
            texts.append(f"{text} {char}")
            words.append(f" {char}")
    found = evaluate(models, texts)
    for name, model in models.items():
        slow = [straight(model, text, word) for text, word in zip(texts, words, strict=True)]
        assert found[name]["item_correct"] == [int(said) for said, _ in slow]
        nats = [n for _, n in slow]
        assert found[name]["item_nats"] == pytest.approx(nats, rel=1e-4)
        assert found[name]["accuracy"] == sum(said for said, _ in slow) / len(texts)
        assert found[name]["ppl"] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-4)


def test_a_word_counts_only_when_all_its_tokens_are_said() -> None:
    model = model_that_says("e word")
    (batch,) = batches(["e word", "e work", "e nord"], max_tokens=999)
    nll_B, hit_B = score_last_words(model, batch)
    order = batch.index_B.argsort()
    assert hit_B[order].tolist() == [True, False, False]
    assert bool((nll_B > 0).all())


def test_source_and_merged_are_compared_text_by_text() -> None:
    good, bad = model_that_says("e word"), model_that_says("xyz")
    found = evaluate({"source": good, "merged": bad}, ["e word", "he word", "e work"])
    assert found["mcnemar"] == mcnemar_exact([1, 1, 0], [0, 0, 0])._asdict()
    assert found["difference"]["value"] == pytest.approx(-2 / 3)
    assert found["difference"]["high"] <= 0


def test_repeats_of_a_padding_sampler_do_not_count() -> None:
    metric = LastWordMetric()
    index, nll = torch.tensor([2, 0, 2]), torch.tensor([1.0, 2.0, 1.0])
    metric.update(index, nll, torch.tensor([True, False, True]))
    assert metric.compute()["item_nats"] == [2.0, 1.0]
    assert metric.compute()["item_correct"] == [0, 1]


# The program.


def test_last_words_are_measured_by_validate(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "mine.jsonl", *(json.dumps({"text": text}) for text in TEXTS))
    fit(tiny_dir, tmp_path / "run", f"--data.last_word={path}")
    results = json.loads((tmp_path / "run" / "metrics.json").read_text())["validate"]
    assert len(results["last_word"]["mine"]["merged"]["item_correct"]) == len(TEXTS)
    assert "last_word/mine" in results["fingerprints"]
    assert "last word, mine" in capsys.readouterr().out


def test_a_bad_line_stops_a_fit_before_it_starts(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "mine.jsonl", '{"text": "alone"}')
    with pytest.raises(SystemExit) as stop:
        run("fit", f"--model.source={tiny_dir}", f"--run_dir={tmp_path / 'run'}",
            f"--data.last_word={path}")  # fmt: skip
    assert stop.value.code == 2
    assert "mine.jsonl, line 1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
