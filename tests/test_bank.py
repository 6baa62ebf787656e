"""What can be checked of the bundled bank."""

import re
from collections import Counter
from importlib import resources
from itertools import product

import pytest

from lmerge.data.questions import DOMAINS, load_questions
from lmerge.data.records import Question, Split
from lmerge.data.text import read_text

SIZES: dict[Split, int] = {"dev": 5, "val": 20, "test": 35}
STUDY = ("medical", "legal", "math", "cs", "humanities")
LANGUAGES = ("en", "es", "fr", "zh")


def questions(split: Split, language: str = "en") -> list[Question]:
    return load_questions("bank", split, [language])


@pytest.mark.parametrize(("split", "domain"), list(product(SIZES, STUDY)))
def test_every_domain_has_its_share_of_each_split(split: Split, domain: str) -> None:
    found = [q for q in questions(split) if q.subject in DOMAINS[domain]]
    assert len(found) == SIZES[split]


@pytest.mark.parametrize(("split", "language"), list(product(SIZES, LANGUAGES)))
def test_medical_questions_are_parallel_in_four_languages(split: Split, language: str) -> None:
    english = {q.id: q for q in questions(split) if q.subject in DOMAINS["medical"]}
    found = {q.id: q for q in questions(split, language) if q.subject in DOMAINS["medical"]}
    assert found.keys() == english.keys()
    assert all(found[i].answer == english[i].answer for i in found)


@pytest.mark.parametrize(("split", "domain"), list(product(("val", "test"), STUDY)))
def test_right_letters_are_balanced(split: Split, domain: str) -> None:
    counts = Counter(q.answer for q in questions(split) if q.subject in DOMAINS[domain])
    assert max(counts.values()) - min(counts[i] for i in range(4)) <= 1


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_question_stands_twice(language: str) -> None:
    texts = [
        re.sub(r"\W+", " ", q.text).lower() for split in SIZES for q in questions(split, language)
    ]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(("split", "language"), list(product(SIZES, LANGUAGES)))
def test_the_four_choices_differ(split: Split, language: str) -> None:
    for question in questions(split, language):
        assert len({choice.strip().lower() for choice in question.choices}) == 4, question.id


def test_the_longest_choice_is_not_the_key() -> None:
    everything = [q for split in SIZES for q in questions(split)]
    longest = [max(range(4), key=lambda i: len(q.choices[i])) == q.answer for q in everything]
    assert sum(longest) / len(everything) < 0.4


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_prose_is_long_enough(language: str, split: Split) -> None:
    text = read_text("bank", language, split=split)
    # A Chinese word has about 1.6 characters.
    words = len(re.findall(r"[一-鿿]", text)) / 1.6 if language == "zh" else len(text.split())
    assert words >= 1500


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_sentence_is_both_calibrated_and_measured_on(language: str) -> None:
    val, test = (
        {
            s.strip()
            for s in re.split(r"[.!?\u3002\uff01\uff1f]", read_text("bank", language, split=split))
        }
        for split in ("val", "test")
    )
    assert not {s for s in val & test if len(s) > 10}


def test_the_card_says_what_the_bank_is() -> None:
    card = (resources.files("lmerge.data") / "bank" / "README.md").read_text(encoding="utf-8")
    assert "smoke-test bank, not a benchmark" in card
