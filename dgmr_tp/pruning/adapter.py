"""The walk: how the algorithms of this package see an encoder, whatever library it comes from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from dgmr_tp.pruning.sites import Site, find_sites


@dataclass(frozen=True)
class Block:
    """One residual block of a tower: it maps a state to a state and owns the MLP sites below ``module``."""

    name: str
    """Path of ``module`` inside :attr:`TowerAdapter.tower`, such as ``transformer.resblocks.3``."""
    module: nn.Module
    forward: Callable[[Tensor], Tensor]

    def __call__(self, state: Tensor) -> Tensor:
        return self.forward(state)


class TowerAdapter(ABC):
    """Runs a vision tower block by block.

    ``embed(blocks[-1](… blocks[0](stem(images))))`` equals the embedding that ``tower(images)`` returns.

    Args:
        tower: the vision module; pruning changes its parameters in place.
        name: the model and its library, such as ``open_clip:ViT-g-14``.
    """

    projection: nn.Module | None = None
    """A module outside the tower that maps its output into the space shared by images and texts. Most towers include it."""
    gives_tokens: bool = False
    """Callers use the patch tokens after the last block, not only the embedding, as dense tasks and language models do."""

    def __init__(self, tower: nn.Module, name: str) -> None:
        self.tower: Any = tower
        self.name = name

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
    """A tower as one module from images to embeddings, whatever else its own ``forward`` returns."""

    def __init__(self, adapter: TowerAdapter) -> None:
        super().__init__()
        self.tower = adapter.tower
        self.projection = adapter.projection
        self.adapter = adapter

    def forward(self, images: Tensor) -> Tensor:
        return self.adapter.embed(last_state(self.adapter, images))


def last_state(adapter: TowerAdapter, images: Tensor) -> Tensor:
    """The state after the last block: what ``features`` and ``embed`` read."""
    return through(adapter.blocks(), adapter.stem(images))


def through(blocks: Iterable[Block], state: Tensor) -> Tensor:
    """The state after ``blocks``, one after the other."""
    for block in blocks:
        state = block(state)
    return state


def tokens_read(read: Callable[[Tensor], Tensor], state: Tensor) -> Tensor:
    """Which tokens of ``state`` ``[batch, tokens, width]`` the function ``read`` depends on, bool ``[tokens]``.

    Found by differentiating ``read``, so that no encoder has to declare it.
    """
    with torch.enable_grad():
        probe = state[:1].detach().clone().requires_grad_(True)
        seen = read(probe)
        (gradient,) = torch.autograd.grad((seen * torch.linspace(1, 2, seen.shape[-1]).to(seen)).sum(), probe)
    return gradient[0].abs().amax(-1) > 0
