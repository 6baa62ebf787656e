"""The GGUF file gives transformers the model and the tokenizer that the checkpoint gives it."""

import json
import os
from pathlib import Path

import pytest
import torch
from checkpoints import edit_config
from cli_run import run
from gguf import GGUFReader
from made_runs import made_run, merged_state, source
from models import logits
from test_streamed_export import SCALED
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from vocabularies import corpus, sentencepiece_bpe

from lmerge.folders import held
from lmerge.gguf_export import GgufDtype, export_gguf
from lmerge.gguf_tokenizer import LLAMA3_SPLIT
from lmerge.plan import Group, MergePlan
from lmerge.source import load_model
from lmerge.streamed_merge import StreamedMerge

SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
LINEAR = {**PLAIN, "rope_type": "linear", "factor": 4.0}
YARN = {**LINEAR, "rope_type": "yarn", "original_max_position_embeddings": 16}
# transformers takes Qwen3's heads of 128 for granted when it reads a GGUF file.
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama-untied": lambda: LlamaConfig(**{**SIZES, "tie_word_embeddings": False}),
    "llama-ungrouped": lambda: LlamaConfig(**{**SIZES, "num_key_value_heads": 4}),
    "llama-wide-heads": lambda: LlamaConfig(**SIZES, head_dim=12),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=128),
}


def checkpoint_of(folder: Path, name: str) -> Path:
    source(folder)  # for its tokenizer
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or key.endswith(".bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def both(tmp_path: Path, folder: Path, **options: object) -> tuple[PreTrainedModel, Path]:
    """The merged model in memory, and the GGUF file of it."""
    merged, state = merged_state(load_model(str(folder)), repair=False)
    path = tmp_path / "out.gguf"
    export_gguf(folder, StreamedMerge(folder, state), path, **options)
    return merged.plain(), path


def from_gguf(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_the_same_logits_back(tmp_path: Path, name: str) -> None:
    plain, path = both(tmp_path, checkpoint_of(tmp_path / "source", name))
    torch.testing.assert_close(logits(from_gguf(path)), logits(plain), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_matrices_may_be_rounded_and_vectors_are_not(tmp_path: Path, dtype: GgufDtype) -> None:
    plain, path = both(tmp_path, checkpoint_of(tmp_path / "source", "llama"), dtype=dtype)
    narrow = {"F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    found = dict(from_gguf(path).named_parameters())
    for name, wanted in plain.named_parameters():
        rounded = wanted.to(narrow).float() if wanted.ndim > 1 else wanted
        assert torch.equal(found[name].float(), rounded), name


def test_a_checkpoint_in_bfloat16_keeps_its_dtype(tmp_path: Path) -> None:
    _, path = both(tmp_path, source(tmp_path / "source", dtype=torch.bfloat16))
    kinds = {str(tensor.tensor_type.name) for tensor in GGUFReader(path).tensors}
    assert kinds == {"F32", "BF16"}


def test_the_tokenizer_is_the_same(tmp_path: Path) -> None:
    folder = checkpoint_of(tmp_path / "source", "llama")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"]["vocab"] |= {"La": 256, "Lay": 257}
    data["model"]["merges"] = [["L", "a"], ["La", "y"]]
    for entry, i in zip(data["added_tokens"], (258, 259), strict=True):
        entry["id"] = i
    (folder / "tokenizer.json").write_text(json.dumps(data))
    _, path = both(tmp_path, folder)
    before = AutoTokenizer.from_pretrained(folder)
    after = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = "Layers merge, 123 of them.\n\nÄrger <|eos|> 雪"
    assert before(text).input_ids[0] == 257
    assert after(text).input_ids == before(text).input_ids
    assert after.chat_template == "{{ messages }}"
    assert (after.bos_token, after.eos_token) == ("<|bos|>", "<|eos|>")


def sentencepiece_source(folder: Path, *, every_way: bool) -> Path:
    """A tiny model with a SentencePiece BPE tokenizer, whose tokens may be joined in every way."""
    data = json.loads(sentencepiece_bpe().to_str())
    vocab, merges = data["model"]["vocab"], data["model"]["merges"]
    ranks = {"".join(pair): rank for rank, pair in enumerate(merges)}
    cuts = [(token[:i], token[i:]) for token in ranks for i in range(1, len(token))]
    if every_way:
        known = [pair for pair in cuts if pair[0] in vocab and pair[1] in vocab]
        data["model"]["merges"] = sorted(known, key=lambda pair: ranks["".join(pair)])
    config = LlamaConfig(**{**SIZES, "vocab_size": len(vocab)})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer = Tokenizer.from_str(json.dumps(data))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    return folder


def test_a_sentencepiece_tokenizer_is_the_same(tmp_path: Path) -> None:
    folder = sentencepiece_source(tmp_path / "source", every_way=True)
    _, path = both(tmp_path, folder)
    before = AutoTokenizer.from_pretrained(folder)
    after = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    fields = GGUFReader(path).fields
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"].contents()
    for text in (
        "Which nerve supplies the muscle?",
        "Ärger 雪, twice\n\nand a line.",
        *corpus()[:9],
    ):
        ids = before(text, add_special_tokens=False).input_ids
        assert after(text, add_special_tokens=False).input_ids == ids


def test_a_tokenizer_that_scores_cannot_describe_is_refused(tmp_path: Path) -> None:
    folder = sentencepiece_source(tmp_path / "source", every_way=False)
    with pytest.raises(ValueError, match="in one way though"):
        both(tmp_path, folder)


@pytest.mark.parametrize(
    ("split", "name"),
    [
        (pre_tokenizers.Digits(individual_digits=True), "smollm"),
        (pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"), "llama-bpe"),
        (pre_tokenizers.Split(Regex(LLAMA3_SPLIT.replace("{1,3}", "")), "isolated"), "qwen2"),
        (None, "gpt-2"),
    ],
)
def test_llama_cpp_is_told_how_text_is_split(
    tmp_path: Path, split: pre_tokenizers.PreTokenizer | None, name: str
) -> None:
    folder = checkpoint_of(tmp_path / "source", "llama")
    if split is not None:
        resplit(folder, split)
    _, path = both(tmp_path, folder)
    assert GGUFReader(path).fields["tokenizer.ggml.pre"].contents() == name


def resplit(folder: Path, split: pre_tokenizers.PreTokenizer) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.save(str(folder / "tokenizer.json"))


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def word_tokenizer(folder: Path) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    (folder / "tokenizer.json").write_text(json.dumps(data))


REFUSED = {
    "scaled by 'yarn'": lambda folder: edit_config(folder, rope_parameters=YARN),
    "a part of each head": lambda folder: edit_config(
        folder, rope_parameters={**PLAIN, "partial_rotary_factor": 0.5}
    ),
    "byte-level BPE": no_tokenizer,
    "SentencePiece BPE": word_tokenizer,
    "splits text": lambda f: resplit(f, pre_tokenizers.Split(Regex("x+"), "isolated")),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_a_gguf_file_cannot_hold_is_refused(tmp_path: Path, words: str) -> None:
    folder = checkpoint_of(tmp_path / "source", "llama")
    REFUSED[words](folder)
    with pytest.raises(ValueError, match=words) as caught:
        both(tmp_path, folder)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_llama_cpp_divides_the_rotary_frequencies_as_transformers_scales_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = checkpoint_of(tmp_path / "source", "llama")
    plain = load_model(str(folder)).model.rotary_emb.inv_freq
    edit_config(folder, rope_parameters=SCALED)
    scaled = load_model(str(folder)).model.rotary_emb.inv_freq
    _, path = both(tmp_path, folder)
    found = {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
    factors = torch.tensor(found["rope_freqs.weight"])
    assert (factors.min() > 1, factors.max()) == (True, SCALED["factor"])
    torch.testing.assert_close(plain / factors, scaled)
    assert "transformers does not" in caplog.text
    with pytest.raises(ValueError, match="plain rotary positions"):
        load_model(str(path))


def test_linear_scaling_is_in_the_metadata(tmp_path: Path) -> None:
    folder = checkpoint_of(tmp_path / "source", "qwen2")
    edit_config(folder, rope_parameters=LINEAR)
    _, path = both(tmp_path, folder)
    fields = GGUFReader(path).fields
    assert fields["qwen2.rope.scaling.type"].contents() == "linear"
    assert fields["qwen2.rope.scaling.factor"].contents() == 4.0


def test_frequencies_that_llama_cpp_reads_of_llama_alone_are_refused(tmp_path: Path) -> None:
    folder = checkpoint_of(tmp_path / "source", "qwen2")
    edit_config(folder, rope_parameters=SCALED)
    with pytest.raises(ValueError, match="qwen2 that are scaled by 'llama3'"):
        both(tmp_path, folder)


def test_another_source_is_refused_and_nothing_stays(tmp_path: Path) -> None:
    folder = checkpoint_of(tmp_path / "source", "llama")
    _, state = merged_state(load_model(str(folder)), repair=False)
    merge = StreamedMerge(folder, state)
    with pytest.raises(ValueError, match="fingerprint"):
        export_gguf(folder, merge, tmp_path / "out.gguf", fingerprint="0123")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_a_kill_left_is_removed_unless_a_process_still_writes_it(tmp_path: Path) -> None:
    folder = checkpoint_of(tmp_path / "source", "llama")
    for name in ("dead", "busy"):
        (tmp_path / f".out.gguf.{name}.tmp").touch()
        os.utime(tmp_path / f".out.gguf.{name}.tmp", (0, 0))
    with held(tmp_path / ".out.gguf.busy.tmp"):
        both(tmp_path, folder)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".out.gguf.busy.tmp", "out.gguf", "source"]


@pytest.mark.parametrize("name", ["llama-biases", "mistral", "qwen3"])
def test_biases_and_windows_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="convert_hf_to_gguf"):
        both(tmp_path, source(tmp_path / "source", name))


def test_the_command_writes_a_gguf_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merged = made_run(tmp_path / "run", source(tmp_path / "source"))
    path = tmp_path / "made.gguf"
    run("export", tmp_path / "run", "--gguf", path)
    torch.testing.assert_close(logits(from_gguf(path)), logits(merged.plain()), rtol=0, atol=1e-5)
    assert not (tmp_path / "run" / "model").exists()
    with pytest.raises(SystemExit):
        run("export", tmp_path / "run", "--gguf", path)
    assert "made.gguf already exists" in capsys.readouterr().err
    run("export", tmp_path / "run", "--gguf", path, "--out", tmp_path / "out", "--overwrite=true")
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.slow
def test_the_real_model_survives_gguf(tmp_path: Path) -> None:
    plan = MergePlan(num_layers=30, groups=(Group(members=(20, 21, 22), anchor=20),))
    merged = made_run(tmp_path / "run", Path("smollm2-135m"), plan=plan, drop=True)
    path = tmp_path / "made.gguf"
    run("export", tmp_path / "run", "--gguf", path)
    assert GGUFReader(path).fields["tokenizer.ggml.pre"].contents() == "smollm"
    torch.testing.assert_close(logits(from_gguf(path)), logits(merged.plain()), rtol=0, atol=1e-4)
