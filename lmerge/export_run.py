"""`lmerge export`: the merged model of a finished run, as a checkpoint or a GGUF file."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, get_args

import torch
import yaml

from lmerge.alphas import AlphaConfig, spread
from lmerge.export import model_card, verify_export
from lmerge.files import one_line, provenance, read_json
from lmerge.folders import check_apart
from lmerge.gate import Check, gate_notes, gate_rows
from lmerge.gguf_export import GgufDtype, export_gguf, source_pre
from lmerge.llama import head_dim
from lmerge.merged import MergedLlama
from lmerge.plan import MergePlan
from lmerge.results import SCHEMA, restored, table_rows
from lmerge.runs import RunState, read_run
from lmerge.source import Dtype, checkpoint_folder, load_model, resolve_source
from lmerge.streamed_export import export_streamed
from lmerge.streamed_merge import StreamedMerge
from lmerge.yaml_files import check_yaml

logger = logging.getLogger(__name__)

NUM_CHECKED_TOKENS = 64


def export(
    run: Path,
    out: Path | None = None,
    source: str | None = None,
    dtype: Dtype | None = None,
    max_shard_size: str = "5GB",
    check: bool = False,
    overwrite: bool = False,
    gguf: Path | None = None,
    gguf_dtype: GgufDtype = "auto",
) -> None:
    """Write the merged model of a run tensor by tensor, without building it.

    Args:
        run: Run folder of a finished fit.
        out: Folder of the checkpoint; RUN/model unless `gguf` alone is given.
        source: Where the source model lies now; null is where the run found it.
        dtype: Dtype of the written weights; null is that of the run, `auto` the source's.
        max_shard_size: Weights above this size are split into several files, such as 5GB.
        check: Whether to load the result and compare its logits with the merged model's; needs
            memory for three models.
        overwrite: Whether an older export may be replaced.
        gguf: Path of a GGUF file, for llama.cpp.
        gguf_dtype: Dtype of its matrices; `auto` keeps that of the checkpoint.
    """
    state = finished_state(run)
    settings = run_settings(run)
    name, made_in = _made_from(run, settings, source)
    folder = checkpoint_folder(name, weights=True)
    merge = StreamedMerge(folder, state, dtype=made_in, out_dtype=dtype, path=run / "plan.json")
    origin = resolve_source(name)
    places = [run, folder, *([origin] if isinstance(origin, Path) else [])]
    if gguf is not None:
        if gguf.is_file():
            check_apart(gguf, *places)
        pre = source_pre(origin) if isinstance(origin, Path) and origin.is_file() else None
        export_gguf(
            folder,
            merge,
            gguf,
            dtype=gguf_dtype,
            name=run.name,
            pre=pre,
            fingerprint=state.plan.source,
            overwrite=overwrite,
        )
    if out is None and gguf is not None:
        return
    out = out or run / "model"
    check_apart(out, *places)
    card = run_card(run, name, state.plan, settings)
    export_streamed(
        folder,
        merge,
        out,
        card=card,
        fingerprint=state.plan.source,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )
    logger.info("exported to %s", out)
    if check:
        _check(out, name, made_in, state, merge.out_dtype)


def _made_from(run: Path, settings: dict[str, Any], source: str | None) -> tuple[str, Dtype]:
    """Return where a run's source lies, and the dtype that the run was made in."""
    name = source or settings.get("model", {}).get("source")
    if not isinstance(name, str):
        raise ValueError(
            f"{run / 'config.yaml'} must say where the source lies (`model.source`), got "
            f"{name!r}. Give `--source`."
        )
    made_in: Dtype = settings.get("model", {}).get("dtype", "auto")
    if made_in not in get_args(Dtype):
        raise ValueError(
            f"{run / 'config.yaml'}: `model.dtype` must be one of {', '.join(get_args(Dtype))}, "
            f"got {made_in!r}. Correct it."
        )
    return name, made_in


def finished_state(run: Path) -> RunState:
    """Return what a finished fit left.

    Raises:
        ValueError: When there is no plan, or there are no alphas.
    """
    state = read_run(run)
    if state.alphas is None:
        raise ValueError(
            f"run folder {run} holds no alphas.json: its fit did not finish. Resume it with "
            "`lmerge fit --ckpt_path`."
        )
    return state


def run_settings(run: Path) -> dict[str, Any]:
    """Return the content of a run's config.yaml; empty where there is none.

    Raises:
        ValueError: When it is no YAML mapping.
    """
    path = run / "config.yaml"
    if not path.is_file():
        return {}
    check_yaml(path)
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        reason = one_line(error)
        raise ValueError(f"{path} must be plain YAML, got: {reason}. Correct it.") from None
    model = settings.get("model", {}) if isinstance(settings, dict) else None
    if not isinstance(settings, dict) or not isinstance(model, dict):
        raise ValueError(f"{path} must hold the options of a run. Use the one that `fit` wrote.")
    return settings


def run_card(run: Path, source: str, plan: MergePlan, settings: dict[str, Any]) -> str:
    """Return the model card of a run, with the results of its last stage."""
    path = run / "metrics.json"
    stages = read_json(path, schema=SCHEMA) if path.is_file() else {}
    results = restored(stages.get("test") or stages.get("validate") or {})
    try:
        checks = [Check(**entry) for entry in results.get("gate", [])]
        rows = table_rows(results) + gate_rows(checks) if results else []
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} must hold results as lmerge wrote them, got {type(error).__name__} {error}. "
            "Evaluate again with `lmerge validate`."
        ) from None
    return model_card(
        source=source,
        num_source_layers=plan.num_layers,
        num_layers=plan.num_layers - plan.num_removed,
        groups=[list(group.members) for group in plan.groups],
        table=rows,
        command=None,
        provenance={**provenance(), **run_provenance(plan, settings, results)},
        notes=gate_notes(checks),
    )


def run_provenance(
    plan: MergePlan, settings: dict[str, Any], results: dict[str, Any]
) -> dict[str, Any]:
    """Return seed and fingerprints of a run; what is not known is None."""
    data = results.get("fingerprints") or {}
    return {
        "plan": plan.method,
        "seed": settings.get("seed_everything"),
        "source_fingerprint": plan.source or None,
        **{f"data_fingerprint {name}": value for name, value in data.items()},
    }


def _check(out: Path, source: str, dtype: Dtype, state: RunState, out_dtype: torch.dtype) -> None:
    model = load_model(source, dtype)
    assert state.alphas is not None
    grain = AlphaConfig(granularity="neuron")
    merged = MergedLlama(model, state.plan, state.orders, grain)
    width = head_dim(model.config)
    merged.set_alphas(
        [
            spread(alphas, grain.granularity, layer.stacked(), head_dim=width)
            for layer, alphas in zip(merged.merged_layers(), state.alphas, strict=True)
        ]
    )
    merged.set_refits(state.refits, state.kept_refits)
    plain = merged.plain()
    for parameter in plain.parameters():  # not `to`, which would round the rotary frequencies too
        parameter.data = parameter.data.to(out_dtype)
    generator = torch.Generator().manual_seed(0)
    token_BT = torch.randint(model.config.vocab_size, (1, NUM_CHECKED_TOKENS), generator=generator)
    difference = verify_export(out, plain, token_BT)
    logger.info("reloaded logits differ by at most %.1e", difference)
