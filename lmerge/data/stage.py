"""What a stage reads: questions of its splits and texts, checked against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lmerge.data.prompts import Examples, check_shots
from lmerge.data.questions import fingerprint, load_questions, resolve_domains
from lmerge.data.records import Question, Split
from lmerge.data.text import file_names, read_texts, split_slice, text_fingerprint
from lmerge.data.words import read_last_words

EVALUATED: dict[str, Split] = {"fit": "val", "validate": "val", "test": "test"}
"""Stage -> the split it reads beside dev. No other is opened, so that nothing can leak."""


@dataclass(frozen=True, kw_only=True)
class StageData:
    """Questions and texts of one stage."""

    stage: str
    """A key of `EVALUATED`."""
    questions: list[Question]
    """Questions of the stage's split, in the order of languages and of the source."""
    examples: Examples
    """The dev questions that the prompts show, by (subject, language)."""
    domain_subjects: dict[str, tuple[str, ...]]
    """Domain -> those of its subjects that the questions cover."""
    calibration_texts: dict[str, str]
    """Prose to calibrate on, by name; none in `test`."""
    eval_texts: dict[str, str]
    """Prose to measure on, by name."""
    last_words: dict[str, list[str]]
    """Texts whose last word is to be guessed, by name of their file."""

    def fingerprints(self) -> dict[str, str]:
        """Return the fingerprint of each split and text, such as `val` and `eval/en`."""
        examples = [question for group in self.examples.values() for question in group]
        found = {"dev": fingerprint(examples)} if examples else {}
        found[EVALUATED[self.stage]] = fingerprint(self.questions)
        for use, texts in (("calibration", self.calibration_texts), ("eval", self.eval_texts)):
            found |= {f"{use}/{name}": text_fingerprint(text) for name, text in texts.items()}
        for name, lines in self.last_words.items():
            found[f"last_word/{name}"] = text_fingerprint("\n".join(lines))
        return found


def read_stage(
    stage: str,
    *,
    questions: str,
    domains: Sequence[str],
    extra_domains: Mapping[str, Sequence[str]] | None,
    languages: Sequence[str],
    num_shots: int,
    max_questions: int | None,
    calibration_text: str | Sequence[str] | None,
    eval_text: str | Sequence[str] | None,
    last_word: str | Sequence[str] | None,
) -> StageData:
    """Read and check what a stage needs; the arguments are those of `MMLUDataModule`.

    Raises:
        ValueError: One line on an unknown stage, domain or language, an empty split, too few
            examples, or a text that is missing or is to be both calibrated and measured on.
    """
    if stage not in EVALUATED:
        raise ValueError(
            f"`stage` must be one of {', '.join(EVALUATED)}, got {stage!r}; use one of these."
        )
    split = EVALUATED[stage]
    found = load_questions(questions, split, languages)
    available = {question.subject for question in found}
    domain_subjects = resolve_domains(domains, extra_domains, available)
    chosen = _select(found, domain_subjects, languages)
    kept = first_questions(chosen, max_questions)
    examples = _read_examples(questions, kept, languages, num_shots)
    check_shots(kept, examples, num_shots)
    calibration_texts = read_texts(
        calibration_text if split == "val" else None, languages, split="val"
    )
    eval_texts = read_texts(eval_text, languages, split="test")
    _check_disjoint(calibration_texts, eval_texts)
    _check_parts(calibration_text, eval_text)
    return StageData(
        stage=stage,
        questions=kept,
        examples=examples,
        domain_subjects=domain_subjects,
        calibration_texts=calibration_texts,
        eval_texts=eval_texts,
        last_words=read_last_words(last_word),
    )


def first_questions(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """Return the first `limit` questions of each subject and language; all where it is None."""
    counts: dict[tuple[str, str], int] = {}
    kept = []
    for question in questions:
        key = (question.subject, question.language)
        counts[key] = counts.get(key, 0) + 1
        if limit is None or counts[key] <= limit:
            kept.append(question)
    return kept


def _select(
    questions: Sequence[Question],
    domain_subjects: Mapping[str, Sequence[str]],
    languages: Sequence[str],
) -> list[Question]:
    """Return the questions of the domains; some domains may lack some of the languages."""
    wanted = {subject for subjects in domain_subjects.values() for subject in subjects}
    chosen = [question for question in questions if question.subject in wanted]
    present = {question.language for question in chosen}
    for language in languages:
        if language not in present:
            raise ValueError(
                f"`languages` must have questions in {', '.join(domain_subjects)}, got "
                f"{language!r} without any; drop it or add domains."
            )
    return chosen


def _read_examples(
    source: str, questions: Sequence[Question], languages: Sequence[str], num_shots: int
) -> dict[tuple[str, str], list[Question]]:
    if num_shots == 0:
        return {}
    examples: dict[tuple[str, str], list[Question]] = {
        (question.subject, question.language): [] for question in questions
    }
    for question in first_questions(load_questions(source, "dev", languages), num_shots):
        if (question.subject, question.language) in examples:
            examples[question.subject, question.language].append(question)
    return examples


def _check_disjoint(calibration: Mapping[str, str], evaluation: Mapping[str, str]) -> None:
    for name, text in evaluation.items():
        if text in calibration.values():
            raise ValueError(
                f"`eval_text` must not be calibrated on, got the text {name!r} for "
                "`calibration_text` too; give another file for one of them."
            )


def _check_parts(
    calibration: str | Sequence[str] | None, evaluation: str | Sequence[str] | None
) -> None:
    """Raise ValueError when parts of one file overlap that are calibrated and measured on."""
    for ours in file_names(calibration):
        for theirs in file_names(evaluation):
            (file, start, stop), (other, low, high) = split_slice(ours), split_slice(theirs)
            if file == other != "bank" and start < high and low < stop:
                raise ValueError(
                    f"`eval_text` must not be calibrated on, got {theirs} while "
                    f"`calibration_text` is {ours}; let the parts not overlap."
                )
