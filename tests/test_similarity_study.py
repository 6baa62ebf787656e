import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonargparse import ActionConfigFile

from lmerge.cli import main
from lmerge.figures import similarity_figure
from lmerge.files import read_json
from lmerge.information import InformationConfig
from lmerge.parser import Hints
from lmerge.similarity import MEASURES
from lmerge.similarity_study import RESULT, SCHEMA, run_similarity


@pytest.fixture
def options(tiny_dir: Path, tmp_path: Path) -> dict[str, object]:
    return {
        "source": str(tiny_dir),
        "out_dir": tmp_path / "out",
        "domains": ["medical", "math"],
        "measures": ["angular"],
        "num_prompts": 6,
        "num_bootstrap": 20,
    }


def test_the_command_leaves_matrices_figure_tables_and_provenance(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = tmp_path / "config.yaml", tmp_path / "out"
    config.write_text(
        f"source: {tiny_dir}\nout_dir: {out}\ndomains: [medical, math]\n"
        "measures: [angular, gaussian_nmi_bounded]\nnum_prompts: 6\nnum_bootstrap: 20\n"
        "information:\n  sigma: 0\n"
    )
    main(["similarity", "--config", str(config)])
    for measure in ("angular", "gaussian_nmi_bounded"):
        for domain in ("medical", "math"):
            matrix = np.load(out / measure / f"{domain}-en.npy", allow_pickle=False)
            assert matrix.shape == (4, 4)
        assert (out / f"{measure}.png").stat().st_size > 1000
    data = read_json(out / RESULT, schema=SCHEMA)
    assert data["num_prompts"] == {"medical/en": 6, "math/en": 6}
    assert data["settings"]["information"]["sigma"] == 0
    assert {"lmerge", "git_commit"} <= data["provenance"].keys()
    with (out / "correlations.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["measure"] for row in rows] == ["angular", "gaussian_nmi_bounded"]
    assert float(rows[0]["low"]) <= float(rows[0]["high"])
    printed = capsys.readouterr().out
    assert all(len(line) <= 80 for line in printed.splitlines())
    assert f"{float(rows[0]['pearson_upper']):.4f}" in printed


def test_an_existing_folder_is_refused_before_the_model_is_loaded(options) -> None:
    options["out_dir"].mkdir()
    options["source"] = "no/such-model"
    with pytest.raises(ValueError, match=r"^`out_dir` must be free, [^\n]*$"):
        run_similarity(**options)


def test_overwrite_replaces_a_result_and_nothing_else(options) -> None:
    run_similarity(**options)
    run_similarity(**options, overwrite=True)
    (options["out_dir"] / RESULT).unlink()
    with pytest.raises(ValueError, match=r"^`out_dir` may be replaced only [^\n]*$"):
        run_similarity(**options, overwrite=True)


def test_an_error_leaves_no_folder_behind(options) -> None:
    with pytest.raises(ValueError, match=r"^`npib` needs more than [^\n]*$"):
        run_similarity(**{**options, "measures": ["npib"]})
    assert not options["out_dir"].exists()


def test_streamed_states_give_the_same_table(options, tmp_path: Path) -> None:
    run_similarity(**options)
    run_similarity(**{**options, "out_dir": tmp_path / "streamed"}, streamed=True)
    tables = [
        json.loads((folder / RESULT).read_text())["correlations"][0]
        for folder in (options["out_dir"], tmp_path / "streamed")
    ]
    assert tables[0].keys() == tables[1].keys()
    for name in ("pearson_full", "low", "high", "half"):
        assert tables[0][name] == pytest.approx(tables[1][name], abs=1e-5)


def test_undefined_cells_are_counted_and_no_number_is_made_of_them(options) -> None:
    # A bandwidth of almost nothing leaves no layer a map.
    config = {**options, "measures": ["gaussian_nmi"]}
    run_similarity(**config, information=InformationConfig(sigma=1e-6))
    data = read_json(options["out_dir"] / RESULT, schema=SCHEMA)
    assert data["undefined_cells"] == {"gaussian_nmi": {"medical/en": 16, "math/en": 16}}
    assert data["correlations"][0]["pearson_full"] is None
    assert data["correlations"][0]["low"] is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("measures", []),
        ("measures", ["cosin"]),
        ("num_prompts", 0),
        ("num_bootstrap", 5),
        ("num_bootstrap", -1),
        ("translated", ["cs"]),
    ],
)
def test_a_bad_option_is_refused_by_its_name(options, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^`{name}` must [^\n]*$"):
        run_similarity(**{**options, name: value})


def test_streaming_needs_a_local_folder(options) -> None:
    options["source"] = "smollm2-135m"
    with pytest.raises(ValueError, match=r"^`streamed` needs a local folder [^\n]*$"):
        run_similarity(**options, streamed=True)


def test_undefined_cells_are_hatched_and_counted_in_the_title() -> None:
    matrix = torch.rand(4, 4).double()
    matrix[1] = torch.nan
    figure = similarity_figure({"all": matrix, "none": torch.full((4, 4), torch.nan)}, "npib")
    first, second = figure.axes[:2]
    assert [patch.get_hatch() for patch in first.patches] == ["////"] * 4
    assert first.get_title() == "all (4 undefined)"
    assert second.get_title() == "none (16 undefined)"


@pytest.mark.parametrize("name", ["similarity", "similarity_mmlu"])
def test_a_shipped_config_parses(name: str) -> None:
    parser = Hints(prog="lmerge similarity")
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_function_arguments(run_similarity, as_positional=True, fail_untyped=True)
    path = Path(__file__).parents[1] / "configs" / f"{name}.yaml"
    options = parser.instantiate_classes(parser.parse_args(["--config", str(path)]))
    assert set(options["measures"]) <= set(MEASURES)


def test_a_domain_of_ones_own_is_measured(options) -> None:
    options["domains"], options["extra_domains"] = (
        ["care", "math"],
        {"care": ["clinical_knowledge"]},
    )
    run_similarity(**options)
    data = read_json(options["out_dir"] / RESULT, schema=SCHEMA)
    assert data["num_prompts"] == {"care/en": 6, "math/en": 6}


def test_states_in_a_file_are_used_again_without_the_model(
    options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "states.safetensors"
    run_similarity(**options, states_path=path)
    first = np.load(options["out_dir"] / "angular" / "math-en.npy", allow_pickle=False)
    monkeypatch.setattr("lmerge.similarity_states.load_model", None)
    options["out_dir"] = tmp_path / "again"
    run_similarity(**options, states_path=path)
    again = np.load(options["out_dir"] / "angular" / "math-en.npy", allow_pickle=False)
    np.testing.assert_array_equal(first, again)
    options["out_dir"] = tmp_path / "other"
    with pytest.raises(ValueError, match=r"^`states_path` must hold [^\n]*$"):
        run_similarity(**{**options, "seed": 1}, states_path=path)
