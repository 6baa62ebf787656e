import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import sklearn.metrics
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor
from torch.utils.data import DistributedSampler
from torchmetrics.functional.classification import multiclass_calibration_error

from lmerge.metrics import (
    ChoiceMetric,
    Outcomes,
    TextMetric,
    accuracy_by,
    bits_per_byte,
    calibration_error,
    confusion,
    letter_counts,
    macro_accuracy,
    micro_accuracy,
    perplexity,
)

NUM_SAMPLES = 23


def sample_data() -> dict[str, Tensor]:
    """Questions and blocks by index; values whose float64 sum depends on the order."""
    generator = torch.Generator().manual_seed(7)
    logp_N4 = -torch.rand(NUM_SAMPLES, 4, generator=generator, dtype=torch.float64) * 10
    nll_N = torch.randn(NUM_SAMPLES, generator=generator, dtype=torch.float64).exp() * 1000
    return {
        "logp_N4": logp_N4,
        "answer_N": torch.randint(0, 4, (NUM_SAMPLES,), generator=generator),
        "nll_N": nll_N,
        "token_N": torch.randint(1, 500, (NUM_SAMPLES,), generator=generator),
        "kl_N": nll_N / 7,
        "agree_N": torch.arange(NUM_SAMPLES) % 5,
    }


def choice_metric(indices: list[int], batch_size: int = 4) -> ChoiceMetric:
    data, metric = sample_data(), ChoiceMetric()
    for index_B in torch.tensor(indices, dtype=torch.int64).split(batch_size):
        if len(index_B):
            metric.update(index_B, data["logp_N4"][index_B], data["answer_N"][index_B])
    return metric


def text_metric(indices: list[int], batch_size: int = 4) -> TextMetric:
    data, metric = sample_data(), TextMetric(num_bytes=9000, seed=1)
    for index_B in torch.tensor(indices, dtype=torch.int64).split(batch_size):
        if len(index_B):
            nll_B, token_B, kl_B, agree_B = (
                data[name][index_B] for name in ("nll_N", "token_N", "kl_N", "agree_N")
            )
            metric.update(index_B, nll_B, token_B, kl_B=kl_B, agree_B=agree_B)
    return metric


def all_outcomes() -> Outcomes:
    return choice_metric(list(range(NUM_SAMPLES))).compute()


LABELS = [("law", "art", "math")[i * i % 3] for i in range(NUM_SAMPLES)]


# Functions.


def test_perplexity_is_the_exponential_of_nats_a_token() -> None:
    assert perplexity(12.0, 4) == pytest.approx(math.e**3)


def test_the_perplexity_of_a_destroyed_model_is_infinite() -> None:
    assert perplexity(1e6, 1) == math.inf


def test_a_uniform_guess_over_bytes_costs_eight_bits() -> None:
    assert bits_per_byte(50 * math.log(256), 50) == pytest.approx(8)


@pytest.mark.parametrize("function", [perplexity, bits_per_byte])
def test_a_text_of_length_zero_is_refused(function: object) -> None:
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        function(1.0, 0)


def test_micro_accuracy_equals_sklearn() -> None:
    outcomes = all_outcomes()
    expected = sklearn.metrics.accuracy_score(outcomes.answer_N, outcomes.chosen_N)
    assert micro_accuracy(outcomes.correct_N).value == expected


def test_micro_accuracy_counts_its_questions() -> None:
    assert micro_accuracy(all_outcomes().correct_N).total == NUM_SAMPLES


def test_micro_accuracy_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one question"):
        micro_accuracy(torch.tensor([], dtype=torch.bool))


def test_accuracy_by_subject_equals_a_loop() -> None:
    correct_N = all_outcomes().correct_N
    expected = {
        name: np.mean(
            [bool(c) for c, label in zip(correct_N, LABELS, strict=True) if label == name]
        )
        for name in sorted(set(LABELS))
    }
    assert {name: rate.value for name, rate in accuracy_by(correct_N, LABELS).items()} == expected


def test_subjects_partition_the_questions() -> None:
    rates = accuracy_by(all_outcomes().correct_N, LABELS)
    assert sum(rate.total for rate in rates.values()) == NUM_SAMPLES


def test_macro_accuracy_is_the_mean_of_the_subjects() -> None:
    correct_N = all_outcomes().correct_N
    rates = accuracy_by(correct_N, LABELS)
    expected = np.mean([rate.value for rate in rates.values()])
    assert macro_accuracy(correct_N, LABELS).value == pytest.approx(expected)


def test_macro_accuracy_weighs_a_small_subject_as_much_as_a_large_one() -> None:
    correct_N = torch.tensor([True] * 9 + [False])
    assert macro_accuracy(correct_N, ["a"] * 9 + ["b"]).value == 0.5


def test_macro_accuracy_lies_in_its_interval() -> None:
    rate = macro_accuracy(all_outcomes().correct_N, LABELS)
    assert rate.low <= rate.value <= rate.high


@pytest.mark.parametrize("labels", [[], ["a"], ["a"] * 3])
def test_labels_that_do_not_fit_are_refused(labels: list[str]) -> None:
    with pytest.raises(ValueError, match=f"each of the 2 questions .* got {len(labels)}"):
        accuracy_by(torch.tensor([True, False]), labels)


def random_predictions(size: int = 500) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logit_N4 = 2 * torch.randn(size, 4, generator=generator, dtype=torch.float64)
    return logit_N4.softmax(dim=1), torch.randint(0, 4, (size,), generator=generator)


@pytest.mark.parametrize("num_bins", [1, 10, 15])
def test_calibration_error_equals_torchmetrics(num_bins: int) -> None:
    probability_N4, answer_N = random_predictions()
    expected = multiclass_calibration_error(probability_N4, answer_N, 4, n_bins=num_bins)
    error = calibration_error(probability_N4, answer_N, num_bins=num_bins)
    assert error == pytest.approx(float(expected), abs=1e-6)


def test_calibration_error_equals_a_loop_over_bins() -> None:
    probability_N4, answer_N = random_predictions()
    pairs = zip(probability_N4, answer_N, strict=True)
    rows = [(float(p.max()), int(p.argmax()) == int(a)) for p, a in pairs]
    expected = 0.0
    for i in range(10):
        inside = [(c, right) for c, right in rows if i / 10 <= c < (i + 1) / 10]
        if inside:
            gap = np.mean([right for _, right in inside]) - np.mean([c for c, _ in inside])
            expected += len(inside) / len(rows) * abs(gap)
    assert calibration_error(probability_N4, answer_N, num_bins=10) == pytest.approx(expected)


def test_a_model_that_is_always_sure_and_wrong_has_calibration_error_one() -> None:
    probability_N4 = torch.tensor([[1.0, 0.0, 0.0, 0.0]] * 6)
    assert calibration_error(probability_N4, torch.tensor([1] * 6)) == 1


def test_a_fair_guesser_has_no_calibration_error() -> None:
    probability_N4 = torch.full((8, 4), 0.25)
    assert calibration_error(probability_N4, torch.tensor([0, 1, 2, 3] * 2)) == 0


def test_calibration_without_bins_is_refused() -> None:
    with pytest.raises(ValueError, match="`num_bins` must be at least 1, got 0"):
        calibration_error(*random_predictions(), num_bins=0)


def test_confusion_equals_sklearn() -> None:
    outcomes = all_outcomes()
    expected = sklearn.metrics.confusion_matrix(
        outcomes.answer_N, outcomes.chosen_N, labels=range(4)
    )
    assert confusion(outcomes.answer_N, outcomes.chosen_N).tolist() == expected.tolist()


def test_confusion_of_different_lengths_is_refused() -> None:
    with pytest.raises(ValueError, match="same length of at least 1, got 2 and 1"):
        confusion(torch.tensor([0, 1]), torch.tensor([0]))


def test_a_model_that_always_says_a_fills_one_letter() -> None:
    assert letter_counts(torch.zeros(5, dtype=torch.int64)).tolist() == [5, 0, 0, 0]


# Classes.


def test_outcomes_are_sorted_by_index() -> None:
    outcomes = choice_metric([5, 2, 9, 0, 7]).compute()
    assert outcomes.index_N.tolist() == [0, 2, 5, 7, 9]


def test_a_repeated_question_counts_once() -> None:
    assert choice_metric([3, 1, 3, 3, 2, 1]).compute().index_N.tolist() == [1, 2, 3]


def test_one_question_keeps_its_axis() -> None:
    assert choice_metric([3]).compute().chosen_N.shape == (1,)


def test_probabilities_are_the_softmax_of_four_log_probabilities() -> None:
    expected = scipy.special.softmax(sample_data()["logp_N4"].numpy(), axis=1)
    np.testing.assert_allclose(all_outcomes().probability_N4.numpy(), expected, rtol=1e-12)


def test_log_probabilities_keep_their_bits() -> None:
    assert torch.equal(all_outcomes().logp_N4, sample_data()["logp_N4"])


def test_a_tie_goes_to_the_first_letter() -> None:
    metric = ChoiceMetric()
    metric.update(torch.tensor([0]), torch.tensor([[-2.0, -1.0, -1.0, -1.0]]), torch.tensor([1]))
    assert metric.compute().chosen_N.tolist() == [1]


def test_text_loss_is_total_nats_over_tokens() -> None:
    data = sample_data()
    expected = math.fsum(data["nll_N"].tolist()) / sum(data["token_N"].tolist())
    assert text_metric(list(range(NUM_SAMPLES))).compute()["loss"] == expected


def test_text_scores_equal_straight_sums() -> None:
    data = sample_data()
    scores = text_metric(list(range(NUM_SAMPLES))).compute()
    tokens = sum(data["token_N"].tolist())
    expected = {
        "tokens": tokens,
        "ppl": math.exp(sum(data["nll_N"].tolist()) / tokens),
        "bits_per_byte": sum(data["nll_N"].tolist()) / math.log(2) / 9000,
        "kl": sum(data["kl_N"].tolist()) / tokens,
        "agreement": sum(data["agree_N"].tolist()) / tokens,
    }
    assert {name: scores[name] for name in expected} == pytest.approx(expected)


def test_the_loss_lies_in_its_interval() -> None:
    scores = text_metric(list(range(NUM_SAMPLES))).compute()
    assert scores["loss_low"] < scores["loss"] < scores["loss_high"]


def test_a_text_without_a_source_has_loss_alone() -> None:
    metric = TextMetric()
    metric.update(torch.tensor([0, 1]), torch.tensor([3.0, 5.0]), torch.tensor([2, 2]))
    blocks = {"block_nats", "block_tokens", "ppl_low", "ppl_high"}
    assert set(metric.compute()) == {"loss", "loss_low", "loss_high", "ppl", "tokens", *blocks}


def test_a_block_without_targets_changes_no_score() -> None:
    data = sample_data()
    plain, padded = TextMetric(), TextMetric()
    plain.update(torch.arange(NUM_SAMPLES), data["nll_N"], data["token_N"])
    padded.update(torch.arange(NUM_SAMPLES), data["nll_N"], data["token_N"])
    padded.update(torch.tensor([NUM_SAMPLES]), torch.zeros(1), torch.zeros(1))
    assert padded.compute() == plain.compute()


def test_a_text_without_targets_is_refused() -> None:
    metric = TextMetric()
    metric.update(torch.tensor([0]), torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match="at least one target"):
        metric.compute()


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
@pytest.mark.parametrize("metric_class", [TextMetric, ChoiceMetric])
def test_a_metric_without_samples_is_refused(metric_class: type) -> None:
    with pytest.raises(ValueError, match="at least one sample, got none"):
        metric_class().compute()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="`nll_B` must be finite"):
        TextMetric().update(torch.tensor([0]), torch.tensor([value]), torch.tensor([1]))


def test_a_score_that_is_no_number_is_refused() -> None:
    logp_B4 = torch.tensor([[0.0, 0.0, math.nan, 0.0]])
    with pytest.raises(ValueError, match="`logp_B4` must be finite"):
        ChoiceMetric().update(torch.tensor([0]), logp_B4, torch.tensor([1]))


@pytest.mark.parametrize(
    ("shape", "answers", "message"),
    [((2, 4), [0], "one row of four"), ((1, 3), [0], "one row of four"), ((1, 4), [4], "0 to 3")],
)
def test_questions_that_do_not_fit_are_refused(
    shape: tuple[int, int], answers: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ChoiceMetric().update(torch.arange(len(answers)), torch.zeros(shape), torch.tensor(answers))


def test_indices_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="one row for each of the 3 indices"):
        ChoiceMetric().update(torch.arange(3), torch.zeros(2, 4), torch.tensor([0, 1]))


def test_reset_forgets_all_samples() -> None:
    metric = choice_metric([1, 2, 3])
    metric.reset()
    metric.update(torch.tensor([9]), torch.zeros(1, 4), torch.tensor([0]))
    assert metric.compute().index_N.tolist() == [9]


# The same bits on one process and on two.


def as_bits(choices: ChoiceMetric, text: TextMetric) -> dict[str, object]:
    outcomes = choices.compute()
    return {
        "index": outcomes.index_N.tolist(),
        "logp": [x.hex() for x in outcomes.logp_N4.flatten().tolist()],
        "text": {name: repr(value) for name, value in text.compute().items()},
    }


def measure_on_two(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    sampler = DistributedSampler(range(NUM_SAMPLES), num_replicas=2, rank=rank, seed=3)
    padded = list(sampler)
    everything = list(range(NUM_SAMPLES))
    parts = {"padded": padded, "one idle": everything if rank == 0 else []}
    results = {
        name: as_bits(choice_metric(part, 3), text_metric(part, 3)) for name, part in parts.items()
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """What each of two real processes computes."""
    folder = tmp_path_factory.mktemp("gloo")
    torch.multiprocessing.spawn(measure_on_two, args=(str(folder),), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("case", ["padded", "one idle"])
def test_two_processes_give_the_bits_of_one(
    two_processes: list[dict[str, object]], case: str, rank: int
) -> None:
    everything = list(range(NUM_SAMPLES))
    assert two_processes[rank][case] == as_bits(choice_metric(everything), text_metric(everything))
