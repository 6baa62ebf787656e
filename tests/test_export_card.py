import re
from pathlib import Path

import pytest
import yaml
from transformers import PreTrainedModel

from lmerge.export import model_card
from lmerge.files import provenance

CARD = {
    "source": "org/Base-1.5B",
    "num_source_layers": 8,
    "num_layers": 5,
    "groups": [[5, 6], [1, 2, 3]],
    "table": [("perplexity a|b", "10.1", "11.2")],
    "command": "lmerge fit --config x.yaml",
    "provenance": {"lmerge": "0.1.0", "git_commit": None},
    "notes": ["It was measured in English only."],
}


def front_matter(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---\n")[1])  # type: ignore[no-any-return]


def test_card_names_the_base_model_in_its_front_matter() -> None:
    assert front_matter(model_card(**CARD))["base_model"] == "org/Base-1.5B"


def test_card_of_an_alias_names_its_hub_id() -> None:
    card = model_card(**{**CARD, "source": "smollm2-135m"})
    assert front_matter(card)["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_card_of_a_local_source_tells_only_its_name(tmp_path: Path) -> None:
    card = model_card(**{**CARD, "source": str(tmp_path / "Llama-3.2-1B")})
    assert "# Llama-3.2-1B, 8 layers merged into 5" in card
    assert str(tmp_path) not in card
    assert "base_model" not in front_matter(card)


def test_card_tells_where_each_group_went() -> None:
    assert "| 1 to 3 | 1 |\n| 5 to 6 | 3 |\n\n" in model_card(**CARD)


def test_groups_of_one_layer_change_nothing_in_the_card() -> None:
    groups = [[0], [1, 2, 3], [4], [5, 6], [7]]
    assert model_card(**{**CARD, "groups": groups}) == model_card(**CARD)


def test_card_escapes_bars_in_its_table() -> None:
    assert r"| perplexity a\|b | 10.1 | 11.2 |" in model_card(**CARD)


def test_card_without_results_says_so() -> None:
    assert "Not measured." in model_card(**{**CARD, "table": []})


@pytest.mark.parametrize("part", ["lmerge fit --config x.yaml", "- lmerge: 0.1.0", "English only"])
def test_card_holds(part: str) -> None:
    assert part in model_card(**CARD)


def test_card_leaves_out_what_is_unknown() -> None:
    assert "None" not in model_card(**{**CARD, "command": None})


def test_card_takes_real_provenance() -> None:
    assert "- torch: " in model_card(**{**CARD, "provenance": provenance()})


def test_loading_snippet_runs(tiny_dir: Path) -> None:
    (code,) = re.findall("```python\n(.*?)```", model_card(**CARD), re.DOTALL)
    names: dict[str, object] = {}
    exec(code.replace("path/to/this/folder", str(tiny_dir)), names)
    assert isinstance(names["model"], PreTrainedModel)
