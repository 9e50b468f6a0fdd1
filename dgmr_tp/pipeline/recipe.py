"""A recipe: one flat YAML file that a person reads top to bottom, validated before anything runs."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dgmr_tp.distillation.config import DistillConfig, TuneTextConfig
from dgmr_tp.distillation.losses import DistillationLoss
from dgmr_tp.errors import DgmrError


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Model(Section):
    """The encoder to prune."""

    source: str
    """``open_clip:NAME``, ``timm:NAME``, ``hf-hub:ORG/REPO``, a model directory, or ``demo``."""
    pretrained: str | None = None
    """For a name: the library's tag, or a checkpoint file."""
    image_size: int | None = Field(None, ge=1)
    """For a name: height and width of the images, where they are not to be the library's."""

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of :func:`dgmr_tp.open_model` beside the weights."""
        return {"source": self.source, "image_size": self.image_size}


class Scenes(Section):
    """Generated data sets, for a run without downloads: ``scenes:images``, ``scenes:classes``, ``scenes:captions``, ``scenes:pairs``."""

    images: int = Field(gt=0)
    """Unlabelled scenes for calibration and distillation."""
    classes: int = Field(gt=0)
    """Labelled scenes for zero-shot classification."""
    captions: int = Field(gt=9, le=10_000)
    """Captioned scenes for zero-shot retrieval, all captions different."""
    pairs: int | None = Field(None, gt=9, le=10_000)
    """Captioned scenes to tune the text tower on."""


AMOUNTS = ("mlp_ratio", "keep_ratio", "keep", "budget", "threshold", "min_cosine", "max_drop")
BUDGETS = ("params", "flops", "latency")
PROMISES = ("min_cosine", "max_drop")


class Search(Section):
    """AMP's search; see dgmr_tp.compression.criteria.search."""

    images: int = Field(4096, ge=2)
    """How many of the images judge a width."""
    candidates: int = Field(512, ge=2)
    """Images of a group, over which an image's entropy is taken."""
    temperature: float = Field(1 / 15, gt=0)
    """Of the softmax over the candidates."""
    two_sided: bool = False
    """Also refuse widths at which the entropy falls."""

    @model_validator(mode="after")
    def _one_group(self) -> Search:
        if self.images < self.candidates:
            raise ValueError(f"images = {self.images} make no group of candidates = {self.candidates}")
        return self


class Prune(Section):
    """Which neurons stay: one of the amounts, alone or as a list; every size goes through the whole recipe."""

    criterion: Literal["dgmr", "l1", "l2", "random", "output", "activation", "taylor", "amp"] = "dgmr"
    """What is looked at: the weights, or, with ``output``, ``activation``, ``taylor`` and ``amp``, ``recover.images`` of the images.
    ``output`` and ``activation`` also fit the widths to a budget."""
    mlp_ratio: float | list[float] | None = None
    """Hidden width over width, in every block."""
    keep_ratio: float | list[float] | None = None
    """Share of the hidden neurons that stays in every block."""
    keep: int | list[int] | None = None
    """Hidden neurons that stay in every block."""
    budget: dict[str, float] | list[dict[str, float]] | None = None
    """What the tower may cost, as ``{params: 0.5}``, ``{flops: 0.4}``, ``{latency: 0.6}`` or several; see dgmr_tp.pruning.allocation."""
    threshold: float | list[float] | None = None
    """For ``amp``: the widths are searched for; how much each MLP's cut may raise the entropy, nats."""
    search: Search = Field(default_factory=Search)
    min_cosine: float | list[float] | None = None
    """The smallest size whose embeddings have this mean cosine to the original's once it is recovered; see dgmr_tp.compression.quality_target."""
    max_drop: float | list[float] | None = None
    """The same for the accuracy of a k-NN classifier, which may fall by this fraction; the images need classes."""
    held_out: int = Field(512, ge=50)
    """Images that judge a promise; neither ranking nor recovery sees them."""
    round_to: int = Field(1, ge=1)
    """Hidden widths are multiples of this."""

    @model_validator(mode="after")
    def _one_size(self) -> Prune:
        given = [key for key in AMOUNTS if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(AMOUNTS)}")
        if len(self.sizes) != (len(self._amounts) or None):
            raise ValueError("the list of sizes is empty or names a size twice")
        if self.threshold is not None and (self.criterion != "amp" or self.round_to > 1):
            raise ValueError(
                "threshold is for criterion: amp, whose widths are what its search finds; leave out round_to"
            )
        if self.threshold is None and self.search != Search.model_validate({}):
            raise ValueError("search is about a threshold; give one instead of another amount, or leave search out")
        if given[0] in PROMISES and self.criterion not in ("output", "activation"):
            raise ValueError(f"{given[0]} looks for fitted widths; set criterion: output")
        if given[0] not in PROMISES and self.held_out != Prune.model_fields["held_out"].default:
            raise ValueError(
                "held_out judges min_cosine or max_drop; give one of them instead of another amount, or leave held_out out"
            )
        for amount in self._amounts:
            if isinstance(amount, dict) and (not amount or not amount.keys() <= set(BUDGETS)):
                raise ValueError(f"a budget has one or more of {', '.join(BUDGETS)}, got {amount}")
            for key, number in amount.items() if isinstance(amount, dict) else [(given[0], amount)]:
                if number <= 0:
                    raise ValueError(f"{key} must be above 0, got {number}")
                if key in PROMISES and number >= 1:
                    raise ValueError(f"{key} must be below 1, got {number}")
                if key == "keep_ratio" and number > 1:
                    raise ValueError(f"keep_ratio must be 1 at most, got {number}")
        return self

    @property
    def sizes(self) -> dict[str, dict[str, Any]]:
        """Name and arguments of each size, such as ``{"mlp_ratio-1": {"mlp_ratio": 1}}`` or ``{"params-0.5": {"budget": …}}``."""
        key = next(key for key in AMOUNTS if getattr(self, key) is not None)
        rounded = {"round_to": self.round_to} if self.round_to > 1 else {}
        sizes = {}
        for amount in self._amounts:
            limits = amount if isinstance(amount, dict) else {key: amount}
            sizes["-".join(f"{name}-{number:g}" for name, number in limits.items())] = {key: amount, **rounded}
        return sizes

    @property
    def promises(self) -> bool:
        """Whether the sizes are found by what they keep."""
        return any(getattr(self, key) is not None for key in PROMISES)

    @property
    def _amounts(self) -> list[Any]:
        value = next(value for key in AMOUNTS if (value := getattr(self, key)) is not None)
        return value if isinstance(value, list) else [value]


class Recover(Section):
    """Closed-form recovery."""

    images: int = Field(1024, ge=10)
    """How many of the images are looked at; a tenth judges the rest."""
    damping: float = Field(1e-3, ge=0)
    """Ridge, relative to the mean of the squared activations."""


class Dataset(Section):
    """A clip_benchmark data set."""

    dataset: str
    """clip_benchmark's name, such as ``wds/cifar10``."""
    root: str
    """Its folder, or ``scenes:classes``, ``scenes:captions``."""
    task: Literal["auto", "zeroshot_classification", "zeroshot_retrieval"] = "auto"
    """``auto``: what the data set is for."""


class KNN(Section):
    """k-NN accuracy of the embeddings: for encoders without a text tower, too."""

    train: str
    """Images with classes: a folder of folders, or tars with ``.cls``."""
    test: str
    """The images that are judged, likewise."""
    workers: int = Field(0, ge=0)
    """Processes that read images."""


class Head(Section):
    """Accuracy of a linear classifier; see dgmr_tp.evaluation.linear_head."""

    test: str
    """Images with classes."""
    weights: str | None = None
    """A file with its weight and bias; without: the encoder gives logits, as a timm model with a classifier does."""
    workers: int = Field(0, ge=0)
    """Processes that read images."""


class Evaluate(Section):
    """What the original and every model of the run is measured by."""

    datasets: list[Dataset] = Field(default_factory=list)
    """clip_benchmark's data sets."""
    knn: KNN | None = None
    """k-NN accuracy of the embeddings."""
    head: Head | None = None
    """Accuracy of a linear classifier."""
    batch_size: int = Field(64, ge=1)
    """Images a step."""

    @model_validator(mode="after")
    def _something(self) -> Evaluate:
        if twice := {
            entry.dataset
            for entry in self.datasets
            if [other.dataset for other in self.datasets].count(entry.dataset) > 1
        }:
            raise ValueError(f"datasets names {', '.join(sorted(twice))} twice")
        if not self.datasets and not self.knn and not self.head:
            raise ValueError("nothing is evaluated; give datasets, knn or head")
        return self

    @property
    def paths(self) -> dict[str, str]:
        """Every folder it reads, by its key."""
        found = {f"evaluate.datasets.{i}.root": entry.root for i, entry in enumerate(self.datasets)}
        found |= {"evaluate.knn.train": self.knn.train, "evaluate.knn.test": self.knn.test} if self.knn else {}
        found |= {"evaluate.head.test": self.head.test} if self.head else {}
        return found | ({"evaluate.head.weights": self.head.weights} if self.head and self.head.weights else {})


class Compare(Section):
    """Must the index of old embeddings be rebuilt? See dgmr_tp.evaluation.index_compatibility."""

    images: str
    """Images like those in the index: a folder, a tar, shards."""
    classes: str | None = None
    """Class names for zero-shot decisions: a text file, a folder with ``classnames.txt``, or class embeddings that clip_benchmark
    saved (``.pt``)."""
    count: int = Field(5000, ge=100)
    """How many of them."""
    queries: int = Field(1000, ge=1)
    """How many of these ask; the others are the index."""
    keep: float = Field(0.98, ge=0, le=1)
    """From this share on the index is kept."""
    convenient: float = Field(0.9, ge=0, le=1)
    """From this share on re-embedding may wait."""
    workers: int = Field(0, ge=0)
    """Processes that read images."""

    @model_validator(mode="after")
    def _ordered(self) -> Compare:
        if self.convenient > self.keep:
            raise ValueError(f"convenient = {self.convenient} is above keep = {self.keep}")
        return self

    @property
    def paths(self) -> dict[str, str]:
        """Every path it reads, by its key."""
        return {"compare.images": self.images} | ({"compare.classes": self.classes} if self.classes else {})


FORMATS = ("onnx", "onnx-fp16", "onnx-int8", "torchscript", "pt2", "aotinductor")


class Export(Section):
    """The files that are deployed; see dgmr_tp.export.bundle.export_bundle."""

    formats: list[Literal[FORMATS]] = Field(["onnx", "torchscript"], min_length=1)  # type: ignore[valid-type]
    """What is written."""
    outputs: list[Literal["embedding", "patches"]] = ["embedding"]
    """What the files give."""
    normalised: bool = False
    """Whether the files make embeddings of length 1."""
    text: bool = False
    """Whether a CLIP's text tower is exported too."""
    layout: Literal["plain", "huggingface", "immich"] = "plain"
    """Names, folders and side files; see dgmr_tp.export.layouts."""
    measure: bool = True
    """Whether the ONNX files are evaluated on the data sets too, on a CPU, as they are served: hours for a large tower."""
    tolerance: dict[Literal[FORMATS], float] = Field(default_factory=dict)  # type: ignore[valid-type]
    """By format, the largest relative error of an output that is allowed."""

    @model_validator(mode="after")
    def _embedding(self) -> Export:
        if "embedding" not in self.outputs:
            raise ValueError("outputs must hold embedding; patches come beside it")
        if self.layout == "immich" and "patches" in self.outputs:
            raise ValueError("layout: immich takes embeddings and nothing else; leave out the patches")
        return self


class Recipe(Section):
    """The whole of a run; each key but ``name``, ``model``, ``images`` and ``prune`` may be left out, and its stage with it."""

    name: str
    """What the report calls the run; it lies in ``runs/NAME`` if nothing else is said."""
    seed: int = Field(0, ge=0)
    """Of all random choices."""
    model: Model
    scenes: Scenes | None = None
    images: str
    """Unlabelled images: a folder, a tar, a folder of tars, a URL of shards, or ``scenes:images``."""
    prune: Prune
    recover: Recover | None = None
    distill: DistillConfig | None = None
    tune_text: TuneTextConfig | None = None
    evaluate: Evaluate | None = None
    compare: Compare | None = None
    export: Export | None = None

    @property
    def calibration(self) -> int:
        """How many images a criterion that sees the data looks at."""
        return (self.recover or Recover.model_validate({})).images

    @field_validator("model", mode="before")
    @classmethod
    def _model_by_name(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _scenes_are_there(self) -> Recipe:
        roots = [self.images, *(self.evaluate.paths.values() if self.evaluate else ())]
        roots += [self.tune_text.captions] if self.tune_text else []
        roots += self.compare.paths.values() if self.compare else []
        if not self.scenes and any(root.startswith("scenes:") for root in roots):
            raise ValueError("a path begins with scenes:, but there is no section scenes")
        if self.scenes and not self.scenes.pairs and "scenes:pairs" in roots:
            raise ValueError("scenes:pairs needs scenes.pairs, the number of captioned scenes to train on")
        if self.distill and self.distill.keep_features and not self.distill.fixed_crops and len(self.prune.sizes) == 1:
            raise ValueError(
                "distill.keep_features serves several sizes, or fixed_crops: true; this recipe has neither"
            )
        if not self.recover and self.prune.promises:
            raise ValueError(
                "prune.min_cosine and prune.max_drop are about the recovered encoder; add the section recover"
            )
        for name, section in (("distill", self.distill), ("tune_text", self.tune_text)):
            if section and section.batch_size % section.processes:
                raise ValueError(
                    f"{name}.batch_size = {section.batch_size} cannot be divided over {name}.processes = {section.processes}"
                )
        return self


def load_recipe(path: str | Path, *, to_run: bool = True) -> Recipe:
    """Read and validate a recipe; ``${NAME}`` in a value is taken from the environment.

    Args:
        path: a YAML file.
        to_run: a variable that is not set is an error; otherwise, but for the model's, it stays as it is written.

    Raises:
        DgmrError: names the file, the line where it can, the key and the nearest valid one, or the variable to set.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise DgmrError(f"cannot read the recipe {path}: {error}") from error
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise DgmrError(
            f"{path}{f', line {mark.line + 1}' if mark else ''}: this is no YAML: {getattr(error, 'problem', error)}"
        ) from error
    if not isinstance(data, dict):
        raise DgmrError(f"{path}: a recipe is a mapping of keys such as model and prune, this is {type(data).__name__}")
    filled = {key: _from_environment(value, path, to_run or key == "model") for key, value in data.items()}
    return parse_recipe(filled, path, text)


def parse_recipe(data: dict[str, Any], path: Path, text: str = "") -> Recipe:
    """Validate the content of a recipe; ``text`` serves to find the lines of the errors."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise DgmrError("\n".join(_explain(path, text, problem) for problem in error.errors())) from error


def _explain(path: Path, text: str, problem: Any) -> str:
    where = [
        part
        for part in problem["loc"]
        if not (isinstance(part, str) and part.startswith(("list[", "float", "literal[")))
    ]
    key = ".".join(map(str, where)) or "recipe"
    line = _line(text, where)
    place = f"{path}{f', line {line}' if line else ''}"
    if problem["type"] == "extra_forbidden":
        known = _known_keys(where[:-1])
        close = difflib.get_close_matches(str(where[-1]), known, n=1, cutoff=0.5)
        return f"{place}: unknown key {key}; " + (
            f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        )
    if problem["type"] == "missing":
        return f"{place}: the key {key} is missing"
    given = "" if isinstance(problem["input"], dict | BaseModel) else f", got {problem['input']!r}"
    return f"{place}: {key}: {problem['msg'].removeprefix('Value error, ')}{given}"


def _known_keys(where: list[Any]) -> list[str]:
    section: type[BaseModel] = Recipe
    inside: dict[Any, type[BaseModel]] = {
        "model": Model,
        "scenes": Scenes,
        "prune": Search if "search" in where else Prune,
        "recover": Recover,
        "distill": DistillationLoss if "loss" in where else DistillConfig,
        "tune_text": TuneTextConfig,
        "evaluate": Evaluate,
        "compare": Compare,
        "export": Export,
    }
    if where:
        within: dict[Any, type[BaseModel]] = {"datasets": Dataset, "knn": KNN, "head": Head}
        section = within.get(where[1] if len(where) > 1 else "", inside[where[0]])
    return list(section.model_fields)


def _line(text: str, where: list[Any]) -> int | None:
    """The line, from 1, of the deepest key of ``where`` that stands in the text."""
    node = yaml.compose(text) if text else None
    line = None
    for part in where:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == str(part):
                    line, node = key.start_mark.line + 1, value
                    break
            else:
                break
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line


def _from_environment(value: Any, path: Path, to_run: bool) -> Any:
    if isinstance(value, dict):
        return {key: _from_environment(item, path, to_run) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_environment(item, path, to_run) for item in value]
    if not isinstance(value, str):
        return value

    def variable(match: re.Match[str]) -> str:
        if match[1] not in os.environ and not to_run:
            return match[0]
        if match[1] not in os.environ:
            raise DgmrError(
                f"{path}: the environment variable {match[1]} is not set; set it to the folder that the recipe means by {match[0]}"
            )
        return os.environ[match[1]]

    return re.sub(r"\$\{(\w+)\}", variable, value)
