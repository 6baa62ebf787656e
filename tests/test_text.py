from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer
from transformers import PreTrainedTokenizerFast

from lmerge.data.records import IGNORE, TextBatch
from lmerge.data.text import (
    read_text,
    read_texts,
    text_batches,
    text_fingerprint,
    token_blocks,
)

TEXT = "The quick brown fox jumps over the lazy dog. ¿Qué?"
LENGTH = len(TEXT.encode())
SHAPES = [(8, 8), (8, 4), (8, 3), (8, 1), (64, 64), (64, 16), (LENGTH - 1, LENGTH - 1), (1, 1)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def batches_of(
    tokenizer: PreTrainedTokenizerFast, block_size: int, stride: int, batch_size: int = 2
) -> list[TextBatch]:
    return text_batches(
        "en", TEXT, tokenizer, block_size=block_size, stride=stride, batch_size=batch_size
    )


def rows_of(batches: list[TextBatch]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([b.token_BT for b in batches]), torch.cat([b.target_BT for b in batches])


# Reading.


@pytest.mark.parametrize("language", ["en", "es", "fr", "zh"])
def test_the_bank_calibrates_and_measures_on_different_prose(language: str) -> None:
    parts = [set(read_text("bank", language, split=s).split("\n")) - {""} for s in ("val", "test")]
    assert parts[0].isdisjoint(parts[1])


def test_bundled_texts_are_named_after_their_language() -> None:
    assert list(read_texts("bank", ["fr", "en"], split="val")) == ["fr", "en"]


def test_a_users_text_is_read_once_whatever_the_languages(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text(TEXT)
    source = str(tmp_path / "mine.txt")
    assert read_texts(source, ["en", "fr"], split="val") == {"mine": TEXT}


def test_no_source_is_no_text() -> None:
    assert read_texts(None, ["en"], split="val") == {}


def test_documents_of_a_jsonl_file_are_joined(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"text": "a"}\n\n{"text": "b", "n": 1}\n')
    assert read_text(str(tmp_path / "mine.jsonl")) == "a\n\nb"


def test_parts_of_a_file_are_cut_between_lines_and_make_up_the_file(tmp_path: Path) -> None:
    text = "".join(f"line {i} of the file\n" for i in range(40))
    (tmp_path / "a.txt").write_text(text)
    parts = [read_text(f"{tmp_path}/a.txt[{part}]") for part in (":33%", "33%:80%", "80%:")]
    assert "".join(parts) == text
    assert all(part.startswith("line") and part.endswith("\n") for part in parts)
    assert len(parts[0]) == pytest.approx(0.33 * len(text), abs=20)


def test_a_part_of_a_file_goes_by_the_name_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("a\nb\n")
    assert read_texts([f"{tmp_path}/mine.txt[:50%]"], ["en"], split="val") == {"mine": "a\n"}


@pytest.mark.parametrize("part", ["80%:20%", "20%:20%", ":101%"])
def test_a_part_of_a_file_is_not_empty_and_lies_in_it(part: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match="must end after its start and at most at 100%"):
        read_text(f"{tmp_path}/a.txt[{part}]")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", None, "an existing .txt file"),
        ("a.pdf", b"text", "an existing .txt file"),
        ("a.txt", b" \n", "must not be empty"),
        ("a.jsonl", b"\n", "must not be empty"),
        ("a.txt", b"ok\n\xff", "line 2: text must be UTF-8, got byte 0xff"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}', "line 2: `text` must be a text, got None"),
        ("a.jsonl", b"plain", "line 1: a line must be a JSON object, got 'plain'"),
    ],
)
def test_an_unreadable_text_is_one_line_with_its_name(
    name: str, content: bytes | None, reason: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^\S*{name}.*{reason}.*$"):
        read_text(str(tmp_path / name))


def test_an_unknown_language_of_the_bank_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"one of en, es, fr, zh, got 'xx'"):
        read_text("bank", "xx")


def test_a_fingerprint_tells_texts_apart() -> None:
    assert text_fingerprint("a") != text_fingerprint("b")


# Blocks.


def test_blocks_are_the_text_without_its_remainder() -> None:
    assert token_blocks(list(range(11)), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_text_shorter_than_a_block_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"`block_size` must be at most the 3 tokens"):
        token_blocks([1, 2, 3], 4)


# Perplexity batches.


@pytest.mark.parametrize(("block_size", "stride"), SHAPES)
def test_every_token_but_the_first_is_predicted_once(
    block_size: int, stride: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    _, target_BT = rows_of(batches_of(tokenizer, block_size, stride))
    assert target_BT[target_BT != IGNORE].tolist() == tokenizer(TEXT)["input_ids"][1:]


@pytest.mark.parametrize(("block_size", "stride"), SHAPES)
def test_a_target_is_the_token_that_follows(
    block_size: int, stride: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    token_BT, target_BT = rows_of(batches_of(tokenizer, block_size, stride))
    inner_BT, next_BT = target_BT[:, :-1], token_BT[:, 1:]
    counts_BT = inner_BT != IGNORE
    assert torch.equal(inner_BT[counts_BT], next_BT[counts_BT])


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_overlapping_blocks_give_every_later_target_its_context(
    stride: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    _, target_BT = rows_of(batches_of(tokenizer, 16, stride))
    first_B = (target_BT != IGNORE).int().argmax(dim=1)
    assert first_B[1:].min() == 16 - stride


def test_every_block_has_the_full_width(tokenizer: PreTrainedTokenizerFast) -> None:
    assert {b.token_BT.shape[1] for b in batches_of(tokenizer, 64, 64)} == {64}


def test_blocks_are_numbered_through_the_batches(tokenizer: PreTrainedTokenizerFast) -> None:
    index_N = torch.cat([b.index_B for b in batches_of(tokenizer, 8, 8, batch_size=3)])
    assert index_N.tolist() == list(range(len(index_N)))


def test_the_batch_size_changes_no_block(tokenizer: PreTrainedTokenizerFast) -> None:
    small, large = (rows_of(batches_of(tokenizer, 8, 4, batch_size=n)) for n in (1, 5))
    torch.testing.assert_close(small, large, rtol=0, atol=0)


@pytest.mark.parametrize("stride", [0, 9])
def test_a_stride_beyond_the_block_is_an_error(
    stride: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match=r"`stride` must be between 1 and the block size 8"):
        batches_of(tokenizer, 8, stride)


def test_a_text_of_one_token_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"text 'x' must have at least 2 tokens, got 1"):
        text_batches("x", "a", tokenizer, block_size=8, stride=8, batch_size=1)
