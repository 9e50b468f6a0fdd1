"""A linear classifier on top of an encoder: the original's own shows a drift of the pruned features that k-NN hides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgmr_tp.data.embeddings import embed_share
from dgmr_tp.data.images import Images
from dgmr_tp.encoders import OpenedModel
from dgmr_tp.errors import DgmrError, first_line
from dgmr_tp.evaluation.linear_probe import regression
from dgmr_tp.utils.distributed import all_gather_rows, all_reduce_sum

Embed = Callable[[Tensor], Tensor]


class LinearHead(NamedTuple):
    """``logits = weight · embedding + bias``."""

    weight: Tensor
    """``[classes, width]``"""
    bias: Tensor
    classes: list[str] | None = None
    """Names of the rows; None: the classes in the order of their names, or of their numbers in ``.cls``."""
    normalised: bool = False
    """Whether embeddings get length 1 first."""


def read_head(path: Path) -> LinearHead:
    """A head from ``.safetensors`` or torch's own file: two tensors, ``weight`` ``[classes, width]`` and ``bias`` ``[classes]``, whatever
    stands before these names. Pickled code is never run.

    Raises:
        DgmrError: it cannot be read, or holds something else.
    """
    from safetensors.torch import load_file

    try:
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        tensors = {name.rpartition(".")[2]: tensor.float() for name, tensor in found.items()}
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        if (
            len(found) == 2
            and shapes.keys() == {"weight", "bias"}
            and len(shapes["weight"]) == 2
            and shapes["weight"][:1] == shapes["bias"]
        ):
            return LinearHead(**tensors)
        problem = f"it holds {', '.join(found)}"
    except Exception as error:  # unpickling and safetensors raise many kinds for damaged files
        problem = first_line(error)
    raise DgmrError(f"{path} is no linear head: {problem}; it takes weight [classes, width] and bias [classes]")


def fitted_head(embed: Embed, preprocess: Callable[[Any], Tensor], train: Images, **how: Any) -> LinearHead:
    """A logistic regression on embeddings of length 1, as :mod:`dgmr_tp.evaluation.linear_probe` fits it.

    Args:
        embed, preprocess: an encoder's.
        train: images with classes.
        how: as for :func:`dgmr_tp.data.embeddings.embed_share`.

    Raises:
        DgmrError: an image has no class, all that can be read have the same, or an embedding is not finite.
    """
    known = train.classes()
    found, places = (
        all_gather_rows(part.to(how["device"])).cpu()
        for part in embed_share(embed, preprocess, train, title="training images", **how)
    )
    names = [known[place] for place in places.tolist()]
    if len(set(names)) < 2:
        raise DgmrError(
            f"the images of {train.source} that can be read have one class, {names[0]}; a classifier needs two"
        )
    _check_finite(found)
    try:
        fitted = regression(F.normalize(found, dim=-1).numpy(), names).best_estimator_
    except ValueError as error:  # too few images to try strengths on a fifth of them
        raise DgmrError(
            f"no classifier can be fitted to {train.source}: {first_line(error)}; give more images of every class"
        ) from error
    weight, bias = torch.from_numpy(fitted.coef_).float(), torch.from_numpy(fitted.intercept_).float()
    if len(fitted.classes_) == 2:  # scikit-learn keeps one row then
        weight, bias = torch.cat([-weight, weight]), torch.cat([-bias, bias])
    return LinearHead(weight, bias, [str(name) for name in fitted.classes_], normalised=True)


def head_accuracy(
    embed: Embed, preprocess: Callable[[Any], Tensor], *, head: LinearHead | None, test: Images, **how: Any
) -> dict[str, float]:
    """How often a linear classifier on an encoder is right. Under torch.distributed the processes share the images.

    Args:
        embed, preprocess: the encoder's.
        head: None: what the encoder gives are logits already; see :func:`check_classifier`.
        test: images with classes.
        how: as for :func:`dgmr_tp.data.embeddings.embed_share`.

    Returns:
        ``{"head@1": …, "head@5": …}`` as fractions; the second with more than five classes.

    Raises:
        DgmrError: an image has no class, classes and head do not go together, or a logit is not finite.
    """
    asked = test.classes()
    found, places = embed_share(embed, preprocess, test, title="test images", **how)
    if head is None:
        logits = found
    else:
        if head.weight.shape[1] != found.shape[1]:
            raise DgmrError(
                f"the head takes embeddings of {head.weight.shape[1]} numbers, the encoder gives {found.shape[1]}"
            )
        features = F.normalize(found, dim=-1) if head.normalised else found
        logits = F.linear(features, head.weight.to(found.device), head.bias.to(found.device))
    _check_finite(logits)
    number = _numbers(test, asked, logits.shape[1], head)
    answers = torch.tensor([number[asked[place]] for place in places.tolist()], device=found.device)
    ranks = (logits >= logits.gather(1, answers[:, None])).sum(1) - 1  # a tie is not right
    counts = torch.tensor([(ranks < 1).sum(), (ranks < 5).sum(), len(ranks)], dtype=torch.float64, device=found.device)
    counts = all_reduce_sum(counts)
    figures = {"head@1": float(counts[0] / counts[2]), "head@5": float(counts[1] / counts[2])}
    return figures if logits.shape[1] > 5 else {"head@1": figures["head@1"]}


def check_classifier(model: OpenedModel) -> None:
    """Raises DgmrError unless the model's encoder ends in a classifier, as timm's do."""
    if not isinstance(getattr(model.module, "get_classifier", lambda: None)(), nn.Linear):
        raise DgmrError(f"{model.name} has no classifier of its own; give the weights of a head, or images to fit one")


def _check_finite(values: Tensor) -> None:
    if not values.isfinite().all():
        raise DgmrError("the encoder gives numbers that are not finite")


def _numbers(test: Images, asked: list[str], outputs: int, head: LinearHead | None) -> dict[str, int]:
    """The output that stands for each class."""
    names = sorted(set(asked))
    if head and head.classes:
        if missing := set(names) - set(head.classes):
            raise DgmrError(
                f"{test.source} has the class {min(missing)!r}, which the head does not know; both need the same classes"
            )
        return {name: row for row, name in enumerate(head.classes)}
    if all(
        isinstance(record.label, tuple) and name.isdecimal() for record, name in zip(test.records, asked, strict=True)
    ):
        number = {name: int(name) for name in names}
        fits = max(number.values()) < outputs
    else:
        number = {name: row for row, name in enumerate(names)}
        fits = len(names) == outputs
    if not fits:
        last = max(names, key=number.__getitem__)
        raise DgmrError(
            f"{test.source} has {len(names)} classes, up to {last}, but there are {outputs} outputs: give images of all classes, "
            "a head for these classes, or images to fit one"
        )
    return number
