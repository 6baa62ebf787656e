"""What a checkpoint must be before it is loaded, and GGUF files turned into one.

Every refusal is one line that names the source, the rule, the value and the way out.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import gguf
from filelock import FileLock
from gguf import GGUFReader
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as hf_logging

from lmerge.files import one_line
from lmerge.folders import atomic_folder
from lmerge.llama import SUPPORTED

logger = logging.getLogger(__name__)

if not hasattr(gguf, "__version__"):
    # On Python 3.10 transformers asks the module, which has none, and stumbles over "N/A".
    vars(gguf)["__version__"] = metadata.version("gguf")

QUIET_BYTES = 4 * 2**30
"""Checkpoints below this size are read or written within seconds, without a progress bar."""

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")

CONVERSION = 1
"""Raise it when a conversion changes, so that old cache entries are not used."""


def check_config(source: str, folder: Path) -> None:
    """Refuse a folder whose config.json is missing, malformed or of an unsupported kind."""
    path = folder / "config.json"
    if not path.is_file():
        files = [f"{source}/{file.name}" for file in sorted(folder.glob("*.gguf"))]
        remedy = f"Give the file itself, {files[0]}" if files else "Give the folder of a checkpoint"
        raise ValueError(f"`source` must hold a config.json, got {source!r} without one. {remedy}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        model_type = config.get("model_type")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"`source` must hold a readable config.json, got {source!r}: {one_line(error)}. Get a "
            "fresh copy of it."
        ) from error
    if model_type not in SUPPORTED:
        raise ValueError(_unsupported(source, model_type, own_code="auto_map" in config))
    if config.get("quantization_config") is not None:
        raise ValueError(
            f"`source` must hold plain weights, got {source!r}, which is quantised. Load the "
            "original model, or a GGUF file, which is dequantised."
        )
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"`source` must hold plain weights, got {source!r} with an adapter. Merge the adapter "
            "into its base model first."
        )


def check_weights(source: str, folder: Path) -> None:
    """Refuse a folder without weights in safetensors."""
    if (folder / SINGLE).is_file():
        return
    if (folder / INDEX).is_file():
        read_index(source, folder)
        return
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    found = f"only the pickle {pickles[0]}, which can run code" if pickles else "none"
    raise ValueError(
        f"`source` must have its weights in {SINGLE}, got {source!r} with {found}. "
        "Convert a checkpoint that you trust once: AutoModelForCausalLM.from_pretrained(OLD, "
        "use_safetensors=False).save_pretrained(NEW)."
    )


def read_index(source: str, folder: Path) -> dict[str, str]:
    """Return the index of a sharded checkpoint: weight -> file of the same folder.

    Raises:
        ValueError: When it is malformed, or names a file outside the folder or one that is missing.
    """
    with loading(source, INDEX):
        names = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(names, dict) or not all(isinstance(f, str) for f in names.values()):
            raise TypeError("`weight_map` must give a file for each weight")
    for file in sorted(set(names.values())):
        # A name, not a path: an index may not reach out of its folder.
        if file != Path(file).name or "\\" in file or not file.endswith(".safetensors"):
            raise ValueError(
                f"`source` must have an index that names safetensors files of its own folder, got "
                f"{file!r} in {INDEX} of {source!r}. Get a fresh copy of it from where you trust."
            )
        if not (folder / file).is_file():
            raise ValueError(
                f"`source` must hold all files that its index names, got {source!r} without {file}."
                " Get a fresh copy of it."
            )
    return names


def load_whole(source: str, folder: Path, *, bars: bool = False, **options: Any) -> PreTrainedModel:
    """Load a model through transformers, and refuse one that it filled up with random weights."""
    auto: Any = AutoModelForCausalLM
    options |= {"trust_remote_code": False, "local_files_only": True}
    with loading(source, "its weights", bars=bars):
        # Both make transformers report what does not fit instead of printing a table.
        model, info = auto.from_pretrained(
            folder, **options, ignore_mismatched_sizes=True, output_loading_info=True
        )
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if info["mismatched_keys"]:
        name, found, wanted = min(info["mismatched_keys"])
        raise ValueError(
            f"`source` must hold weights that fit its config.json, got {source!r} with {name} of "
            f"shape {tuple(found)} instead of {tuple(wanted)}. Get a fresh copy of its files."
        )
    if missing:
        raise ValueError(
            f"`source` must hold all of its weights, got {source!r} without {len(missing)} of "
            f"them, such as {missing[0]}. Get a fresh copy of its files."
        )
    if unexpected:
        logger.warning(
            "%s holds %d tensors that its config does not use, such as %s; they are ignored",
            source,
            len(unexpected),
            unexpected[0],
        )
    assert isinstance(model, PreTrainedModel)
    return model


@contextmanager
def loading(source: str, what: str, *, bars: bool = False) -> Iterator[None]:
    """Turn what transformers raises on a file that it cannot use into one line."""
    try:
        with quiet(bars=bars):
            yield
    except (ImportError, MemoryError, Warning):
        raise
    except Exception as error:  # malformed files end in errors of every type, also bare ones
        raise ValueError(
            f"`source` must be a whole checkpoint, got {source!r}, and {what} cannot be read: "
            f"{one_line(error)}. Get a fresh copy of its files."
        ) from error


@contextmanager
def quiet(*, bars: bool = False) -> Iterator[None]:
    """Keep the messages of transformers, and its progress bars unless `bars`, off stderr."""
    verbosity = hf_logging.get_verbosity()
    # The hub's library warns when its environment variable has already decided.
    decided = "HF_HUB_DISABLE_PROGRESS_BARS" in os.environ
    hide = not bars and not decided and hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    if hide:
        hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if hide:
            hf_logging.enable_progress_bar()


def converted_gguf(source: str, path: Path) -> Path:
    """Return the cached safetensors copy of a GGUF file, which the first caller makes.

    Copies lie in `$LMERGE_CACHE`, or `~/.cache/lmerge`. A lock lets one process convert while
    others wait; a copy appears under its name only when it is whole.
    """
    root = Path(os.environ.get("LMERGE_CACHE") or Path.home() / ".cache" / "lmerge").expanduser()
    folder = root / _cache_key(path)
    if folder.is_dir():
        return folder
    _check_gguf(source, path)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{folder.name}.lock"):
            # Whoever held the lock before may have made the copy, or have been killed over it.
            for left in root.glob(f".{folder.name}.*.tmp"):
                shutil.rmtree(left, ignore_errors=True)
            if not folder.is_dir():
                _convert(source, path, folder)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"The cache folder must be writable, got {str(root)!r}: {one_line(error)}. Set "
            "LMERGE_CACHE to another folder."
        ) from error
    return folder


def _unsupported(source: str, model_type: object, *, own_code: bool = False) -> str:
    code = " with its own code, which is never run" if own_code else ""
    return (
        f"`source` must be one of the model types {', '.join(SUPPORTED)}, got {model_type!r}{code} "
        f"in {source!r}. Choose another model, or describe its layers in lmerge/llama.py."
    )


def _cache_key(path: Path) -> str:
    stat = path.stat()
    digest = hashlib.sha256(f"{CONVERSION} {path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    with path.open("rb") as file:
        digest.update(file.read(2**20))
        file.seek(max(0, stat.st_size - 2**20))
        digest.update(file.read())
    return f"{path.stem}-{digest.hexdigest()[:16]}"


def _convert(source: str, path: Path, folder: Path) -> None:
    logger.info("converting %s to safetensors, once; this takes about half a minute", path.name)
    with loading(source, "its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = load_whole(source, path.parent, bars=True, gguf_file=path.name)
    # The weights are plain by now, but transformers refuses to save what it thinks quantised.
    vars(model.config).pop("quantization_config", None)
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(name, None)
    with atomic_folder(folder) as temporary:
        tokenizer.save_pretrained(temporary)
        model.save_pretrained(temporary)


def _check_gguf(source: str, path: Path) -> None:
    with loading(source, "its GGUF header"):
        reader = GGUFReader(path)
        architecture = reader.fields["general.architecture"].contents()
        scaling = reader.fields.get(f"{architecture}.rope.scaling.type")
        scaled = scaling is not None and scaling.contents() != "none"
    if architecture not in SUPPORTED:
        raise ValueError(_unsupported(source, architecture))
    if scaled or any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
        raise ValueError(
            f"A GGUF file must have plain rotary positions, got {source!r}, which scales them, and "
            "transformers does not read that. Load the original checkpoint instead."
        )
