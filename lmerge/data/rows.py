"""Raw rows of questions from CSV files, JSONL files or the hub; `questions.py` checks them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple, Protocol

from lmerge.data.records import Split
from lmerge.files import one_line


class Readable(Protocol):
    """A file on disk or inside the package."""

    def read_bytes(self) -> bytes: ...


class Row(NamedTuple):
    """One question as it was found, not yet checked."""

    where: str
    """File and line, for error messages."""
    fields: Mapping[str, object]
    """Values under `subject`, `question`, `choices`, `answer`, and perhaps `id`, `language`,
    `split`."""


class HubLayout(NamedTuple):
    """How a dataset on the hub names its splits."""

    splits: dict[Split, str]
    config: str | None
    """The configuration to load; None where each language has one, named by its code."""


GLOBAL_MMLU = HubLayout({"dev": "dev", "test": "test"}, None)

HUB: dict[str, HubLayout] = {
    "cais/mmlu": HubLayout({"dev": "dev", "val": "validation", "test": "test"}, "all"),
    "CohereLabs/Global-MMLU": GLOBAL_MMLU,
    "CohereLabs/Global-MMLU-Lite": GLOBAL_MMLU,
}
"""Datasets on the hub that can be read; a row more is a dataset more."""


def csv_rows(folder: Path, split: Split) -> Iterator[Row]:
    """Yield the rows of `FOLDER/SPLIT/SUBJECT_SPLIT.csv`, subjects in alphabetical order.

    The `csv` module keeps every cell as text: pandas would turn the answer "None" into NaN.
    """
    for path in sorted((folder / split).glob(f"*_{split}.csv")):
        subject = path.name.removesuffix(f"_{split}.csv")
        records = _csv_records(path)
        if not records:
            raise ValueError(
                f"{path}: a file must hold at least one question, got none; remove it."
            )
        for number, (line, cells) in enumerate(records):
            where = f"{path}, line {line}"
            if len(cells) != 6:
                raise ValueError(
                    f"{where}: a row must have 6 columns (question, four choices, answer), got "
                    f"{len(cells)}: {show(cells)}; quote cells that hold commas."
                )
            yield Row(
                where,
                {
                    "id": f"{subject}/{split}/{number}",
                    "subject": subject,
                    "question": cells[0],
                    "choices": cells[1:5],
                    "answer": cells[5],
                    "split": split,
                },
            )


def jsonl_rows(file: Readable, *, split: str | None) -> Iterator[Row]:
    """Yield the rows of a JSONL file, one for each language of a line.

    A line is flat (`question`, `choices`, `answer`, `subject`, perhaps `id`, `language`, `split`)
    or parallel (`answer`, `subject`, perhaps `id`, `split`, and per language code an object with
    `q` and `choices`).

    Args:
        file: A UTF-8 file; empty lines are skipped.
        split: Split of the lines that name none; None makes such a line an error.
    """
    for number, line in enumerate(read_utf8(file).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        entry = parse_object(line, where)
        if entry.setdefault("split", split) is None:
            raise ValueError(
                f"{where}: `split` must be given, since the file's name is not dev, val or test "
                'with .jsonl; add "split": "val" to each line or rename the file.'
            )
        yield from _line_rows(entry, where)


def hub_rows(name: str, split: Split, languages: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a dataset in `HUB`; needs the network or the hub's local cache."""
    layout = HUB[name]
    if split not in layout.splits:
        raise ValueError(
            f"{name} has no split {split!r}, only {', '.join(layout.splits)}; choose another "
            "source of questions for this stage."
        )
    # A dataset of one configuration is English; `load_questions` reports the other languages.
    configs = {layout.config: "en"} if layout.config else {code: code for code in languages}
    for config, language in configs.items():
        dataset = _load_hub(name, config, layout.splits[split])
        yield from dataset_rows(dataset, f"{name} ({config})", split=split, language=language)


def dataset_rows(
    dataset: Iterable[Mapping[str, object]], where: str, *, split: Split, language: str
) -> Iterator[Row]:
    """Yield the rows of a dataset with the hub's columns.

    Columns are `question`, `subject`, `answer`, and either `choices` (cais/mmlu) or `option_a` to
    `option_d` (Global-MMLU, whose `sample_id` is kept).
    """
    for number, entry in enumerate(dataset):
        choices = entry.get("choices", [entry.get(f"option_{letter}") for letter in "abcd"])
        fields = {name: entry.get(name) for name in ("subject", "question", "answer")}
        fields |= {"choices": choices, "split": split, "language": language}
        if "sample_id" in entry:
            fields["id"] = entry["sample_id"]
        yield Row(f"{where}, {split} row {number}", fields)


def number_rows(rows: Iterable[Row]) -> Iterator[Row]:
    """Give each row without an id the id `subject/split/n`, n counting inside its language."""
    counters: dict[tuple[str, ...], Iterator[int]] = {}
    for where, fields in rows:
        key = tuple(str(fields.get(name)) for name in ("subject", "split", "language"))
        number = next(counters.setdefault(key, count()))
        yield Row(where, {"id": f"{key[0]}/{key[1]}/{number}", **fields})


def read_utf8(file: Readable) -> str:
    """Return the text of a UTF-8 file without a byte order mark."""
    content = file.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{file}, line {line}: text must be UTF-8, got byte 0x{content[error.start]:02x}; "
            "convert the file to UTF-8."
        ) from error


def parse_object(line: str, where: str) -> dict[str, object]:
    """Return the JSON object on one line."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", one_line(error))
        raise ValueError(
            f"{where}: a line must be a JSON object, got {show(line)} ({reason}); correct it."
        ) from error
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: a line must be a JSON object, got {show(entry)}; correct it.")
    return entry


def show(value: object) -> str:
    """Return `value` on one line of at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _csv_records(path: Path) -> list[tuple[int, list[str]]]:
    """Return each record with the line it starts on; a record may span lines."""
    # StringIO with newline="" keeps line ends inside quoted cells as they are.
    reader = csv.reader(io.StringIO(read_utf8(path), newline=""), strict=True)
    records, line = [], 1
    try:
        for cells in reader:
            if cells:
                records.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {line}: a row must be well-formed CSV, got {error}; correct the quotes."
        ) from error
    return records


def _line_rows(entry: dict[str, object], where: str) -> Iterator[Row]:
    if "question" in entry:
        yield Row(where, entry)
        return
    shared = {key: value for key, value in entry.items() if not isinstance(value, dict)}
    translations = {key: value for key, value in entry.items() if isinstance(value, dict)}
    if not translations:
        raise ValueError(
            f"{where}: a line must have `question`, or a language such as `en` with `q` and "
            f"`choices`, got {show(entry)}; add one."
        )
    for language, text in translations.items():
        fields = {"question": text.get("q"), "choices": text.get("choices"), "language": language}
        yield Row(f"{where} ({language})", {**shared, **fields})


def _load_hub(name: str, config: str, split: str) -> Iterable[Mapping[str, object]]:
    # Imported here because it takes a second that the other sources need not wait for.
    import datasets

    try:
        dataset: Iterable[Mapping[str, object]] = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{name}: configuration {config!r}, split {split!r} must be readable from the hub, got "
            f"{type(error).__name__}: {reason}; check the network, or use questions=bank or a "
            "local directory."
        ) from error
    return dataset
