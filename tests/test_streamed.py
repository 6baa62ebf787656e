import json
from pathlib import Path

import pytest
import torch
from models import VARIANTS, tiny_variant
from torch import Tensor

from lmerge.activations import Pooling, layer_states
from lmerge.shards import weight_files
from lmerge.source import load_model
from lmerge.streamed import streamed_states

PROMPTS = [torch.arange(3, 3 + n) for n in (9, 4, 17, 9, 30)]


def saved(folder: Path, name: str = "llama", **options: object) -> Path:
    tiny_variant(name).save_pretrained(folder, **options)
    return folder


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("name", VARIANTS)
def test_states_are_those_of_the_resident_model(
    tmp_path: Path, name: str, pooling: Pooling
) -> None:
    wanted = layer_states(tiny_variant(name), PROMPTS, pooling=pooling, tokens_per_batch=60)
    found = streamed_states(saved(tmp_path, name), PROMPTS, pooling=pooling, tokens_per_batch=60)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_shards_give_the_same_states(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole")
    shards = saved(tmp_path / "shards", max_shard_size="40kB")
    assert len(set(weight_files(shards).values())) > 1
    assert torch.equal(streamed_states(shards, PROMPTS), streamed_states(whole, PROMPTS))


def test_weights_of_another_dtype_are_converted_a_layer_at_a_time(tmp_path: Path) -> None:
    tiny_variant("llama").bfloat16().save_pretrained(tmp_path)
    wanted = layer_states(load_model(str(tmp_path), "float32"), PROMPTS)
    torch.testing.assert_close(streamed_states(tmp_path, PROMPTS), wanted, rtol=0, atol=1e-5)


def test_layers_run_in_the_wanted_dtype(tmp_path: Path) -> None:
    found = streamed_states(saved(tmp_path), PROMPTS, dtype=torch.bfloat16)
    wanted = layer_states(load_model(str(tmp_path), "bfloat16"), PROMPTS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^`source` must be a local folder with [^\n]*$"):
        streamed_states(tmp_path, PROMPTS)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path, max_shard_size="40kB")
    gone = sorted(folder.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ValueError, match=rf"^`source` must hold all files [^\n]*{gone.name}\. "):
        streamed_states(folder, PROMPTS)


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path, max_shard_size="40kB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.layers.2.mlp.up_proj.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"^`source` must hold all of its weights, [^\n]*up_proj"):
        streamed_states(folder, PROMPTS)


@pytest.mark.parametrize("prompts", [[], [torch.arange(0)]])
def test_no_prompt_and_an_empty_one_are_refused(tmp_path: Path, prompts: list[Tensor]) -> None:
    with pytest.raises(ValueError, match=r"^`prompts` must hold at least one [^\n]*$"):
        streamed_states(saved(tmp_path), prompts)


@pytest.mark.slow
def test_states_of_the_real_model_are_those_of_the_resident_mode(tmp_path: Path) -> None:
    model = load_model("smollm2-135m", "float32")
    model.save_pretrained(tmp_path, max_shard_size="100MB")
    wanted, found = layer_states(model, PROMPTS), streamed_states(tmp_path, PROMPTS)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
