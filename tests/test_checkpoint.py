import logging
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from checkpoints import edit_config, logits, refusal
from conftest import byte_tokenizer, tiny_model
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from lmerge.llama import SUPPORTED
from lmerge.source import (
    load_config,
    load_model,
    load_tokenizer,
    model_fingerprint,
)

SAMPLE = "<|im_start|>user\nÜber 日本 123  x\n<|im_end|>"

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleave_rotary(weight_OI: Tensor, num_heads: int) -> Tensor:
    """GGUF keeps the two halves of a head's rotary pairs interleaved."""
    return weight_OI.unflatten(0, (num_heads, 2, -1)).swapaxes(1, 2).flatten(0, 2)


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    *,
    architecture: str = "llama",
    rope_freqs: bool = False,
    num_blocks: int = 4,
) -> None:
    """Write the tiny model as a GGUF file, as llama.cpp's converter would."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(num_blocks)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(config.vocab_size)
    tokenizer = byte_tokenizer()
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*tokens, "Ġa", "<|x|>"])
    writer.add_token_types([1] * 256 + [3, 3, 1, 3])
    writer.add_token_merges(["Ġ a"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_chat_template("{{ messages[0]['content'] }}<|eos|>")
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in model.named_parameters():
        if name.startswith("model.layers."):
            index, inner = name.removeprefix("model.layers.").split(".", 1)
            short = GGUF_NAMES[inner.removesuffix(".weight")]
            weight = interleave_rotary(tensor, heads[short]) if short in heads else tensor
            writer.add_tensor(f"blk.{index}.{short}.weight", weight.detach().contiguous().numpy())
    writer.add_tensor("token_embd.weight", model.model.embed_tokens.weight.detach().numpy())
    writer.add_tensor("output_norm.weight", model.model.norm.weight.detach().numpy())
    if rope_freqs:
        writer.add_tensor("rope_freqs.weight", torch.ones(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("LMERGE_CACHE", str(folder))
    return folder


@pytest.fixture
def tiny_gguf(tmp_path: Path, cache: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_model())
    return path


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    assert "without one" in refusal(load_model, str(tmp_path))


def test_folder_with_only_a_gguf_names_that_file(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").touch()
    assert f"{tmp_path}/x.gguf" in refusal(load_model, str(tmp_path))


def test_malformed_config_is_refused(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text("{")
    assert "readable config.json" in refusal(load_model, str(checkpoint))


def test_config_with_impossible_values_is_refused(checkpoint: Path) -> None:
    edit_config(checkpoint, hidden_size="wide")
    assert "config.json cannot be read" in refusal(load_model, str(checkpoint))


@pytest.mark.parametrize("load", [load_model, load_tokenizer, load_config])
def test_unsupported_architecture_is_refused_with_the_supported_ones(
    checkpoint: Path, load: object
) -> None:
    edit_config(checkpoint, model_type="gpt2")
    assert f"{', '.join(SUPPORTED)}, got 'gpt2'" in refusal(load, str(checkpoint))


def test_model_with_its_own_code_is_refused(checkpoint: Path) -> None:
    edit_config(checkpoint, model_type="mine", auto_map={"AutoConfig": "code.MyConfig"})
    assert "never run" in refusal(load_model, str(checkpoint))


def test_own_code_of_a_supported_type_is_not_run(checkpoint: Path, tmp_path: Path) -> None:
    edit_config(checkpoint, auto_map={"AutoModelForCausalLM": "code.Model"})
    (checkpoint / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    load_model(str(checkpoint))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused(checkpoint: Path, name: str) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / name)
    message = refusal(load_model, str(checkpoint))
    assert f"only the pickle {name}" in message
    assert "save_pretrained" in message


def test_folder_without_weights_is_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    assert "with none" in refusal(load_model, str(checkpoint))


def test_quantised_checkpoint_is_refused(checkpoint: Path) -> None:
    edit_config(checkpoint, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "which is quantised" in refusal(load_model, str(checkpoint))


def test_adapter_is_refused(checkpoint: Path) -> None:
    (checkpoint / "adapter_config.json").write_text("{}")
    assert "with an adapter" in refusal(load_model, str(checkpoint))


@pytest.mark.parametrize("keep", [0, 4, 1000, -100])
def test_truncated_weights_are_refused(checkpoint: Path, keep: int) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "its weights cannot be read" in refusal(load_model, str(checkpoint))


def test_missing_shard_is_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="50kB")
    max(tmp_path.glob("model-*.safetensors")).unlink()
    assert "must hold all files that its index names" in refusal(load_model, str(tmp_path))


def test_missing_layer_is_refused(checkpoint: Path) -> None:
    edit_config(checkpoint, num_hidden_layers=5)
    assert "without 9 of them" in refusal(load_model, str(checkpoint))


def test_weights_of_another_shape_are_refused(checkpoint: Path) -> None:
    edit_config(checkpoint, intermediate_size=64)
    assert "of shape (32, 48) instead of (32, 64)" in refusal(load_model, str(checkpoint))


def test_unused_weights_are_logged(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_config(checkpoint, num_hidden_layers=3)
    load_model(str(checkpoint))
    assert "holds 9 tensors that its config does not use" in caplog.text


def test_gguf_gives_the_weights_that_were_written(tiny_gguf: Path) -> None:
    torch.testing.assert_close(logits(load_model(str(tiny_gguf))), logits(tiny_model()))


def test_gguf_is_converted_once(tiny_gguf: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lmerge"):
        for load in (load_model, load_tokenizer, load_config, load_model):
            load(str(tiny_gguf))
    assert sum("converting" in message for message in caplog.messages) == 1


def test_changed_gguf_is_converted_again(tiny_gguf: Path) -> None:
    before = model_fingerprint(load_model(str(tiny_gguf)))
    write_gguf(tiny_gguf, tiny_model(seed=1))
    assert model_fingerprint(load_model(str(tiny_gguf))) != before


def test_gguf_tokenizer_keeps_ids_template_and_special_tokens(tiny_gguf: Path) -> None:
    before = AutoTokenizer.from_pretrained(tiny_gguf.parent, gguf_file=tiny_gguf.name)
    after = load_tokenizer(str(tiny_gguf))
    assert after(SAMPLE).input_ids == before(SAMPLE).input_ids
    assert after.chat_template == before.chat_template
    assert after.special_tokens_map == before.special_tokens_map


@pytest.mark.slow
def test_two_processes_may_convert_at_once(tiny_gguf: Path, cache: Path) -> None:
    code = (
        "import sys; from lmerge.source import *;print(model_fingerprint(load_model(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(tiny_gguf)]
    runs = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL)
        for _ in range(2)
    ]
    prints = {run.communicate()[0].strip() for run in runs}
    assert prints == {model_fingerprint(load_model(str(tiny_gguf)))}
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1


def test_left_overs_of_a_killed_conversion_are_cleared(tiny_gguf: Path, cache: Path) -> None:
    load_model(str(tiny_gguf))
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    left = folder.rename(cache / f".{folder.name}.0123abcd.tmp")
    load_model(str(tiny_gguf))
    assert folder.is_dir()
    assert not left.exists()


def test_unwritable_cache_is_refused(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LMERGE_CACHE", str(tmp_path / "file" / "cache"))
    assert "Set LMERGE_CACHE" in refusal(load_model, str(tiny_gguf))


def test_failed_conversion_leaves_nothing_in_the_cache(tiny_gguf: Path, cache: Path) -> None:
    write_gguf(tiny_gguf, tiny_model(), num_blocks=5)
    refusal(load_model, str(tiny_gguf))
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


@pytest.mark.parametrize("keep", [0, 10, 2000, -100])
def test_truncated_gguf_is_refused(tiny_gguf: Path, keep: int) -> None:
    tiny_gguf.write_bytes(tiny_gguf.read_bytes()[:keep])
    assert "GGUF header cannot be read" in refusal(load_model, str(tiny_gguf))


def test_gguf_of_an_unsupported_architecture_is_refused(tiny_gguf: Path) -> None:
    write_gguf(tiny_gguf, tiny_model(), architecture="gemma3")
    assert "got 'gemma3'" in refusal(load_model, str(tiny_gguf))


def test_gguf_with_scaled_rotary_positions_is_refused(tiny_gguf: Path) -> None:
    write_gguf(tiny_gguf, tiny_model(), rope_freqs=True)
    assert "rotary positions" in refusal(load_model, str(tiny_gguf))
