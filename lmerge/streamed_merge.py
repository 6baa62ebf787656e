"""The weights of the merged model, formed one at a time from a source checkpoint on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig

from lmerge.align import move
from lmerge.alphas import Alphas
from lmerge.axes import ALPHA_AXIS
from lmerge.big_files import pieces
from lmerge.checkpoint import loading
from lmerge.frames import check_motion
from lmerge.llama import MATRICES, PATHS, LayerTensors, config_with_layers, head_spec, stack_layers
from lmerge.merge import expand_alpha, fold_norms, merge_vectors, reference_norms, weighted_sum
from lmerge.plan import Group, check_plan
from lmerge.runs import RunState
from lmerge.shards import Content, Shape, Stored, stored_tensors
from lmerge.source import Dtype, read_config, sample, weights_fingerprint
from lmerge.streamed import EMBEDDING, skeleton

HEAD = "lm_head.weight"
LAYERS = "model.layers."
SHORT = {path: name for name, path in PATHS.items()}


class _Frame(NamedTuple):
    """What all matrices of a group share."""

    vectors: list[LayerTensors]
    """Norms, biases and head norms of each member, as stored."""
    norms: LayerTensors
    merged: LayerTensors
    """Norms, biases and head norms of the merged layer."""


class StreamedMerge:
    """The merged model as a mapping from names to weights; about two matrices are in memory.

    Weights that the merge leaves alone are handed out as places on disk. The others are formed by
    the functions and in the order of sums that the model in memory has, so they are equal to its
    weights bit for bit.

    Args:
        folder: Source checkpoint in safetensors.
        state: Plan, orders, alphas and refits.
        dtype: Dtype that the run loaded the source in.
        out_dtype: Dtype of the weights handed out; None is `dtype`.
        path: Where the plan lies, for errors.

    Raises:
        ValueError: When the checkpoint is not whole, or the state does not fit it.
    """

    def __init__(
        self,
        folder: Path,
        state: RunState,
        *,
        dtype: Dtype = "auto",
        out_dtype: Dtype | None = None,
        path: Path = Path("plan.json"),
    ) -> None:
        assert state.alphas is not None
        self.state, self.plan, self.path = state, state.plan, path
        self.stored = stored_tensors(folder)
        with loading(str(folder), "its config.json"):
            model = skeleton(folder, torch.float32)
        check_plan(self.plan, model.config.num_hidden_layers, "", path)
        self.source_config = read_config(str(folder), folder)
        self._wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        self.tied = bool(model.config.tie_word_embeddings) and self._head_is_embedding()
        if self.tied:
            del self._wanted[HEAD]
        self._check_source(folder)
        self.dtype = self._resolve(dtype)
        self.out_dtype = self._resolve(out_dtype or dtype)
        self._groups = {self.plan.position(group): i for i, group in enumerate(self.plan.groups)}
        self._origins = self.plan.origins()
        self._frame: tuple[int, _Frame] | None = None
        self._samples: dict[str, Tensor] = {}
        self._unsampled: list[str] = []
        self._check_state()

    @property
    def config(self) -> PretrainedConfig:
        """The merged model's config."""
        return config_with_layers(self.source_config, self._origins)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shape of each weight of the merged model, in the model's order."""
        kept = {origin: i for i, origin in enumerate(self._origins)}
        shapes = {}
        for name, shape in self._wanted.items():
            layer, rest = _place(name)
            if layer is None:
                shapes[name] = shape
            elif layer in kept:
                shapes[f"{LAYERS}{kept[layer]}.{rest}"] = shape
        return shapes

    @torch.no_grad()
    def tensor(self, name: str) -> Content:
        """Return a weight of the merged model in `out_dtype`.

        Raises:
            ValueError: When a weight that is not copied as it is is not finite.
        """
        content = self._content(name)
        if isinstance(content, Stored):
            if content.dtype == self.out_dtype:
                return content
            content = content.read()
        tensor = content.to(self.out_dtype)
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"merged weights must be finite, got NaN or infinity in {name} of {tensor.dtype}. "
                f"Check the source and the alphas beside {self.path}, or choose a wider `dtype`."
            )
        return tensor

    def _content(self, name: str) -> Content:
        layer, rest = _place(name)
        refit = self.state.kept_refits.get(-1 if layer is None else layer, {}).get(
            SHORT.get(rest, "")
        )
        if refit is not None:
            return refit.to(self.dtype)
        if layer in self._groups:
            return self._form(self._groups[layer], SHORT[rest])
        return self._touch(name if layer is None else f"{LAYERS}{self._origins[layer]}.{rest}")

    def fingerprint(self) -> str:
        """Return what `model_fingerprint` returns of the source loaded in `dtype`.

        Cheap once all weights were handed out: their pages were read just now.
        """
        self._sample_touched()
        for name in self._wanted.keys() - self._samples.keys():
            self._touch(name)
        self._sample_touched()
        return weights_fingerprint(self.source_config, self._wanted, self._samples)

    def _touch(self, name: str) -> Stored:
        # Samples are taken later, when the pages of the last weights were read in one go.
        self._sample_touched()
        self._unsampled.append(name)
        return self.stored[name]

    def _sample_touched(self) -> None:
        for name in self._unsampled:
            values = sample(self.stored[name].read())
            self._samples[name] = values.to(self.dtype).float()
            self.stored[name].forget()
        self._unsampled.clear()

    def _read(self, layer: int, short: str) -> Tensor:
        return self._touch(f"{LAYERS}{layer}.{PATHS[short]}").read().to(self.dtype)

    def _form(self, index: int, short: str) -> Tensor:
        """Return one weight of a merged layer."""
        refits = self.state.refits[index] if self.state.refits is not None else {}
        if short in refits:
            return refits[short].to(self.dtype)
        if self._frame is None or self._frame[0] != index:
            self._frame = (index, self._make_frame(index))
        frame = self._frame[1]
        if short not in MATRICES:
            return frame.merged[short]
        layer = self.plan.groups[index].members[0]
        axis = ALPHA_AXIS[short]
        slots = self._wanted[f"{LAYERS}{layer}.{PATHS[short]}"][axis]
        alpha = expand_alpha(self._alphas(index)[short], slots)
        return weighted_sum(self._terms(index, short, alpha, frame), axis)

    def _terms(
        self, index: int, short: str, alpha: Tensor, frame: _Frame
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield alpha and matrix of each member; those of alpha 0 add nothing and are not read."""
        members = self.plan.groups[index].members
        for layer, vectors, alpha_m in zip(members, frame.vectors, alpha, strict=True):
            if bool((alpha_m != 0).any()) or not bool((alpha != 0).any()):
                matrix = {**vectors, short: self._read(layer, short)}
                yield alpha_m, self._moved(layer, matrix, frame.norms)[short]

    def _moved(self, layer: int, tensors: LayerTensors, norms: LayerTensors) -> LayerTensors:
        return move(fold_norms(tensors, norms), self.state.orders.get(layer))

    def _make_frame(self, index: int) -> _Frame:
        group = self.plan.groups[index]
        names = [
            name
            for name in PATHS
            if name not in MATRICES and f"{LAYERS}{group.anchor}.{PATHS[name]}" in self._wanted
        ]
        vectors = [{name: self._read(i, name) for name in names} for i in group.members]
        norms = reference_norms(vectors[group.anchor_position])
        moved = [self._moved(i, v, norms) for i, v in zip(group.members, vectors, strict=True)]
        merged = merge_vectors(stack_layers(moved), self._alphas(index), group.anchor_position)
        return _Frame(vectors, norms, merged)

    def _alphas(self, index: int) -> Alphas:
        assert self.state.alphas is not None
        alphas = self.state.alphas[index]
        return dict.fromkeys(MATRICES, alphas["layer"]) if "layer" in alphas else alphas

    # Checks before anything is formed.

    def _head_is_embedding(self) -> bool:
        """Whether a model with tied embeddings has one matrix, or a second one that is equal."""
        if HEAD not in self.stored:
            return True
        head, embedding = self.stored[HEAD], self.stored.get(EMBEDDING)
        if embedding is None or (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
            return False
        pairs = zip(
            pieces(head.path, head.start, head.num_bytes),
            pieces(embedding.path, embedding.start, embedding.num_bytes),
            strict=True,
        )
        return all(one == other for one, other in pairs)

    def _check_source(self, folder: Path) -> None:
        for name, shape in self._wanted.items():
            if name not in self.stored:
                raise ValueError(
                    f"`source` must hold all of its weights, got {str(folder)!r} without {name}. "
                    "Get a fresh copy of its files."
                )
            found = self.stored[name].shape
            if found != shape:
                raise ValueError(
                    f"`source` must hold weights that fit its config.json, got {str(folder)!r} "
                    f"with {name} of shape {found} instead of {shape}. Get a fresh copy of its "
                    "files."
                )

    def _resolve(self, dtype: Dtype) -> torch.dtype:
        if dtype == "auto":
            known = getattr(self.source_config, "dtype", None)
            return known or next(iter(self.stored.values())).dtype
        found = getattr(torch, dtype)
        assert isinstance(found, torch.dtype)
        return found

    def _check_state(self) -> None:
        for layer, motion in self.state.orders.items():
            shapes = {n: self._wanted[f"{LAYERS}0.{PATHS[n]}"] for n in MATRICES}
            if layer < self.plan.num_layers:
                check_motion(layer, motion, shapes, head_spec(self.source_config))
        for index, group in enumerate(self.plan.groups):
            self._check_alphas(index, group)
            refits = self.state.refits[index] if self.state.refits is not None else {}
            for short, weight in refits.items():
                self._check_fits("repair.safetensors", group.anchor, short, tuple(weight.shape))
        for position, refits in self.state.kept_refits.items():
            for short, weight in refits.items():
                layer = self._origins[position]
                self._check_fits("repair.safetensors", layer, short, tuple(weight.shape))

    def _check_alphas(self, index: int, group: Group) -> None:
        for short, alpha in self._alphas(index).items():
            slots = self._shape(group.anchor, short)[ALPHA_AXIS[short]]
            if alpha.ndim == 2 and (not alpha.shape[1] or slots % alpha.shape[1]):
                raise ValueError(
                    f"alphas.json beside {self.path} must have alphas of {short} that divide its "
                    f"{slots} slots, got {alpha.shape[1]}. Use the alphas.json of the same run."
                )

    def _check_fits(self, file: str, layer: int, short: str, found: Shape) -> None:
        wanted = self._shape(layer, short)
        if found != wanted:
            raise ValueError(
                f"{file} beside {self.path} must fit the source, got {short} of shape {found} "
                f"instead of {wanted}. Use the files of the same run."
            )

    def _shape(self, layer: int, short: str) -> Shape:
        return self._wanted[f"{LAYERS}{layer}.{PATHS[short]}"]


def _place(name: str) -> tuple[int | None, str]:
    """Return the layer of a weight, if it lies in one, and the rest of its name."""
    if not name.startswith(LAYERS):
        return None, name
    layer, _, rest = name.removeprefix(LAYERS).partition(".")
    return int(layer), rest
