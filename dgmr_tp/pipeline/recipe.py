"""A recipe: one flat YAML file that a person reads top to bottom, validated before anything runs."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dgmr_tp.errors import DgmrError
from dgmr_tp.evaluation.index_compatibility import CompareConfig
from dgmr_tp.evaluation.knn import KNNConfig
from dgmr_tp.evaluation.linear_head import HeadConfig
from dgmr_tp.evaluation.zero_shot import DatasetConfig
from dgmr_tp.export.config import ExportConfig


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


class Loss(Section):
    """What the student is asked for; see dgmr_tp.distillation.losses.Objective."""

    class_token: float = Field(1.0, ge=0)
    """Weight of the mean squared error of the class token; a tower without one has none."""
    patches: float = Field(1.0, ge=0)
    """Of the patch tokens."""
    embedding: float = Field(0.0, ge=0)
    """Of the tower's output: the embedding, or a classifier's logits."""
    layers: dict[int, float] = Field(default_factory=dict)
    """Of all tokens behind single blocks: the block's number, from 1, and its weight."""
    after_norm: bool = False
    """Whether class token and patches are taken behind the final norm."""

    @model_validator(mode="after")
    def _something(self) -> Loss:
        if not any((self.class_token, self.patches, self.embedding, *self.layers.values())):
            raise ValueError("every weight is 0; give one of class_token, patches, embedding, layers")
        return self


class Training(Section):
    """What every training is told; see dgmr_tp.distillation.config.Settings."""

    processes: int = Field(1, ge=1)
    """On this machine; with fewer GPUs than that, as many as there are."""
    hostfile: str | None = None
    """DeepSpeed's list of machines, for more than this one: lines such as ``node1 slots=8``."""
    steps: int = Field(ge=1)
    """Steps of the optimiser."""
    batch_size: int = Field(ge=1)
    """Images of a step, over all processes."""
    base_lr: float = Field(ge=0)
    """The highest learning rate is ``base_lr · batch_size / 256``."""
    min_lr: float = Field(0.0, ge=0)
    """Where the cosine ends; taken as it is."""
    warmup_steps: int = Field(0, ge=0)
    """Steps in which the learning rate rises from 0."""
    weight_decay: float = Field(0.0, ge=0)
    """Of matrices; norms, biases and embeddings have none."""
    final_weight_decay: float | None = Field(None, ge=0)
    """Where the decay goes on a cosine; without, it stays."""
    gradient_clipping: float = Field(0.0, ge=0)
    """Largest norm of the gradient; 0: any."""
    bf16: bool = False
    """Compute in bfloat16; master weights, losses and averages are float32 always."""
    deepspeed: str | None = None
    """A DeepSpeed JSON that is joined with what this section says."""
    checkpoint_every: int = Field(100, ge=1)
    """Steps between two checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """So many of the newest stay on disk."""
    log_every: int = Field(10, ge=1)
    """Steps between two points of the curves."""
    workers: int = Field(0, ge=0)
    """Processes that read images, for each that trains."""
    max_broken: float = Field(0.01, ge=0, le=1)
    """Share of the images that may fail to decode before the run stops."""

    @property
    def deciding(self) -> dict[str, Any]:
        """What decides the result: the rest may change between two starts of one training."""
        machines = {
            "processes",
            "hostfile",
            "workers",
            "micro_batch",
            "recompute",
            "compile",
            "shard_teacher",
            "keep_features",
        }
        return self.model_dump(exclude=machines | {"checkpoint_every", "keep_checkpoints", "log_every", "max_broken"})


class Distill(Training):
    """Distillation; see dgmr_tp.distillation.config.DistillSettings."""

    micro_batch: int | None = Field(None, ge=1)
    """The most images that one process works on at a time; gradients are accumulated. Without: all of its share at once."""
    held_out: int = Field(0, ge=0)
    """Images that are not trained on; the student nearest to the original on them is the result."""
    evaluate_every: int = Field(100, ge=1)
    """Steps between two looks at them."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of a moving average of the weights, which then is the result."""
    loss: Loss = Field(default_factory=Loss)
    augment: Literal["clip", "dinov2"] = "clip"
    """``clip``: a random crop, flipped; ``dinov2``: DINOv2's colours, blur and solarisation, too."""
    min_crop: float = Field(0.2, gt=0, le=1)
    """The smallest crop's share of the image's area."""
    flip: bool = True
    """Mirror half of the crops."""
    fixed_crops: bool = False
    """Crop an image alike in every epoch."""
    keep_features: bool = False
    """The original's features of every crop stay on disk, for the other sizes of the recipe and for the next epochs of fixed crops."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed shards over the processes: 1 the optimiser's states, 2 the gradients too, 3 the parameters too."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What lies in the CPU's memory: the optimiser's states, or the parameters too (zero_stage: 3)."""
    shard_teacher: bool = False
    """Shard the original's parameters over the processes."""
    recompute: bool = False
    """Blocks keep only their input and run again in the backward pass."""
    compile: bool = False
    """``torch.compile`` for student and original; it needs a C++ compiler."""

    @model_validator(mode="after")
    def _possible(self) -> Distill:
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError("offload: optimizer needs zero_stage 1, 2 or 3")
        if self.bf16 and self.zero_stage == 0:
            raise ValueError("bf16 needs zero_stage 1, 2 or 3: stage 0 gives no float32 master weights back")
        if self.offload == "all" and self.zero_stage != 3:
            raise ValueError(f"offload: all needs zero_stage: 3, this is {self.zero_stage}")
        if self.keep_features and self.shard_teacher:
            raise ValueError(
                "keep_features does not go with shard_teacher, whose processes must compute together; leave one of them out"
            )
        if self.compile and (self.zero_stage == 3 or self.shard_teacher):
            raise ValueError(
                "compile does not go with sharded parameters (zero_stage: 3, shard_teacher: true); leave one of them out"
            )
        return self


class TuneText(Training):
    """Tuning of the text tower; see dgmr_tp.distillation.config.TextSettings. The whole batch is worked on at once, since its
    captions are told apart from each other."""

    captions: str
    """Images with a ``.txt`` beside each, in a folder or in tars; or Karpathy's JSON; or ``scenes:pairs``."""
    images: str | None = None
    """For a JSON: the folder of its images."""
    first_caption: bool = False
    """Of several captions always the first, as in the paper, instead of one drawn for every epoch."""
    zero_stage: Literal[1, 2] = 1
    """As for distill."""


class Evaluate(Section):
    """What the original and every model of the run is measured by."""

    datasets: list[DatasetConfig] = Field(default_factory=list)
    """clip_benchmark's data sets."""
    knn: KNNConfig | None = None
    """k-NN accuracy of the embeddings."""
    head: HeadConfig | None = None
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
    distill: Distill | None = None
    tune_text: TuneText | None = None
    evaluate: Evaluate | None = None
    compare: CompareConfig | None = None
    export: ExportConfig | None = None

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
        "distill": Loss if "loss" in where else Distill,
        "tune_text": TuneText,
        "evaluate": Evaluate,
        "compare": CompareConfig,
        "export": ExportConfig,
    }
    if where:
        within: dict[Any, type[BaseModel]] = {"datasets": DatasetConfig, "knn": KNNConfig, "head": HeadConfig}
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
