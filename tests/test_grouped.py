import pytest
import torch
from conftest import tiny_model
from models import VARIANTS, tiny_variant, tokens

from lmerge.grouped import NAME, grouped_attention


def causal_mask(length: int, num_groups: int) -> torch.Tensor:
    hidden_TT = torch.ones(length, length, dtype=torch.bool).triu(1)
    mask_TT = torch.zeros(length, length).masked_fill(hidden_TT, torch.finfo(torch.float32).min)
    return mask_TT[None, None].repeat(2, 1, num_groups, 1)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_grouped_attention_computes_what_sdpa_does(name: str) -> None:
    model, token_BT = tiny_variant(name), tokens(2, 4)
    wanted = model(token_BT, attention_mask=causal_mask(4, 1), use_cache=False).logits
    with grouped_attention(model) as num_groups:
        found = model(token_BT, attention_mask=causal_mask(4, num_groups), use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_the_attention_of_a_model_is_put_back_after_an_error() -> None:
    model = tiny_model(attn_implementation="sdpa")

    def fail() -> None:
        with grouped_attention(model) as num_groups:
            assert (num_groups, model.config._attn_implementation) == (2, NAME)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "changes", [{"attn_implementation": "eager"}, {"num_key_value_heads": 4}], ids=str
)
def test_nothing_changes_without_groups_or_sdpa(changes: dict[str, object]) -> None:
    model = tiny_model(**changes)
    before = model.config._attn_implementation
    with grouped_attention(model) as num_groups:
        assert (num_groups, model.config._attn_implementation) == (1, before)
