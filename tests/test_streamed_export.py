"""The streamed export equals the model in memory, bit for bit, and plain transformers loads it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import edit_config
from cli_run import fit, run
from conftest import byte_tokenizer, tiny_config
from made_runs import PLAN, merged_state, source
from models import VARIANTS, logits, plan_of, same, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lmerge.alphas import AlphaConfig, Granularity
from lmerge.llama import decoder_layers, layer_tensors
from lmerge.merged import MergedLlama
from lmerge.runs import RunState
from lmerge.source import Dtype, load_model, model_fingerprint
from lmerge.streamed_export import export_streamed
from lmerge.streamed_merge import StreamedMerge

SCALED = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def reloaded(folder: Path) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def written(folder: Path) -> dict[str, Tensor]:
    parts = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: tensor for part in parts for name, tensor in part.items()}


def expect_equal(folder: Path, plain: PreTrainedModel) -> None:
    """The checkpoint holds the weights of the model in memory, and computes what it computes."""
    found, wanted = written(folder), dict(plain.named_parameters())
    assert same(found, {name: p.detach() for name, p in wanted.items()})
    assert torch.equal(logits(reloaded(folder)), logits(plain))


@pytest.mark.parametrize(("name", "shard"), [("llama", "5GB"), *((n, "20kB") for n in VARIANTS)])
def test_streamed_weights_are_those_in_memory(tmp_path: Path, name: str, shard: str) -> None:
    folder = source(tmp_path / "source", name, max_shard_size=shard)
    merged, state = merged_state(load_model(str(folder)))
    export_streamed(
        folder, StreamedMerge(folder, state), tmp_path / "out", card="", max_shard_size=shard
    )
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (shard == "20kB")
    expect_equal(tmp_path / "out", merged.plain())


@pytest.mark.parametrize("grain", ["layer", "tensor", "head", "neuron"])
@pytest.mark.parametrize("kind", ["none", "neurons", "full", "rowwise"])
def test_every_alignment_and_granularity(tmp_path: Path, kind: str, grain: Granularity) -> None:
    folder = source(tmp_path / "source", "llama-biases")
    merged, state = merged_state(load_model(str(folder)), kind, grain, repair=False)
    merge = StreamedMerge(folder, state)
    for name, wanted in merged.plain().named_parameters():
        found = merge.tensor(name)
        assert torch.equal(found if isinstance(found, Tensor) else found.read(), wanted), name


def test_refits_of_layers_in_no_group_are_written(tmp_path: Path) -> None:
    folder = source(tmp_path / "source")
    plan = plan_of([0, 1], anchors=[1])
    merged, state = merged_state(load_model(str(folder)), plan=plan, repair=False)
    generator = torch.Generator().manual_seed(7)
    kept = layer_tensors(decoder_layers(merged.causal_lm)[1])
    names = ("down_proj", "o_proj", "input_layernorm")
    new = {name: torch.randn(kept[name].shape, generator=generator) for name in names}
    merged.refit_layer(1, new)
    state.kept_refits = merged.kept_refits
    export_streamed(folder, StreamedMerge(folder, state), tmp_path / "out", card="")
    expect_equal(tmp_path / "out", merged.plain())
    assert torch.equal(
        written(tmp_path / "out")["model.layers.1.mlp.down_proj.weight"], new["down_proj"]
    )


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_every_dtype_rounds_as_in_memory(tmp_path: Path, dtype: Dtype) -> None:
    folder = source(tmp_path / "source", dtype=torch.bfloat16)
    merged, state = merged_state(load_model(str(folder), dtype), "neurons")
    merge = StreamedMerge(folder, state, dtype=dtype)
    export_streamed(folder, merge, tmp_path / "out", card="")
    assert reloaded(tmp_path / "out").dtype == merged.plain().dtype
    expect_equal(tmp_path / "out", merged.plain())


def test_wider_sums_may_be_written_in_the_dtype_of_the_source(tmp_path: Path) -> None:
    folder = source(tmp_path / "source", dtype=torch.bfloat16)
    merged, state = merged_state(load_model(str(folder), "float32"))
    merge = StreamedMerge(folder, state, dtype="float32", out_dtype="auto")
    export_streamed(folder, merge, tmp_path / "out", card="")
    wanted = dict(merged.plain().named_parameters())
    assert same(written(tmp_path / "out"), {n: p.bfloat16() for n, p in wanted.items()})


def test_layers_that_add_nothing_are_not_read(tmp_path: Path) -> None:
    folder = source(tmp_path / "source")
    model = load_model(str(folder))
    merged = MergedLlama(model, PLAN, {}, AlphaConfig())
    merge = StreamedMerge(folder, RunState(plan=PLAN, alphas=merged.alphas()))
    export_streamed(folder, merge, tmp_path / "out", card="")
    expect_equal(tmp_path / "out", merged.plain())
    read = {name for name in merge._samples if name.endswith("down_proj.weight")}
    assert read == {f"model.layers.{i}.mlp.down_proj.weight" for i in (1, 2)}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_streamed_fingerprint_is_that_of_the_model(tmp_path: Path, name: str) -> None:
    folder = source(tmp_path / "source", name, torch.bfloat16)
    dtypes: tuple[Dtype, ...] = ("auto", "float16")
    for dtype in dtypes:
        model = load_model(str(folder), dtype)
        merge = StreamedMerge(folder, merged_state(model)[1], dtype=dtype)
        merge.tensor("model.norm.weight")
        assert merge.fingerprint() == model_fingerprint(model)


def test_weights_of_another_source_are_refused_and_nothing_stays(tmp_path: Path) -> None:
    folder = source(tmp_path / "source")
    merge = StreamedMerge(folder, merged_state(load_model(str(folder)))[1])
    with pytest.raises(ValueError, match="fingerprint 0123"):
        export_streamed(folder, merge, tmp_path / "out", card="", fingerprint="0123")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_scaled_rotary_positions_survive(tmp_path: Path) -> None:
    config = tiny_config(rope_parameters=SCALED)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    merged, state = merged_state(load_model(str(tmp_path / "source")))
    merge = StreamedMerge(tmp_path / "source", state)
    export_streamed(tmp_path / "source", merge, tmp_path / "out", card="")
    expect_equal(tmp_path / "out", merged.plain())
    assert AutoConfig.from_pretrained(tmp_path / "out").rope_parameters == SCALED


def test_layer_types_and_window_counts_follow_the_layers(tmp_path: Path) -> None:
    folder = source(tmp_path / "source", "qwen2")
    edit_config(folder, layer_types="remove")  # as the published configs
    merge = StreamedMerge(folder, merged_state(load_model(str(folder)))[1])
    export_streamed(folder, merge, tmp_path / "out", card="")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["layer_types"] == ["full_attention", "sliding_attention"]
    assert config["max_window_layers"] == 1
    assert config["num_hidden_layers"] == 2


def test_other_keys_of_the_config_stay_as_they_were(tmp_path: Path) -> None:
    folder = source(tmp_path / "source")
    edit_config(folder, rope_parameters="remove", rope_theta=10000.0, torch_dtype="float32")
    edit_config(folder, dtype="remove", auto_map={"AutoModel": "evil.Model"})
    merge = StreamedMerge(folder, merged_state(load_model(str(folder)))[1])
    export_streamed(folder, merge, tmp_path / "out", card="")
    before = json.loads((folder / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    del before["auto_map"]
    assert after == {**before, "num_hidden_layers": 2}


def test_a_second_copy_of_a_tied_head_is_dropped(tmp_path: Path) -> None:
    folder = source(tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    merged, state = merged_state(load_model(str(folder)))
    export_streamed(folder, StreamedMerge(folder, state), tmp_path / "out", card="")
    expect_equal(tmp_path / "out", merged.plain())


def test_tokenizer_template_and_licence_come_along_and_code_does_not(tmp_path: Path) -> None:
    folder = source(tmp_path / "source")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE").write_text("terms")
    (folder / "tokenizer_evil.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    merge = StreamedMerge(folder, merged_state(load_model(str(folder)))[1])
    export_streamed(folder, merge, tmp_path / "out", card="# card\n")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        *("README.md", "LICENSE", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert found("Layers merge.").input_ids == byte_tokenizer()("Layers merge.").input_ids


def test_files_have_the_usual_permissions(tmp_path: Path) -> None:
    folder = source(tmp_path / "source")
    merge = StreamedMerge(folder, merged_state(load_model(str(folder)))[1])
    export_streamed(folder, merge, tmp_path / "out", card="")
    (tmp_path / "usual").touch()
    modes = {p.stat().st_mode for p in (tmp_path / "usual", *(tmp_path / "out").iterdir())}
    assert len(modes) == 1


@pytest.mark.parametrize("name", VARIANTS)
def test_generation_is_the_same_with_and_without_a_cache(tmp_path: Path, name: str) -> None:
    folder = source(tmp_path / "source", name)
    merge = StreamedMerge(folder, merged_state(load_model(str(folder)))[1])
    export_streamed(folder, merge, tmp_path / "out", card="")
    model, prompt = reloaded(tmp_path / "out"), tokens(1)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    runs = [model.generate(prompt, use_cache=cache, **options) for cache in (True, False)]
    assert torch.equal(*runs)


@pytest.mark.parametrize("size", ["0", "-1GB", "many", "nanGB", ""])
def test_sizes_that_are_none_are_refused(tmp_path: Path, size: str) -> None:
    folder = source(tmp_path / "source")
    merge = StreamedMerge(folder, merged_state(load_model(str(folder)))[1])
    with pytest.raises(ValueError, match=r"^`max_shard_size` must be a size above 0"):
        export_streamed(folder, merge, tmp_path / "out", card="", max_shard_size=size)
    assert not (tmp_path / "out").exists()


# The command, on a run with alignment, neuron alphas and repair.


@pytest.fixture(scope="module")
def run_dir(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "run"
    fit(tiny_dir, folder, "--model.optimizer=torch.optim.Adam", "--model.optimizer.lr=0.01")
    assert (folder / "repair.safetensors").is_file()
    return folder


def test_the_command_writes_what_the_end_of_fit_wrote(run_dir: Path, tmp_path: Path) -> None:
    run("export", run_dir, "--out", tmp_path / "out", "--check=true", "--max_shard_size=30kB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert same(written(tmp_path / "out"), written(run_dir / "model"))
    assert torch.equal(logits(reloaded(tmp_path / "out")), logits(reloaded(run_dir / "model")))


def test_the_card_shows_results_and_provenance(run_dir: Path, tmp_path: Path) -> None:
    run("export", run_dir, "--out", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    plan = json.loads((run_dir / "plan.json").read_text())
    for words in ("loss on en text", "gate: ", plan["source"], "seed: 0", "data_fingerprint val"):
        assert words in card


def test_an_old_export_is_replaced_only_when_asked(run_dir: Path, tmp_path: Path) -> None:
    run("export", run_dir, "--out", tmp_path / "out")
    with pytest.raises(SystemExit):
        run("export", run_dir, "--out", tmp_path / "out")
    run("export", run_dir, "--out", tmp_path / "out", "--overwrite=true", "--dtype=bfloat16")
    assert reloaded(tmp_path / "out").dtype == torch.bfloat16
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_source_that_moved_is_given(run_dir: Path, tiny_dir: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    (moved / "config.yaml").unlink()
    with pytest.raises(SystemExit):
        run("export", moved)
    run("export", moved, "--source", tiny_dir)
    assert same(written(moved / "model"), written(run_dir / "model"))
