"""Find the MLPs of a model by their structure.

Works on any ``nn.Module`` and returns :class:`Site` records. Knows no class names of any model library.

A site is a module that maps a matrix of tokens to a matrix of tokens of the same width through hidden neurons. One or
more Linear layers produce the neurons, exactly one Linear consumes them, and nothing outside the module sees them. In a
gated MLP each neuron has two rows, one in the gate and one in the value. Gate and value are two Linear layers, or the
two halves of one (fused). torch-pruning traces each candidate module alone, with a 2-D probe. The whole model is never
run.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

from dgmr_tp.errors import DgmrError
from dgmr_tp.utils.modules import evaluating

MIN_TOKEN_WIDTH = 8
"""Minimum input width of an MLP on tokens. It excludes SwinV2's position MLPs, whose inputs are two coordinates."""


@dataclass(frozen=True)
class Site:
    """One MLP of a model. Layers are named by path, so that a site stays valid for copies of the model."""

    name: str
    """Path of the MLP module, such as ``blocks.3.mlp``."""
    producers: tuple[str, ...]
    """Paths of the Linear layers that produce the hidden neurons, in the order in which they are registered."""
    consumer: str
    """Path of the Linear layer that reads the hidden neurons."""
    width: int
    """Token width at the input and the output."""
    hidden: int
    """Number of hidden neurons."""
    fused: bool
    """True if one producer makes gate and value. Neuron ``k`` then has the rows ``k`` and ``hidden + k``."""
    exact: bool
    """True if cutting a neuron equals zeroing it. False if the MLP has a norm over the hidden neurons."""

    def relative_to(self, path: str) -> Site:
        """Return this site with its paths relative to the submodule ``path`` that contains it.

        ``""`` changes nothing.
        """
        return replace(
            self,
            name=_relative(self.name, path),
            producers=tuple(_relative(producer, path) for producer in self.producers),
            consumer=_relative(self.consumer, path),
        )


def _relative(name: str, path: str) -> str:
    if name == path:
        return ""
    return name.removeprefix(f"{path}.") if path else name


def sites_inside(sites: Sequence[Site], path: str) -> list[Site]:
    """Return the sites inside the submodule ``path``, with their paths relative to it. ``""`` selects all of them."""
    inside = [site for site in sites if not path or site.name == path or site.name.startswith(f"{path}.")]
    return [site.relative_to(path) for site in inside]


def find_sites(model: nn.Module) -> list[Site]:
    """Return all MLP sites of ``model`` in the order of its modules. Weights, flags and train/eval mode do not change.

    Raises:
        DgmrError: ``model`` has no site, a fused gate that torch-pruning cannot follow, or a parametrized MLP.
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
            "hidden neurons and through another back to the same width. Pass the vision tower itself. Where attention "
            "and MLP share one projection (parallel blocks), the MLP cannot be cut alone."
        )
    return sites


def _site_at(name: str, module: nn.Module) -> Site | None:
    linears = {child: layer for child, layer in module.named_children() if isinstance(layer, nn.Linear)}
    for producer, first in linears.items():
        shapes = [(last.in_features, last.out_features) for last in linears.values() if last is not first]
        fused = (first.out_features / 2, first.in_features) in shapes
        if first.in_features < MIN_TOKEN_WIDTH or not (fused or (first.out_features, first.in_features) in shapes):
            continue
        group = hidden_group(module, producer, range(first.out_features))
        if group is None:
            continue
        path = {layer: f"{name}.{child}" if name else child for child, layer in module.named_modules()}
        members = [(item.dep.target.module, prunes_outputs(item)) for item in group]
        producers = [layer for layer, output in members if output and isinstance(layer, nn.Linear)]
        consumers = [layer for layer, output in members if not output and isinstance(layer, nn.Linear)]
        visible = any(isinstance(layer, tp.ops._OutputOp) for layer, _ in members)
        token_widths = {layer.in_features for layer in producers} | {layer.out_features for layer in consumers}
        if len(consumers) != 1 or visible or token_widths != {first.in_features}:
            continue
        hidden = consumers[0].in_features
        for layer in (*producers, *consumers):
            if "weight" not in layer._parameters:
                raise DgmrError(
                    f"the weight of {path[layer]} is computed from other tensors (weight_norm or another "
                    "parametrization), so its neurons cannot be cut. Remove the parametrization, for example with "
                    "torch.nn.utils.parametrize.remove_parametrizations."
                )
        if fused and not _pairs_halves(module, producer, hidden):
            raise DgmrError(
                f"the MLP {name or type(module).__name__} makes gate and value in one Linear, and torch-pruning does "
                "not see which rows belong together. Split the two halves in its forward with chunk(2, dim=-1)."
            )
        other_layers = [
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
            exact=not other_layers,
        )
    return None


def _pairs_halves(mlp: nn.Module, producer: str, hidden: int) -> bool:
    """Return whether torch-pruning prunes row ``hidden + k`` of a fused producer together with row ``k``."""
    group = hidden_group(mlp, producer, [hidden - 1])
    neurons = [sorted(item.idxs) for item in group or [] if isinstance(item.dep.target.module, nn.Linear)]
    return neurons == [[hidden - 1, 2 * hidden - 1], [hidden - 1]]


def hidden_group(mlp: nn.Module, producer: str, neurons: range | list[int]) -> tp.Group | None:
    """Return torch-pruning's group of all parameters that belong to the rows ``neurons`` of the child ``producer``.

    The dependency graph is built anew for this one MLP at each call. A graph of a whole transformer loses the index
    mapping of fused gates, and a graph has stale split offsets once it was pruned through.

    Returns:
        The group, or None if ``mlp`` cannot run on a matrix of tokens.
    """
    first = cast(nn.Linear, mlp.get_submodule(producer))
    hooks_before = {module: set(module._forward_hooks) for module in mlp.modules()}
    try:
        with (
            torch.inference_mode(False),
            evaluating(mlp),
            _in_one_dtype(mlp),
            torch.enable_grad(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            probe = torch.zeros(
                2, first.in_features, dtype=first.weight.dtype, device=first.weight.device, requires_grad=True
            )
            graph = tp.DependencyGraph().build_dependency(_as_modules(mlp), example_inputs=(probe,))
            return graph.get_pruning_group(first, tp.prune_linear_out_channels, list(neurons))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # attention, for example, needs more than one matrix; each module fails with its own error
        return None
    finally:
        # torch-pruning does not remove its hooks when it fails. They would keep every later graph alive.
        for module, before in hooks_before.items():
            for hook in set(module._forward_hooks) - before:
                del module._forward_hooks[hook]


@contextmanager
def _in_one_dtype(mlp: nn.Module) -> Iterator[None]:
    """Give all parameters of ``mlp`` one dtype inside the context, because Linears of different dtypes do not run."""
    parameters = [(layer, name, p) for layer in mlp.modules() for name, p in layer.named_parameters(recurse=False)]
    mixed = len({parameter.dtype for _, _, parameter in parameters}) > 1
    try:
        for layer, name, parameter in parameters if mixed else ():
            layer._parameters[name] = nn.Parameter(parameter.detach().float())
        yield
    finally:
        for layer, name, parameter in parameters:
            layer._parameters[name] = parameter


def _as_modules(mlp: nn.Module) -> nn.Module:
    """Return ``mlp``, or an equivalent module that calls its Linears if ``mlp`` is a SwiGLU with xformers' names.

    xformers' operators read the weights of the Linears without calling the Linears, so that no tracer can follow them.
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
    """Return whether a member of a torch-pruning group loses output channels. If not, it loses input channels."""
    return item.dep.handler.__name__ == "prune_out_channels"  # type: ignore[attr-defined]
