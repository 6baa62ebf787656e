import json
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, tiny_model

from lmerge import transfer_cells
from lmerge.cli import main
from lmerge.data.mixing import held_blocks
from lmerge.data.records import IGNORE, TextBatch
from lmerge.files import read_json
from lmerge.information import InformationConfig
from lmerge.plan import Group
from lmerge.score import score_text
from lmerge.transfer import (
    MIXED,
    first_states,
    merged_model,
    mixed_texts,
    question_nats,
    raised,
    similar_groups,
)
from lmerge.transfer_data import DomainTexts, domain_texts, key_of, read_sides
from lmerge.transfer_study import RESULT, SCHEMA, run_transfer
from lmerge.transfer_table import summaries, transfer_rows

SIDES = {
    "extra_domains": None,
    "calibration_splits": ["val"],
    "eval_split": "val",
    "holdout": 0.5,
    "seed": 0,
}


def some_texts(**changes: object) -> dict[str, DomainTexts]:
    sides = read_sides("bank", ["medical", "math"], ["en", "es"], **SIDES)
    options = {
        "kept": {"medical": ["en", "es"], "math": ["en"]},
        "num_prompts": 4,
        "num_tokens": 512,
        "block_size": 64,
        "num_questions": 3,
        "max_length": 300,
        "seed": 0,
    }
    return domain_texts(sides, byte_tokenizer(), **{**options, **changes})


def test_no_question_is_on_both_sides_in_any_language() -> None:
    sides = read_sides("bank", ["medical", "all"], ["en", "es"], **SIDES)
    calibrated, measured = (set(map(key_of, side)) for side in sides[:2])
    assert calibrated
    assert measured
    assert not calibrated & measured


def test_another_split_is_measured_on_whole() -> None:
    sides = read_sides("bank", ["medical"], ["en"], **{**SIDES, "eval_split": "test"})
    assert {q.split for q in sides.calibration} == {"val"}
    assert {q.split for q in sides.measured} == {"test"}


def test_all_groups_calibrate_on_as_much_and_translations_measure_the_same_questions() -> None:
    texts = some_texts(num_tokens=64_000)
    assert list(texts) == ["medical/en", "medical/es", "math/en"]
    assert len({group.blocks_BT.shape for group in texts.values()}) == 1
    sides = read_sides("bank", ["medical"], ["en", "es"], **SIDES)
    first = {}
    for language in ("en", "es"):
        group = [q for q in sides.measured if q.language == language]
        rows = texts[f"medical/{language}"].questions
        found = [byte_tokenizer().decode(row) for row in rows]
        first[language] = [next(q.id for q in group if text.startswith(q.text)) for text in found]
    assert first["en"] == first["es"]


def test_the_mixed_text_holds_as_much_as_one_domain_and_something_of_each() -> None:
    texts = some_texts()
    mixed = mixed_texts(texts)
    assert mixed.blocks_BT.shape == texts["math/en"].blocks_BT.shape
    for group in texts.values():
        same = (mixed.blocks_BT[:, None] == group.blocks_BT[None]).all(dim=2).any(dim=1)
        assert same.any()


def test_too_little_text_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"^every domain must fill at least 2 blocks [^\n]*$"):
        some_texts(block_size=100_000, num_tokens=200_000)


def reference(model, texts: dict[str, DomainTexts]) -> dict[str, list[float]]:
    """The nats of each question, one at a time."""
    nats = {}
    for name, group in texts.items():
        nats[name] = []
        for row in group.questions:
            target = torch.cat([row[1:], torch.tensor([IGNORE])])
            batch = TextBatch(
                name=name, index_B=torch.arange(1), token_BT=row[None], target_BT=target[None]
            )
            nats[name].append(float(score_text(model, batch).sum()))
    return nats


def close(found: dict[str, list[float]], wanted: dict[str, list[float]]) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name] == pytest.approx(wanted[name], rel=1e-5)


@pytest.mark.parametrize("layer", [0, 2])
def test_the_nats_of_questions_from_any_layer_are_those_of_one_at_a_time(layer: int) -> None:
    model, texts = tiny_model(), some_texts()
    states, batches = first_states(model, texts, tokens_per_batch=512)
    close(question_nats(model, raised(model, states, layer), batches), reference(model, texts))


def test_a_merged_model_scores_from_its_block_as_it_does_as_a_whole() -> None:
    model, texts = tiny_model(), some_texts()
    states, batches = first_states(model, texts)
    states = raised(model, states, 1)
    prefix = states.blocks["math/en"]
    merged = merged_model(
        model, (Group(members=(1, 2), anchor=1),), prefix, held_blocks(len(prefix), 0.2)
    )
    found = question_nats(merged, states, batches)
    close(found, reference(merged, texts))
    assert found != question_nats(model, states, batches)


def test_a_measure_that_is_defined_nowhere_makes_no_plan() -> None:
    states = torch.randn(4, 1, 6).expand(4, 9, 6)
    with pytest.raises(ValueError, match=r"^`gaussian_nmi` must be defined for some [^\n]*$"):
        similar_groups(states, "gaussian_nmi", 1, InformationConfig())


def test_an_undefined_pair_is_never_the_most_alike() -> None:
    states = torch.randn(5, 9, 6, generator=torch.Generator().manual_seed(0))
    states[1] = states[0]  # the most alike pair
    config = InformationConfig(sigma=2.0)
    assert similar_groups(states, "gaussian_nmi_bounded", 1, config)[0].start == 0
    states[1] = states[1, :1]  # no map any more
    assert similar_groups(states, "gaussian_nmi_bounded", 1, config)[0].start == 2


def test_regret_is_the_distance_from_the_home_plan_and_0_for_equal_plans() -> None:
    low, high = (Group(members=(0, 1), anchor=0),), (Group(members=(1, 2), anchor=1),)
    plans = {("cka", 1, "a/en"): low, ("cka", 1, "b/en"): high, ("cka", 1, MIXED): low}
    tokens = {"a/en": [10.0, 10.0], "b/en": [20.0, 20.0]}
    source = {"a/en": [10.0, 30.0], "b/en": [20.0, 20.0]}
    worse = {"a/en": [20.0, 40.0], "b/en": [40.0, 40.0]}
    models = {(low, "a/en"): source, (high, "b/en"): worse}
    models |= {(low, MIXED): source, (high, MIXED): source}
    rows = transfer_rows(plans, models, source, tokens, refits=["own", "mixed"], seed=0)
    by_key = {(r.refit, r.plan_from, r.measured_on): r for r in rows}
    assert by_key["own", "b/en", "a/en"].increase.value == pytest.approx(1)
    assert by_key["own", "b/en", "a/en"].regret.value == pytest.approx(1)
    assert by_key["own", "a/en", "b/en"].regret.value == pytest.approx(-1)
    assert by_key["own", "a/en", "a/en"].regret is None
    own, mixed = summaries(rows, plans, models, tokens, seed=0)
    assert (own.num_plans, own.home, own.away) == pytest.approx((2, 0.5, 0.5))
    assert (mixed.regret, *mixed.interval) == (0, 0, 0)


@pytest.fixture
def options(tiny_dir: Path, tmp_path: Path) -> dict[str, object]:
    return {
        "source": str(tiny_dir),
        "out_dir": tmp_path / "out",
        "domains": ["medical", "math"],
        "rules": ["angular", "block_repaired"],
        "num_removed": [1],
        "num_prompts": 6,
        "num_calibration_tokens": 512,
        "num_eval_questions": 3,
    }


def test_the_command_leaves_tables_and_a_figure_and_goes_on_where_it_ended(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, done = options["out_dir"], []
    assert isinstance(out, Path)

    def stop(*args: object) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(args)
        return merged_model(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(transfer_cells, "merged_model", stop)
        with pytest.raises(KeyboardInterrupt):
            run_transfer(**options)  # type: ignore[arg-type]
    cells = {p.name: p.stat().st_mtime_ns for p in (out / "cells").iterdir()}
    assert len([name for name in cells if name.startswith("model")]) == 1
    run_transfer(**options)  # type: ignore[arg-type]
    assert (
        cells.items() <= {p.name: p.stat().st_mtime_ns for p in (out / "cells").iterdir()}.items()
    )
    data = read_json(out / RESULT, schema=SCHEMA)
    assert len(data["rows"]) == 2 * 2 * (2 + 3)
    assert {line["refit"] for line in data["summary"]} == {"own", "mixed"}
    assert (out / "transfer.png").stat().st_size > 1000
    assert "| plan made on | block |" in (out / "transfer.md").read_text()


def test_cells_of_other_settings_are_refused_unless_overwritten(options: dict[str, object]) -> None:
    small = {**options, "rules": ["angular"]}
    run_transfer(**small)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^`out_dir` must hold cells of the same [^\n]*$"):
        run_transfer(**{**small, "seed": 1})  # type: ignore[arg-type]
    run_transfer(**{**small, "seed": 1}, overwrite=True)  # type: ignore[arg-type]
    settings = json.loads((small["out_dir"] / "settings.json").read_text())  # type: ignore[operator]
    assert settings["settings"]["seed"] == 1


def test_a_rule_is_added_without_computing_the_others_again(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_transfer(**{**options, "rules": ["block_repaired"]})  # type: ignore[arg-type]
    monkeypatch.setattr(transfer_cells, "repaired_blocks_of", None)
    run_transfer(**options)  # type: ignore[arg-type]
    data = read_json(options["out_dir"] / RESULT, schema=SCHEMA)  # type: ignore[operator]
    assert {row["rule"] for row in data["rows"]} == {"angular", "block_repaired"}


def test_a_folder_of_something_else_is_never_touched(options: dict[str, object]) -> None:
    out = options["out_dir"]
    assert isinstance(out, Path)
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"^`out_dir` must be free or hold [^\n]*$"):
        run_transfer(**options, overwrite=True)  # type: ignore[arg-type]
    assert (out / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rules", []),
        ("rules", ["tail"]),
        ("refits", ["all"]),
        ("domains", ["math"]),
        ("num_removed", []),
        ("num_removed", [0]),
        ("num_removed", [4]),
        ("holdout", 1.0),
        ("calibration_splits", ["test"]),
        ("num_eval_questions", 1),
        ("num_calibration_tokens", 100),
        ("translated", ["cs"]),
    ],
)
def test_a_bad_option_is_refused_by_its_name(
    options: dict[str, object], name: str, value: object
) -> None:
    with pytest.raises(ValueError, match=rf"^`{name}` must [^\n]*$"):
        run_transfer(**{**options, name: value})  # type: ignore[arg-type]
    assert not options["out_dir"].exists()  # type: ignore[attr-defined]


def test_the_test_split_is_never_calibrated_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["transfer", "--calibration_splits", "[test]"])
    assert stop.value.code == 2
    assert "calibration_splits" in capsys.readouterr().err
