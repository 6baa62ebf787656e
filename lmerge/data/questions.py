"""Question records from the bundled bank, MMLU's CSV files, JSONL files or the hub."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import cast, get_args

from lmerge.data.records import LETTERS, Question, Split
from lmerge.data.rows import HUB, Row, csv_rows, hub_rows, jsonl_rows, number_rows, show

logger = logging.getLogger(__name__)

SPLITS: tuple[Split, ...] = get_args(Split)

_SUBJECTS = {
    "medical": "clinical_knowledge professional_medicine",
    "legal": "professional_law international_law",
    "math": "high_school_mathematics college_mathematics",
    "cs": "computer_security machine_learning",
    "humanities": "world_religions philosophy",
    "mmlu_stem": """
        abstract_algebra astronomy college_biology college_chemistry college_computer_science
        college_mathematics college_physics computer_security conceptual_physics
        electrical_engineering elementary_mathematics high_school_biology high_school_chemistry
        high_school_computer_science high_school_mathematics high_school_physics
        high_school_statistics machine_learning""",
    "mmlu_humanities": """
        formal_logic high_school_european_history high_school_us_history high_school_world_history
        international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy
        prehistory professional_law world_religions""",
    "mmlu_social_sciences": """
        econometrics high_school_geography high_school_government_and_politics
        high_school_macroeconomics high_school_microeconomics high_school_psychology
        human_sexuality professional_psychology public_relations security_studies sociology
        us_foreign_policy""",
    "mmlu_other": """
        anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging
        management marketing medical_genetics miscellaneous nutrition professional_accounting
        professional_medicine virology""",
}

DOMAINS: dict[str, tuple[str, ...]] = {
    name: tuple(text.split()) for name, text in _SUBJECTS.items()
}
"""Domain -> MMLU subjects: the five of the layer-merging study, then the four categories of
Hendrycks et al. (arXiv:2009.03300; lm-eval files anatomy under stem), then everything."""

DOMAINS["all"] = tuple(
    sorted(subject for name, row in DOMAINS.items() if name.startswith("mmlu_") for subject in row)
)


def load_questions(source: str, split: Split, languages: Sequence[str] = ("en",)) -> list[Question]:
    """Read and check the questions of one split, language by language, in the order of the file.

    Args:
        source: `bank` (bundled), a directory with `{dev,val,test}/SUBJECT_{split}.csv` in MMLU's
            layout (English), a directory with `{dev,val,test}.jsonl`, one `.jsonl` file, or a
            dataset on the hub (a key of `rows.HUB`). In a single file each line names its `split`;
            only in a file called dev.jsonl, val.jsonl or test.jsonl may it be left out. The forms
            of a line are in `rows.jsonl_rows`.
        split: The split to return; files of other splits are not opened.
        languages: ISO 639-1 codes. A question that lacks a language is left out of it.

    Raises:
        ValueError: One line with file, line, rule, value and remedy.
    """
    rows = [row for row in _source_rows(source, split, languages) if _in_split(row, split)]
    if not rows:
        raise ValueError(
            f"{source}: split {split!r} must hold at least one question, got none; add some, or "
            "choose another source of questions."
        )
    by_language: dict[str, list[Row]] = {}
    for row in rows:
        by_language.setdefault(str(row.fields.get("language", "en")), []).append(row)
    for language in languages:
        if language not in by_language:
            known = " ".join(", ".join(sorted(by_language)).split())  # one line, whatever they are
            raise ValueError(
                f"{source}: `languages` must be among {known} for split {split!r}, got "
                f"{language!r}; drop it or choose another source of questions."
            )
    return [
        question
        for language in dict.fromkeys(languages)
        for question in _unique_questions(by_language[language])
    ]


def resolve_domains(
    names: Sequence[str],
    extra: Mapping[str, Sequence[str]] | None,
    available: set[str],
) -> dict[str, tuple[str, ...]]:
    """Return the subjects of each domain that are present.

    Args:
        names: Rows of `DOMAINS` or of `extra`, or subjects; `all` is every subject present.
        extra: The user's own domains; may not rename a row of `DOMAINS`.
        available: Subjects that the questions cover.

    Raises:
        ValueError: One line on an unknown name, or a domain without any question.
    """
    extra = extra or {}
    _check_extra(extra, available)
    known = {*DOMAINS["all"], *available}
    table: dict[str, tuple[str, ...]] = {subject: (subject,) for subject in known}
    table |= {name: tuple(subjects) for name, subjects in extra.items()}
    table |= DOMAINS | {"all": tuple(sorted(available))}
    if not names:
        raise ValueError("`domains` must name at least one domain, got none; try domains=[all].")
    for name in names:
        if name not in table:
            hint = _close_matches(name, table) or f"one of {', '.join(DOMAINS)}, or a subject"
            raise ValueError(f"`domains` must hold known names, got {name!r}; did you mean {hint}?")
    return {name: _present(name, table[name], available) for name in names}


def fingerprint(questions: Iterable[Question]) -> str:
    """Return 16 hex digits of SHA-256 over all fields, in order."""
    digest = hashlib.sha256()
    for q in questions:
        fields = [q.id, q.subject, q.split, q.language, q.text, *q.choices, q.answer]
        digest.update(json.dumps(fields, ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()[:16]


def _source_rows(source: str, split: Split, languages: Sequence[str]) -> Iterator[Row]:
    path = Path(source)
    if source == "bank":
        return jsonl_rows(resources.files("lmerge.data") / "bank" / f"{split}.jsonl", split=split)
    if path.is_dir():
        return _directory_rows(path, split)
    if path.is_file() and path.suffix == ".jsonl":
        return jsonl_rows(path, split=path.stem if path.stem in SPLITS else None)
    if source in HUB:
        return hub_rows(source, split, languages)
    raise ValueError(
        f"`questions` must be bank, an existing directory, an existing .jsonl file, or one of "
        f"{', '.join(HUB)}, got {source!r}; check the path."
    )


def _directory_rows(folder: Path, split: Split) -> Iterator[Row]:
    if (folder / f"{split}.jsonl").is_file():
        return jsonl_rows(folder / f"{split}.jsonl", split=split)
    if any((folder / split).glob(f"*_{split}.csv")):
        return csv_rows(folder, split)
    found = [name for name in SPLITS if list(folder.glob(f"{name}.jsonl"))]
    found += [name for name in SPLITS if list(folder.glob(f"{name}/*_{name}.csv"))]
    raise ValueError(
        f"{folder}: split {split!r} must be in {split}.jsonl or in {split}/SUBJECT_{split}.csv, "
        f"got {', '.join(found) or 'none of the splits'}; add it."
    )


def _in_split(row: Row, split: Split) -> bool:
    found = row.fields.get("split")
    if found not in SPLITS:
        raise ValueError(
            f"{row.where}: `split` must be dev, val or test, got {show(found)}; correct it."
        )
    return found == split


def _unique_questions(rows: Iterable[Row]) -> Iterator[Question]:
    first: dict[str, str] = {}
    for row in number_rows(rows):
        question = _question(row)
        if question.id in first:
            raise ValueError(
                f"{row.where}: `id` must be unique inside a split and language, got "
                f"{show(question.id)}, which is taken by {first[question.id]}; rename one."
            )
        first[question.id] = row.where
        yield question


def _question(row: Row) -> Question:
    """Check a row and return its record."""
    fields = row.fields
    return Question(
        id=_text(row, "id", fields.get("id")),
        subject=_text(row, "subject", fields.get("subject")),
        split=cast(Split, fields["split"]),
        language=_text(row, "language", fields.get("language", "en")),
        text=_text(row, "question", fields.get("question")),
        choices=_choices(row),
        answer=_answer(row),
    )


def _text(row: Row, name: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(
            f"{row.where}: `{name}` must be a text that is not empty, got {show(value)}; fill it "
            "in or remove the question."
        )
    return value


def _choices(row: Row) -> tuple[str, str, str, str]:
    value = row.fields.get("choices")
    if not isinstance(value, list | tuple) or len(value) != 4:
        raise ValueError(
            f"{row.where}: `choices` must be a list of 4 texts, got {show(value)}; correct it or "
            "remove the question."
        )
    first, second, third, fourth = (_text(row, "choices", choice) for choice in value)
    return first, second, third, fourth


def _answer(row: Row) -> int:
    value = row.fields.get("answer")
    if isinstance(value, str) and value in LETTERS:
        return LETTERS.index(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(LETTERS):
        return value
    raise ValueError(
        f"{row.where}: `answer` must be one of {', '.join(LETTERS)} or 0 to 3, got {show(value)}; "
        "correct it."
    )


def _check_extra(extra: Mapping[str, Sequence[str]], available: set[str]) -> None:
    known = {*DOMAINS["all"], *available}
    for name, subjects in extra.items():
        if name in DOMAINS or name in known:
            raise ValueError(
                f"`extra_domains` must not redefine a domain or subject, got {name!r}; rename it."
            )
        for subject in subjects:
            if subject not in known:
                hint = _close_matches(subject, known) or "a subject of the questions"
                raise ValueError(
                    f"`extra_domains.{name}` must hold subjects, got {subject!r}; did you mean "
                    f"{hint}?"
                )


def _close_matches(name: str, known: Iterable[str]) -> str:
    return " or ".join(difflib.get_close_matches(name, list(known)))


def _present(name: str, subjects: tuple[str, ...], available: set[str]) -> tuple[str, ...]:
    present = tuple(subject for subject in subjects if subject in available)
    if not present:
        listed = ", ".join(subjects[:4]) + (", ..." if len(subjects) > 4 else "")
        raise ValueError(
            f"domain {name!r} must have questions in the chosen languages on one of {listed}, got "
            "none; drop it from `domains`, or choose other languages or questions."
        )
    if len(present) < len(subjects):
        logger.info("domain %s: %d of %d subjects present", name, len(present), len(subjects))
    return present
