import json
import math
from typing import Any, get_args

import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from models import logits, plan_of, tiny_variant, tokens
from transformers import PreTrainedModel

from lmerge.alphas import AlphaConfig
from lmerge.data.prompts import build_choice_batches
from lmerge.data.records import IGNORE, ChoiceBatch, Question, Scoring, TextBatch
from lmerge.data.text import block_batches, text_batches
from lmerge.evaluate import Evaluation
from lmerge.merged import MergedLlama
from lmerge.metrics import macro_accuracy, micro_accuracy
from lmerge.statistics import mcnemar_exact

SCORINGS: tuple[Scoring, ...] = get_args(Scoring)
TEXTS = {"en": "Many a word was written before a model read one of them.", "de": "Ein kurzer Text."}
SUBJECTS = ("anatomy", "virology", "law")
DOMAINS = {"medicine": ("anatomy", "virology"), "law": ("law",), "everything": SUBJECTS}


def make_questions(count: int = 13) -> list[Question]:
    """Questions of three subjects and two languages."""
    return [
        Question(
            id=f"q{i}",
            subject=SUBJECTS[i % 3],
            split="val",
            language="de" if i % 4 == 0 else "en",
            text=f"What is {i} and {7 * i % 5}?",
            choices=(f"{i}", f"about {3 * i}", f"it is {i + 1}", f"no{i}ne"),
            answer=i * 5 % 4,
        )
        for i in range(count)
    ]


QUESTIONS = make_questions()


def choice_batches(scoring: Scoring) -> list[ChoiceBatch]:
    return build_choice_batches(
        QUESTIONS, {}, byte_tokenizer(), scoring=scoring, num_shots=0, max_tokens_per_batch=300
    )


def every_batch() -> list[TextBatch | ChoiceBatch]:
    batches: list[TextBatch | ChoiceBatch] = []
    for name, text in TEXTS.items():
        batches += text_batches(name, text, byte_tokenizer(), block_size=8, stride=8, batch_size=3)
    for scoring in SCORINGS:
        batches += choice_batches(scoring)
    return batches


def evaluate(source: PreTrainedModel, merged: PreTrainedModel) -> dict[str, Any]:
    evaluation = Evaluation({n: len(t.encode()) for n, t in TEXTS.items()}, SCORINGS)
    for batch in every_batch():
        evaluation.update(source, merged, batch)
    return evaluation.results(QUESTIONS, DOMAINS)


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    source = tiny_model()
    merged = MergedLlama(source, plan_of([1, 2]), {}, AlphaConfig(start="uniform"))
    return {"source": source, "merged": merged.causal_lm}


@pytest.fixture(scope="module")
def results(models: dict[str, PreTrainedModel]) -> dict[str, Any]:
    return evaluate(**models)


@torch.no_grad()
def straight_choices(model: PreTrainedModel, scoring: Scoring) -> list[int]:
    """The choice that a model takes on each question, from one unpadded pass for each answer."""
    chosen = {}
    for batch in choice_batches(scoring):
        for b, index in enumerate(batch.index_B.tolist()):
            row, segment = batch.token_BT[b], batch.segment_BT[b]
            start = torch.cat([batch.prefix_P, row[segment == 0]])
            if scoring == "letter":
                scores = logits(model, start[None])[0, -1, batch.letter_ids_4]
            else:
                scores = torch.stack(
                    [
                        answer_logp(model, start, row[segment == s])
                        / len(QUESTIONS[index].choices[s - 1])
                        for s in (1, 2, 3, 4)
                    ]
                )
            chosen[index] = int(scores.argmax())
    return [chosen[i] for i in range(len(QUESTIONS))]


def answer_logp(model: PreTrainedModel, start: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    logp = logits(model, torch.cat([start, answer])[None])[0].log_softmax(dim=-1)
    return logp[len(start) - 1 : -1].gather(1, answer[:, None]).double().sum()


# Choices.


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("name", ["source", "merged"])
def test_choices_are_those_of_one_pass_for_each_answer(
    models: dict[str, PreTrainedModel], results: dict[str, Any], scoring: Scoring, name: str
) -> None:
    found = [row[f"{scoring}_{name}"] for row in results["questions"]]
    assert found == straight_choices(models[name], scoring)


def correct(results: dict[str, Any], key: str) -> torch.Tensor:
    """Whether each question was answered right, from the rows of the questions."""
    return torch.tensor([row[key] == row["answer"] for row in results["questions"]])


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("name", ["source", "merged"])
def test_accuracies_are_those_of_the_questions(
    results: dict[str, Any], scoring: Scoring, name: str
) -> None:
    right = correct(results, f"{scoring}_{name}")
    found = results["choices"][scoring][name]
    wanted = micro_accuracy(right)
    assert list(found["micro"].values()) == [wanted.value, wanted.low, wanted.high, wanted.total]
    subjects = [q.subject for q in QUESTIONS]
    assert found["macro"]["accuracy"] == macro_accuracy(right, subjects).value


@pytest.mark.parametrize("name", ["source", "merged"])
@pytest.mark.parametrize("domain", DOMAINS)
def test_a_question_counts_in_every_domain_that_has_its_subject(
    results: dict[str, Any], name: str, domain: str
) -> None:
    inside = torch.tensor([q.subject in DOMAINS[domain] for q in QUESTIONS])
    found = results["choices"]["cloze"][name]["by_domain"][domain]
    assert found["num_questions"] == int(inside.sum())
    assert found["accuracy"] == float(correct(results, f"cloze_{name}")[inside].double().mean())


@pytest.mark.parametrize("group", ["subject", "language"])
def test_groups_of_questions_have_all_of_their_questions(
    results: dict[str, Any], group: str
) -> None:
    found = results["choices"]["letter"]["source"][f"by_{group}"]
    labels = [getattr(question, group) for question in QUESTIONS]
    counts = {name: rate["num_questions"] for name, rate in found.items()}
    assert counts == {name: labels.count(name) for name in set(labels)}


@pytest.mark.parametrize("scoring", SCORINGS)
def test_both_models_are_compared_on_the_same_questions(
    results: dict[str, Any], scoring: Scoring
) -> None:
    source, merged = (correct(results, f"{scoring}_{name}") for name in ("source", "merged"))
    assert results["choices"][scoring]["mcnemar"] == mcnemar_exact(source, merged)._asdict()


@pytest.mark.parametrize("scoring", SCORINGS)
def test_the_difference_is_merged_minus_source(results: dict[str, Any], scoring: Scoring) -> None:
    both = results["choices"][scoring]
    wanted = both["merged"]["micro"]["accuracy"] - both["source"]["micro"]["accuracy"]
    assert both["difference"]["value"] == pytest.approx(wanted)


def test_a_merged_model_that_loses_answers_has_a_negative_difference() -> None:
    questions = [q for q in QUESTIONS if q.answer == 0]
    index = torch.arange(len(questions))
    evaluation = Evaluation({}, ["letter"])
    right, wrong = torch.tensor([0.0, -1, -2, -3]), torch.tensor([-3.0, 0, -1, -2])
    for name, logp in (("source", right), ("merged", wrong)):
        evaluation.choices["letter", name].update(index, logp.repeat(len(index), 1), 0 * index)
    found = evaluation.results(questions, DOMAINS)["choices"]["letter"]["difference"]
    assert found["value"] == found["low"] == found["high"] == -1


@pytest.mark.parametrize("scoring", SCORINGS)
def test_confusion_counts_every_question_once(results: dict[str, Any], scoring: Scoring) -> None:
    rows = results["choices"][scoring]["merged"]["confusion"]
    answers = [q.answer for q in QUESTIONS]
    assert [sum(row) for row in rows] == [answers.count(i) for i in range(4)]


def test_rows_name_their_questions_in_order(results: dict[str, Any]) -> None:
    for row, question in zip(results["questions"], QUESTIONS, strict=True):
        found = (row["id"], row["subject"], row["language"], row["answer"])
        assert found == (question.id, question.subject, question.language, question.answer)


# Texts.


@torch.no_grad()
def straight_texts(model: PreTrainedModel, name: str) -> tuple[float, int]:
    """Nats and tokens of a text, block by block."""
    nats, count = 0.0, 0
    for batch in every_batch():
        if isinstance(batch, TextBatch) and batch.name == name:
            for token_T, target_T in zip(batch.token_BT, batch.target_BT, strict=True):
                logp = logits(model, token_T[None])[0].double().log_softmax(dim=-1)
                kept = target_T != IGNORE
                nats -= float(logp[kept].gather(1, target_T[kept][:, None]).sum())
                count += int(kept.sum())
    return nats, count


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["source", "merged"])
def test_losses_are_those_of_one_pass_for_each_block(
    models: dict[str, PreTrainedModel], results: dict[str, Any], text: str, name: str
) -> None:
    nats, count = straight_texts(models[name], text)
    found = results["text"][text][name]
    assert found["tokens"] == count == len(TEXTS[text].encode()) - 1
    assert found["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert found["ppl"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    size = len(TEXTS[text].encode())
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


@pytest.mark.parametrize("text", TEXTS)
def test_kl_is_that_of_the_distributions(
    models: dict[str, PreTrainedModel], results: dict[str, Any], text: str
) -> None:
    total, count = 0.0, 0
    for batch in every_batch():
        if isinstance(batch, TextBatch) and batch.name == text:
            kept = batch.target_BT != IGNORE
            logp, logq = (
                logits(models[name], batch.token_BT)[kept].double().log_softmax(dim=-1)
                for name in ("source", "merged")
            )
            total += float((logp.exp() * (logp - logq)).sum())
            count += int(kept.sum())
    assert results["text"][text]["merged"]["kl"] == pytest.approx(total / count, rel=1e-4)


def test_a_text_of_unknown_size_has_no_bits_per_byte() -> None:
    model = tiny_model()
    evaluation = Evaluation({"blocks": None})
    for batch in block_batches("blocks", tokens(4), 3):
        evaluation.update(model, model, batch)
    scores = evaluation.results([], {})["text"]["blocks"]["merged"]
    assert "bits_per_byte" not in scores
    assert scores["tokens"] == 4 * 11


# Both.


@pytest.mark.parametrize("name", ["llama", "llama-biases", "qwen3-untied"])
def test_a_model_that_is_the_source_is_at_no_distance_from_it(name: str) -> None:
    source = tiny_variant(name)
    merged = MergedLlama(source, plan_of(), {}, AlphaConfig()).causal_lm
    results = evaluate(source, merged)
    for text in results["text"].values():
        assert text["merged"]["kl"] == 0
        assert text["merged"]["agreement"] == 1
        assert text["merged"]["loss"] == text["source"]["loss"]
    for scoring, both in results["choices"].items():
        assert both["merged"] == both["source"]
        assert both["difference"]["value"] == 0
        assert both["mcnemar"]["p_value"] == 1
        assert all(
            row[f"{scoring}_source"] == row[f"{scoring}_merged"] for row in results["questions"]
        )


def test_results_are_json(results: dict[str, Any]) -> None:
    assert json.loads(json.dumps(results)) == results


def test_prefixes_are_forgotten_at_the_end() -> None:
    model = tiny_model()
    evaluation = Evaluation({}, ["letter"])
    for batch in choice_batches("letter"):
        evaluation.update(model, model, batch)
    evaluation.results(QUESTIONS, DOMAINS)
    assert not any(len(cache) for cache in evaluation.prefixes.values())


def test_batches_that_come_twice_count_once(models: dict[str, PreTrainedModel]) -> None:
    evaluation = Evaluation({}, ["letter"])
    for batch in choice_batches("letter") * 2:
        evaluation.update(models["source"], models["merged"], batch)
    results = evaluation.results(QUESTIONS, DOMAINS)
    assert results["choices"]["letter"]["source"]["micro"]["num_questions"] == len(QUESTIONS)
