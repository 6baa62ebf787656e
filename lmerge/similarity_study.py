"""`lmerge similarity`: layer similarity by domain and language, and how far it differs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import get_args

import numpy as np
from torch import Tensor

from lmerge.activations import Pooling
from lmerge.agreement import (
    agreement,
    percentiles,
    resample_matrices,
    split_half,
    upper_pearson,
)
from lmerge.agreement_table import Row, as_record, print_agreements, table_csv, table_markdown
from lmerge.data.batching import sample_prompts
from lmerge.data.questions import fingerprint, load_questions, resolve_domains
from lmerge.figures import save, similarity_figure
from lmerge.files import provenance, write_json, write_text
from lmerge.folders import atomic_folder
from lmerge.information import InformationConfig
from lmerge.progress import track
from lmerge.similarity import Measure, similarity_matrix
from lmerge.similarity_states import group_states
from lmerge.source import Dtype, load_tokenizer
from lmerge.wandb_log import WandbMode
from lmerge.wandb_studies import log_agreements
from lmerge.wandb_tables import wandb_run

logger = logging.getLogger(__name__)

SCHEMA = 1
RESULT = "similarity.json"
NUM_SPLITS = 20
"""Splits of the prompts in two halves that a split-half correlation is averaged over."""

STUDY_DOMAINS = ["medical", "legal", "math", "cs", "humanities"]
ENGLISH = ["en"]
ANGULAR: list[Measure] = ["angular"]


def run_similarity(
    source: str = "smollm2-135m",
    out_dir: Path = Path("runs/similarity"),
    questions: str = "bank",
    domains: list[str] = STUDY_DOMAINS,
    languages: list[str] = ENGLISH,
    translated: list[str] | None = None,
    extra_domains: dict[str, list[str]] | None = None,
    measures: list[Measure] = ANGULAR,
    information: InformationConfig = InformationConfig(),  # noqa: B008 - frozen
    num_prompts: int = 40,
    pooling: Pooling = "last",
    num_bootstrap: int = 200,
    states_path: Path | None = None,
    streamed: bool = False,
    dtype: Dtype = "auto",
    seed: int = 0,
    overwrite: bool = False,
    wandb: WandbMode = "disabled",
) -> None:
    """Compare the layer similarity of domains and languages, with intervals over prompts.

    Args:
        source: Model: hub id, local folder, GGUF file or alias.
        out_dir: Folder for matrices, figures and tables.
        questions: Where the questions are, as in `fit --data.questions`; val is read.
        domains: Domains to compare.
        languages: ISO 639-1 codes of the languages to compare.
        translated: Domains that are taken in every language; the others in the first language
            alone. Null takes all in every language.
        extra_domains: Further domains, each a list of subjects.
        measures: Layer similarities; one grid of heatmaps for each.
        information: Options of `npib`, `gaussian_nmi` and `gaussian_nmi_bounded`.
        num_prompts: Prompts of each domain and language; at least 1.
        pooling: Which token's state stands for a prompt.
        num_bootstrap: Resamples of the prompts; 0 for no intervals, otherwise at least 20.
        states_path: File (.safetensors) that keeps the layer states: read where it is there and
            belongs to the same model and prompts, so that other measures need no model; else
            written.
        streamed: Whether each layer is read from the disk in turn, for models larger than memory;
            needs a local folder.
        dtype: Dtype of the weights; `auto` keeps the checkpoint's (float32 where streamed).
        seed: Seed of the samples; at least 0.
        overwrite: Whether an earlier result in `out_dir` may be replaced.
        wandb: Whether W&B gets table and figures: `offline` writes files in `out_dir`, `online`
            sends them.
    """
    settings = {**locals(), "information": asdict(information)}
    for name in ("out_dir", "overwrite", "states_path", "wandb"):
        del settings[name]
    _check(measures, num_prompts=num_prompts, num_bootstrap=num_bootstrap, seed=seed)
    _check_folder(out_dir, overwrite=overwrite)
    prompts, texts_fingerprint = _prompts(
        questions, domains, languages, translated, extra_domains, source, num_prompts, seed
    )
    with atomic_folder(out_dir, overwrite=overwrite) as folder:
        states, model = group_states(
            source, prompts, pooling, dtype, streamed=streamed, path=states_path
        )
        rows, undefined, figures = [], {}, {}
        for measure in measures:
            matrices = _write_matrices(folder, states, measure, information)
            undefined[measure] = {n: int((~m.isfinite()).sum()) for n, m in matrices.items()}
            figures[measure] = similarity_figure(matrices, measure)
            save(figures[measure], folder / f"{measure}.png")
            rows += _rows(states, matrices, measure, information, num_bootstrap, seed)
        write_text(folder / "correlations.csv", table_csv(rows))
        write_text(folder / "correlations.md", table_markdown(rows))
        data = {
            "model": model,
            "questions": texts_fingerprint,
            "num_prompts": {name: len(group) for name, group in prompts.items()},
            "undefined_cells": undefined,
            "correlations": [as_record(row) for row in rows],
            "settings": settings,
            "provenance": provenance(),
        }
        write_json(folder / RESULT, data, schema=SCHEMA)
    print_agreements(rows)
    group = Path(source).name
    with wandb_run(wandb, out_dir, f"{group} similarity", "similarity", group) as run:
        if run is not None:
            log_agreements(run, rows, figures)


def _check(measures: Sequence[Measure], **numbers: int) -> None:
    unknown = [name for name in measures if name not in get_args(Measure)]
    if not measures or unknown:
        raise ValueError(
            f"`measures` must be some of {', '.join(get_args(Measure))}, got "
            f"{unknown[0] if unknown else 'none'}; use these names."
        )
    for name, low in {"num_prompts": 1, "num_bootstrap": 0, "seed": 0}.items():
        if numbers[name] < low:
            raise ValueError(f"`{name}` must be at least {low}, got {numbers[name]}; raise it.")
    if 0 < numbers["num_bootstrap"] < 20:
        raise ValueError(
            f"`num_bootstrap` must be 0 or at least 20, got {numbers['num_bootstrap']}; raise it."
        )


def _check_folder(out_dir: Path, *, overwrite: bool) -> None:
    if not out_dir.exists():
        return
    if not overwrite:
        raise ValueError(
            f"`out_dir` must be free, got {out_dir}, which exists. Choose another folder, or "
            "replace it with `--overwrite=true`."
        )
    if not (out_dir / RESULT).is_file():
        raise ValueError(
            f"`out_dir` may be replaced only where it holds {RESULT}, got {out_dir} without one. "
            "Choose another folder."
        )


def _prompts(
    questions: str,
    domains: Sequence[str],
    languages: Sequence[str],
    translated: Sequence[str] | None,
    extra_domains: Mapping[str, Sequence[str]] | None,
    source: str,
    num_prompts: int,
    seed: int,
) -> tuple[dict[str, list[Tensor]], str]:
    """Return the prompts of each group by `domain/language`, and the questions' fingerprint."""
    for name in translated or ():
        if name not in domains:
            raise ValueError(f"`translated` must name some of `domains`, got {name!r}; add it.")
    found = load_questions(questions, "val", languages)
    subjects = resolve_domains(domains, extra_domains, {question.subject for question in found})
    sampled = sample_prompts(
        found, subjects, load_tokenizer(source), num_prompts=num_prompts, seed=seed
    )
    kept = {
        f"{domain}/{language}": prompts
        for (domain, language), prompts in sampled.items()
        if translated is None or domain in translated or language == languages[0]
    }
    return kept, fingerprint(found)


def _write_matrices(
    folder: Path, states: Mapping[str, Tensor], measure: Measure, information: InformationConfig
) -> dict[str, Tensor]:
    matrices = {
        name: similarity_matrix(x_LND, measure, information, allow_undefined=True)
        for name, x_LND in states.items()
    }
    for name, matrix_LL in matrices.items():
        undefined = int((~matrix_LL.isfinite()).sum())
        if undefined:
            logger.warning("%s: %d cells of %s are undefined", measure, undefined, name)
        path = folder / measure / f"{name.replace('/', '-')}.npy"
        path.parent.mkdir(exist_ok=True)
        np.save(path, matrix_LL.numpy(), allow_pickle=False)
    return matrices


def _rows(
    states: Mapping[str, Tensor],
    matrices: Mapping[str, Tensor],
    measure: Measure,
    information: InformationConfig,
    num_bootstrap: int,
    seed: int,
) -> list[Row]:
    matrix = partial(_matrix, measure=measure, information=information)
    pairs = list(combinations(matrices, 2))
    samples: dict[tuple[str, str], list[float]] = {pair: [] for pair in pairs}
    halves: dict[tuple[str, str], list[float]] = {}
    try:
        for s in track(range(num_bootstrap), f"bootstrap {measure}", total=num_bootstrap):
            drawn = resample_matrices(
                states, matrix, seed=seed * 1_000_003 + s, halves=measure == "npib"
            )
            for a, b in pairs:
                samples[a, b].append(upper_pearson(drawn[a], drawn[b]))
        for s in range(NUM_SPLITS if num_bootstrap else 0):
            for pair, value in split_half(states, matrix, seed=seed * 1_000_003 + s).items():
                halves.setdefault(pair, []).append(value)
    except ValueError as error:
        logger.warning("%s: no intervals: %s", measure, error)
    mean = {pair: _mean(values) for pair, values in halves.items()}
    return [
        Row(
            measure,
            a,
            b,
            agreement(matrices[a], matrices[b]),
            percentiles(samples[a, b]),
            mean.get((a, b)),
            _mean([mean.get((a, a)), mean.get((b, b))]),
        )
        for a, b in pairs
    ]


def _matrix(states_LND: Tensor, *, measure: Measure, information: InformationConfig) -> Tensor:
    return similarity_matrix(states_LND, measure, information, allow_undefined=True)


def _mean(values: Sequence[float | None]) -> float | None:
    finite = [value for value in values if value is not None and np.isfinite(value)]
    return sum(finite) / len(finite) if finite else None
