"""The walk: how the algorithms of this package see an encoder, whatever library it comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from dgmr_tp.pruning.sites import Site, find_sites


@dataclass(frozen=True)
class Block:
    """One residual block of an encoder: it takes a state to a state and owns the MLP sites below ``module``."""

    name: str
    """Path of ``module`` inside ``Encoder.module``, such as ``transformer.resblocks.3``."""
    module: nn.Module
    forward: Callable[[Tensor], Tensor]

    def __call__(self, state: Tensor) -> Tensor:
        return self.forward(state)


class Encoder(Protocol):
    """A vision tower as a walk. ``embed(blocks[-1](… blocks[0](stem(images))))`` is the embedding that ``module(images)`` gives."""

    name: str
    """What it is and where it came from, such as ``open_clip:ViT-g-14``."""
    module: nn.Module
    """The tower itself, whose parameters are pruned in place."""

    def stem(self, images: Tensor) -> Tensor:
        """Images ``[batch, 3, height, width]`` to the state before the first block, ``[batch, tokens, width]``."""
        ...

    def blocks(self) -> Sequence[Block]:
        """The residual blocks in the order in which they run."""
        ...

    def features(self, state: Tensor) -> tuple[Tensor | None, Tensor]:
        """The class token ``[batch, width]`` (None where the tower has none) and the patch tokens
        ``[batch, patches, width]`` of a state, before the final norm."""
        ...

    def norm(self, state: Tensor) -> Tensor:
        """The state after the last block behind the tower's final norm, token by token; as it is where the tower has none."""
        ...

    def embed(self, state: Tensor) -> Tensor:
        """The state after the last block to what the tower gives its caller, ``[batch, embedding]``: of several outputs
        the one that stands for the image. Behind the :func:`projection`, where there is one."""
        ...


def projection(encoder: Encoder) -> nn.Module | None:
    """What stands outside the tower and brings its output into the space that images and texts share; most towers do so themselves."""
    return getattr(encoder, "projection", None)


def gives_tokens(encoder: Encoder) -> bool:
    """Whether callers take the tokens after the last block too, and not the embedding alone, as dense tasks and language models do."""
    return getattr(encoder, "gives_tokens", False)


class Tower(nn.Module):
    """The encoder as one module from images to the embedding, whatever else its own ``forward`` returns."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.module = encoder.module
        self.projection = projection(encoder)
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder.embed(last_state(self.encoder, images))


def last_state(encoder: Encoder, images: Tensor) -> Tensor:
    """The state after the last block: what ``features`` and ``embed`` read."""
    return through(encoder.blocks(), encoder.stem(images))


def through(blocks: Iterable[Block], state: Tensor) -> Tensor:
    """The state after ``blocks``, one after the other."""
    for block in blocks:
        state = block(state)
    return state


def sites_in_blocks(encoder: Encoder) -> list[Site]:
    """The MLPs inside the residual blocks: those of a head are left out."""
    inside = tuple(f"{block.name}." for block in encoder.blocks())
    return [site for site in find_sites(encoder.module) if site.name.startswith(inside)]


def tokens_read(read: Callable[[Tensor], Tensor], state: Tensor) -> Tensor:
    """Which tokens of ``state`` ``[batch, tokens, width]`` the function ``read`` depends on, bool ``[tokens]``.

    Found by differentiating ``read``, so that no encoder has to declare it.
    """
    with torch.enable_grad():
        probe = state[:1].detach().clone().requires_grad_(True)
        seen = read(probe)
        (gradient,) = torch.autograd.grad((seen * torch.linspace(1, 2, seen.shape[-1]).to(seen)).sum(), probe)
    return gradient[0].abs().amax(-1) > 0
