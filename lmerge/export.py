"""Check an exported checkpoint, and describe it in a card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lmerge.checkpoint import loading
from lmerge.files import write_text
from lmerge.source import ALIASES, HUB_ID

CARD = "README.md"

TOLERANCE = 1e-4
"""Largest difference of a logit between memory and disk, where the dtype is fine enough."""

TOLERANCE_STEPS = 4
"""The same in steps of the dtype at the largest logit; decides in bfloat16 and float16."""

TAGS = ("lmerge", "layer-merging", "model-compression")

LOADING = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```"""

LIMITS = (
    "It inherits the limits, the biases and the license of its base model.",
    "Fewer layers cost quality unevenly: multiple-choice scores can hold while free text suffers. "
    "Measure your own task before you rely on it.",
)


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Raise ValueError when a checkpoint would replace a folder that holds something else."""
    names = [path.name for path in folder.iterdir()] if overwrite and folder.is_dir() else []
    if names and "config.json" not in names:
        raise ValueError(
            f"{folder} must be free or hold a checkpoint to overwrite, got a folder with "
            f"{min(names)} but no config.json. Choose another path."
        )


@torch.no_grad()
def verify_export(folder: Path, model: PreTrainedModel, token_BT: Tensor) -> float:
    """Reload a checkpoint with plain transformers and compare its logits with the model's.

    Args:
        folder: The exported checkpoint.
        model: The model that was exported.
        token_BT: Token ids to compare on (int64), without padding.

    Returns:
        The largest absolute difference of a logit.

    Raises:
        ValueError: If the checkpoint does not load, or the difference is not rounding.
    """
    auto: Any = AutoModelForCausalLM
    with loading(str(folder), "the exported checkpoint"):
        reloaded: Any = auto.from_pretrained(
            folder,
            dtype=model.dtype,
            attn_implementation=model.config._attn_implementation,
            use_safetensors=True,
            local_files_only=True,
        )
    token_BT = token_BT.to(model.device)
    wanted_BTV = model(token_BT, use_cache=False).logits.double()
    found_BTV = reloaded.to(model.device)(token_BT, use_cache=False).logits.double()
    difference = float((found_BTV - wanted_BTV).abs().max())
    step = torch.finfo(model.dtype).eps * float(wanted_BTV.abs().max())
    tolerance = max(TOLERANCE, TOLERANCE_STEPS * step)
    if not difference <= tolerance:  # also refuses NaN
        raise ValueError(
            f"The checkpoint in {folder} must give the logits of the model in memory, got a "
            f"difference of {difference:.2e}, above {tolerance:.1e}. Export it again."
        )
    return difference


def write_card(folder: Path, card: str) -> None:
    """Replace the card of an exported checkpoint and leave the rest alone.

    Raises:
        ValueError: If there is no checkpoint, or it cannot be written.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} must hold an exported checkpoint, got no config.json there. Check the path."
        )
    write_text(folder / CARD, card)


def model_card(
    *,
    source: str,
    num_source_layers: int,
    num_layers: int,
    groups: Sequence[Sequence[int]],
    table: Sequence[tuple[str, str, str]],
    command: str | None,
    provenance: Mapping[str, Any],
    notes: Sequence[str],
) -> str:
    """Return the model card of a merged model: Markdown under YAML front matter.

    Args:
        source: Hub id, path or alias of the base model; of a path only the last part is shown.
        num_source_layers: Layers of the base model.
        num_layers: Layers of the merged model.
        groups: Source layers that became one, each group a run of neighbours; groups of one layer
            may be left out.
        table: Rows of what was measured: name, value of the source, value of the merged model.
        command: The command that made the model.
        provenance: As `lmerge.files.provenance` returns it; what is None is left out.
        notes: Further limits, one sentence each.
    """
    hub_id = _hub_id(source)
    name = hub_id or Path(source).resolve().name.removesuffix(".gguf")
    link = f"[{name}](https://huggingface.co/{hub_id})" if hub_id else name
    removed = num_source_layers - num_layers
    made = [f"- {key}: {value}" for key, value in provenance.items() if value is not None]
    sections = [
        _front_matter(hub_id),
        f"# {name.split('/')[-1]}, {num_source_layers} layers merged into {num_layers}",
        f"lmerge made this model from {link} by merging redundant decoder layers: {removed} of "
        f"{num_source_layers} are gone. Width, vocabulary and tokenizer are those of the base "
        "model, and so is the license.",
        "## What was removed",
        _table(("source layers", "become layer"), _moves(groups)) or "No layer was merged.",
        "## What it cost",
        _table(("", "source", "merged"), table) or "Not measured.",
        "## How to load it",
        LOADING,
        "## How it was made",
        *([f"```bash\n{command}\n```"] if command else []),
        "\n".join(made) or "Not recorded.",
        "## Limits",
        "\n".join(f"- {note}" for note in (*LIMITS, *notes)),
    ]
    return "\n\n".join(sections) + "\n"


def _hub_id(source: str) -> str | None:
    if source in ALIASES:
        return ALIASES[source].hub_id
    shaped = "/" in source and HUB_ID.fullmatch(source) is not None
    return source if shaped and not Path(source).exists() else None


def _front_matter(hub_id: str | None) -> str:
    base = [f"base_model: {hub_id}"] if hub_id else []
    tags = [f"- {tag}" for tag in TAGS]
    lines = [*base, "library_name: transformers", "pipeline_tag: text-generation", "tags:", *tags]
    return "\n".join(["---", *lines, "---"])


def _moves(groups: Sequence[Sequence[int]]) -> list[tuple[str, str]]:
    """Return which run of source layers became which merged layer."""
    rows, num_gone = [], 0
    for group in sorted(sorted(group) for group in groups if len(group) > 1):
        rows.append((f"{group[0]} to {group[-1]}", str(group[0] - num_gone)))
        num_gone += len(group) - 1
    return rows


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, or nothing where there are no rows."""
    if not rows:
        return ""
    cells = [head, ["---"] * len(head), *rows]
    lines = [[" ".join(cell.replace("|", r"\|").split()) for cell in row] for row in cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
