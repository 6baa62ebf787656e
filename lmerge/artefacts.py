"""The artefacts that callbacks write and log: plan, similarity, alphas, evaluation, model card."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmerge.alignment import HungarianAlignment
from lmerge.alpha_spread import logged_alphas
from lmerge.cost import measure_costs
from lmerge.data.tokens import encode
from lmerge.export import model_card, write_card
from lmerge.figures import (
    matching_figure,
    matrices_figure,
    save,
    search_figure,
    similarity_figure,
)
from lmerge.files import provenance, write_json
from lmerge.gate import check_gate, gate_notes, gate_rows
from lmerge.generation import NUM_TOKENS, PROMPTS, generation_sanity, greedy
from lmerge.module import AlphaModule
from lmerge.progress import track
from lmerge.report_figures import alphas_figure, plan_figure
from lmerge.results import Row, group_tables, print_table, table_rows, write_metrics
from lmerge.similarity import INFORMATION
from lmerge.wandb_log import evaluation_metrics, log_evaluation, wandb_loggers


def logged_names(module: AlphaModule, stage: str) -> list[str]:
    """Return the names under which an evaluation in `val` or `test` may log."""
    data = module.data()
    scorings, domains = data.scorings, data.domain_subjects
    return evaluation_metrics(stage, data.text_bytes, data.last_words, scorings, domains)


def log_alphas(trainer: Trainer, module: AlphaModule) -> None:
    """Log where the alphas of each merged layer lie."""
    values = logged_alphas(module.merged.plan, module.merged.alphas())
    for any_logger in trainer.loggers if values else ():
        any_logger.log_metrics(values, step=trainer.global_step)


def alpha_figures(module: AlphaModule) -> dict[str, Figure]:
    """Return the picture of the plan and the alphas of each group, by the names in W&B."""
    plan, alphas = module.merged.plan, module.merged.alphas()
    figures = {"plan/picture": plan_figure(plan, alphas)}
    for group, found in zip(plan.groups, alphas, strict=True):
        figures[f"alphas/{group.start}-{group.members[-1]}"] = alphas_figure(group, found)
    return figures


def write_alignment(trainer: Trainer, module: AlphaModule, alignment: HungarianAlignment) -> None:
    """Write and log how alike neurons and matrices are before and after, and their figures."""
    log_figure(trainer, module, matching_figure(**alignment.similarity), "alignment/neurons")
    log_figure(trainer, module, matrices_figure(**alignment.matrices), "alignment/matrices")
    means = {w: float(torch.cat([*x.values()]).mean()) for w, x in alignment.similarity.items()}
    data = {"method": alignment.method, "neurons": means, **_text_keys(alignment.matrices)}
    write_json(module.run_dir / "alignment" / "similarity.json", data, schema=1)
    for any_logger in trainer.loggers:
        any_logger.log_metrics(alignment.means(), step=0)


def _text_keys(matrices: dict[str, dict[int, dict[str, float]]]) -> dict[str, dict[str, object]]:
    return {when: {str(i): dict(v) for i, v in found.items()} for when, found in matrices.items()}


def write_similarity(trainer: Trainer, module: AlphaModule) -> None:
    """Write the similarity matrices of the plan stage and their figure."""
    matrices = module.similarity_LL
    if not matrices:
        return
    assert module.state is not None
    folder = module.run_dir / "similarity"
    folder.mkdir(parents=True, exist_ok=True)
    for name, matrix_LL in matrices.items():
        np.save(folder / f"{name.replace('/', '_')}.npy", matrix_LL.numpy(), allow_pickle=False)
    data = {
        "measure": module.measure,
        "information": asdict(module.information) if module.measure in INFORMATION else None,
        "pooling": module.pooling,
        "matrices": list(matrices),
        "provenance": provenance(),
    }
    write_json(folder / "similarity.json", data, schema=1)
    figure = similarity_figure(matrices, module.measure, module.state.plan)
    log_figure(trainer, module, figure, "similarity/layers")


def write_search(trainer: Trainer, module: AlphaModule) -> None:
    """Write what the candidates of the plan search cost, and their figure."""
    if not module.candidates:
        return
    costs = [
        {"groups": [list(group.members) for group in c.groups], "kl": c.kl}
        for c in module.candidates
    ]
    data = {"method": module.plan_method, "candidates": costs, "provenance": provenance()}
    write_json(module.run_dir / "plan" / "search.json", data, schema=1)
    log_figure(trainer, module, search_figure(module.candidates), "plan/search")


def log_figure(trainer: Trainer, module: AlphaModule, figure: Figure, name: str) -> None:
    """Save a figure in the run folder and show it in W&B."""
    path = module.run_dir / f"{name}.png"
    save(figure, path)
    for wandb_logger in wandb_loggers(trainer.loggers):
        wandb_logger.log_image(name, [str(path)])


def finish_evaluation(trainer: Trainer, module: AlphaModule, stage: str) -> None:
    """Measure costs, write metrics.json, print the table and bring the model card up to date."""
    data = module.data()
    if not module.is_sharded:  # this process alone cannot run layers that are split over all
        _measure_alone(module)
    module.checks = check_gate(module.results, module.gate)
    module.results["gate"] = [check._asdict() for check in module.checks]
    read: dict[str, Any] = {"fingerprints": data.fingerprints, "settings": data.settings}
    read["source_fingerprint"] = module.merged.plan.source
    read["seeds"] = {"alphas": module.seed, "data": data.seed}
    write_metrics(module.run_dir, stage, {"source": module.source_name, **read, **module.results})
    if module.journal is not None:
        module.journal.remove()
    rows = table_rows(module.results) + gate_rows(module.checks)
    for title, groups in group_tables(module.results).items():
        print_table(groups, f"{module.source_name}: {stage}, {title}")
    print_table(rows, f"{module.source_name}: {stage} of source and merged model")
    log_evaluation(trainer.loggers, stage, module.results)
    if (module.run_dir / "model" / "config.json").is_file():
        write_card(module.run_dir / "model", card(module, rows))


def _measure_alone(module: AlphaModule) -> None:
    """Measure what needs the models but no data: costs, and whether they write sensibly."""
    models = {"source": module.source, "merged": module.merged.plain()}
    module.results["cost"] = measure_costs(models)
    module.results["generation"] = {
        name: write_on(model, module.data().tokenizer)
        for name, model in track(models.items(), "generation", total=2)
    }


def write_on(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """Return what a model writes after each of the prompts, and how much it repeats itself."""
    texts = greedy(model, [torch.tensor(ids) for ids in encode(tokenizer, PROMPTS)], NUM_TOKENS)
    written = {prompt: tokenizer.decode(ids) for prompt, ids in zip(PROMPTS, texts, strict=True)}
    return {**generation_sanity(texts), "texts": written}


def card(module: AlphaModule, rows: list[Row]) -> str:
    """Return the model card of the exported model."""
    plan = module.merged.plan
    return model_card(
        source=module.source_name,
        num_source_layers=plan.num_layers,
        num_layers=plan.num_layers - plan.num_removed,
        groups=[list(group.members) for group in plan.groups],
        table=rows,
        command=None,
        provenance={**provenance(), "plan": plan.method, "source_fingerprint": plan.source or None},
        notes=gate_notes(module.checks),
    )
