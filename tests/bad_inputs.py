"""Bad inputs by name: each damages a tiny checkpoint or run, and gives a command that must fail."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from checkpoints import edit_config
from cli_run import SMALL
from safetensors.torch import load_file, save_file

from lmerge.files import read_tensors, write_tensors

Args = tuple[str | Path, ...]


class Bad(NamedTuple):
    """A command that must fail, and words of its one line."""

    args: Args
    words: tuple[str, ...]


class Place(NamedTuple):
    """Where a case makes its files."""

    folder: Path
    source: Path
    """A tiny checkpoint in shards, with a tokenizer."""
    run: Path
    """A finished run on it."""


Case = Callable[[Place], Bad]
CASES: dict[str, Case] = {}


def case(make: Case) -> Case:
    CASES[make.__name__.replace("_", " ")] = make
    return make


def export(place: Place, *options: str | Path) -> Args:
    return ("export", place.run, "--out", place.folder / "out", *options)


def fit(place: Place, *options: str | Path) -> Args:
    run_dir = f"--run_dir={place.folder / 'new'}"
    return ("fit", f"--model.source={place.source}", run_dir, *SMALL, *options)


def shard(place: Place) -> Path:
    return sorted(place.source.glob("model-*.safetensors"))[1]


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(path: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    tensors = {name: change(name, tensor) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def edit_index(place: Place, file: str) -> None:
    path = place.source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = file
    path.write_text(json.dumps(index))


# The source.


@case
def corrupt_safetensors(place: Place) -> Bad:
    shard(place).write_bytes(bytes(range(256)) * 40)
    return Bad(export(place), (shard(place).name, "cannot be read"))


@case
def truncated_shard(place: Place) -> Bad:
    shard(place).write_bytes(shard(place).read_bytes()[:-100])
    return Bad(export(place), (shard(place).name, "cannot be read"))


@case
def empty_shard(place: Place) -> Bad:
    shard(place).write_bytes(b"")
    return Bad(export(place), (shard(place).name, "cannot be read"))


@case
def header_longer_than_the_file(place: Place) -> Bad:
    shard(place).write_bytes(struct.pack("<Q", 2**62) + b"{}")
    return Bad(export(place), (shard(place).name, "cannot be read"))


@case
def index_names_a_missing_file(place: Place) -> Bad:
    shard(place).unlink()
    return Bad(
        export(place),
        ("all files that its index names", "without model-"),
    )


@case
def index_reaches_out_of_its_folder(place: Place) -> Bad:
    shutil.copy(shard(place), place.folder / "secret.safetensors")
    edit_index(place, "../secret.safetensors")
    return Bad(export(place), ("its own folder", "../secret.safetensors"))


@case
def index_names_an_absolute_path(place: Place) -> Bad:
    shutil.copy(shard(place), place.folder / "secret.safetensors")
    edit_index(place, str(place.folder / "secret.safetensors"))
    return Bad(export(place), ("its own folder", "secret.safetensors"))


@case
def index_names_a_pickle(place: Place) -> Bad:
    (place.source / "model.bin").write_bytes(b"x")
    edit_index(place, "model.bin")
    return Bad(export(place), ("safetensors files of its own folder", "model.bin"))


@case
def index_gives_a_weight_to_the_wrong_shard(place: Place) -> Bad:
    edit_index(place, sorted(place.source.glob("model-*.safetensors"))[0].name)
    return Bad(export(place), ("where its index says", "model.norm.weight"))


@case
def index_that_is_no_json(place: Place) -> Bad:
    (place.source / "model.safetensors.index.json").write_text("{")
    return Bad(export(place), ("model.safetensors.index.json cannot be read",))


@case
def index_without_a_map(place: Place) -> Bad:
    (place.source / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    return Bad(export(place), ("model.safetensors.index.json cannot be read",))


@case
def weights_in_whole_numbers(place: Place) -> Bad:
    edit_tensors(shard(place), lambda name, tensor: tensor.to(torch.int8))
    return Bad(export(place), ("cannot be read", "I8"))


@case
def nan_weights(place: Place) -> Bad:
    for path in place.source.glob("model-*.safetensors"):
        edit_tensors(path, lambda name, tensor: tensor.index_fill(0, torch.tensor([0]), torch.nan))
    return Bad(fit(place), ("finite", "model."))


@case
def infinite_weights_in_a_merged_layer(place: Place) -> Bad:
    for path in place.source.glob("model-*.safetensors"):
        edit_tensors(path, lambda name, t: t * torch.inf if "layers.1.mlp" in name else t)
    return Bad(export(place), ("finite", "model.layers."))


@case
def weights_of_another_width(place: Place) -> Bad:
    edit_config(place.source, intermediate_size=64)
    return Bad(export(place), ("fit its config.json", "mlp", "(64, 32)"))


@case
def fewer_layers_than_the_config_says(place: Place) -> Bad:
    edit_config(place.source, num_hidden_layers=5, layer_types="remove")
    return Bad(fit(place), ("without", "model.layers.4"))


@case
def config_that_is_no_json(place: Place) -> Bad:
    (place.source / "config.json").write_text("llama")
    return Bad(export(place), ("readable config.json",))


@case
def config_that_is_a_list(place: Place) -> Bad:
    (place.source / "config.json").write_text("[]")
    return Bad(export(place), ("readable config.json",))


@case
def config_without_a_model_type(place: Place) -> Bad:
    edit_config(place.source, model_type="remove")
    return Bad(export(place), ("llama, mistral, qwen2, qwen3", "None"))


@case
def architecture_that_is_not_supported(place: Place) -> Bad:
    edit_config(place.source, model_type="gemma3_text")
    return Bad(export(place), ("llama, mistral, qwen2, qwen3", "gemma3_text"))


@case
def architecture_with_its_own_code(place: Place) -> Bad:
    edit_config(place.source, model_type="mine", auto_map={"AutoConfig": "mine.Config"})
    (place.source / "mine.py").write_text("raise SystemExit('ran')")
    return Bad(export(place), ("own code, which is never run", "mine"))


@case
def heads_that_do_not_fit(place: Place) -> Bad:
    edit_config(place.source, num_attention_heads=0)
    return Bad(export(place), ("config.json cannot be read",))


@case
def negative_width(place: Place) -> Bad:
    edit_config(place.source, hidden_size=-32)
    return Bad(export(place), ("config.json cannot be read",))


@case
def text_in_place_of_a_number(place: Place) -> Bad:
    edit_config(place.source, num_hidden_layers="four")
    return Bad(export(place), ("config.json cannot be read",))


@case
def quantised_weights(place: Place) -> Bad:
    edit_config(place.source, quantization_config={"quant_method": "gptq"})
    return Bad(export(place), ("quantised",))


@case
def adapter_beside_the_weights(place: Place) -> Bad:
    (place.source / "adapter_config.json").write_text("{}")
    return Bad(export(place), ("adapter",))


def only_pickle(place: Place, name: str) -> Bad:
    for path in place.source.glob("model*"):
        path.unlink()
    torch.save({}, place.source / name)
    return Bad(export(place), ("safetensors", name, "can run code"))


@case
def only_a_bin_file(place: Place) -> Bad:
    return only_pickle(place, "pytorch_model.bin")


@case
def only_a_pt_file(place: Place) -> Bad:
    return only_pickle(place, "model.pt")


@case
def no_tokenizer(place: Place) -> Bad:
    for path in place.source.glob("tokenizer*"):
        path.unlink()
    return Bad(fit(place), ("must have a tokenizer",))


@case
def corrupt_tokenizer(place: Place) -> Bad:
    (place.source / "tokenizer.json").write_text("{")
    return Bad(fit(place), ("its tokenizer cannot be read",))


@case
def source_that_is_a_shard(place: Place) -> Bad:
    return Bad(export(place, "--source", shard(place)), ("folder or a .gguf file",))


@case
def corrupt_gguf(place: Place) -> Bad:
    path = place.folder / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    return Bad(export(place, "--source", path), ("broken.gguf", "cannot be read"))


@case
def source_that_is_not_there(place: Place) -> Bad:
    shutil.rmtree(place.source)
    return Bad(export(place), ("no such path exists",))


@case
def another_source_of_the_same_shape(place: Place) -> Bad:
    edit_tensors(shard(place), lambda name, tensor: tensor + 1)
    return Bad(export(place), ("fingerprint",))


# The run folder.


def edit_plan(place: Place, groups: list[object], **changes: object) -> Args:
    edit_json(place.run / "plan.json", groups=groups, **changes)
    return export(place)


@case
def plan_for_another_depth(place: Place) -> Bad:
    edit_json(place.run / "plan.json", num_layers=30)
    return Bad(fit(place, f"--model.plan={place.run / 'plan.json'}"), ("30 layers", "has 4"))


@case
def overlapping_groups(place: Place) -> Bad:
    return Bad(edit_plan(place, [{"members": [0, 1]}, {"members": [1, 2]}]), ("disjoint",))


@case
def groups_in_falling_order(place: Place) -> Bad:
    return Bad(edit_plan(place, [{"members": [2, 3]}, {"members": [0, 1]}]), ("rising order",))


@case
def group_with_a_gap(place: Place) -> Bad:
    return Bad(edit_plan(place, [{"members": [0, 2]}]), ("adjacent", "[0, 2]"))


@case
def group_of_one(place: Place) -> Bad:
    return Bad(edit_plan(place, [{"members": [1]}]), ("at least two", "[1]"))


@case
def anchor_outside_its_group(place: Place) -> Bad:
    return Bad(edit_plan(place, [{"members": [0, 1], "anchor": 3}]), ("anchor", "3"))


@case
def negative_layer(place: Place) -> Bad:
    return Bad(edit_plan(place, [{"members": [-1, 0]}]), ("0 to 3", "-1"))


@case
def layer_that_is_no_whole_number(place: Place) -> Bad:
    return Bad(edit_plan(place, [{"members": [0, 1.5]}]), ("must look like",))


@case
def unknown_key_in_a_plan(place: Place) -> Bad:
    return Bad(edit_plan(place, [], colour="red"), ("no key 'colour'",))


@case
def plan_of_another_schema(place: Place) -> Bad:
    return Bad(edit_plan(place, [], schema=2), ("`schema` 1, got 2",))


@case
def plan_with_a_key_twice(place: Place) -> Bad:
    (place.run / "plan.json").write_text('{"schema": 1, "schema": 1}')
    return Bad(export(place), ("appears twice",))


@case
def plan_that_is_no_text(place: Place) -> Bad:
    (place.run / "plan.json").write_bytes(b"\xff\xfe\x00\x00")
    return Bad(export(place), ("plan.json must be valid JSON",))


@case
def plan_nested_without_end(place: Place) -> Bad:
    (place.run / "plan.json").write_text("[" * 100_000)
    return Bad(export(place), ("plan.json must be valid JSON",))


@case
def plan_that_is_a_folder(place: Place) -> Bad:
    return Bad(fit(place, f"--model.plan={place.run}"), ("must be a readable file",))


@case
def run_without_a_plan(place: Place) -> Bad:
    (place.run / "plan.json").unlink()
    return Bad(export(place), ("holds no plan.json",))


@case
def run_that_is_not_there(place: Place) -> Bad:
    return Bad(("export", place.folder / "nowhere"), ("nowhere", "holds no plan.json"))


@case
def unfinished_run(place: Place) -> Bad:
    (place.run / "alphas.json").unlink()
    return Bad(export(place), ("did not finish",))


def edit_alphas(place: Place, change: Callable[[dict], object]) -> Args:  # type: ignore[type-arg]
    path = place.run / "alphas.json"
    data = json.loads(path.read_text())
    change(data["groups"][0])
    path.write_text(json.dumps(data))
    return export(place)


@case
def alphas_of_too_few_members(place: Place) -> Bad:
    args = edit_alphas(place, lambda group: group["alphas"]["q_proj"].pop())
    return Bad(args, ("q_proj", "2 members"))


@case
def alphas_of_too_few_neurons(place: Place) -> Bad:
    args = edit_alphas(
        place, lambda group: group["alphas"].update(up_proj=[[0.5] * 47, [0.5] * 47])
    )
    return Bad(args, ("up_proj", "48", "47"))


@case
def alphas_that_are_not_numbers(place: Place) -> Bad:
    args = edit_alphas(place, lambda group: group["alphas"].update(q_proj=["a", "b"]))
    return Bad(args, ("q_proj", "finite numbers"))


@case
def nan_alphas(place: Place) -> Bad:
    args = edit_alphas(place, lambda group: group["alphas"].update(q_proj=[torch.nan, 1.0]))
    return Bad(args, ("alphas.json", "finite"))


@case
def alphas_without_a_matrix(place: Place) -> Bad:
    return Bad(edit_alphas(place, lambda group: group["alphas"].pop("o_proj")), ("o_proj",))


@case
def alphas_of_another_plan(place: Place) -> Bad:
    return Bad(edit_alphas(place, lambda group: group.update(anchor=0)), ("anchor 1",))


@case
def alphas_beyond_a_float(place: Place) -> Bad:
    args = edit_alphas(place, lambda group: group["alphas"].update(q_proj=[10**400, 1]))
    return Bad(args, ("q_proj", "finite numbers"))


@case
def orders_that_are_no_permutation(place: Place) -> Bad:
    save_file({"0": torch.zeros(48, dtype=torch.int32)}, place.run / "orders.safetensors")
    return Bad(export(place), ("orders.safetensors", "permutation"))


@case
def orders_of_another_width(place: Place) -> Bad:
    save_file({"0": torch.arange(40, dtype=torch.int32)}, place.run / "orders.safetensors")
    return Bad(export(place), ("orders.safetensors", "[48]", "[40]"))


@case
def truncated_orders(place: Place) -> Bad:
    path = place.run / "orders.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    return Bad(export(place), ("orders.safetensors must be a whole",))


@case
def repair_of_another_width(place: Place) -> Bad:
    path = place.run / "repair.safetensors"
    tensors, metadata = read_tensors(path)
    write_tensors(path, {name: t[:, :-1] for name, t in tensors.items()}, metadata)
    return Bad(export(place), ("repair.safetensors", "(32, 47)", "(32, 48)"))


@case
def config_yaml_that_calls_python(place: Place) -> Bad:
    (place.run / "config.yaml").write_text("model: !!python/object/apply:os.getcwd []\n")
    return Bad(export(place), ("config.yaml must be plain YAML",))


@case
def config_yaml_that_is_a_list(place: Place) -> Bad:
    (place.run / "config.yaml").write_text("- model\n")
    return Bad(export(place), ("config.yaml must hold the options",))


@case
def config_yaml_without_a_source(place: Place) -> Bad:
    (place.run / "config.yaml").write_text("model: {}\n")
    return Bad(export(place), ("Give `--source`",))


@case
def metrics_of_another_kind(place: Place) -> Bad:
    (place.run / "metrics.json").write_text('{"schema": 1, "test": {"gate": [1]}}')
    return Bad(export(place), ("metrics.json", "as lmerge wrote them"))


# Where results go.


@case
def output_over_the_source(place: Place) -> Bad:
    args = ("export", place.run, "--out", place.source, "--overwrite=true")
    return Bad(args, ("would be replaced", "is read and lies there"))


@case
def output_that_holds_the_run(place: Place) -> Bad:
    (place.folder / "config.json").write_text("{}")
    args = ("export", place.run, "--out", place.folder, "--overwrite=true")
    return Bad(args, ("would be replaced", "is read and lies there"))


@case
def run_folder_that_holds_the_source(place: Place) -> Bad:
    shutil.copytree(place.source, place.run / "model")
    options = (
        f"--model.source={place.run / 'model'}",
        f"--run_dir={place.run}",
        "--overwrite=true",
    )
    return Bad(fit(place, *options), ("would be replaced", "is read and lies there"))


@case
def weights_beyond_the_dtype(place: Place) -> Bad:
    edit_tensors(shard(place), lambda name, tensor: torch.full_like(tensor, 1e5))
    return Bad(export(place, "--dtype=float16"), ("must be finite", "float16"))


@case
def output_that_is_a_file(place: Place) -> Bad:
    (place.folder / "out").write_text("mine")
    return Bad(export(place, "--overwrite=true"), ("must be a folder or free",))


@case
def output_that_is_a_link_to_other_work(place: Place) -> Bad:
    (place.folder / "thesis").mkdir()
    (place.folder / "thesis" / "thesis.tex").write_text("mine")
    (place.folder / "out").symlink_to(place.folder / "thesis")
    return Bad(export(place, "--overwrite=true"), ("thesis.tex", "no config.json"))


@case
def output_below_a_file(place: Place) -> Bad:
    (place.folder / "file").write_text("mine")
    return Bad(("export", place.run, "--out", place.folder / "file" / "out"), ("must be writable",))


@case
def output_that_exists(place: Place) -> Bad:
    shutil.copytree(place.source, place.folder / "out")
    return Bad(export(place), ("already exists",))


@case
def shard_size_that_is_none(place: Place) -> Bad:
    return Bad(export(place, "--max_shard_size=huge"), ("max_shard_size", "huge", "5GB"))


@case
def gguf_into_a_folder(place: Place) -> Bad:
    return Bad(("export", place.run, "--gguf", place.folder), ("already exists",))


@case
def unknown_option_of_export(place: Place) -> Bad:
    return Bad(export(place, "--shard_size=1GB"), ("shard_size", "--max_shard_size"))


@case
def run_folder_that_is_a_dead_link(place: Place) -> Bad:
    (place.folder / "new").symlink_to(place.folder / "gone" / "away")
    return Bad(fit(place), ("--run_dir",))


# YAML and numbers.


def config(place: Place, text: str | bytes) -> Args:
    path = place.folder / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    run_dir = f"--run_dir={place.folder / 'new'}"
    return ("fit", "--config", path, run_dir, f"--model.source={place.source}")


@case
def cyclic_yaml(place: Place) -> Bad:
    return Bad(config(place, "model: &m\n  alpha: *m\n"), ("an alias inside", "line 1"))


@case
def yaml_that_grows_without_end(place: Place) -> Bad:
    lines = ["a0: &a0 [1, 1]", *(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9}]" for i in range(1, 9))]
    return Bad(config(place, "\n".join(lines)), ("at most 100000 values",))


@case
def yaml_that_calls_python(place: Place) -> Bad:
    return Bad(config(place, "seed_everything: !!python/object/apply:os.getcwd []\n"), ("python",))


@case
def yaml_that_is_no_text(place: Place) -> Bad:
    return Bad(config(place, b"\xff\xfe\x00model"), ("mine.yaml",))


@case
def yaml_with_a_tab(place: Place) -> Bad:
    return Bad(config(place, "model:\n\tnum_removed: 1\n"), ("mine.yaml",))


@case
def unknown_section(place: Place) -> Bad:
    return Bad(config(place, "modle:\n  num_removed: 1\n"), ("modle",))


@case
def unknown_keys_at_every_level(place: Place) -> Bad:
    return Bad(config(place, "model:\n  alpha:\n    granularty: head\n"), ("granularty",))


@case
def unknown_key_of_the_trainer(place: Place) -> Bad:
    return Bad(config(place, "trainer:\n  max_epoch: 1\n"), ("max_epoch",))


@case
def negative_tokens(place: Place) -> Bad:
    return Bad(fit(place, "--data.num_calibration_tokens=-5"), ("num_calibration_tokens", "-5"))


@case
def zero_block_size(place: Place) -> Bad:
    return Bad(fit(place, "--data.block_size=0"), ("block_size", "0"))


@case
def zero_epochs(place: Place) -> Bad:
    return Bad(fit(place, "--trainer.max_epochs=0", "--trainer.max_steps=-1"), ("max_epochs", "0"))


@case
def negative_learning_rate(place: Place) -> Bad:
    optimizer = ("--model.optimizer=torch.optim.Adam", "--model.optimizer.lr=-0.1")
    return Bad(fit(place, *optimizer), ("learning rate", "-0.1"))


@case
def limit_out_of_its_range(place: Place) -> Bad:
    return Bad(fit(place, "--gate.max_ppl_ratio=0.5"), ("max_ppl_ratio", "0.5"))


# Questions and texts.


def questions(place: Place, *lines: object, split: str = "val") -> Args:
    """Fit on a folder of JSONL whose lines of one split are bad."""
    folder = place.folder / "questions"
    folder.mkdir()
    for name in ("dev", "val"):
        rows = [good(i) for i in range(6)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    raw = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / f"{split}.jsonl").write_text("\n".join(raw))
    return fit(place, f"--data.questions={folder}", "--data.domains=[anatomy]")


def good(i: int, **changes: object) -> dict[str, object]:
    row = {"id": str(i), "subject": "anatomy", "question": f"What is {i}?"}
    return {**row, "choices": ["a", "b", "c", "d"], "answer": "B", **changes}


@case
def duplicate_ids(place: Place) -> Bad:
    return Bad(questions(place, good(1), good(1)), ("val.jsonl", "unique"))


@case
def line_that_is_no_json(place: Place) -> Bad:
    return Bad(questions(place, good(1), "{"), ("val.jsonl", "line 2"))


@case
def line_nested_without_end(place: Place) -> Bad:
    return Bad(questions(place, "[" * 100_000), ("val.jsonl", "line 1"))


@case
def line_that_is_a_list(place: Place) -> Bad:
    return Bad(questions(place, "[1]"), ("val.jsonl", "line 1"))


@case
def three_choices(place: Place) -> Bad:
    return Bad(questions(place, good(1, choices=["a", "b", "c"])), ("choices", "4"))


@case
def empty_question(place: Place) -> Bad:
    return Bad(questions(place, good(1, question=" ")), ("question", "not empty"))


@case
def answer_that_is_none(place: Place) -> Bad:
    return Bad(questions(place, good(1, answer=7)), ("answer", "7"))


@case
def csv_in_another_encoding(place: Place) -> Bad:
    folder = place.folder / "csv"
    for split in ("dev", "val"):
        (folder / split).mkdir(parents=True)
        row = '"Größe?","1","2","3","4","B"\n'
        (folder / split / f"anatomy_{split}.csv").write_bytes(row.encode("latin-1"))
    args = fit(place, f"--data.questions={folder}", "--data.domains=[anatomy]")
    return Bad((*args, "--data.num_shots=0"), ("UTF-8", "line 1"))


@case
def prompt_beyond_the_context(place: Place) -> Bad:
    edit_config(place.source, max_position_embeddings=16)
    return Bad(fit(place, "--data.block_size=16"), ("16 tokens", "context"))


@case
def empty_text(place: Place) -> Bad:
    path = place.folder / "empty.txt"
    path.write_text(" \n")
    return Bad(fit(place, f"--data.calibration_text={path}"), ("empty.txt", "not be empty"))


@case
def text_that_is_not_there(place: Place) -> Bad:
    return Bad(fit(place, "--data.eval_text=nowhere.txt"), ("nowhere.txt",))


@case
def text_of_one_token(place: Place) -> Bad:
    path = place.folder / "short.txt"
    path.write_text("a")
    return Bad(fit(place, f"--data.eval_text={path}"), ("short", "2 tokens"))
