import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import datasets
import pytest

from lmerge.data.questions import (
    DOMAINS,
    SPLITS,
    fingerprint,
    load_questions,
    resolve_domains,
)
from lmerge.data.records import Question, Split
from lmerge.data.rows import HUB, dataset_rows, number_rows

STUDY = ["medical", "legal", "math", "cs", "humanities"]

PARALLEL = {
    "id": "art/val/0",
    "subject": "art",
    "answer": "B",
    "en": {"q": "Who?", "choices": ["a", "b", "c", "d"]},
    "es": {"q": "¿Quién?", "choices": ["a", "b", "c", "e"]},
}
FLAT = {"subject": "art", "question": "Who?", "choices": ["a", "b", "c", "d"], "answer": "B"}


def write_jsonl(file: Path, *lines: object) -> str:
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return str(file)


def write_csv(folder: Path, content: str | bytes, subject: str = "art", split: str = "val") -> str:
    file = folder / split / f"{subject}_{split}.csv"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


def error_of(source: str, split: Split = "val", languages: tuple[str, ...] = ("en",)) -> str:
    with pytest.raises(ValueError, match=r".") as info:
        load_questions(source, split, languages)
    return str(info.value)


# Real data.


@pytest.mark.parametrize(("split", "number"), [("dev", 285), ("val", 1531), ("test", 14042)])
def test_mmlu_csv_files_read_in_full(shared_dir: Path, split: Split, number: int) -> None:
    questions = load_questions(str(shared_dir / "data" / "mmlu"), split)
    assert (len(questions), len({q.subject for q in questions})) == (number, 57)


def test_the_answer_none_stays_text(shared_dir: Path) -> None:
    questions = load_questions(str(shared_dir / "data" / "mmlu"), "test")
    assert sum(choice == "None" for q in questions for choice in q.choices) == 10


def test_csv_and_parallel_jsonl_hold_the_same_mmlu_question(shared_dir: Path) -> None:
    folders = [str(shared_dir / "data" / name) for name in ("mmlu", "mmlu_multilingual")]
    by_text = [{(q.subject, q.text, q.answer) for q in load_questions(f, "val")} for f in folders]
    assert len(by_text[0] & by_text[1]) > 1000


def test_a_language_missing_on_some_lines_leaves_those_questions_out(shared_dir: Path) -> None:
    source = str(shared_dir / "data" / "mmlu_multilingual")
    counts = Counter(q.language for q in load_questions(source, "dev", ["en", "hi"]))
    assert counts == {"en": 257, "hi": 224}


@pytest.mark.parametrize("split", SPLITS)
def test_the_bank_has_questions_in_every_domain_of_the_study(split: Split) -> None:
    available = {question.subject for question in load_questions("bank", split)}
    assert all(resolve_domains(STUDY, None, available).values())


def test_the_splits_of_the_bank_share_no_question() -> None:
    texts = [{q.text for q in load_questions("bank", split)} for split in SPLITS]
    assert len(set.union(*texts)) == sum(map(len, texts))


# What the readers accept.


def test_csv_cells_may_hold_commas_quotes_and_line_breaks(tmp_path: Path) -> None:
    source = write_csv(tmp_path, '"a, ""b""\nc",1,2,3,4,D\n')
    assert load_questions(source, "val") == [
        Question(
            id="art/val/0",
            subject="art",
            split="val",
            language="en",
            text='a, "b"\nc',
            choices=("1", "2", "3", "4"),
            answer=3,
        )
    ]


def test_questions_come_language_by_language(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "val.jsonl", PARALLEL, {**PARALLEL, "id": "art/val/1"})
    found = [(q.language, q.id) for q in load_questions(source, "val", ["es", "en"])]
    assert found == [(code, f"art/val/{i}") for code in ("es", "en") for i in (0, 1)]


def test_a_directory_of_jsonl_reads_one_file_a_split(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "dev.jsonl", {**PARALLEL, "id": "other"})
    write_jsonl(tmp_path / "val.jsonl", PARALLEL)
    assert [q.id for q in load_questions(str(tmp_path), "dev")] == ["other"]


def test_one_file_may_hold_all_splits(tmp_path: Path) -> None:
    lines = [{**FLAT, "split": split, "id": split} for split in SPLITS]
    source = write_jsonl(tmp_path / "mine.jsonl", *lines)
    assert [load_questions(source, split)[0].id for split in SPLITS] == list(SPLITS)


def test_flat_lines_without_an_id_are_numbered_in_their_subject(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "val.jsonl", FLAT, {**FLAT, "subject": "law"}, FLAT)
    ids = [question.id for question in load_questions(source, "val")]
    assert ids == ["art/val/0", "law/val/0", "art/val/1"]


@pytest.mark.parametrize("answer", ["C", 2])
def test_an_answer_is_a_letter_or_a_number(tmp_path: Path, answer: object) -> None:
    source = write_jsonl(tmp_path / "val.jsonl", {**FLAT, "answer": answer})
    assert load_questions(source, "val")[0].answer == 2


def test_equal_choices_are_allowed(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "val.jsonl", {**FLAT, "choices": ["a", "a", "b", "b"]})
    assert load_questions(source, "val")[0].choices == ("a", "a", "b", "b")


# The hub, by its columns; the network is never needed.


def test_rows_of_cais_mmlu_become_questions() -> None:
    dataset = datasets.Dataset.from_dict(
        {"question": ["Q"], "subject": ["art"], "choices": [["a", "b", "c", "d"]], "answer": [2]},
        features=datasets.Features(
            {
                "question": datasets.Value("string"),
                "subject": datasets.Value("string"),
                "choices": datasets.List(datasets.Value("string")),
                "answer": datasets.ClassLabel(names=["A", "B", "C", "D"]),
            }
        ),
    )
    (row,) = number_rows(dataset_rows(dataset, "cais/mmlu", split="val", language="en"))
    assert row.fields == {
        "id": "art/val/0",
        "subject": "art",
        "question": "Q",
        "choices": ["a", "b", "c", "d"],
        "answer": 2,
        "split": "val",
        "language": "en",
    }


def global_mmlu() -> datasets.Dataset:
    columns = {"sample_id": ["art/dev/7"], "subject": ["art"], "question": ["Q"], "answer": ["D"]}
    return datasets.Dataset.from_dict(columns | {f"option_{x}": [x] for x in "abcd"})


def test_rows_of_global_mmlu_keep_their_id() -> None:
    (row,) = dataset_rows(global_mmlu(), "x", split="dev", language="sw")
    assert row.fields["id"] == "art/dev/7"


def test_rows_of_global_mmlu_gather_their_options() -> None:
    (row,) = dataset_rows(global_mmlu(), "x", split="dev", language="sw")
    assert row.fields["choices"] == ["a", "b", "c", "d"]


def test_a_hub_dataset_loads_each_language_as_a_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def load_dataset(name: str, config: str, *, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        return global_mmlu()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    questions = load_questions("CohereLabs/Global-MMLU", "dev", ["en", "sw"])
    assert [q.language for q in questions] == [config for _, config, _ in asked] == ["en", "sw"]


def test_a_split_that_the_hub_lacks_is_never_invented() -> None:
    assert "has no split 'val', only dev, test" in error_of("CohereLabs/Global-MMLU")


@pytest.mark.parametrize("name", HUB)
def test_an_unreachable_hub_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    message = error_of(name, "test")
    assert re.search(rf"^{name}: .* must be readable from the hub, got .*network.*$", message)


# What the readers reject, each in one line with file, line, rule, value and remedy.

BROKEN_LINES = {
    "answer": ({**FLAT, "answer": "E"}, "`answer` must be one of A, B, C, D or 0 to 3, got 'E'"),
    "number": ({**FLAT, "answer": 4}, "`answer` must be one of A, B, C, D or 0 to 3, got 4"),
    "bool": ({**FLAT, "answer": True}, "`answer` must be one of A, B, C, D or 0 to 3, got True"),
    "three": ({**FLAT, "choices": ["a", "b", "c"]}, "`choices` must be a list of 4 texts, got ['a"),
    "string": ({**FLAT, "choices": "abcd"}, "`choices` must be a list of 4 texts, got 'abcd'"),
    "blank": ({**FLAT, "choices": ["a", "b", "c", ""]}, "`choices` must be a text that is not emp"),
    "question": ({**FLAT, "question": " "}, "`question` must be a text that is not empty, got ' '"),
    "subject": ({**FLAT, "subject": None}, "`subject` must be a text that is not empty, got None"),
    "split": ({**FLAT, "split": "train"}, "`split` must be dev, val or test, got 'train'"),
    "keys": ({"subject": "art"}, "a line must have `question`, or a language such as `en`"),
    "array": (["Who?"], "a line must be a JSON object, got ['Who?']"),
}


@pytest.mark.parametrize("name", BROKEN_LINES)
def test_a_broken_jsonl_line_is_named(name: str, tmp_path: Path) -> None:
    line, reason = BROKEN_LINES[name]
    source = write_jsonl(tmp_path / "val.jsonl", {**FLAT, "id": "first"}, line)
    assert error_of(source).startswith(f"{source}, line 2: {reason}")


@pytest.mark.parametrize("name", BROKEN_LINES)
def test_an_error_is_one_line_that_ends_with_a_remedy(name: str, tmp_path: Path) -> None:
    message = error_of(write_jsonl(tmp_path / "val.jsonl", BROKEN_LINES[name][0]))
    assert re.fullmatch(r".*[;?] .*\w\.", message)


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "val.jsonl").write_text('\n{"subject": \n')
    assert "val.jsonl, line 2: a line must be a JSON object" in error_of(str(tmp_path))


def test_a_broken_translation_names_its_language(tmp_path: Path) -> None:
    line = {**PARALLEL, "es": {"q": "", "choices": ["a", "b", "c", "d"]}}
    source = write_jsonl(tmp_path / "val.jsonl", line)
    assert "line 1 (es): `question` must be" in error_of(source, languages=("es",))


def test_a_single_file_must_name_the_splits(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "mine.jsonl", FLAT)
    assert f"{source}, line 1: `split` must be given" in error_of(source)


@pytest.mark.parametrize("row", ["a,b,c,d,A", "a,b,c,d,e,A,extra", "a"])
def test_a_csv_row_with_other_than_six_columns_is_named(tmp_path: Path, row: str) -> None:
    source = write_csv(tmp_path, f'"q\nr",a,b,c,d,A\n{row}\n')
    assert "art_val.csv, line 3: a row must have 6 columns" in error_of(source)


def test_broken_csv_quotes_are_named(tmp_path: Path) -> None:
    source = write_csv(tmp_path, 'q,a,b,c,d,A\n"q,a,b,c,d,A\n')
    assert "art_val.csv, line 2: a row must be well-formed CSV" in error_of(source)


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    source = write_csv(tmp_path, "q,a,b,c,d,A\nété,a,b,c,d,A\n".encode("latin-1"))
    assert "art_val.csv, line 2: text must be UTF-8, got byte 0xe9" in error_of(source)


def test_a_byte_order_mark_is_no_part_of_the_question(tmp_path: Path) -> None:
    source = write_csv(tmp_path, "q,a,b,c,d,A\n".encode("utf-8-sig"))
    assert load_questions(source, "val")[0].text == "q"


def test_an_empty_csv_file_is_named(tmp_path: Path) -> None:
    source = write_csv(tmp_path, "")
    assert "art_val.csv: a file must hold at least one question" in error_of(source)


def test_an_empty_split_is_an_error(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "mine.jsonl", {**FLAT, "split": "dev"})
    assert "split 'val' must hold at least one question, got none" in error_of(source)


def test_a_directory_without_the_split_names_those_it_has(tmp_path: Path) -> None:
    source = write_csv(tmp_path, "q,a,b,c,d,A\n", split="dev")
    assert "split 'val' must be in val.jsonl or in val/SUBJECT_val.csv, got dev" in error_of(source)


def test_an_id_twice_in_one_language_is_an_error(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "val.jsonl", PARALLEL, PARALLEL)
    assert "line 2 (en): `id` must be unique" in error_of(source)


def test_an_unknown_language_lists_the_available_ones(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "val.jsonl", PARALLEL)
    assert "`languages` must be among en, es for split 'val', got 'fr'" in error_of(
        source, languages=("fr",)
    )


def test_languages_that_are_no_words_are_listed_on_one_line(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "val.jsonl", {"\u001e": {}})
    assert len(error_of(source).splitlines()) == 1


def test_an_unknown_source_lists_what_is_possible() -> None:
    assert "must be bank, an existing directory, an existing .jsonl file" in error_of("bnak")


# Domains.


def test_the_four_categories_hold_every_subject_once() -> None:
    rows = [row for name, row in DOMAINS.items() if name.startswith("mmlu_")]
    assert sorted(subject for row in rows for subject in row) == list(DOMAINS["all"])


def test_the_domains_cover_the_real_subjects(shared_dir: Path) -> None:
    questions = load_questions(str(shared_dir / "data" / "mmlu"), "dev")
    assert {q.subject for q in questions} == set(DOMAINS["all"])


def test_a_domain_keeps_its_present_subjects() -> None:
    available = {"philosophy", "anatomy"}
    assert resolve_domains(["humanities"], None, available) == {"humanities": ("philosophy",)}


def test_a_subject_is_a_domain() -> None:
    assert resolve_domains(["art"], None, {"art"}) == {"art": ("art",)}


def test_all_is_every_subject_present() -> None:
    assert resolve_domains(["all"], None, {"art", "anatomy"}) == {"all": ("anatomy", "art")}


def test_a_user_may_add_a_domain() -> None:
    extra = {"both": ["art", "anatomy"]}
    assert resolve_domains(["both"], extra, {"art", "anatomy"}) == {"both": ("art", "anatomy")}


@pytest.mark.parametrize(
    ("names", "extra", "reason"),
    [
        (["medcal"], None, "got 'medcal'; did you mean medical?"),
        (["zzz"], None, "did you mean one of medical, legal"),
        (
            ["legal"],
            None,
            "domain 'legal' must have questions in the chosen languages on one of pr",
        ),
        ([], None, "`domains` must name at least one"),
        (["all"], {"medical": ["art"]}, "`extra_domains` must not redefine"),
        (["all"], {"new": ["anatmy"]}, "got 'anatmy'; did you mean anatomy?"),
    ],
)
def test_an_impossible_domain_is_an_error(
    names: list[str], extra: dict[str, list[str]] | None, reason: str
) -> None:
    with pytest.raises(ValueError, match=r".") as info:
        resolve_domains(names, extra, {"art", "anatomy"})
    assert reason in str(info.value)


def test_a_partly_present_domain_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lmerge"):
        resolve_domains(["medical"], None, {"clinical_knowledge"})
    assert caplog.messages == ["domain medical: 1 of 2 subjects present"]


# Fingerprints.


def test_equal_questions_have_equal_fingerprints() -> None:
    assert fingerprint(load_questions("bank", "val")) == fingerprint(load_questions("bank", "val"))


@pytest.mark.parametrize(
    "change",
    [
        {"id": "x"},
        {"subject": "x"},
        {"split": "test"},
        {"language": "x"},
        {"text": "x"},
        {"choices": ("a", "b", "d", "c")},
        {"answer": 3},
    ],
)
def test_a_fingerprint_depends_on_every_field(change: dict[str, object]) -> None:
    question = Question(
        id="i",
        subject="s",
        split="val",
        language="en",
        text="t",
        choices=("a", "b", "c", "d"),
        answer=0,
    )
    assert fingerprint([question]) != fingerprint([dataclasses.replace(question, **change)])


def test_a_fingerprint_depends_on_the_order() -> None:
    questions = load_questions("bank", "dev")
    assert fingerprint(questions) != fingerprint(questions[::-1])
