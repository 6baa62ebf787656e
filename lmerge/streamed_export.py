"""Write the merged model as a checkpoint without building it, tensor by tensor."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from lmerge.big_files import check_room
from lmerge.checkpoint import loading
from lmerge.export import CARD, check_free
from lmerge.files import writing
from lmerge.folders import atomic_folder
from lmerge.shards import stored_tensors, write_checkpoint
from lmerge.streamed_merge import StreamedMerge

COPIED = (
    *("tokenizer*", "vocab.json", "merges.txt", "*.jinja"),
    *("special_tokens_map.json", "added_tokens.json", "generation_config.json"),
    *("LICENSE*", "NOTICE*", "USE_POLICY*"),
)
"""Files that are copied from the source; code and other weights never are."""

LOCAL_KEYS = ("auto_map", "_name_or_path", "is_local", "local_files_only")
"""Settings that name code which is not copied, or tell where the source lay."""


def export_streamed(
    source_dir: Path,
    merge: StreamedMerge,
    folder: Path,
    *,
    card: str,
    fingerprint: str = "",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> None:
    """Write a checkpoint that plain transformers loads: all of it, or nothing.

    Args:
        source_dir: The source checkpoint, whose tokenizer and generation config are copied.
        merge: The merged model.
        folder: Where the checkpoint goes.
        card: Text of README.md.
        fingerprint: What the source's weights must have; empty is any.
        max_shard_size: Weights above this size are split into several files.
        overwrite: Whether an older checkpoint there may be replaced.

    Raises:
        ValueError: If the source is another one, or the folder may not be replaced or written.
    """
    check_free(folder, overwrite=overwrite)
    shapes = merge.shapes
    num_bytes = sum(map(math.prod, shapes.values())) * merge.out_dtype.itemsize
    with atomic_folder(folder, overwrite=overwrite) as temporary, writing(folder):
        check_room(folder, num_bytes)
        (temporary / CARD).write_text(card, encoding="utf-8")
        copy_small_files(source_dir, temporary)
        config = merged_config(source_dir, merge)
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_checkpoint(temporary, shapes, merge.out_dtype, merge.tensor, max_shard_size)
        check_fingerprint(merge, fingerprint)
        _check_written(temporary, merge)


def merged_config(source_dir: Path, merge: StreamedMerge) -> dict[str, Any]:
    """Return the source's config.json with the merged model's layers, dtype and tying.

    All other keys stay as they are, so that older readers find what they look for.
    """
    config: dict[str, Any] = json.loads((source_dir / "config.json").read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key not in LOCAL_KEYS}
    known, origins = merge.config, merge.plan.origins()
    config["num_hidden_layers"] = len(origins)
    types = getattr(known, "layer_types", None)
    if types is not None and ("layer_types" in config or len(set(types)) > 1):
        config["layer_types"] = types
    if config.get("max_window_layers") is not None:
        # Layers from here on slide: what readers go by that do not know `layer_types`.
        config["max_window_layers"] = sum(i < config["max_window_layers"] for i in origins)
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(
        merge.out_dtype
    ).removeprefix("torch.")
    if merge.tied != bool(known.tie_word_embeddings):
        config["tie_word_embeddings"] = merge.tied
    return config


def copy_small_files(source_dir: Path, folder: Path) -> None:
    """Copy tokenizer, chat template, generation config and license."""
    for pattern in COPIED:
        for path in sorted(source_dir.glob(pattern)):
            if path.is_file() and path.suffix != ".py":
                shutil.copyfile(path, folder / path.name)
    path = folder / "tokenizer_config.json"
    if path.is_file():
        with loading(str(source_dir), path.name):
            settings = dict(json.loads(path.read_text(encoding="utf-8")))
        settings = {key: value for key, value in settings.items() if key not in LOCAL_KEYS}
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_fingerprint(merge: StreamedMerge, fingerprint: str) -> None:
    """Raise ValueError when the weights that were merged are not those that the run merged."""
    if fingerprint and merge.fingerprint() != fingerprint:
        raise ValueError(
            f"{merge.path} was made for a source with fingerprint {fingerprint}, but this one has "
            f"{merge.fingerprint()}. Give the run's own source, or empty `source` in the plan to "
            "use it all the same."
        )


def _check_written(folder: Path, merge: StreamedMerge) -> None:
    """Read the heads of what was written: every weight is there, in its shape and dtype."""
    found = {name: (t.shape, t.dtype) for name, t in stored_tensors(folder).items()}
    assert found == {name: (shape, merge.out_dtype) for name, shape in merge.shapes.items()}
