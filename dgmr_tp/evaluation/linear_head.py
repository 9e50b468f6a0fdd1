"""Accuracy of a linear classifier on an encoder's embeddings.

A head that was fitted to the dense encoder shows a drift of the pruned encoder's features that k-NN hides. The
processes of a launch share the images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn

from dgmr_tp.data.embeddings import embed_share
from dgmr_tp.data.images import Images
from dgmr_tp.encoders import OpenedModel
from dgmr_tp.errors import DgmrError, first_line
from dgmr_tp.evaluation.linear_probe import fit_logistic_regression
from dgmr_tp.utils.config import Config, DataPath
from dgmr_tp.utils.distributed import all_gather_rows, all_reduce_sum

Embed = Callable[[Tensor], Tensor]


class HeadConfig(Config):
    """Accuracy of a linear classifier on the embeddings. See :mod:`dgmr_tp.evaluation.linear_head`."""

    test: Annotated[str, DataPath()]
    """Labeled images."""
    weights: Annotated[str | None, DataPath("file")] = None
    """File with the classifier's weight and bias. Without it, the encoder's outputs are used as logits, as for a timm
    model with its classifier."""
    workers: int = Field(0, ge=0)
    """Number of processes that read images."""


class LinearHead(NamedTuple):
    """A linear classifier: ``logits = weight · embedding + bias``."""

    weight: Tensor
    """``[classes, width]``"""
    bias: Tensor
    """``[classes]``"""
    classes: list[str] | None = None
    """Class name of each row. None: the classes sorted by name, or their numbers in ``.cls``."""
    normalized: bool = False
    """True if embeddings are normalized to length 1 first."""


def read_head(path: Path) -> LinearHead:
    """Read a head from a ``.safetensors`` or torch file without running pickled code.

    The file contains two tensors, ``weight`` ``[classes, width]`` and ``bias`` ``[classes]``. Their names may have a
    prefix.

    Raises:
        DgmrError: the file cannot be read or has another content.
    """
    try:
        stored = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        tensors = {name.rpartition(".")[2]: tensor.float() for name, tensor in stored.items()}
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        if len(stored) == 2 and shapes.keys() == {"weight", "bias"}:
            weight, bias = shapes["weight"], shapes["bias"]
            if len(weight) == 2 and weight[:1] == bias:
                return LinearHead(**tensors)
        problem = f"it contains {', '.join(stored)}"
    except Exception as error:  # unpickling and safetensors raise many kinds for damaged files
        problem = first_line(error)
    raise DgmrError(
        f"{path} is not a linear head: {problem}. Give a file with weight [classes, width] and bias [classes]"
    )


def fit_head(embed: Embed, preprocess: Callable[[Any], Tensor], train: Images, **options: Any) -> LinearHead:
    """Fit a logistic regression to embeddings of length 1; see :mod:`dgmr_tp.evaluation.linear_probe`.

    Args:
        embed: maps preprocessed images to embeddings.
        preprocess: maps a PIL image to a tensor.
        train: labeled images.
        options: device, batch_size and workers of :func:`dgmr_tp.data.embeddings.embed_share`.

    Raises:
        DgmrError: an image has no class, all images that can be decoded have the same class, or an embedding is not
            finite.
    """
    classes = train.classes(at_least=2)
    share = embed_share(embed, preprocess, train, title="training images", **options)
    embeddings, places = (all_gather_rows(part.to(options["device"])).cpu() for part in share)
    labels = [classes[place] for place in places.tolist()]
    if len(set(labels)) < 2:
        raise DgmrError(
            f"the images of {train.source} that can be decoded have one class, {labels[0]}. Give images of two or "
            "more classes."
        )
    try:
        regression = fit_logistic_regression(F.normalize(embeddings, dim=-1).numpy(), labels).best_estimator_
    except ValueError as error:  # too few images to choose the regularization on a fifth of them
        name, count = Counter(labels).most_common()[-1]
        raise DgmrError(
            f"no classifier can be fitted to {train.source}, whose class {name} has {count} images: "
            f"{first_line(error).rstrip('.')}. Give more images of every class."
        ) from error
    weight, bias = torch.from_numpy(regression.coef_).float(), torch.from_numpy(regression.intercept_).float()
    if len(regression.classes_) == 2:  # scikit-learn stores a single row for two classes
        weight, bias = torch.cat([-weight, weight]), torch.cat([-bias, bias])
    return LinearHead(weight, bias, [str(name) for name in regression.classes_], normalized=True)


def head_accuracy(
    embed: Embed, preprocess: Callable[[Any], Tensor], *, head: LinearHead | None, test: Images, **options: Any
) -> dict[str, float]:
    """Return the accuracy of a linear classifier on an encoder. Under torch.distributed the processes share the images.

    Args:
        embed: maps preprocessed images to embeddings.
        preprocess: maps a PIL image to a tensor.
        head: the classifier. None if the encoder's outputs are logits; see :func:`check_classifier`.
        test: labeled images.
        options: device, batch_size and workers of :func:`dgmr_tp.data.embeddings.embed_share`.

    Returns:
        ``{"head@1": …, "head@5": …}`` as fractions, the second only with more than five classes. Ties count as wrong.

    Raises:
        DgmrError: an image has no class, the classes do not match the head, or a logit is not finite.
    """
    classes = test.classes()
    embeddings, places = embed_share(embed, preprocess, test, title="test images", **options)
    logits = embeddings if head is None else _apply_head(head, embeddings)
    if logits.shape[1] < 2:
        raise DgmrError("the classifier has one output, and an accuracy needs at least two. Use another classifier.")
    number = _class_numbers(test, classes, logits.shape[1], head)
    answers = torch.tensor([number[classes[place]] for place in places.tolist()], device=logits.device)
    ranks = (logits >= logits.gather(1, answers[:, None])).sum(1) - 1
    counts = torch.tensor([(ranks < 1).sum(), (ranks < 5).sum(), len(ranks)], dtype=torch.float64, device=logits.device)
    counts = all_reduce_sum(counts)
    figures = {"head@1": float(counts[0] / counts[2]), "head@5": float(counts[1] / counts[2])}
    return figures if logits.shape[1] > 5 else {"head@1": figures["head@1"]}


def check_classifier(model: OpenedModel) -> None:
    """Check that the model's encoder ends in a classifier, as timm's models do.

    Raises:
        DgmrError: it does not.
    """
    if not isinstance(getattr(model.module, "get_classifier", lambda: None)(), nn.Linear):
        raise DgmrError(f"{model.name} has no classifier. Give the weights of a linear head, or images to fit one.")


def _apply_head(head: LinearHead, embeddings: Tensor) -> Tensor:
    if head.weight.shape[1] != embeddings.shape[1]:
        raise DgmrError(
            f"the head takes embeddings of width {head.weight.shape[1]}, and the encoder's have width "
            f"{embeddings.shape[1]}. Use a head of this encoder."
        )
    features = F.normalize(embeddings, dim=-1) if head.normalized else embeddings
    return F.linear(features, head.weight.to(embeddings.device), head.bias.to(embeddings.device))


def _class_numbers(test: Images, classes: list[str], outputs: int, head: LinearHead | None) -> dict[str, int]:
    """Return the logit of each class: by the head's names, by the numbers in ``.cls``, or in the order of the names."""
    names = sorted(set(classes))
    if head and head.classes:
        if missing := set(names) - set(head.classes):
            raise DgmrError(
                f"{test.source} has the class {min(missing)!r}, which is missing in the head. Give both the same "
                "classes."
            )
        return {name: row for row, name in enumerate(head.classes)}
    pairs = zip(test.records, classes, strict=True)
    if all(record.has_cls and name.isdecimal() for record, name in pairs):
        number = {name: int(name) for name in names}
        fits = max(number.values()) < outputs
    else:
        number = {name: row for row, name in enumerate(names)}
        fits = len(names) == outputs
    if not fits:
        last = max(names, key=number.__getitem__)
        raise DgmrError(
            f"{test.source} has {len(names)} classes, up to {last}, but there are {outputs} outputs. Give images of "
            "all classes, a head for these classes, or images to fit one."
        )
    return number
