"""The interface through which the algorithms of this package run an encoder, whatever library it comes from.

A :class:`TowerAdapter` runs a vision tower block by block. ``dgmr_tp.encoders`` implements it for each family of
encoders.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from dgmr_tp.errors import DgmrError, first_line
from dgmr_tp.pruning.sites import Site, find_sites


@dataclass(frozen=True, eq=False)
class Block:
    """One residual block of a tower. It maps a state to a state and contains the MLP sites below ``module``."""

    name: str
    """Path of ``module`` inside :attr:`TowerAdapter.tower`, such as ``transformer.resblocks.3``."""
    module: nn.Module
    """The block's module."""
    forward: Callable[[Tensor], Tensor]
    """Function from the state before the block to the state after it, ``[batch, tokens, width]``."""

    def __call__(self, state: Tensor) -> Tensor:
        return self.forward(state)


class TowerAdapter(ABC):
    """Runs a vision tower block by block.

    ``embed(blocks[-1](… blocks[0](stem(images))))`` equals the embedding that ``tower(images)`` returns.

    Args:
        tower: the vision module. Pruning changes its parameters in place.
        name: the model and its library, such as ``open_clip:ViT-g-14``.
    """

    projection: nn.Module | None = None
    """Module outside the tower that maps its output into the space shared by images and texts.

    Most towers include it.
    """
    gives_tokens: bool = False
    """True if callers use the patch tokens after the last block, as dense tasks and language models do."""

    precision: torch.dtype = torch.float32
    """Precision of forward passes that evaluate the tower. Calibration activations and training do not use it."""

    def __init__(self, tower: nn.Module, name: str) -> None:
        self.tower: Any = tower
        self.name = name

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context that computes in :attr:`precision`."""
        if self.precision == torch.float32:
            return nullcontext()  # torch.export would record a disabled autocast
        return torch.autocast(next(self.tower.parameters()).device.type, self.precision)

    @cached_property
    def sites(self) -> list[Site]:
        """MLP sites inside the residual blocks, found once. MLPs of a head are left out."""
        prefixes = tuple(f"{block.name}." for block in self.blocks())
        return [site for site in find_sites(self.tower) if site.name.startswith(prefixes)]

    @abstractmethod
    def stem(self, images: Tensor) -> Tensor:
        """Map images ``[batch, 3, height, width]`` to the state before the first block, ``[batch, tokens, width]``."""

    @abstractmethod
    def blocks(self) -> Sequence[Block]:
        """Return the residual blocks in the order in which they run."""

    @abstractmethod
    def features(self, state: Tensor) -> tuple[Tensor | None, Tensor]:
        """Split a state before the final norm into class token and patch tokens.

        Returns:
            The class token ``[batch, width]``, or None if the tower has none, and the patch tokens
            ``[batch, patches, width]``.
        """

    @abstractmethod
    def norm(self, state: Tensor) -> Tensor:
        """Apply the tower's final norm to the state after the last block, token by token. Identity without a norm."""

    @abstractmethod
    def embed(self, state: Tensor) -> Tensor:
        """Map the state after the last block to the image embedding ``[batch, embedding]``, projection included."""


class ImageEncoder(nn.Module):
    """A tower as one module from images to embeddings, whatever else its own ``forward`` returns.

    With another :attr:`TowerAdapter.precision` than float32, the embeddings are still float32.
    """

    def __init__(self, adapter: TowerAdapter) -> None:
        super().__init__()
        self.tower = adapter.tower
        self.projection = adapter.projection
        self.adapter = adapter

    def forward(self, images: Tensor) -> Tensor:
        with self.adapter.autocast():
            embeddings = self.adapter.embed(last_state(self.adapter, images))
        return embeddings if self.adapter.precision == torch.float32 else embeddings.float()


def check_embeddings(embeddings: Tensor, source: str) -> Tensor:
    """Return embeddings that are about to be used.

    Args:
        embeddings: of any shape.
        source: what was embedded, for the message.

    Raises:
        DgmrError: an embedding is not finite.
    """
    if not bool(embeddings.isfinite().all()):
        raise DgmrError(
            f"some embeddings of {source} are not finite. Check the weights and the preprocessing, or compute in "
            "float32."
        )
    return embeddings


def stem_states(adapter: TowerAdapter, images: Iterable[Tensor]) -> list[Tensor]:
    """Return the states before the first block.

    Raises:
        DgmrError: the tower does not take images of this shape, or the batches differ in it.
    """
    states, shapes = [], set()
    for batch in images:
        shapes.add(tuple(batch.shape[1:]))
        if len(shapes) > 1:
            raise DgmrError(
                f"the batches hold images of the shapes {' and '.join(map(str, sorted(shapes)))}. Give images of one "
                "shape."
            )
        try:
            states.append(adapter.stem(batch))
        except (DgmrError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, AssertionError, ValueError) as error:  # every library checks sizes in its own way
            raise DgmrError(
                f"{adapter.name} does not take images of shape {list(batch.shape[1:])}: "
                f"{first_line(error).rstrip('.')}. Give images as its preprocessing returns them."
            ) from error
    return states


def last_state(adapter: TowerAdapter, images: Tensor) -> Tensor:
    """Return the state after the last block, which ``features`` and ``embed`` take."""
    return run_blocks(adapter.blocks(), adapter.stem(images))


def run_blocks(blocks: Iterable[Block], state: Tensor) -> Tensor:
    """Run ``blocks`` one after the other and return the last state."""
    for block in blocks:
        state = block(state)
    return state


def used_tokens(function: Callable[[Tensor], Tensor], state: Tensor) -> Tensor:
    """Return which tokens of ``state`` ``[batch, tokens, width]`` affect the output of ``function``, bool ``[tokens]``.

    The function is differentiated, so that no adapter has to declare the tokens that its head reads.
    """
    with torch.enable_grad():
        probe = state[:1].detach().clone().requires_grad_(True)
        output = function(probe)
        (gradient,) = torch.autograd.grad((output * torch.linspace(1, 2, output.shape[-1]).to(output)).sum(), probe)
    return gradient[0].abs().amax(-1) > 0
