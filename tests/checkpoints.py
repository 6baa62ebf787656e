"""Helpers of the tests that load, damage and refuse checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "remove"}))


def refusal(load: object, *arguments: object, **options: object) -> str:
    assert callable(load)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the callers check the text
        load(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(torch.arange(40)[None]).logits
    return result
