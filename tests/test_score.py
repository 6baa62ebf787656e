from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import byte_tokenizer, tiny_model
from torch import Tensor, nn
from transformers import (
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lmerge.data.prompts import build_choice_batches
from lmerge.data.questions import load_questions
from lmerge.data.records import IGNORE, ChoiceBatch, Scoring, TextBatch
from lmerge.data.stage import first_questions
from lmerge.score import (
    PrefixCache,
    compare_text,
    normalise_cloze,
    score_choices,
    score_text,
    score_text_pair,
)
from lmerge.source import load_model, load_tokenizer

PREFIX = "Questions about sums.\n1+1? 2\n\n"
QUESTIONS = [
    ("3+4?", [" 7", " eight", " 11", " it is 12"]),
    ("What is the sum of two and of three?", [" five", " 5 and no more", " 6", " x"]),
    ("0?", [" zero", " none", " 0", " nothing at all"]),
]
SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "pad_token_id": 257,
}
Encode = Callable[[str], list[int]]
KINDS = ("llama", "mistral", "qwen2", "qwen3")


def make_model(kind: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    torch.manual_seed(seed)
    fields = {**SIZES, **changes}
    if kind == "mistral":
        return MistralForCausalLM(MistralConfig(**fields)).eval()
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**fields)).eval()
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**fields)).eval()
    return tiny_model(seed, **changes)


def tokens(text: str) -> list[int]:
    return list(text.encode())


def choice_batch(
    scoring: Scoring,
    questions: list[tuple[str, list[str]]] = QUESTIONS,
    *,
    prefix: str = PREFIX,
    extra_padding: int = 0,
    encode: Encode = tokens,
) -> ChoiceBatch:
    rows, segments = [], []
    for text, choices in questions:
        parts = [text, *choices] if scoring == "cloze" else [text]
        rows.append([token for part in parts for token in encode(part)])
        segments.append([s for s, part in enumerate(parts) for _ in encode(part)])
    length = max(len(row) for row in rows) + extra_padding
    return ChoiceBatch(
        scoring=scoring,
        index_B=torch.arange(len(rows)),
        prefix_P=torch.tensor(encode(prefix)),
        token_BT=torch.tensor([row + [257] * (length - len(row)) for row in rows]),
        segment_BT=torch.tensor([row + [-1] * (length - len(row)) for row in segments]),
        letter_ids_4=torch.tensor(encode("ABCD")),
        choice_length_B4=torch.tensor([[len(c.strip()) for c in cs] for _, cs in questions]),
        answer_B=torch.zeros(len(rows), dtype=torch.int64),
    )


@torch.no_grad()
def slow_logp(model: PreTrainedModel, context: list[int], continuation: list[int]) -> float:
    """One full forward pass without padding, cache or tree."""
    logp_TV = model(torch.tensor([context + continuation])).logits[0].float().log_softmax(dim=-1)
    first = len(context) - 1
    return sum(float(logp_TV[first + i, token]) for i, token in enumerate(continuation))


def slow_scores(
    model: PreTrainedModel,
    scoring: Scoring,
    questions: list[tuple[str, list[str]]] = QUESTIONS,
    *,
    prefix: str = PREFIX,
    encode: Encode = tokens,
) -> Tensor:
    rows = []
    for text, choices in questions:
        context = encode(prefix) + encode(text)
        endings = choices if scoring == "cloze" else list("ABCD")
        rows.append([slow_logp(model, context, encode(ending)) for ending in endings])
    return torch.tensor(rows, dtype=torch.float64)


def text_batch(texts: list[str], *, extra_padding: int = 0) -> TextBatch:
    rows = [tokens(text) for text in texts]
    length = max(len(row) for row in rows) + extra_padding
    targets = [row[1:] + [IGNORE] * (length - len(row) + 1) for row in rows]
    return TextBatch(
        name="en",
        index_B=torch.arange(len(rows)),
        token_BT=torch.tensor([row + [257] * (length - len(row)) for row in rows]),
        target_BT=torch.tensor(targets),
    )


TEXTS = ["The cat sat on the mat.", "No.", "A longer text has more tokens than a short one."]


@pytest.mark.parametrize("scoring", ["letter", "cloze"])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_equal_one_full_pass_for_each_choice(kind: str, scoring: Scoring) -> None:
    model = make_model(kind)
    scores = score_choices(model, choice_batch(scoring), PrefixCache())
    torch.testing.assert_close(scores, slow_scores(model, scoring), rtol=0, atol=1e-4)


@pytest.mark.parametrize("scoring", ["letter", "cloze"])
def test_eager_attention_gives_the_same_scores(scoring: Scoring) -> None:
    model = tiny_model(attn_implementation="eager")
    scores = score_choices(model, choice_batch(scoring), PrefixCache())
    torch.testing.assert_close(scores, slow_scores(model, scoring), rtol=0, atol=1e-4)


def test_scores_are_float64_with_four_columns(tiny_llama: LlamaForCausalLM) -> None:
    scores = score_choices(tiny_llama, choice_batch("cloze"), PrefixCache())
    assert (scores.dtype, scores.shape) == (torch.float64, (3, 4))


@pytest.mark.parametrize("scoring", ["letter", "cloze"])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_row_alone_scores_as_in_a_batch(
    tiny_llama: LlamaForCausalLM, scoring: Scoring, row: int
) -> None:
    together = score_choices(tiny_llama, choice_batch(scoring), PrefixCache())[row]
    alone = score_choices(tiny_llama, choice_batch(scoring, [QUESTIONS[row]]), PrefixCache())[0]
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scoring", ["letter", "cloze"])
def test_more_padding_changes_no_score(tiny_llama: LlamaForCausalLM, scoring: Scoring) -> None:
    scores = score_choices(tiny_llama, choice_batch(scoring), PrefixCache())
    padded = score_choices(tiny_llama, choice_batch(scoring, extra_padding=40), PrefixCache())
    torch.testing.assert_close(padded, scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scoring", ["letter", "cloze"])
def test_the_choice_does_not_depend_on_the_batches(
    tiny_llama: LlamaForCausalLM, scoring: Scoring
) -> None:
    asked = first_questions(load_questions("bank", "val"), 4)
    found = []
    for max_tokens in (1, 1500, 20_000):
        logp_N4 = torch.full((len(asked), 4), torch.nan, dtype=torch.float64)
        prefixes = PrefixCache()
        for batch in build_choice_batches(
            asked,
            {},
            byte_tokenizer(),
            scoring=scoring,
            num_shots=0,
            max_tokens_per_batch=max_tokens,
        ):
            logp_N4[batch.index_B] = score_choices(tiny_llama, batch, prefixes)
        found.append(logp_N4)
    for logp_N4 in found[1:]:
        torch.testing.assert_close(logp_N4, found[0], rtol=0, atol=1e-3)
        assert torch.equal(logp_N4.argmax(dim=1), found[0].argmax(dim=1))


def test_an_answer_does_not_see_the_others(tiny_llama: LlamaForCausalLM) -> None:
    text, choices = QUESTIONS[0]
    changed = (text, [" quite another text", " 13", *choices[2:]])
    before = score_choices(tiny_llama, choice_batch("cloze", [QUESTIONS[0]]), PrefixCache())
    after = score_choices(tiny_llama, choice_batch("cloze", [changed]), PrefixCache())
    torch.testing.assert_close(after[0, 2:], before[0, 2:], rtol=0, atol=1e-4)


def test_reordering_the_answers_reorders_the_scores(tiny_llama: LlamaForCausalLM) -> None:
    text, choices = QUESTIONS[1]
    order = [2, 0, 3, 1]
    swapped = (text, [choices[i] for i in order])
    before = score_choices(tiny_llama, choice_batch("cloze", [QUESTIONS[1]]), PrefixCache())
    after = score_choices(tiny_llama, choice_batch("cloze", [swapped]), PrefixCache())
    torch.testing.assert_close(after[0], before[0, order], rtol=0, atol=1e-4)


def test_bfloat16_scores_are_near_those_of_float32(tiny_llama: LlamaForCausalLM) -> None:
    exact = score_choices(tiny_llama, choice_batch("letter"), PrefixCache())
    rounded = score_choices(tiny_llama.bfloat16(), choice_batch("letter"), PrefixCache())
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.1)


class Wrapper(nn.Module):
    """Has what score.py may rely on, and nothing else."""

    def __init__(self, inner: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.lm_head, self.config = inner.model, inner.lm_head, inner.config
        self.dtype, self.device = inner.dtype, inner.device


@pytest.mark.parametrize("scoring", ["letter", "cloze"])
def test_a_wrapper_scores_as_the_model_inside(
    tiny_llama: LlamaForCausalLM, scoring: Scoring
) -> None:
    inside = score_choices(tiny_llama, choice_batch(scoring), PrefixCache())
    wrapped = score_choices(Wrapper(tiny_llama), choice_batch(scoring), PrefixCache())
    assert torch.equal(wrapped, inside)


def test_letters_need_logits_at_one_position_of_a_row(tiny_llama: LlamaForCausalLM) -> None:
    shapes: list[torch.Size] = []
    tiny_llama.lm_head.register_forward_hook(lambda _, args, out: shapes.append(out.shape))
    score_choices(tiny_llama, choice_batch("letter"), PrefixCache())
    assert shapes == [(3, 260)]


# What is refused.


def test_a_prompt_beyond_the_sliding_window_is_refused() -> None:
    model = make_model("mistral", sliding_window=16)
    with pytest.raises(ValueError, match="sliding window of 16 tokens"):
        score_choices(model, choice_batch("cloze"), PrefixCache())


def test_a_row_without_an_answer_is_refused(tiny_llama: LlamaForCausalLM) -> None:
    empty = ("Why?", [" a", "", " c", " d"])
    with pytest.raises(ValueError, match="segment 2 in every row, got none in row 1"):
        score_choices(tiny_llama, choice_batch("cloze", [QUESTIONS[0], empty]), PrefixCache())


def test_a_row_without_a_question_is_refused(tiny_llama: LlamaForCausalLM) -> None:
    batch = choice_batch("letter", [QUESTIONS[0], ("", [" a", " b", " c", " d"])])
    with pytest.raises(ValueError, match="segment 0 in every row, got none in row 1"):
        score_choices(tiny_llama, batch, PrefixCache())


def test_cloze_is_normalised_by_characters() -> None:
    logp_B4 = torch.tensor([[-2.0, -6.0, -4.0, -1.0]], dtype=torch.float64)
    scores = normalise_cloze(logp_B4, torch.tensor([[1, 3, 8, 2]]))
    assert scores.tolist() == [[-2.0, -2.0, -0.5, -0.5]]


def test_normalising_by_an_empty_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="`choice_length_B4` must be at least 1, got 0"):
        normalise_cloze(torch.zeros(1, 4), torch.tensor([[1, 0, 2, 3]]))


# Texts.


def test_text_loss_equals_cross_entropy_of_each_text_alone(tiny_llama: LlamaForCausalLM) -> None:
    nll_BT = score_text(tiny_llama, text_batch(TEXTS, extra_padding=7))
    expected = [-slow_logp(tiny_llama, tokens(t)[:1], tokens(t)[1:]) for t in TEXTS]
    torch.testing.assert_close(nll_BT.sum(dim=1).tolist(), expected, rtol=0, atol=1e-3)


def test_text_loss_is_zero_where_nothing_is_predicted(tiny_llama: LlamaForCausalLM) -> None:
    batch = text_batch(TEXTS)
    nll_BT = score_text(tiny_llama, batch)
    assert torch.equal(nll_BT != 0, batch.target_BT != IGNORE)


@pytest.mark.parametrize("chunk_size", [1, 5, 10_000])
def test_text_loss_does_not_depend_on_the_chunk(
    tiny_llama: LlamaForCausalLM, chunk_size: int
) -> None:
    nll_BT = score_text(tiny_llama, text_batch(TEXTS), chunk_size=chunk_size)
    torch.testing.assert_close(nll_BT, score_text(tiny_llama, text_batch(TEXTS)), rtol=0, atol=1e-5)


def test_a_block_without_targets_has_no_loss(tiny_llama: LlamaForCausalLM) -> None:
    assert score_text(tiny_llama, text_batch(["x"])).tolist() == [[0.0]]


def test_logits_exist_for_one_chunk_at_a_time(tiny_llama: LlamaForCausalLM) -> None:
    sizes: list[int] = []
    tiny_llama.lm_head.register_forward_hook(lambda _, args, out: sizes.append(len(out)))
    score_text_pair(tiny_llama, tiny_llama, text_batch(TEXTS), chunk_size=8)
    assert max(sizes) == 8


def test_a_pair_has_the_losses_of_each_model_alone(tiny_llama: LlamaForCausalLM) -> None:
    other, batch = tiny_model(seed=1), text_batch(TEXTS)
    scores = score_text_pair(tiny_llama, other, batch)
    alone = torch.stack([score_text(tiny_llama, batch), score_text(other, batch)])
    assert torch.equal(torch.stack([scores.source_nll_BT, scores.merged_nll_BT]), alone)


def test_kl_to_the_same_model_is_exactly_zero(tiny_llama: LlamaForCausalLM) -> None:
    scores = score_text_pair(tiny_llama, tiny_llama, text_batch(TEXTS))
    assert int(scores.kl_BT.count_nonzero()) == 0


def test_the_same_model_agrees_on_every_target(tiny_llama: LlamaForCausalLM) -> None:
    scores = score_text_pair(tiny_llama, tiny_llama, text_batch(TEXTS))
    assert torch.equal(scores.agree_BT, scores.mask_BT)


def test_the_mask_marks_the_targets(tiny_llama: LlamaForCausalLM) -> None:
    batch = text_batch(TEXTS)
    scores = score_text_pair(tiny_llama, tiny_llama, batch)
    assert torch.equal(scores.mask_BT, batch.target_BT != IGNORE)


def pair_logits(texts: list[str]) -> tuple[Tensor, Tensor]:
    token_BT = text_batch(texts).token_BT
    with torch.no_grad():
        return tiny_model()(token_BT).logits, tiny_model(seed=1)(token_BT).logits


def test_pair_kl_equals_kl_div_of_full_logits() -> None:
    source_BTV, merged_BTV = pair_logits(TEXTS)
    scores = score_text_pair(tiny_model(), tiny_model(seed=1), text_batch(TEXTS), chunk_size=7)
    kl_BTV = F.kl_div(
        merged_BTV.double().log_softmax(-1),
        source_BTV.double().log_softmax(-1),
        log_target=True,
        reduction="none",
    )
    expected = kl_BTV.sum(dim=-1) * scores.mask_BT
    torch.testing.assert_close(scores.kl_BT, expected, rtol=1e-4, atol=1e-5)


def test_pair_agreement_equals_that_of_full_logits() -> None:
    source_BTV, merged_BTV = pair_logits(TEXTS)
    scores = score_text_pair(tiny_model(), tiny_model(seed=1), text_batch(TEXTS), chunk_size=7)
    expected = (source_BTV.argmax(-1) == merged_BTV.argmax(-1)) & scores.mask_BT
    assert torch.equal(scores.agree_BT, expected)


def test_kl_is_finite_for_hopeless_logits() -> None:
    source_NV = torch.tensor([[0.0, 300.0, -300.0]])
    kl_N, _ = compare_text(source_NV, -source_NV)
    torch.testing.assert_close(kl_N, torch.tensor([600.0], dtype=torch.float64))


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_comparing_logits_in_chunks_changes_nothing(chunk_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    source_NV, merged_NV = torch.randn(2, 11, 50, generator=generator)
    chunked = compare_text(source_NV, merged_NV, chunk_size=chunk_size)
    torch.testing.assert_close(chunked, compare_text(source_NV, merged_NV))


def test_comparing_two_vocabularies_is_refused() -> None:
    with pytest.raises(ValueError, match="`merged_logits_NV` must have the shape"):
        compare_text(torch.zeros(3, 5), torch.zeros(3, 6))


@pytest.mark.slow
def test_tree_cloze_of_smollm_equals_one_full_pass_for_each_choice() -> None:
    model, tokenizer = load_model("smollm2-135m", dtype="float32"), load_tokenizer("smollm2-135m")
    prefix, questions = (
        "Answer the questions.\n\n",
        [
            (
                "Question: Which planet is the largest?\nAnswer:",
                [" Jupiter", " Mars", " Venus", " Io"],
            ),
            (
                "Question: Is ice lighter than water?\nAnswer:",
                [" yes", " no, it sinks", " 3", " ice"],
            ),
            ("Who wrote Hamlet?\nAnswer:", [" Kant", " William Shakespeare", " a king", " Bach"]),
        ],
    )
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    batch = choice_batch("cloze", questions, prefix=prefix, encode=encode)
    scores = score_choices(model, batch, PrefixCache())
    expected = slow_scores(model, "cloze", questions, prefix=prefix, encode=encode)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-3)
