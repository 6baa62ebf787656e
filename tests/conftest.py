"""Fixtures: a tiny random Llama with a byte tokenizer, the real model, the shared data."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SHARED = Path(__file__).parents[2] / "shared"


def tiny_config(**changes: object) -> LlamaConfig:
    """Four layers of width 32 with grouped queries; `changes` override the fields."""
    fields = {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 257,
        "initializer_range": 0.2,
    }
    return LlamaConfig(**{**fields, **changes})


def tiny_model(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """Random weights, norm weights that are not 1, float32, eval mode."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
    return model.eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte (ids 0 to 255), then bos, eos."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|bos|>", "<|eos|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|eos|>"
    )


@pytest.fixture(autouse=True)
def _finished_wandb_runs() -> Iterator[None]:
    """End a run of W&B that a test leaves open: the next logger in this process would join it."""
    yield
    wandb = sys.modules.get("wandb")
    if wandb is not None and getattr(wandb, "run", None) is not None:
        wandb.finish()


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local checkpoint folder of the tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_dir: Path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_dir, tmp_path / "checkpoint"))


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    return tiny_model()


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real MMLU data, where it is present."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs the folder shared/ beside the repository")
    return SHARED
