from itertools import groupby
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from models import plan_of
from torch import nn

from lmerge.alphas import AlphaConfig
from lmerge.cost import measure_costs, model_bytes, peak_memory
from lmerge.llama import count_parameters
from lmerge.merged import MergedLlama

SMALL = {"num_sequences": 1, "sequence_length": 8, "num_rounds": 1, "num_new_tokens": 2}
SIZES = ("layers", "parameters", "bytes", "peak_memory")


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_bytes_are_those_of_the_parameters(dtype: torch.dtype, width: int) -> None:
    model = tiny_model().to(dtype)
    assert model_bytes(model) == width * count_parameters(model)


def test_bytes_are_those_of_the_file_that_is_saved(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    header = (tmp_path / "model.safetensors").stat().st_size - model_bytes(model)
    assert 0 < header < 10_000


def test_tied_weights_are_stored_once() -> None:
    saved = model_bytes(tiny_model(tie_word_embeddings=False)) - model_bytes(tiny_model())
    assert saved == 4 * 260 * 32


def test_a_merged_model_costs_what_a_shorter_model_costs() -> None:
    plain = MergedLlama(tiny_model(), plan_of([1, 2]), {}, AlphaConfig()).plain()
    costs = measure_costs({"merged": plain, "short": tiny_model(num_hidden_layers=3)}, **SMALL)
    for key in SIZES:
        assert costs["merged"][key] == costs["short"][key]


def test_costs_are_above_zero() -> None:
    costs = measure_costs({"source": tiny_model(), "merged": tiny_model()}, **SMALL)
    assert set(costs["source"]) == {*SIZES, "prefill_tokens_per_s", "decode_tokens_per_s"}
    assert all(value > 0 for model in costs.values() for value in model.values())


def test_models_are_timed_in_alternation_after_a_warm_up() -> None:
    models, order = {"a": tiny_model(), "b": tiny_model()}, []
    for name, model in models.items():
        model.register_forward_hook(lambda *_, name=name: order.append(name))
    measure_costs(models, num_rounds=3, num_sequences=1, sequence_length=4, num_new_tokens=5)
    # A prefill, then a decode that starts with one, of either model; the memory at the end.
    calls = [(name, len(list(run))) for name, run in groupby(order)]
    assert calls == [("a", 1), ("b", 1), ("a", 6), ("b", 6)] * 4 + [("a", 1), ("b", 1)]


def test_a_prefill_has_the_tokens_that_are_asked_for() -> None:
    model, shapes = tiny_model(), []
    model.model.embed_tokens.register_forward_hook(lambda _m, i, _o: shapes.append(i[0].shape))
    measure_costs({"source": model}, num_sequences=3, sequence_length=300, num_rounds=1)
    assert set(shapes) == {(3, 300), (1, 300), (1, 1)}  # more than the vocabulary of 260


def test_peak_memory_is_that_of_the_weights_and_of_the_most_that_is_held_at_once() -> None:
    model = tiny_model()

    def run() -> None:
        first = torch.zeros(1000, 250)  # 1 MB
        del first
        second = [torch.zeros(1000, 500), torch.zeros(1000, 250)]  # 3 MB
        del second

    assert peak_memory(model, run) == model_bytes(model) + 3_000_000


def test_memory_is_not_measured_where_nobody_counts_it() -> None:
    class Elsewhere(nn.Module):
        device = torch.device("meta")

    assert peak_memory(Elsewhere(), lambda: None) is None  # type: ignore[arg-type]
