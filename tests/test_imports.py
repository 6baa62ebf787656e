"""Imports go the way the data goes: a file imports only from files above it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lmerge"

# In the order in which one model goes from load to report; helpers stand before their first user.
ORDER = (
    "commands",
    "verbosity",
    "units",
    "files",
    "folders",
    "big_files",
    "yaml_files",
    "progress",
    "tables",
    "history",
    "positional",
    "llama",
    "axes",
    "checkpoint",
    "shards",
    "source",
    "statistics",
    "data.records",
    "data.rows",
    "data.tokens",
    "data.text",
    "data.questions",
    "data.prompts",
    "data.words",
    "data.stage",
    "data.batching",
    "data.mixing",
    "data.evaluation",
    "data.limits",
    "data.served",
    "data.module",
    "activations",
    "streamed",
    "diffusion",
    "ksg",
    "information",
    "similarity",
    "agreement",
    "agreement_table",
    "plan",
    "symmetry",
    "heads",
    "neurons",
    "assignment",
    "sketch",
    "soft",
    "align",
    "groups",
    "alphas",
    "merge",
    "frames",
    "merged",
    "divergence",
    "sharding",
    "cache",
    "prefix",
    "grouped",
    "score",
    "indexed",
    "metrics",
    "words",
    "normal_equations",
    "repair",
    "trained_layers",
    "block_refits",
    "search",
    "baselines.calibration",
    "baselines.dropping",
    "baselines.merging",
    "baselines.patching",
    "baselines.table",
    "alpha_files",
    "runs",
    "streamed_merge",
    "kept",
    "alignment_jobs",
    "checkpoints",
    "losses",
    "row_refits",
    "neuron_pool",
    "memory",
    "state_training",
    "refine",
    "objective",
    "heal",
    "compose",
    "estimate",
    "journal",
    "evaluate",
    "generation",
    "cost",
    "results",
    "gate",
    "diff",
    "yardstick",
    "bench",
    "figures",
    "compare_table",
    "export",
    "streamed_export",
    "gguf_tokenizer",
    "gguf_export",
    "similarity_states",
    "export_run",
    "side_by_side",
    "transfer_data",
    "transfer",
    "transfer_table",
    "transfer_cells",
    "preparation",
    "good_alphas",
    "module",
    "alignment",
    "alpha_spread",
    "svg",
    "report_run",
    "report_figures",
    "report_table",
    "report_pictures",
    "report_sections",
    "report",
    "wandb_log",
    "trials",
    "sweep_figures",
    "wandb_tables",
    "wandb_studies",
    "similarity_study",
    "transfer_study",
    "compare",
    "artefacts",
    "callbacks",
    "planning",
    "stopping",
    "sweep_results",
    "sweep",
    "run_folder",
    "hints",
    "parser",
    "lightning_cli",
    "api",
    "completion",
    "cli",
    "__main__",
)


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


FILES = {name_of(path): path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}


def imported(tree: ast.AST) -> set[str]:
    """The files of lmerge that a file imports anywhere, also inside functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "lmerge imports by full names"
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    inside = {name.removeprefix("lmerge.") for name in names if name.startswith("lmerge.")}
    return inside & set(FILES)


def test_every_file_has_its_place() -> None:
    assert sorted(ORDER) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_from_files_above_it(name: str) -> None:
    above = set(ORDER[: ORDER.index(name)])
    assert imported(ast.parse(FILES[name].read_text(encoding="utf-8"))) <= above


@pytest.mark.parametrize(
    "code",
    [
        "import lmerge.plan",
        "import lmerge.plan as p",
        "from lmerge import plan",
        "from lmerge.plan import Group",
        "def f():\n    from lmerge.plan import Group",
    ],
)
def test_every_way_of_importing_is_seen(code: str) -> None:
    assert imported(ast.parse(code)) == {"plan"}
