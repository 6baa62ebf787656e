"""What a run starts from: a saved state, a plan that is made now, or alphas from a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmerge.activations import Pooling, layer_states
from lmerge.alpha_files import load_alphas, plan_of_alphas
from lmerge.alphas import AlphaConfig, Alphas, spread, to_free
from lmerge.checkpoints import read_checkpoint
from lmerge.data.module import MMLUDataModule
from lmerge.frames import check_motion
from lmerge.information import InformationConfig
from lmerge.llama import MATRICES, decoder_layers, head_dim, head_spec, layer_tensors, num_layers
from lmerge.plan import PLAN_METHODS, MergePlan, PlanMethod, check_plan, make_plan
from lmerge.runs import RunState, read_plan, read_run, with_refits_of
from lmerge.search import Candidate, SearchMethod, search_plan
from lmerge.similarity import Measure, similarity_matrix
from lmerge.source import model_fingerprint


def saved_state(
    stage: str, ckpt_path: str | None, *, run_dir: Path, plan_path: Path | None
) -> RunState | None:
    """Return what a stage starts from; None for a fit that makes its plan itself.

    Args:
        stage: `fit`, `validate` or `test`.
        ckpt_path: Checkpoint to start from.
        run_dir: Folder of the run.
        plan_path: A plan.json, which a new fit takes.

    Raises:
        ValueError: When what should be there is missing or malformed.
    """
    if stage == "fit" and not ckpt_path:
        return RunState(plan=read_plan(plan_path)) if plan_path else None
    saved = read_checkpoint(Path(ckpt_path)) if ckpt_path and Path(ckpt_path).is_file() else None
    if stage == "fit":
        # Alphas come from the checkpoint; refits of an earlier end of training do not.
        return saved or replace(read_run(run_dir), refits=None, kept_refits={})
    if saved is None:
        state = read_run(run_dir)
        if state.alphas is None:
            raise ValueError(
                f"run folder {run_dir} holds no alphas.json: its fit did not finish. "
                "Resume it with `lmerge fit --ckpt_path`, or give `--ckpt_path` here."
            )
        return state
    return with_refits_of(run_dir, saved)


def check_fits(state: RunState, source: PreTrainedModel) -> None:
    """Raise ValueError when saved orders or refits do not have the shapes of the source."""
    layers = decoder_layers(source)
    for index, motion in state.orders.items():
        layer = layer_tensors(layers[index])
        shapes = {name: tuple(layer[name].shape) for name in MATRICES}
        check_motion(index, motion, shapes, head_spec(source.config))
    for group, refits in zip(state.plan.groups, state.refits or (), strict=bool(state.refits)):
        layer = layer_tensors(layers[group.anchor])
        for name, weight in refits.items():
            if weight.shape != layer[name].shape:
                raise ValueError(
                    f"the refit of {name} must have the shape {list(layer[name].shape)} of the "
                    f"source, got {list(weight.shape)}. Use the files of a run on this source."
                )


def alphas_of_file(
    state: RunState | None, config: AlphaConfig, source: PreTrainedModel
) -> RunState:
    """Return the state with the alphas of `alpha.path`; its plan too where there is none.

    Raises:
        ValueError: When the file is malformed, is for another plan or model, or holds alphas that
            `alpha.granularity` or `alpha.simplex` cannot express.
    """
    assert config.path is not None
    path = Path(config.path)
    plan = state.plan if state else plan_of_alphas(path, num_layers(source))
    check_plan(plan, num_layers(source), model_fingerprint(source), path)
    alphas = [
        _spread(group, layer, config, source)
        for group, layer in zip(
            load_alphas(path, plan), (group.anchor for group in plan.groups), strict=True
        )
    ]
    return RunState(plan=plan, alphas=alphas)


def _spread(group: Alphas, anchor: int, config: AlphaConfig, source: PreTrainedModel) -> Alphas:
    layer = layer_tensors(decoder_layers(source)[anchor])
    stacked = {name: tensor[None] for name, tensor in layer.items()}  # for the shapes alone
    fine = spread(group, config.granularity, stacked, head_dim=head_dim(source.config))
    to_free(fine, simplex=config.simplex)
    return fine


def similarity_by_domain(
    source: PreTrainedModel,
    data: MMLUDataModule,
    measure: Measure,
    pooling: Pooling,
    information: InformationConfig,
) -> dict[str, Tensor]:
    """Return the similarity of the layers for each domain and language, and for `all` together."""
    states = {
        "/".join(key): layer_states(
            source, prompts, pooling=pooling, description=f"states {'/'.join(key)}"
        )
        for key, prompts in data.calibration_prompts().items()
    }
    states["all"] = torch.cat(list(states.values()), dim=1)
    return {
        name: similarity_matrix(states_LND, measure, information)
        for name, states_LND in states.items()
    }


def choose_plan(
    source: PreTrainedModel,
    data: MMLUDataModule,
    num_removed: int,
    method: PlanMethod | SearchMethod,
    similarity_LL: Tensor,
) -> tuple[MergePlan, list[Candidate]]:
    """Return the plan of a method, and the candidates of a search, the best first.

    Args:
        source: The source model.
        data: Calibration blocks, in stage `fit`.
        num_removed: Layers to remove.
        method: How the groups are chosen.
        similarity_LL: Layer similarity, for the methods that look at it.
    """
    provenance = {
        "source": model_fingerprint(source),
        "calibration": data.fingerprints["val"],
    }
    if method in PLAN_METHODS or not num_removed:
        plain: PlanMethod = "tail" if method == "tail" else "block"
        return make_plan(similarity_LL, num_removed, plain, **provenance), []
    blocks_BT, held_B = data.calibration_blocks(), data.held_out()
    search = cast(SearchMethod, method)
    candidates = search_plan(source, blocks_BT, held_B, num_removed, search)
    groups = candidates[0].groups
    plan = MergePlan(num_layers=num_layers(source), groups=groups, method=method, **provenance)
    return plan, candidates
