"""docs/security.md, held: no pickle, no code of a model, nothing outside a folder, nothing sent."""

import ast
import socket
from pathlib import Path

import pytest
import torch
from cli_run import fit, run
from made_runs import made_run, source

from lmerge.shards import stored_tensors
from lmerge.source import load_model

PACKAGE = Path(__file__).parents[1] / "lmerge"
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}

CALLS = [node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.Call)]
UNSAFE_MODULES = {
    *("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"),
    *("socket", "http", "urllib", "requests", "httpx", "aiohttp", "ftplib", "smtplib"),
}
FORBIDDEN = {"eval", "exec", "compile", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}


def name_of(call: ast.Call) -> str:
    return ast.unparse(call.func)


def keywords(call: ast.Call) -> dict[str | None, str]:
    return {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}


def test_nothing_that_unpickles_or_opens_connections_is_imported() -> None:
    found = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module).split(".")[0])
    assert not found & UNSAFE_MODULES


def test_nothing_is_evaluated_and_yaml_is_safe() -> None:
    assert not {name_of(call) for call in CALLS} & FORBIDDEN


def test_every_load_of_torch_and_numpy_refuses_pickles() -> None:
    for call in CALLS:
        if name_of(call) == "torch.load":
            assert keywords(call).get("weights_only") == "True"
        if name_of(call) in ("np.load", "np.save"):
            assert keywords(call).get("allow_pickle") == "False"


def test_no_call_trusts_remote_code() -> None:
    values = [keywords(call).get("trust_remote_code") for call in CALLS]
    assert set(values) == {None, "False"}


def test_every_download_leaves_pickles_and_code_out() -> None:
    (patterns,) = (
        ast.literal_eval(node.value)
        for node in ast.walk(TREES[PACKAGE / "source.py"])
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SMALL_FILES"
    )
    assert {Path(pattern).suffix for pattern in patterns} == {".json", ".txt", ".model", ".jinja"}


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/x.safetensors", "a/../b.bin", ".."]
)
def test_an_index_stays_in_its_folder(tmp_path: Path, file: str) -> None:
    folder = source(tmp_path / "source", max_shard_size="20kB")
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    index = folder / "model.safetensors.index.json"
    text = index.read_text()
    first = next(iter(sorted(folder.glob("model-*.safetensors")))).name
    index.write_text(text.replace(first, file, 1))
    for load in (lambda: load_model(str(folder)), lambda: stored_tensors(folder)):
        with pytest.raises(ValueError, match="of its own folder"):
            load()


def test_code_beside_the_weights_is_not_run(tmp_path: Path) -> None:
    folder = source(tmp_path / "source")
    config = folder / "config.json"
    code = '"auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"},'
    config.write_text(config.read_text().replace("{", "{" + code, 1))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert type(load_model(str(folder))).__name__ == "LlamaForCausalLM"
    made_run(tmp_path / "run", folder)
    run("export", tmp_path / "run", "--out", tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert not list((tmp_path / "out").glob("*.py"))
    assert "auto_map" not in (tmp_path / "out" / "config.json").read_text()


def test_a_pickle_in_the_place_of_weights_is_not_loaded(tmp_path: Path) -> None:
    folder = source(tmp_path / "source")
    torch.save({"model.norm.weight": torch.ones(32)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(str(folder))


def test_a_fit_connects_to_nothing_outside(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = []
    connect = socket.socket.connect

    def watched(self: socket.socket, address: object) -> None:
        if self.family != socket.AF_UNIX and not str(address).startswith("('127.0.0.1'"):
            outside.append(address)
            raise OSError(101, "Network is unreachable")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", watched)
    monkeypatch.delenv("WANDB_MODE")
    fit(tiny_dir, tmp_path / "run", "--wandb=offline", "--evaluate_after=false")
    run("export", tmp_path / "run", "--out", tmp_path / "out")
    assert not outside
