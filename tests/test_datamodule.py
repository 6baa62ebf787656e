import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lmerge.data.mixing import mix_blocks
from lmerge.data.module import MMLUDataModule
from lmerge.data.records import ChoiceBatch, TextBatch

STAGES = ("fit", "validate", "test")

# The loaders of the data module serve tensors that exist already: workers would not help.
IGNORE_WORKERS = pytest.mark.filterwarnings("ignore:.*does not have many workers")
# Repeated samples are dropped by the metrics; Python 3.12 warns of any fork beside threads.
IGNORE_REPEATS = pytest.mark.filterwarnings("ignore:Using `DistributedSampler`")
IGNORE_FORK = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


@pytest.fixture
def small(tiny_dir: Path) -> dict[str, Any]:
    """Options of a data module that is quick to set up."""
    return {
        "source": str(tiny_dir),
        "num_shots": 1,
        "max_questions": 4,
        "block_size": 64,
        "num_calibration_tokens": 64 * 20,
        "eval_tokens": 1024,
    }


def module(stage: str, options: dict[str, Any], **changes: object) -> MMLUDataModule:
    data = MMLUDataModule(**{**options, **changes})
    data.setup(stage)
    return data


def folder_of(tmp_path: Path, **contents: str) -> str:
    """Write {split}.jsonl files: a number of questions, or broken text."""
    for split, content in contents.items():
        (tmp_path / f"{split}.jsonl").write_text(content)
    return str(tmp_path)


def lines(split: str, number: int = 3) -> str:
    line = {"subject": "art", "choices": ["a", "b", "c", "d"], "answer": "A"}
    return "\n".join(json.dumps({**line, "question": f"{split} {i}?"}) for i in range(number))


def kinds(loader: DataLoader[Any]) -> list[str]:
    """Return what a loader serves, repeats left out."""
    return list(dict.fromkeys(getattr(b, "scoring", None) or f"text {b.name}" for b in loader))


# Splits.


@pytest.mark.parametrize(
    ("stage", "split"), [("fit", "val"), ("validate", "val"), ("test", "test")]
)
def test_a_stage_evaluates_the_questions_of_one_split(
    stage: str, split: str, small: dict[str, Any]
) -> None:
    assert {question.split for question in module(stage, small).questions} == {split}


@pytest.mark.parametrize(
    ("stage", "other"), [("fit", "test"), ("validate", "test"), ("test", "val")]
)
def test_a_stage_never_opens_the_other_split(
    stage: str, other: str, tmp_path: Path, small: dict[str, Any]
) -> None:
    contents = {split: lines(split) for split in ("dev", "val", "test")} | {other: "not readable"}
    source = folder_of(tmp_path, **contents)
    assert module(stage, small, questions=source, domains=["all"]).questions


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_test_questions_are_refused_before_the_test_stage(
    stage: str, small: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"^this belongs to stage test, got stage .*$"):
        module(stage, small).test_dataloader()


@pytest.mark.parametrize(
    "method", ["calibration_prompts", "calibration_blocks", "train_dataloader", "val_dataloader"]
)
def test_the_test_stage_has_nothing_to_calibrate_or_validate_on(
    method: str, small: dict[str, Any]
) -> None:
    with pytest.raises(
        ValueError, match=r"^this belongs to stage fit or validate, got stage 'test'"
    ):
        getattr(module("test", small), method)()


def test_nothing_is_served_before_setup(small: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"call setup\(stage\) first"):
        _ = MMLUDataModule(**small).questions


def test_a_failed_setup_leaves_nothing_of_the_stage_before(small: dict[str, Any]) -> None:
    data = module("fit", small)
    data.question_source = "nowhere"
    with pytest.raises(ValueError, match=r"got 'nowhere'"):
        data.setup("test")
    with pytest.raises(ValueError, match=r"call setup\(stage\) first"):
        data.calibration_blocks()


# What evaluation serves.


def test_validation_serves_texts_then_each_scoring(small: dict[str, Any]) -> None:
    data = module("validate", small, languages=["en", "es"])
    assert kinds(data.val_dataloader()) == ["text en", "text es", "letter", "cloze"]


def test_testing_serves_texts_then_each_scoring(small: dict[str, Any]) -> None:
    assert kinds(module("test", small).test_dataloader()) == ["text en", "letter", "cloze"]


def test_validation_inside_a_fit_serves_the_held_out_blocks_alone(small: dict[str, Any]) -> None:
    data = module("fit", small)
    assert kinds(data.val_dataloader()) == ["text held-out"]
    served_NT = torch.cat([batch.token_BT for batch in data.val_dataloader()])
    assert torch.equal(served_NT, data.calibration_blocks()[data.held_out()])


def test_training_never_sees_a_held_out_block(small: dict[str, Any]) -> None:
    data = module("fit", small)
    trained = {i for batch in data.train_dataloader() for i in batch["index"].tolist()}
    held = set(data.held_out().nonzero().flatten().tolist())
    assert len(held) == 3
    assert trained | held == set(range(20))
    assert not trained & held


def test_one_block_cannot_be_held_out(small: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="num_calibration_tokens"):
        module("fit", small, num_calibration_tokens=64)


def test_an_index_points_into_the_questions(small: dict[str, Any]) -> None:
    data = module("validate", small)
    for batch in data.val_dataloader():
        if isinstance(batch, ChoiceBatch):
            answers = [data.questions[index].answer for index in batch.index_B.tolist()]
            assert answers == batch.answer_B.tolist()


def test_eval_tokens_bound_every_batch(small: dict[str, Any]) -> None:
    for batch in module("validate", small).val_dataloader():
        assert batch.token_BT.numel() <= 1024


def test_equal_stages_serve_equal_text(small: dict[str, Any]) -> None:
    stages = [module(stage, small).fingerprints["eval/en"] for stage in STAGES]
    assert len(set(stages)) == 1


def test_max_questions_limits_each_subject_and_language(small: dict[str, Any]) -> None:
    data = module("validate", small, domains=["medical", "cs"], languages=["en", "es"])
    # The bank has Spanish questions on medicine alone.
    assert len(data.questions) == 3 * small["max_questions"]


def test_text_tokens_are_all_but_the_first(small: dict[str, Any]) -> None:
    data = module("validate", small)
    assert data.text_tokens["en"] == data.text_bytes["en"] - 1


def test_fingerprints_name_each_split_and_text(small: dict[str, Any]) -> None:
    assert set(module("fit", small).fingerprints) == {"dev", "val", "calibration/en", "eval/en"}


def test_fingerprints_in_test_name_nothing_to_calibrate_on(small: dict[str, Any]) -> None:
    assert set(module("test", small, num_shots=0).fingerprints) == {"test", "eval/en"}


def test_domain_subjects_are_those_present(small: dict[str, Any]) -> None:
    data = module("fit", small, domains=["medical", "philosophy"])
    assert data.domain_subjects == {
        "medical": ("clinical_knowledge",),
        "philosophy": ("philosophy",),
    }


# Calibration.


def test_prompts_are_grouped_by_domain_and_language(small: dict[str, Any]) -> None:
    data = module("fit", small, domains=["medical", "cs"], languages=["en", "es"])
    prompts = data.calibration_prompts()
    assert set(prompts) == {("medical", "en"), ("cs", "en"), ("medical", "es")}


def test_a_prompt_is_a_zero_shot_question(small: dict[str, Any]) -> None:
    data = module("fit", small, domains=["cs"])
    texts = [data.tokenizer.decode(ids_T) for ids_T in data.calibration_prompts()["cs", "en"]]
    assert all(text.startswith("The following") and text.endswith("\nAnswer:") for text in texts)


def test_a_prompt_sample_has_the_asked_size(small: dict[str, Any]) -> None:
    data = module("fit", small, max_questions=None, num_prompts=7)
    assert {len(prompts) for prompts in data.calibration_prompts().values()} == {7}


def test_a_short_domain_gives_all_its_prompts(small: dict[str, Any]) -> None:
    prompts = module("fit", small, num_prompts=100).calibration_prompts()
    assert {len(group) for group in prompts.values()} == {small["max_questions"]}


def test_languages_sample_the_same_questions(small: dict[str, Any]) -> None:
    options = {"max_questions": None, "domains": ["medical"], "num_prompts": 5}
    data = module("fit", small, languages=["en", "es"], **options)
    choices = {}
    for language in ("en", "es"):
        texts = [data.tokenizer.decode(p) for p in data.calibration_prompts()["medical", language]]
        of_text = {q.text: q.id for q in data.questions if q.language == language}
        choices[language] = [next(of_text[t] for t in of_text if t in text) for text in texts]
    assert choices["en"] == choices["es"]


@pytest.mark.parametrize("method", ["calibration_prompts", "calibration_blocks"])
def test_equal_seeds_calibrate_on_equal_tokens(method: str, small: dict[str, Any]) -> None:
    first, second = (getattr(module("fit", small, seed=3), method)() for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_other_seeds_calibrate_on_other_blocks(small: dict[str, Any]) -> None:
    first, second = (module("fit", small, seed=s).calibration_blocks() for s in (0, 1))
    assert not torch.equal(first, second)


def test_calibration_blocks_fill_the_budget(small: dict[str, Any]) -> None:
    assert module("fit", small).calibration_blocks().shape == (20, 64)


def test_calibration_blocks_hold_questions_and_prose(small: dict[str, Any]) -> None:
    both = module("fit", small).calibration_blocks()
    questions = module("fit", small, calibration_text=None).calibration_blocks()
    assert 0 < sum(row in questions.tolist() for row in both.tolist()) < len(both)


def test_overlapping_domains_calibrate_on_a_question_once(small: dict[str, Any]) -> None:
    options = {"calibration_text": None, "num_calibration_tokens": 10**6}
    once, twice = (
        module("fit", small, domains=domains, **options).calibration_blocks()
        for domains in (["all"], ["all", "cs"])
    )
    assert torch.equal(once, twice)


def test_blocks_are_shared_out_in_proportion() -> None:
    streams = [[stream] * length for stream, length in enumerate((600, 300, 100))]
    blocks_NT = mix_blocks(streams, block_size=10, num_blocks=20, seed=0)
    assert torch.bincount(blocks_NT[:, 0]).tolist() == [12, 6, 2]


@pytest.mark.parametrize(("num_blocks", "shares"), [(20, [7, 7, 6]), (50, [25, 15, 10])])
def test_equal_shares_go_as_far_as_each_text_does(num_blocks: int, shares: list[int]) -> None:
    streams = [[stream] * length for stream, length in enumerate((600, 150, 100))]
    blocks_NT = mix_blocks(streams, block_size=10, num_blocks=num_blocks, seed=0, mix="equal")
    assert sorted(torch.bincount(blocks_NT[:, 0]).tolist()) == sorted(shares)


def test_equal_shares_of_too_little_text_are_all_of_it() -> None:
    streams = [[stream] * length for stream, length in enumerate((30, 20))]
    assert len(mix_blocks(streams, block_size=10, num_blocks=9, seed=0, mix="equal")) == 5


@pytest.mark.parametrize("part", ["[70%:]", ""])
def test_parts_of_one_file_that_overlap_are_not_calibrated_and_measured_on(
    part: str, small: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("some words in a line\n" * 200)
    with pytest.raises(ValueError, match="let the parts not overlap"):
        module(
            "fit",
            small,
            calibration_text=f"{tmp_path}/a.txt[:80%]",
            eval_text=f"{tmp_path}/a.txt{part}",
        )


def test_parts_of_one_file_may_touch(small: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words in a line\n" * 200)
    for ours, theirs in (("[:80%]", "[80%:]"), ("[20%:]", "[:20%]")):
        data = module(
            "fit",
            small,
            calibration_text=f"{tmp_path}/a.txt{ours}",
            eval_text=f"{tmp_path}/a.txt{theirs}",
        )
        assert {"calibration/a", "eval/a"} <= set(data.fingerprints)


def test_blocks_of_all_streams_are_spread_evenly() -> None:
    streams = [[stream] * length for stream, length in enumerate((600, 300, 100))]
    blocks_NT = mix_blocks(streams, block_size=10, num_blocks=20, seed=0)
    assert torch.bincount(blocks_NT[:10, 0]).tolist() == [6, 3, 1]


def test_a_short_supply_of_text_is_used_in_full() -> None:
    streams = [list(range(25)), list(range(5))]
    assert mix_blocks(streams, block_size=10, num_blocks=99, seed=0).flatten().tolist() == [
        *range(20)
    ]


def test_no_text_for_a_single_block_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"`block_size` must be at most the 5 tokens"):
        mix_blocks([[1] * 5], block_size=10, num_blocks=1, seed=0)


def test_training_batches_are_blocks_with_their_index(small: dict[str, Any]) -> None:
    data = module("fit", small)
    for batch in data.train_dataloader():
        assert torch.equal(batch["token_BT"], data.calibration_blocks()[batch["index"]])


def test_an_epoch_serves_every_kept_block_once(small: dict[str, Any]) -> None:
    data = module("fit", small, batch_size=3)
    kept = (~data.held_out()).nonzero().flatten().tolist()
    assert sorted(training_order(data)) == kept


def test_a_loader_goes_on_where_its_state_was_saved(small: dict[str, Any]) -> None:
    whole = module("fit", small, batch_size=3).train_dataloader()
    epochs = [[batch["index"].tolist() for batch in whole] for _ in range(2)]
    part, rest = (module("fit", small, batch_size=3).train_dataloader() for _ in range(2))
    list(part)
    served = [batch["index"].tolist() for batch in itertools.islice(part, 2)]
    rest.load_state_dict(part.state_dict())
    assert epochs[0] != epochs[1]
    assert served + [batch["index"].tolist() for batch in rest] == epochs[1]


def training_order(data: MMLUDataModule) -> list[int]:
    return torch.cat([batch["index"] for batch in data.train_dataloader()]).tolist()


def test_equal_seeds_train_in_equal_order(small: dict[str, Any]) -> None:
    first, second = (training_order(module("fit", small, seed=5)) for _ in range(2))
    assert first == second


def test_training_is_shuffled(small: dict[str, Any]) -> None:
    order = training_order(module("fit", small))
    assert order != sorted(order)


# Devices and processes.


def test_a_batch_moves_with_all_its_tensors(small: dict[str, Any]) -> None:
    data = module("validate", small)
    for batch in data.val_dataloader():
        moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
        values = [getattr(moved, field.name) for field in dataclasses.fields(moved)]
        assert all(value.is_meta for value in values if isinstance(value, Tensor))


def test_a_training_batch_moves_too(small: dict[str, Any]) -> None:
    data = module("fit", small)
    batch = next(iter(data.train_dataloader()))
    assert data.transfer_batch_to_device(batch, torch.device("meta"), 0)["token_BT"].is_meta


class Recorder(LightningModule):
    """Writes down which batches its process sees."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.weight * self._record("fit", batch["index"])

    def validation_step(self, batch: TextBatch | ChoiceBatch, batch_idx: int) -> None:
        self._record("validate", batch.index_B, getattr(batch, "scoring", "text"))

    def test_step(self, batch: TextBatch | ChoiceBatch, batch_idx: int) -> None:
        self._record("test", batch.index_B, getattr(batch, "scoring", "text"))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def _record(self, stage: str, index: Tensor, kind: str = "block") -> float:
        with (self.folder / f"{stage}_{self.global_rank}").open("a") as file:
            file.write(json.dumps([kind, *index.tolist()]) + "\n")
        return 1.0


def trainer_of(folder: Path, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "num_sanity_val_steps": 0, "max_epochs": 1}
    return Trainer(accelerator="cpu", default_root_dir=folder, **quiet, **options)


def two_processes(folder: Path, **options: Any) -> Trainer:
    if torch.cuda.is_initialized():
        pytest.skip("a process that uses CUDA cannot fork")
    return trainer_of(folder, strategy="ddp_fork", devices=2, **options)


def seen(folder: Path, stage: str, rank: int) -> list[tuple[Any, ...]]:
    return [tuple(json.loads(x)) for x in (folder / f"{stage}_{rank}").read_text().splitlines()]


@IGNORE_WORKERS
def test_one_trainer_fits_validates_and_tests(tmp_path: Path, small: dict[str, Any]) -> None:
    trainer, recorder, data = trainer_of(tmp_path), Recorder(tmp_path), MMLUDataModule(**small)
    trainer.fit(recorder, datamodule=data)
    trainer.test(recorder, datamodule=data, verbose=False)
    assert {kind for kind, *_ in seen(tmp_path, "test", 0)} == {"text", "letter", "cloze"}


@IGNORE_REPEATS
@IGNORE_FORK
@IGNORE_WORKERS
def test_two_processes_share_the_batches_of_one(tmp_path: Path, small: dict[str, Any]) -> None:
    trainer = two_processes(tmp_path)
    trainer.validate(Recorder(tmp_path), datamodule=MMLUDataModule(**small), verbose=False)
    alone = [
        (getattr(batch, "scoring", "text"), *batch.index_B.tolist())
        for batch in module("validate", small).val_dataloader()
    ]
    parts = [seen(tmp_path, "validate", rank) for rank in range(2)]
    # The sampler repeats the first batch where they cannot be shared out evenly.
    assert [alone[::2], (alone + alone[:1])[1::2]] == parts


@IGNORE_REPEATS
@IGNORE_FORK
@IGNORE_WORKERS
def test_two_processes_train_on_every_block_between_them(
    tmp_path: Path, small: dict[str, Any]
) -> None:
    trainer = two_processes(tmp_path, limit_val_batches=0)
    trainer.fit(Recorder(tmp_path), datamodule=MMLUDataModule(**small))
    parts = [{i for _, *b in seen(tmp_path, "fit", rank) for i in b} for rank in range(2)]
    # 17 of the 20 blocks are trained on, so one is repeated.
    assert [len(part) for part in parts] == [9, 9]
    assert len(parts[0] | parts[1]) == 17


# Options.

IMPOSSIBLE: dict[str, tuple[dict[str, object], str]] = {
    "domain": ({"domains": ["medcal"]}, "got 'medcal'; did you mean medical"),
    "language": ({"languages": ["xx"]}, "`languages` must be among en, es, fr, zh .* got 'xx'"),
    "pair": ({"languages": ["en", "es"], "domains": ["cs"]}, "must have questions in cs, got 'es'"),
    "shots": ({"num_shots": 6}, "`num_shots` must be at most the 5 dev examples"),
    "source": ({"questions": "nowhere"}, "`questions` must be bank, .* got 'nowhere'"),
    "text": ({"eval_text": "no.txt"}, "no.txt: a text must be bank, an existing"),
    "block": ({"block_size": 4096, "num_calibration_tokens": 9999}, "at most the 2048 tokens"),
    "tokens": ({"block_size": 2000, "num_calibration_tokens": 2000, "calibration_text": None,
                "max_questions": 1}, "`block_size` must be at most the"),
}  # fmt: skip


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_an_impossible_option_is_one_line_in_setup(name: str, small: dict[str, Any]) -> None:
    changes, reason = IMPOSSIBLE[name]
    data = MMLUDataModule(**{**small, **changes})
    with pytest.raises(ValueError, match=rf"^.*{reason}.*$"):
        data.setup("fit")


@pytest.mark.parametrize("stage", ["predict", "nonsense"])
def test_an_unknown_stage_is_an_error(stage: str, small: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^`stage` must be one of fit, validate, test, got "):
        module(stage, small)


def test_a_text_is_never_both_calibrated_and_measured_on(
    tmp_path: Path, small: dict[str, Any]
) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("The same words. " * 20)
    texts = {"calibration_text": str(tmp_path / "a.txt"), "eval_text": str(tmp_path / "b.txt")}
    with pytest.raises(ValueError, match=r"^`eval_text` must not be calibrated on, got .* 'b' .*$"):
        module("fit", small, **texts)


@pytest.mark.parametrize(
    ("option", "value", "minimum"),
    [
        ("num_shots", -1, 0),
        ("block_size", 1, 2),
        ("num_calibration_tokens", 63, 64),
        ("max_questions", 0, 1),
        ("batch_size", 0, 1),
    ],
)
def test_an_option_out_of_range_is_named(
    option: str, value: int, minimum: int, small: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=f"^`{option}` must be at least {minimum}, got {value};"):
        MMLUDataModule(**{**small, option: value})


def test_nothing_to_measure_is_an_error(small: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"`scorings` must not be empty without `eval_text`"):
        MMLUDataModule(**small, scorings=[], eval_text=None)


def test_every_option_is_a_plain_type_with_help() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(MMLUDataModule, "data")
    options = [action for action in parser._actions if action.dest.startswith("data.")]
    assert all(action.help for action in options)


def test_a_language_can_be_added_on_the_command_line() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(MMLUDataModule, "data")
    assert parser.parse_args(["--data.languages+=fr"]).data.languages == ["en", "fr"]
