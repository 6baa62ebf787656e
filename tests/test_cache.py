from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from models import NUM_LAYERS, VARIANTS, logits, tiny_variant, tokens
from torch import Tensor
from transformers import PreTrainedModel

from lmerge import cache
from lmerge.cache import cache_states, keep_states
from lmerge.llama import decoder_layers, embed, lm_logits

PLACES = range(NUM_LAYERS + 1)


@torch.no_grad()
def hooked(model: PreTrainedModel, token_BT: Tensor, first_merged: int) -> tuple[Tensor, Tensor]:
    """The input of a layer (of the norm after the last) and the normed output, seen by hooks."""
    seen = {}
    modules = [*decoder_layers(model), model.model.norm]
    hooks = [
        modules[first_merged].register_forward_pre_hook(lambda _m, i: seen.update(prefix=i[0])),
        model.model.norm.register_forward_hook(lambda _m, _i, out: seen.update(final=out)),
    ]
    model(token_BT, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen["prefix"], seen["final"]


@pytest.mark.parametrize("first_merged", PLACES)
@pytest.mark.parametrize("name", VARIANTS)
def test_states_are_those_that_hooks_see_in_the_plain_model(name: str, first_merged: int) -> None:
    model = tiny_variant(name)
    cache = cache_states(model, tokens(3), first_merged, batch_size=3)
    prefix, final = hooked(model, tokens(3), first_merged)
    assert torch.equal(cache.prefix_BTD, prefix)
    assert torch.equal(cache.final_BTD, final)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 10])
def test_the_batch_size_does_not_matter(batch_size: int) -> None:
    found = cache_states(tiny_model(), tokens(5), 2, batch_size=batch_size)
    wanted = cache_states(tiny_model(), tokens(5), 2, batch_size=5)
    for states, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)


def test_final_states_give_the_logits() -> None:
    model = tiny_model()
    final = cache_states(model, tokens(), 1).final_BTD
    with torch.no_grad():
        torch.testing.assert_close(lm_logits(model, final), logits(model))


def test_states_keep_the_dtype_of_the_source() -> None:
    cache = cache_states(tiny_model().bfloat16(), tokens(), 1)
    assert {states.dtype for states in cache} == {torch.bfloat16}


def test_states_carry_no_gradient() -> None:
    assert not any(states.requires_grad for states in cache_states(tiny_model(), tokens(), 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_mapped_from_disk_are_those_in_memory(dtype: torch.dtype, tmp_path: Path) -> None:
    model, blocks_BT = tiny_model().to(dtype), tokens(7)
    kept = [keep_states(model, blocks_BT, 2, folder=tmp_path, memory=m) for m in (1.0, 0.0, 0.0)]
    for states in zip(*kept, strict=True):
        assert torch.equal(states[0], states[1])
        assert torch.equal(states[1], states[2])


def test_mapped_states_are_computed_once_and_belong_to_their_source(tmp_path: Path) -> None:
    for seed, expected in ((0, 2), (0, 2), (1, 4)):
        keep_states(tiny_model(seed), tokens(3), 2, folder=tmp_path, memory=0.0)
        assert (
            len([p for p in tmp_path.iterdir() if p.suffix in (".prefix_BTD", ".final_BTD")])
            == expected
        )


def test_states_cut_off_by_a_kill_go_on_where_they_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, blocks_BT = tiny_model(), tokens(13)
    wanted = keep_states(model, blocks_BT, 2, folder=tmp_path / "whole", memory=0.0)
    seen: list[int] = []

    def watched(source: PreTrainedModel, token_BT: Tensor) -> Tensor:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(len(token_BT))
        return embed(source, token_BT)

    monkeypatch.setattr(cache, "embed", watched)
    with pytest.raises(KeyboardInterrupt):
        keep_states(model, blocks_BT, 2, folder=tmp_path / "cut", memory=0.0)
    seen.clear()
    found = keep_states(model, blocks_BT, 2, folder=tmp_path / "cut", memory=0.0)
    assert seen == [4, 1]  # of 4, 4, 4, 1
    for states, expected in zip(found, wanted, strict=True):
        assert torch.equal(states, expected)
    assert not [path for path in (tmp_path / "cut").iterdir() if "part" in path.name]


def test_states_that_fit_leave_no_file(tmp_path: Path) -> None:
    keep_states(tiny_model(), tokens(3), 2, folder=tmp_path / "none", memory=1.0)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("memory", [0.0, 1.0])
def test_room_beside_the_states_lies_where_they_lie(memory: float, tmp_path: Path) -> None:
    cache = keep_states(tiny_model(), tokens(3), 2, folder=tmp_path, memory=memory)
    before = sorted(tmp_path.iterdir())
    room_BTD = cache.room(torch.float64)
    assert room_BTD.shape == cache.final_BTD.shape
    assert (room_BTD.untyped_storage().filename is None) == (memory > 0)
    room_BTD.fill_(1.5)
    assert (room_BTD == 1.5).all()
    assert sorted(tmp_path.iterdir()) == before  # its file has no name any more
