"""The merged model: a shorter Llama whose merged layers are formed from frozen weights by alphas.

Only the alphas are trainable. Layers outside every group share their memory with the source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from lmerge.align import Orders
from lmerge.alphas import AlphaConfig, Alphas, start_alphas, to_free, to_shares
from lmerge.frames import framed_group
from lmerge.llama import (
    MATRICES,
    LayerTensors,
    by_path,
    decoder_layers,
    head_dim,
    layer_tensors,
    num_layers,
    with_layer_index,
    with_layers,
    with_tensors,
)
from lmerge.merge import merge_group
from lmerge.plan import Group, MergePlan


class MergedLayer(nn.Module):
    """A decoder layer whose weights are the alpha-weighted sum of its group's members.

    Args:
        template: The anchor's decoder layer; its code runs, with other weights.
        stacked: The members' tensors stacked along G, in one frame.
        anchor: Position of the anchor among the members.
        free: Unconstrained parameters of the alphas.
        simplex: Whether the alphas are a softmax of them.
    """

    def __init__(
        self,
        template: nn.Module,
        stacked: LayerTensors,
        anchor: int,
        free: Alphas,
        *,
        simplex: bool,
    ) -> None:
        super().__init__()
        self.template = template
        self.anchor = anchor
        self.simplex = simplex
        self.names = tuple(stacked)
        for name, tensor in stacked.items():
            # Frozen parameters: FSDP shards no buffers, and DDP would send them at every step.
            self.register_parameter(f"stacked_{_key(name)}", nn.Parameter(tensor, False))
        self.free = nn.ParameterDict({name: nn.Parameter(p) for name, p in free.items()})
        self.refits: dict[str, Tensor] = {}
        self._fixed: tuple[Alphas, LayerTensors] | None = None
        self._set: tuple[Alphas, Alphas] | None = None

    def stacked(self) -> LayerTensors:
        """Return the members' tensors, stacked along G."""
        return {name: self.get_parameter(f"stacked_{_key(name)}") for name in self.names}

    def shares(self) -> Alphas:
        """Return the alphas at their own granularity.

        Shares that were set come back to the bit while nothing is trained: a softmax of their
        logarithms would round them anew.
        """
        free = dict(self.free.items())
        if self._set is not None and not torch.is_grad_enabled():
            at, shares = self._set
            if all(torch.equal(at[name], p.cpu()) for name, p in free.items()):
                return {name: share.to(free[name].device) for name, share in shares.items()}
        return to_shares(free, simplex=self.simplex)

    @torch.no_grad()
    def set_shares(self, shares: Alphas) -> None:
        """Set the alphas, at their own granularity.

        Raises:
            ValueError: When names or shapes differ from the parameters', or alphas on the simplex
                are no shares.
        """
        free = to_free(shares, simplex=self.simplex)
        shapes = {name: tuple(p.shape) for name, p in self.free.items()}
        if shapes != {name: tuple(p.shape) for name, p in free.items()}:
            raise ValueError(
                "the saved alphas do not have the shapes that `alpha.granularity` asks for. "
                "Set it to the value of the run that saved them (see its config.yaml)."
            )
        for name, parameter in self.free.items():
            parameter.copy_(free[name])
        if self.simplex:
            at = {name: p.detach().cpu().clone() for name, p in self.free.items()}
            self._set = at, {name: share.cpu().clone() for name, share in shares.items()}
        self._fixed = None

    def alphas(self) -> Alphas:
        """Return the alphas of the seven matrices."""
        shares = self.shares()
        return dict.fromkeys(MATRICES, shares["layer"]) if "layer" in shares else shares

    def tensors(self) -> LayerTensors:
        """Return the merged layer's tensors; they are formed once while no gradient is needed."""
        if torch.is_grad_enabled():
            return self._form()
        # By value: fused optimisers change parameters without a new version.
        if self._fixed is None or not _all_equal(self._fixed[0], self.free):
            # Tensors of inference mode could never be trained, and `plain` hands these out.
            with torch.inference_mode(False), torch.no_grad():
                self._fixed = ({n: p.clone() for n, p in self.free.items()}, self._form())
        return self._fixed[1]

    def refit(self, name: str, weight: Tensor) -> None:
        """Put a refitted matrix in the place of the merged one (repair)."""
        self.refits[name] = weight
        self._fixed = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return functional_call(
            self.template, by_path(self.tensors()), (hidden_states, *args), kwargs
        )

    def _form(self) -> LayerTensors:
        merged = merge_group(self.stacked(), self.alphas(), self.anchor)
        refits = {name: w.to(merged[name]) for name, w in self.refits.items()}
        return {**merged, **refits}

    def _apply(self, fn: Any, recurse: bool = True) -> MergedLayer:
        self._fixed = None  # it lives on the old device
        super()._apply(fn, recurse)
        return self


def _key(name: str) -> str:
    return name.replace(".", "_")


def _all_equal(old: Alphas, new: nn.ParameterDict) -> bool:
    return all(torch.equal(alpha, new[name]) for name, alpha in old.items())


class MergedLlama(nn.Module):
    """The partially merged model; only its alphas have gradients.

    Args:
        source: The source model; frozen here.
        plan: Groups of source layers that become one.
        orders: How each source layer is moved, from the alignment; missing ones are left as is.
        config: What the alphas can express and where they start.
        similarity_LL: Layer similarity, for the starts that need it.
    """

    def __init__(
        self,
        source: PreTrainedModel,
        plan: MergePlan,
        orders: Orders,
        config: AlphaConfig,
        similarity_LL: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.head_dim = head_dim(source.config)
        assert plan.num_layers == num_layers(source)
        source.requires_grad_(False)
        self.plan = plan
        self.kept_refits: dict[int, LayerTensors] = {}
        groups = {group.anchor: group for group in plan.groups}
        layers = []
        for index, origin in enumerate(plan.origins()):
            layer = with_layer_index(decoder_layers(source)[origin], index)
            if origin in groups:
                layer = _merged_layer(source, layer, groups[origin], orders, config, similarity_LL)
            layers.append(layer)
        self.causal_lm = with_layers(source, layers, plan.origins())

    def merged_layers(self) -> list[MergedLayer]:
        """Return the merged layers in the order of the plan's groups."""
        return [m for m in decoder_layers(self.causal_lm) if isinstance(m, MergedLayer)]

    def positions(self, num_after: int) -> list[int]:
        """Return the indices of the merged layers and of `num_after` layers above each."""
        top = len(self.plan.origins())
        found = [self.plan.position(group) for group in self.plan.groups]
        return sorted({p for q in found for p in range(q, min(q + num_after + 1, top))})

    def alpha_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def alphas(self) -> list[Alphas]:
        """Return a copy of the alphas of each group, on the CPU, at their own granularity."""
        return [
            {name: alpha.detach().cpu().clone() for name, alpha in layer.shares().items()}
            for layer in self.merged_layers()
        ]

    def set_alphas(self, alphas: Sequence[Alphas]) -> None:
        """Set the alphas of each group.

        Raises:
            ValueError: When names or shapes differ from the configured granularity.
        """
        for layer, group in zip(self.merged_layers(), alphas, strict=True):
            layer.set_shares(group)

    def refits(self) -> list[dict[str, Tensor]]:
        """Return the refitted matrices of each group."""
        return [dict(layer.refits) for layer in self.merged_layers()]

    def set_refits(
        self,
        refits: Sequence[dict[str, Tensor]] | None,
        kept_refits: Mapping[int, LayerTensors] | None = None,
    ) -> None:
        """Put refitted tensors in the place of the merged ones, and of those of other layers.

        Args:
            refits: The tensors of each group; None for none.
            kept_refits: Those of layers in no group, by position in the merged model.
        """
        layers = self.merged_layers() if refits is not None else ()
        for layer, group in zip(layers, refits or (), strict=True):
            for name, weight in group.items():
                layer.refit(name, weight)
        for position, tensors in (kept_refits or {}).items():
            self.refit_layer(position, tensors)

    def refit_layer(self, position: int, tensors: LayerTensors) -> None:
        """Put refitted tensors in the place of those of any layer; the source is untouched.

        Args:
            position: Index of the layer in the merged model.
            tensors: The new tensors by short name; the others stay.
        """
        layers = decoder_layers(self.causal_lm)
        layer = layers[position]
        if isinstance(layer, MergedLayer):
            for name, tensor in tensors.items():
                layer.refit(name, tensor)
            return
        old = layer_tensors(layer)
        new = {name: tensor.detach().to(old[name]) for name, tensor in tensors.items()}
        layers[position] = with_tensors(layer, {**old, **new})
        self.kept_refits[position] = {**self.kept_refits.get(position, {}), **new}

    @property
    def first_merged(self) -> int:
        """Index of the first merged layer; everything below it is the source's own."""
        return self.plan.groups[0].start if self.plan.groups else self.plan.num_layers

    @torch.no_grad()
    def plain(self) -> PreTrainedModel:
        """Return the merged model as a plain model of the source's class, without any alphas.

        Its weights share memory with this model and the source: copy it before changing them.
        """
        layers = [
            _plain_layer(layer) if isinstance(layer, MergedLayer) else with_layer_index(layer, i)
            for i, layer in enumerate(decoder_layers(self.causal_lm))
        ]
        return with_layers(self.causal_lm, layers, range(len(layers)))


def _merged_layer(
    source: PreTrainedModel,
    template: nn.Module,
    group: Group,
    orders: Orders,
    config: AlphaConfig,
    similarity_LL: Tensor | None,
) -> MergedLayer:
    stacked = framed_group(source, group, orders)
    alphas = start_alphas(
        config,
        stacked,
        group,
        head_dim=head_dim(source.config),
        similarity_LL=similarity_LL,
    )
    device = stacked["q_proj"].device
    free = {n: a.to(device) for n, a in to_free(alphas, simplex=config.simplex).items()}
    return MergedLayer(template, stacked, group.anchor_position, free, simplex=config.simplex)


def _plain_layer(layer: MergedLayer) -> nn.Module:
    """Return a decoder layer of the architecture's own class that holds the merged weights."""
    return with_tensors(layer.template, layer.tensors())
