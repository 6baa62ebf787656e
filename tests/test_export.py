import json
import os
import re
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from made_runs import export_unmerged
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lmerge.big_files import BigFile
from lmerge.export import verify_export, write_card
from lmerge.files import read_tensors
from lmerge.llama import decoder_layers, with_layer_index, with_layers
from lmerge.source import Dtype, load_model, load_tokenizer, model_fingerprint

TOKEN_BT = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))

RELOAD = """
import json, sys
sys.modules["lmerge"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
token_BT = tokenizer("Layers merge.", return_tensors="pt").input_ids
runs = [
    model.generate(token_BT, max_new_tokens=20, do_sample=False, use_cache=cache).tolist()
    for cache in (True, False)
]
with torch.no_grad():
    print(json.dumps({"logits": model(token_BT).logits.tolist(), "runs": runs}))
"""


def shorter(model: PreTrainedModel, origins: list[int]) -> PreTrainedModel:
    """The model with only the layers `origins`."""
    layers = decoder_layers(model)
    kept = [with_layer_index(layers[origin], index) for index, origin in enumerate(origins)]
    return with_layers(model, kept, origins)


def tiny_qwen() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=2,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    return Qwen2ForCausalLM(config).eval()


def saved(
    model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> Path:
    model.save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return folder


def export(
    model: PreTrainedModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: object,
) -> None:
    """Export a model from a source on disk that is gone afterwards."""
    with tempfile.TemporaryDirectory() as name:
        source = saved(model, Path(name), tokenizer)
        export_unmerged(source, folder, **{"card": "# card\n", **options})


def refusal(call: object, *arguments: object, **options: object) -> str:
    assert callable(call)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the callers check the text
        call(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def merged() -> PreTrainedModel:
    return shorter(tiny_model(), [0, 1, 3])


@pytest.fixture(scope="module")
def exported(merged: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "model"
    export(merged, folder)
    return folder


@pytest.fixture(scope="module")
def reloaded(exported: Path) -> dict[str, list[list[list[float]]]]:
    """What a process that cannot import lmerge gets from the exported folder."""
    command = [sys.executable, "-W", "error", "-c", RELOAD, str(exported)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_logits_are_the_same_without_lmerge(
    reloaded: dict[str, object], merged: PreTrainedModel
) -> None:
    token_BT = byte_tokenizer()("Layers merge.", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(reloaded["logits"]), merged(token_BT).logits)


def test_cache_does_not_change_what_is_generated(reloaded: dict[str, list[object]]) -> None:
    with_cache, without_cache = reloaded["runs"]
    assert with_cache == without_cache


def test_exported_model_loads_as_a_source(exported: Path, merged: PreTrainedModel) -> None:
    assert model_fingerprint(load_model(str(exported))) == model_fingerprint(merged)


def test_exported_tokenizer_gives_the_same_ids(exported: Path) -> None:
    text = "Übung 日本 <|eos|>"
    assert load_tokenizer(str(exported))(text).input_ids == byte_tokenizer()(text).input_ids


def test_chat_template_is_exported(tmp_path: Path, merged: PreTrainedModel) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    export(merged, tmp_path / "out", tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


def test_verify_returns_no_difference(exported: Path, merged: PreTrainedModel) -> None:
    assert verify_export(exported, merged, TOKEN_BT) == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtype_survives_the_export(tmp_path: Path, tiny_dir: Path, dtype: Dtype) -> None:
    model = load_model(str(tiny_dir), dtype)
    export(model, tmp_path / "out")
    assert load_model(str(tmp_path / "out")).dtype == model.dtype
    assert verify_export(tmp_path / "out", model, TOKEN_BT) == 0


def test_verify_allows_for_the_steps_of_a_narrow_dtype(tmp_path: Path) -> None:
    model = tiny_model()
    export(model.to(torch.bfloat16), tmp_path / "out")
    # Casting a whole module also rounds its rotary frequencies, which a checkpoint does not hold.
    assert 1e-4 < verify_export(tmp_path / "out", model, TOKEN_BT) < 0.5


def test_verify_refuses_other_weights(exported: Path) -> None:
    other = shorter(tiny_model(seed=1), [0, 1, 3])
    assert "difference of" in refusal(verify_export, exported, other, TOKEN_BT)


def test_verify_refuses_logits_that_are_not_numbers(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    export(model, tmp_path / "out")
    assert "difference of nan" in refusal(verify_export, tmp_path / "out", model, TOKEN_BT)


def test_verify_refuses_a_damaged_file(tmp_path: Path, merged: PreTrainedModel) -> None:
    export(merged, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert "exported checkpoint cannot be read" in refusal(
        verify_export, tmp_path / "out", merged, TOKEN_BT
    )


def test_config_counts_the_layers(exported: Path) -> None:
    assert AutoConfig.from_pretrained(exported).num_hidden_layers == 3


def test_sliding_layers_stay_with_their_layers(tmp_path: Path) -> None:
    export(shorter(tiny_qwen(), [0, 2, 3]), tmp_path / "out")
    expected = ["full_attention", "sliding_attention", "sliding_attention"]
    assert AutoConfig.from_pretrained(tmp_path / "out").layer_types == expected


def test_model_with_sliding_layers_and_biases_verifies(tmp_path: Path) -> None:
    model = shorter(tiny_qwen(), [0, 2, 3])
    export(model, tmp_path / "out")
    assert verify_export(tmp_path / "out", model, TOKEN_BT) == 0


def test_tied_embeddings_are_stored_once(exported: Path) -> None:
    tensors, _ = read_tensors(exported / "model.safetensors")
    assert "lm_head.weight" not in tensors


def test_large_weights_are_split(tmp_path: Path, merged: PreTrainedModel) -> None:
    export(merged, tmp_path / "out", max_shard_size="50kB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert verify_export(tmp_path / "out", merged, TOKEN_BT) == 0


def test_export_holds_no_pickle(exported: Path) -> None:
    assert {path.suffix for path in exported.iterdir()} <= {".json", ".safetensors", ".md"}


def test_export_does_not_tell_where_the_source_lay(tmp_path: Path, tiny_dir: Path) -> None:
    model, tokenizer = load_model(str(tiny_dir)), load_tokenizer(str(tiny_dir))
    export(model, tmp_path / "out", tokenizer)
    texts = [path.read_text() for path in (tmp_path / "out").glob("*.json")]
    assert not any(re.search(f"{tiny_dir}|local", text) for text in texts)


def test_exported_files_have_the_usual_permissions(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    files = [tmp_path / "usual", *exported.iterdir()]
    assert len({stat.S_IMODE(path.stat().st_mode) for path in files}) == 1


def test_export_prints_nothing(
    tmp_path: Path, merged: PreTrainedModel, capfd: pytest.CaptureFixture[str]
) -> None:
    source = saved(merged, tmp_path / "source")
    capfd.readouterr()
    export_unmerged(source, tmp_path / "out")
    assert capfd.readouterr() == ("", "")


def test_existing_folder_is_refused(tmp_path: Path, merged: PreTrainedModel) -> None:
    export(merged, tmp_path / "out")
    assert "already exists" in refusal(export, merged, tmp_path / "out")


def test_existing_checkpoint_is_replaced_where_allowed(
    tmp_path: Path, merged: PreTrainedModel
) -> None:
    export(tiny_model(), tmp_path / "out", max_shard_size="50kB")
    export(merged, tmp_path / "out", overwrite=True)
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]


def test_folder_that_is_no_checkpoint_is_never_replaced(
    tmp_path: Path, merged: PreTrainedModel
) -> None:
    (tmp_path / "thesis.tex").touch()
    assert "with thesis.tex but no" in refusal(export, merged, tmp_path, overwrite=True)


def test_unwritable_parent_is_refused(tmp_path: Path, merged: PreTrainedModel) -> None:
    (tmp_path / "file.txt").touch()
    assert "must be writable" in refusal(export, merged, tmp_path / "file.txt" / "out")


@pytest.mark.parametrize(("owner", "name"), [(os, "rename"), (Path, "mkdir")])
def test_failed_export_leaves_nothing(
    tmp_path: Path,
    merged: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    owner: object,
    name: str,
) -> None:
    def refuse(*_arguments: object, exist_ok: bool = False, **_options: object) -> None:
        if not exist_ok:  # the folder that is there already
            raise OSError(30, "Read-only file system")

    source, out = saved(merged, tmp_path / "source"), tmp_path / "new" / "out"
    out.parent.mkdir()
    monkeypatch.setattr(owner, name, refuse)
    assert "Read-only file system" in refusal(export_unmerged, source, out)
    assert not list(out.parent.iterdir())


def test_crash_in_the_middle_leaves_the_old_checkpoint(
    tmp_path: Path, merged: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    old, source = tiny_model(), saved(merged, tmp_path / "source")
    export(old, tmp_path / "out")
    monkeypatch.setattr(BigFile, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        export_unmerged(source, tmp_path / "out", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert verify_export(tmp_path / "out", old, TOKEN_BT) == 0


def test_card_is_exported(exported: Path) -> None:
    assert (exported / "README.md").read_text() == "# card\n"


def test_card_can_be_rewritten_alone(tmp_path: Path, merged: PreTrainedModel) -> None:
    export(merged, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("[!R]*")}
    write_card(tmp_path / "out", "# measured\n")
    assert (tmp_path / "out" / "README.md").read_text() == "# measured\n"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("[!R]*")} == before


def test_card_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    assert "must hold an exported checkpoint" in refusal(write_card, tmp_path, "")


def test_plain_auto_class_fills_nothing_with_random_weights(exported: Path) -> None:
    _, info = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


@pytest.mark.slow
def test_real_model_survives_the_export(tmp_path: Path) -> None:
    model = shorter(load_model("smollm2-135m"), [*range(12), *range(18, 30)])
    tokenizer = load_tokenizer("smollm2-135m")
    export(model, tmp_path / "out", tokenizer)
    token_BT = tokenizer(
        "Layers merge, and a shorter model remains.", return_tensors="pt"
    ).input_ids
    assert verify_export(tmp_path / "out", model, token_BT) == 0
    assert load_tokenizer(str(tmp_path / "out")).chat_template == tokenizer.chat_template
