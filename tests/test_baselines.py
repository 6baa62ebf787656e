"""Each baseline against a straight loop over whole models, written apart from it."""

import copy
from itertools import pairwise
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from models import fresh_model, logits, same, tiny_variant, weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmerge.alphas import AlphaConfig
from lmerge.baselines import dropping, merging, patching
from lmerge.baselines.calibration import Calibration, Shallow, keep_layers
from lmerge.baselines.table import BASELINES, Baseline, make_baseline
from lmerge.information import InformationConfig
from lmerge.llama import MATRICES, PATHS
from lmerge.similarity import similarity_matrix

BLOCKS = torch.randint(0, 256, (60, 8), generator=torch.Generator().manual_seed(0))
NAMES = get_args(Baseline)
WEIGHTS = [PATHS[name] for name in MATRICES]


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patching, "COSINE_STEPS", 50)
    monkeypatch.setattr(patching, "COSINE_RATE", 1e-2)


def data_of(model: PreTrainedModel) -> Calibration:
    return Calibration(model, BLOCKS)


def deep(seed: int = 0, num_hidden_layers: int = 7, **changes: object) -> PreTrainedModel:
    return tiny_model(seed, num_hidden_layers=num_hidden_layers, **changes)


@torch.no_grad()
def raw_states(model: PreTrainedModel) -> list[Tensor]:
    """Embedding and each layer's output, none of them normed."""
    found = [model.model.embed_tokens(BLOCKS)]
    handles = [
        layer.register_forward_hook(lambda _m, _i, out: found.append(out))
        for layer in model.model.layers
    ]
    model(BLOCKS, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def cut(model: PreTrainedModel, kept: list[int]) -> PreTrainedModel:
    """A deep copy that has the layers `kept`."""
    clone = copy.deepcopy(model)
    clone.model.layers = nn.ModuleList(clone.model.layers[i] for i in kept)
    for place, layer in enumerate(clone.model.layers):
        layer.self_attn.layer_idx = place
    clone.config.num_hidden_layers = len(kept)
    return clone


def close(model: PreTrainedModel, reference: PreTrainedModel, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(logits(model), logits(reference), rtol=tolerance, atol=tolerance)


def test_every_baseline_has_a_row() -> None:
    assert set(BASELINES) == set(NAMES)


@pytest.mark.parametrize("num_removed", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_baseline_has_that_many_layers_less_and_runs(name: Baseline, num_removed: int) -> None:
    model = deep()
    shallow = make_baseline(name, data_of(model), num_removed)
    assert len(shallow.model.model.layers) == len(shallow.kept) == 7 - num_removed
    assert shallow.model.config.num_hidden_layers == 7 - num_removed
    assert logits(shallow.model).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_baseline_leaves_the_source_untouched(name: Baseline) -> None:
    model = deep()
    before = weights(model)
    make_baseline(name, data_of(model), 2)
    assert same(before, weights(model))


@pytest.mark.parametrize("variant", ["llama-biases", "mistral", "qwen3-untied"])
@pytest.mark.parametrize("name", NAMES)
def test_a_baseline_works_on_every_architecture(name: Baseline, variant: str) -> None:
    model = tiny_variant(variant)
    shallow = make_baseline(name, data_of(model), 1)
    assert logits(shallow.model).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_removing_nothing_gives_the_source(name: Baseline) -> None:
    model = deep()
    torch.testing.assert_close(
        logits(make_baseline(name, data_of(model), 0).model), logits(model), rtol=0, atol=0
    )


@pytest.mark.parametrize("name", NAMES)
def test_removing_all_layers_is_refused(name: Baseline) -> None:
    with pytest.raises(ValueError, match="`num_removed` must be between 0 and 6"):
        make_baseline(name, data_of(deep()), 7)


def test_last_keeps_the_first_layers() -> None:
    model = deep()
    close(make_baseline("last", data_of(model), 2).model, fresh_model(model, range(5)), 0)


def test_random_removal_depends_on_the_seed_alone() -> None:
    model = deep(num_hidden_layers=12)
    drawn = {s: dropping.drop_random(Calibration(model, BLOCKS, seed=s), 3).kept for s in range(6)}
    assert drawn[0] == dropping.drop_random(Calibration(model, BLOCKS), 3).kept
    assert len(set(drawn.values())) > 1
    assert all({0, 11} <= set(kept) for kept in drawn.values())


def test_shortgpt_is_a_loop_over_tokens() -> None:
    model = deep()
    states, influence = raw_states(model), []
    for before, after in pairwise(states):
        total = 0.0
        for x, y in zip(before.flatten(0, 1), after.flatten(0, 1), strict=True):
            total += 1 - float(x @ y / x.norm() / y.norm())
        influence.append(total)
    kept = sorted(sorted(range(7), key=influence.__getitem__)[2:])
    close(make_baseline("shortgpt", data_of(model), 2).model, fresh_model(model, kept), 0)


def test_angular_block_is_a_loop_over_blocks() -> None:
    model = deep()
    states = [s[:, -1].double() for s in raw_states(model)]
    cosine = [F.cosine_similarity(states[i], states[i + 2], dim=1) for i in range(1, 5)]
    gap = 1 + min(range(4), key=lambda i: float(cosine[i].clamp(-1, 1).arccos().mean()))
    kept = [i for i in range(7) if not gap <= i < gap + 2]
    close(make_baseline("angular_block", data_of(model), 2).model, fresh_model(model, kept), 0)


def test_sleb_is_a_loop_over_whole_models() -> None:
    model, kept = deep(), list(range(7))
    for _ in range(3):
        losses = []
        for place in range(1, len(kept) - 1):
            tried = cut(model, kept[:place] + kept[place + 1 :])
            with torch.no_grad():
                losses.append(float(tried(BLOCKS, labels=BLOCKS, use_cache=False).loss))
        del kept[1 + losses.index(min(losses))]
    assert list(make_baseline("sleb", data_of(model), 3).kept) == kept


def test_sleb_for_several_budgets_is_sleb_for_each() -> None:
    shared = data_of(deep())
    for num_removed in (3, 1, 4):
        alone = make_baseline("sleb", data_of(deep()), num_removed).kept
        assert make_baseline("sleb", shared, num_removed).kept == alone


def test_mka_merges_pair_after_pair() -> None:
    model, reference = deep(), deep()
    last_LBD = torch.stack([s[:, -1] for s in raw_states(model)[1:]])
    mean = similarity_matrix(last_LBD, "npib", InformationConfig()).mean(dim=1)
    for i in (5, 4, 3):
        alpha = torch.sigmoid(mean[i] / (mean[i] + mean[i + 1])).float()
        for path in WEIGHTS:
            lower = reference.model.layers[i].get_parameter(path)
            upper = reference.model.layers[i + 1].get_parameter(path)
            with torch.no_grad():
                lower.copy_(alpha * lower + (1 - alpha) * upper)
    close(make_baseline("mka", data_of(model), 3).model, cut(reference, [0, 1, 2, 3]))


def test_mka_alphas_are_about_five_eighths_whatever_the_data() -> None:
    model = deep()
    group = merging.Group(members=(5, 6), anchor=5)
    last_LBD = torch.stack([s[:, -1] for s in raw_states(model)[1:]])
    share = merging.mka_start(group, AlphaConfig(), similarity_matrix(last_LBD, "npib"))
    assert 0.5 < float(share[0]) < 0.74


@pytest.mark.parametrize("num_above", [1, 2, 3])
def test_a_laco_merge_adds_parameter_differences(num_above: int) -> None:
    model, reference = deep(), deep()
    for path in WEIGHTS:
        base = model.model.layers[1].get_parameter(path)
        with torch.no_grad():
            for k in range(1, num_above + 1):
                upper = model.model.layers[1 + k].get_parameter(path)
                reference.model.layers[1].get_parameter(path).add_(upper - base)
    kept = [0, 1, *range(2 + num_above, 7)]
    whole = Shallow(model, tuple(range(7)))
    collapsed = merging.collapse(whole, 1, num_above, released=False)
    assert list(collapsed.kept) == kept
    close(collapsed.model, cut(reference, kept))


def test_the_released_laco_keeps_the_upper_layer_under_the_lower_norms() -> None:
    model, reference = deep(), deep()
    for path in WEIGHTS:
        lower = reference.model.layers[1].get_parameter(path)
        with torch.no_grad():
            for upper in (model.model.layers[2], model.model.layers[3]):
                lower.add_(upper.get_parameter(path) - lower)
    collapsed = merging.collapse(Shallow(model, tuple(range(7))), 1, 2, released=True)
    close(collapsed.model, cut(reference, [0, 1, 4, 5, 6]))


@torch.no_grad()
def straight_laco(model: PreTrainedModel, threshold: float, num_removed: int) -> list[list[int]]:
    """The groups that a pass of LaCo's loop makes, by deep copies; stops at `num_removed`."""
    sentences = BLOCKS[:5]
    wanted = model.model(sentences, use_cache=False).last_hidden_state
    current, groups = copy.deepcopy(model), [[i] for i in range(7)]
    place = 7 - 4
    while place >= 0 and len(groups) > 7 - num_removed:
        above = min(3, len(groups) - place - 1, num_removed - (7 - len(groups)))
        tried = copy.deepcopy(current)
        for path in WEIGHTS:
            base = current.model.layers[place].get_parameter(path)
            for k in range(1, above + 1):
                upper = current.model.layers[place + k].get_parameter(path)
                tried.model.layers[place].get_parameter(path).add_(upper - base)
        tried = cut(tried, [i for i in range(len(groups)) if not place < i <= place + above])
        cosine = F.cosine_similarity(
            tried.model(sentences, use_cache=False).last_hidden_state.flatten(1),
            wanted.flatten(1),
            dim=1,
        ).mean()
        if above and cosine > threshold:
            current = tried
            groups[place] = [i for group in groups[place : place + above + 1] for i in group]
            del groups[place + 1 : place + above + 1]
            place = min(place - 2, len(groups) - 4)
        else:
            place -= 1
    return groups


@pytest.mark.parametrize("num_removed", [2, 3, 4])
def test_laco_lowers_its_threshold_until_enough_layers_are_gone(num_removed: int) -> None:
    model = deep(3)
    for threshold in (*merging.LACO_THRESHOLDS, -1.0):
        groups = straight_laco(model, threshold, num_removed)
        if len(groups) == 7 - num_removed:
            break
    kept = make_baseline("laco", data_of(model), num_removed).kept
    assert list(kept) == [group[0] for group in groups]


def gap_of(states: list[Tensor], num_removed: int) -> int:
    """The first removed layer where states before and after are most alike."""
    cosine = [
        float(F.cosine_similarity(states[i], states[i + num_removed], dim=-1).mean())
        for i in range(1, 7 - num_removed)
    ]
    return 1 + cosine.index(max(cosine))


def test_replaceme_is_a_least_squares_map_in_the_down_projection() -> None:
    model = deep()
    states = raw_states(model)
    gap = gap_of(states, 2)
    layer = model.model.layers[gap - 1]
    with torch.no_grad():
        mlp = []
        handle = layer.mlp.register_forward_hook(lambda _m, _i, out: mlp.append(out))
        model(BLOCKS, use_cache=False)
        handle.remove()
        m_ND, after_ND, target_ND = (
            x.flatten(0, 1).double() for x in (mlp[0], states[gap], states[gap + 2])
        )
        solution = torch.linalg.lstsq(m_ND, target_ND - (after_ND - m_ND)).solution
        reference = cut(model, [i for i in range(7) if not gap <= i < gap + 2])
        down = reference.model.layers[gap - 1].mlp.down_proj.weight
        down.copy_((solution.T @ down.double()).float())
    close(make_baseline("replaceme", data_of(model), 2).model, reference, 1e-3)


def test_replaceme_cosine_is_more_alike_than_removal_and_turns_from_the_identity() -> None:
    model = deep()
    data = data_of(model)
    gap = gap_of(raw_states(model), 2)
    target = raw_states(model)[gap + 2]

    def cosine(shallow: Shallow) -> float:
        return float(F.cosine_similarity(raw_states(shallow.model)[gap], target, dim=-1).mean())

    dropped = keep_layers(model, [i for i in range(7) if not gap <= i < gap + 2])
    assert cosine(make_baseline("replaceme_cosine", data, 2)) > cosine(dropped) + 0.01


@torch.no_grad()
def test_linear_patch_is_a_hook_after_the_layer_below_the_gap() -> None:
    model = deep()
    states = raw_states(model)
    gap = gap_of(states, 2)
    rotation = patching.hadamard_matrix(32).float()
    ratios = [
        (states[gap + 2][b] @ rotation).abs().mean(dim=0)
        / (states[gap][b] @ rotation).abs().mean(dim=0)
        for b in range(len(BLOCKS))
    ]
    patch = rotation @ torch.diag(torch.stack(ratios).mean(dim=0)) @ rotation.T
    reference = cut(model, [i for i in range(7) if not gap <= i < gap + 2])
    reference.model.layers[gap - 1].register_forward_hook(lambda _m, _i, out: out @ patch)
    close(make_baseline("linear_patch", data_of(model), 2).model, reference)


@torch.no_grad()
def test_prune_and_compensate_scales_everything_below_as_the_paper_does() -> None:
    model = deep(tie_word_embeddings=False)
    reference = copy.deepcopy(model)
    for _ in range(2):
        states = raw_states(reference)
        pairs = list(pairwise(states))
        influence = [1 - float(F.cosine_similarity(x, y, dim=-1).mean()) for x, y in pairs]
        gap = influence.index(min(influence))
        before, after = (s.abs().mean(dim=1) for s in pairs[gap])
        scale = float((after / before).mean())
        reference = cut(reference, [i for i in range(len(influence)) if i != gap])
        reference.model.embed_tokens.weight.mul_(scale)
        for layer in reference.model.layers[:gap]:
            layer.self_attn.o_proj.weight.mul_(scale)
            layer.mlp.down_proj.weight.mul_(scale)
    close(make_baseline("prune_comp", data_of(model), 2).model, reference, 1e-3)


@pytest.mark.parametrize("order", [1, 2, 8, 12, 20, 24, 32, 48, 224, 576, 896])
def test_hadamard_matrices_are_orthonormal_with_equal_sizes(order: int) -> None:
    matrix = patching.hadamard_matrix(order)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(order, dtype=torch.float64))
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, order**-0.5))


def test_an_unknown_hadamard_order_is_refused() -> None:
    with pytest.raises(ValueError, match="knows no Hadamard matrix for the hidden width 9"):
        patching.hadamard_matrix(9)


def test_a_merge_that_changed_no_weight_is_refused() -> None:
    model = deep()
    with pytest.raises(ValueError, match="must change at least one weight"):
        merging.check_changed(keep_layers(model, [0, 1, 2]), model)
