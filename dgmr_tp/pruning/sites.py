"""Finding the MLPs of a model by their structure.

A site is a module that turns a matrix of tokens into a matrix of tokens through hidden neurons: one or more Linear layers
make the neurons, exactly one Linear consumes them, and nothing else sees them. A gated MLP makes each neuron from two rows,
its gate and its value: of two Linear layers, or of the two halves of one (fused). Each candidate is traced alone with a 2-D
probe by torch-pruning; the whole model is never run. No class names appear here.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

from dgmr_tp.errors import DgmrError
from dgmr_tp.utils.modules import evaluating

SMALLEST_WIDTH = 8
"""Narrower MLPs do not work on tokens: those of SwinV2's positions take two coordinates."""


@dataclass(frozen=True)
class Site:
    """One MLP of a model; layers are named by their path in the model, so a site outlives pruning and copying."""

    name: str
    """Path of the MLP module, such as ``blocks.3.mlp``."""
    producers: tuple[str, ...]
    """Paths of the Linear layers that make the hidden neurons, in the order in which they were registered."""
    consumer: str
    """Path of the Linear layer that reads them."""
    width: int
    """Tokens' width at the input and the output."""
    hidden: int
    """Number of hidden neurons."""
    fused: bool
    """Whether one producer makes gate and value: neuron ``k`` is made by its rows ``k`` and ``hidden + k``."""
    exact: bool
    """Whether cutting a neuron equals zeroing it (not so where a norm over the hidden neurons sits inside)."""


def find_sites(model: nn.Module) -> list[Site]:
    """All MLP sites of ``model`` in the order of its modules. Weights, flags and mode stay untouched.

    Raises:
        DgmrError: there is none.
    """
    sites: list[Site] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{site.name}.") for site in sites):
            continue
        if site := _site_at(name, module):
            sites.append(site)
    if not sites:
        raise DgmrError(
            f"no MLP found in {type(model).__name__}: no module takes a matrix of tokens through one Linear layer to "
            "hidden neurons and through another back to the same width. Pass the vision tower itself; where attention and MLP "
            "share one projection (parallel blocks), the MLP cannot be cut alone"
        )
    return sites


def _site_at(name: str, module: nn.Module) -> Site | None:
    linears = {child: layer for child, layer in module.named_children() if isinstance(layer, nn.Linear)}
    for producer, first in linears.items():
        shapes = [(last.in_features, last.out_features) for last in linears.values() if last is not first]
        fused = (first.out_features / 2, first.in_features) in shapes
        if first.in_features < SMALLEST_WIDTH or not (fused or (first.out_features, first.in_features) in shapes):
            continue
        group = hidden_group(module, producer, range(first.out_features))
        if group is None:
            continue
        path = {layer: f"{name}.{child}" if name else child for child, layer in module.named_modules()}
        members = [(item.dep.target.module, prunes_outputs(item)) for item in group]
        producers = [layer for layer, out in members if out and isinstance(layer, nn.Linear)]
        consumers = [layer for layer, out in members if not out and isinstance(layer, nn.Linear)]
        visible = any(isinstance(layer, tp.ops._OutputOp) for layer, _ in members)
        same_width = {layer.in_features for layer in producers} | {layer.out_features for layer in consumers}
        if len(consumers) != 1 or visible or same_width != {first.in_features}:
            continue
        hidden = consumers[0].in_features
        if fused and not _halves_go_together(module, producer, hidden):
            raise DgmrError(
                f"the MLP {name or type(module).__name__} makes gate and value in one Linear, and torch-pruning does not see which rows "
                "belong together; let its forward take them apart with chunk(2, dim=-1)"
            )
        rest = [
            layer
            for layer, _ in members
            if not isinstance(layer, nn.Linear) and type(layer).__module__ != tp.ops.__name__
        ]
        return Site(
            name,
            tuple(path[layer] for layer in producers),
            path[consumers[0]],
            first.in_features,
            hidden,
            fused,
            exact=not rest,
        )
    return None


def _halves_go_together(mlp: nn.Module, producer: str, hidden: int) -> bool:
    group = hidden_group(mlp, producer, [hidden - 1])
    neurons = [sorted(item.idxs) for item in group or [] if isinstance(item.dep.target.module, nn.Linear)]
    return neurons == [[hidden - 1, 2 * hidden - 1], [hidden - 1]]


def hidden_group(mlp: nn.Module, producer: str, neurons: range | list[int]) -> tp.Group | None:
    """torch-pruning's group of everything that goes with the rows ``neurons`` of the child ``producer`` of ``mlp``.

    Always a fresh graph of this one MLP: graphs of whole transformers lose the index mapping of fused gates, and a graph
    that was pruned through once has stale split offsets. None if ``mlp`` cannot be run on a matrix of tokens.
    """
    first = cast(nn.Linear, mlp.get_submodule(producer))
    hooks = {module: set(module._forward_hooks) for module in mlp.modules()}
    try:
        with torch.inference_mode(False), evaluating(mlp), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            probe = torch.zeros(
                2, first.in_features, dtype=first.weight.dtype, device=first.weight.device, requires_grad=True
            )
            graph = tp.DependencyGraph().build_dependency(_as_modules(mlp), example_inputs=(probe,))
            return graph.get_pruning_group(first, tp.prune_linear_out_channels, list(neurons))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a module that needs more than one matrix, such as attention, fails in its own way
        return None
    finally:
        for (
            module,
            before,
        ) in hooks.items():  # torch-pruning leaves its own where it fails, and they would keep every graph to come
            for left in set(module._forward_hooks) - before:
                del module._forward_hooks[left]


def _as_modules(mlp: nn.Module) -> nn.Module:
    """``mlp``, or for a SwiGLU in xformers' naming a module that computes the same by calling its Linears.

    xformers' operators take the Linears' weights without calling the Linears, so that no tracer can follow them.
    """
    layers = dict(mlp.named_children())
    if not all(isinstance(layer, nn.Linear) for layer in layers.values()):
        return mlp
    fused = set(layers) == {"w12", "w3"}
    split = (
        set(layers) == {"w1", "w2", "w3"}
        and layers["w2"].out_features == layers["w3"].in_features == layers["w1"].out_features
    )
    return _SwiGLU(mlp) if fused or (split and layers["w1"].in_features == layers["w2"].in_features) else mlp


class _SwiGLU(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        for name, layer in mlp.named_children():
            self.add_module(name, layer)

    def forward(self, tokens: Tensor) -> Tensor:
        gate, value = self.w12(tokens).chunk(2, dim=-1) if hasattr(self, "w12") else (self.w1(tokens), self.w2(tokens))
        return self.w3(F.silu(gate) * value)


def prunes_outputs(item: object) -> bool:
    """Whether a member of a torch-pruning group loses output channels (and not input channels)."""
    return item.dep.handler.__name__ == "prune_out_channels"  # type: ignore[attr-defined]
