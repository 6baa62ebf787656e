import json
import math
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from models import plan_of, tiny_variant, tokens

from lmerge.alpha_files import load_alphas, plan_of_alphas
from lmerge.alphas import STARTS, AlphaConfig, Alphas, Start, spread
from lmerge.merge import blend
from lmerge.merged import MergedLlama
from lmerge.plan import Group

SIMILARITY_LL = torch.rand(4, 4, generator=torch.Generator().manual_seed(3)) + 0.1


def shares(start: Start, group: Group, **options: object) -> list[float]:
    config = AlphaConfig(start=start, **options)
    return STARTS[start](group, config, SIMILARITY_LL).tolist()


def test_a_fixed_value_is_the_lower_layers_share_of_a_pair() -> None:
    assert shares("fixed", Group(members=(1, 2), anchor=1), value=0.7) == pytest.approx([0.7, 0.3])


def test_merges_of_two_compound_in_a_longer_group() -> None:
    found = shares("fixed", Group(members=(0, 1, 2), anchor=0), value=0.7, steps={"0": 0.6})
    assert found == pytest.approx([0.7, 0.3 * 0.6, 0.3 * 0.4])


def test_layers_below_the_anchor_merge_up_into_it() -> None:
    found = shares("fixed", Group(members=(0, 1, 2), anchor=1), value=0.7)
    assert found == pytest.approx([0.3, 0.49, 0.21])


def test_the_mka_share_of_a_pair_is_the_rule() -> None:
    mean = SIMILARITY_LL.double().mean(dim=1).tolist()
    alpha = 1 / (1 + math.exp(-2 * mean[1] / (mean[1] + mean[2])))
    found = shares("mka", Group(members=(1, 2), anchor=1), beta=2.0)
    assert found == pytest.approx([alpha, 1 - alpha])


def test_the_similarity_share_of_a_pair_is_their_similarity_in_0_to_1() -> None:
    found = shares("similarity", Group(members=(1, 2), anchor=1))
    assert found[0] == pytest.approx(float(SIMILARITY_LL[1, 2].clamp(0, 1)))


@pytest.mark.parametrize("name", ["bayes", "gradient", "heuristic"])
def test_published_merges_equal_shares_of_one_group(name: str, shared_dir: Path) -> None:
    path = shared_dir / "reference" / f"alphas_{name}.json"
    plan = plan_of_alphas(path, num_layers=32)
    (group,) = plan.groups
    assert group == Group(members=tuple(range(18, 32)), anchor=18)
    (alphas,) = load_alphas(path, plan)
    generator = torch.Generator().manual_seed(0)
    weight_GOI = torch.randn(14, 5, 6, generator=generator, dtype=torch.float64)
    layers = dict(zip(group.members, weight_GOI.clone(), strict=True))
    for step in json.loads(path.read_text()):
        i, j, a = (step[k] for k in ("layer_to_merge_into", "layer_to_remove", "ratio_i_alpha"))
        layers[i] = a * layers[i] + (1 - a) * layers.pop(j)
    merged_OI = torch.einsum("g,goi->oi", alphas["layer"].double(), weight_GOI)
    torch.testing.assert_close(merged_OI, layers[18], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "content",
    [
        '[{"layer_to_merge_into": 1, "layer_to_remove": 2}]',
        '[{"layer_to_merge_into": 0, "layer_to_remove": 1, "ratio_i_alpha": 0.5}]',
        '[{"layer_to_merge_into": 2, "layer_to_remove": 1, "ratio_i_alpha": 0.5}]',
        "[",
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "alphas.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"^[^\n]*alphas\.json[^\n]*$"):
        load_alphas(path, plan_of([1, 2]))


def spread_over(merged: MergedLlama, alphas: list[Alphas]) -> list[Alphas]:
    return [
        spread(group, merged.config.granularity, layer.stacked(), head_dim=merged.head_dim)
        for layer, group in zip(merged.merged_layers(), alphas, strict=True)
    ]


@pytest.mark.parametrize("granularity", ["layer", "tensor", "head", "neuron"])
def test_coarse_alphas_give_the_same_model_at_every_granularity(granularity: str) -> None:
    token_BT, alphas = tokens(), [{"layer": torch.tensor([0.7, 0.3])}]
    models = []
    for grain in ("layer", granularity):
        config = AlphaConfig(granularity=grain)
        merged = MergedLlama(tiny_variant("qwen3"), plan_of([1, 2]), {}, config)
        merged.set_alphas(spread_over(merged, alphas))
        models.append(merged.causal_lm(token_BT, use_cache=False).logits)
    torch.testing.assert_close(models[0], models[1])


def test_alphas_finer_than_the_granularity_are_refused() -> None:
    fine = MergedLlama(tiny_model(), plan_of([1, 2]), {}, AlphaConfig(granularity="neuron"))
    for coarse in ("layer", "tensor", "head"):
        merged = MergedLlama(tiny_model(), plan_of([1, 2]), {}, AlphaConfig(granularity=coarse))
        with pytest.raises(ValueError, match=r"alpha\.granularity"):
            spread_over(merged, fine.alphas())


@pytest.mark.parametrize(
    "options",
    [{"value": math.nan}, {"start": "file"}, {"path": "x"}, {"steps": {"0": 0.1}}],
)
def test_options_that_contradict_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"^`alpha\.\w+`[^\n]*$"):
        AlphaConfig(**options)


@pytest.mark.parametrize(("axis", "slots"), [(0, 0), (0, 2), (0, 4), (1, 3), (1, 6)])
def test_gradients_of_a_blend_are_exact_in_float64(axis: int, slots: int) -> None:
    generator = torch.Generator().manual_seed(1)
    shape = (3, slots) if slots else (3,)
    alpha = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    weight_GOI = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: blend(weight_GOI, a, axis), alpha)
