"""From a recipe to a report: which stages there are, what each reads, and the work of each.

Done already and made from the same: skipped. Anything else: the run stops and says what changed (``run_directory.py``).
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from dgmr_tp.compression.criteria import DIFFERENTIATING, SEEING, Found, Rankings, make_plan, rank, search
from dgmr_tp.compression.prune import prune
from dgmr_tp.data.images import Images
from dgmr_tp.data.streams import find_images, is_url
from dgmr_tp.encoders import OpenedModel, open_model
from dgmr_tp.errors import DgmrError
from dgmr_tp.export.formats import FORMATS
from dgmr_tp.pipeline.preflight import check_needs
from dgmr_tp.pipeline.recipe import DatasetConfig, Recipe, Training, parse_recipe
from dgmr_tp.pipeline.run_directory import JOURNAL, RunDirectory, Step, digest, fingerprint, versions
from dgmr_tp.pruning import ImageEncoder, Plan
from dgmr_tp.utils.files import hold, sha256, write_whole

STAGES = ("scenes", "rank", "prune", "recover", "distill", "tune_text", "evaluate", "compare", "export")
SCENE_SEEDS = {
    "images": 101,
    "classes": 102,
    "captions": 103,
    "pairs": 104,
}  # the demo CLIP was trained on seed 1 and tested on seed 2
MODEL_STAGES = {"prune": "pruned", "recover": "recovered", "distill": "distilled", "tune_text": "tuned"}
ORIGINAL = "original"
"""In the place of a size: the encoder before pruning."""
NOT_CLIP_BENCHMARKS = {"knn": "k-NN", "head": "linear head"}
"""Headings of what is measured by our own code."""


class Run(RunDirectory):
    """A recipe in a run directory.

    Raises:
        DgmrError: the directory is there but is no run directory.
    """

    def __init__(self, recipe: Recipe, directory: str | Path) -> None:
        self.recipe = recipe
        super().__init__(directory)
        marker = self.directory / "recipe.json"
        begun = self.directory.is_dir() and all(path.name == "lock" for path in self.directory.iterdir())
        if self.directory.exists() and not marker.exists() and not begun:
            raise DgmrError(
                f"{self.directory} is no run directory (it has no recipe.json) and is not empty; name a new one with -o"
            )
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    @classmethod
    def open(cls, directory: str | Path) -> Run:
        """The run that was begun in ``directory``."""
        path = Path(directory) / "recipe.json"
        try:
            return cls(parse_recipe(json.loads(path.read_text()), path), directory)
        except OSError as error:
            raise DgmrError(f"{directory} is no run directory: it has no recipe.json") from error
        except ValueError as error:
            raise DgmrError(f"{path} is damaged: {error}") from error

    def run(self, redo: str | None = None, until: str | None = None, say: Callable[[str], None] = print) -> None:
        """Do every step that is not done yet, in order.

        Args:
            redo: drop this stage and those after it first.
            until: stop after this stage.
            say: receives one line per step.

        Raises:
            DgmrError: another run works here; something that a later stage needs is missing; a finished step was made from
                something else; or a step's own error.
        """
        for name in (redo, until):
            if name is not None and name not in STAGES:
                raise DgmrError(f"unknown stage {name!r}; stages: {', '.join(STAGES)}")
        check_needs(self.recipe)
        with hold(self.directory, "dgmr-tp run is working"):
            self._run(redo, until, say)

    def _run(self, redo: str | None, until: str | None, say: Callable[[str], None]) -> None:
        dropped = STAGES[STAGES.index(redo) :] if redo else ()
        for step in self.steps:
            if step.stage not in dropped:
                self.check_still_true(step)
        for stage in dropped:
            if (self.directory / stage).exists():
                shutil.rmtree(self.directory / stage)
        write_whole(self.directory / "recipe.json", self.recipe.model_dump_json(indent=1) + "\n")
        last = STAGES.index(until) if until else len(STAGES)
        for step in (step for step in self.steps if STAGES.index(step.stage) <= last):
            if self.is_done(step):
                say(f"{step.key}: done before")
            else:
                say(f"{step.key}: running")
                started = time.monotonic()
                self.do(step)
                say(f"{step.key}: done in {time.monotonic() - started:.1f} s")

    @cached_property
    def steps(self) -> list[Step]:
        """All steps of the recipe in the order in which they run."""
        recipe, seed = self.recipe, self.recipe.seed
        model: dict[str, Any] = {"model": recipe.model.model_dump(), "files": fingerprint(recipe.model.source)}
        if recipe.model.pretrained:
            model["pretrained_files"] = fingerprint(recipe.model.pretrained)
        images: dict[str, Any] = {"images": recipe.images, "seed": seed}
        data = ("scenes/all",) if recipe.scenes else ()
        if not recipe.images.startswith("scenes:"):
            images["files"] = fingerprint(recipe.images)
        steps = []
        if recipe.scenes:
            steps.append(Step("scenes", "all", recipe.scenes.model_dump(), (), self._scenes))
        machine: Any = {"batch_size": True, "knn": {"workers"}, "head": {"workers"}}
        evaluated = recipe.evaluate.model_dump(exclude=machine) if recipe.evaluate else None
        if (
            evaluated
            and recipe.evaluate
            and recipe.evaluate.head
            and (head := Path(recipe.evaluate.head.weights or "")).is_file()
        ):
            evaluated["head_sha256"] = sha256(head)  # another head has the same name and size
        if evaluated:  # first: a model or data set that cannot be evaluated shows before anything is computed
            steps.append(Step("evaluate", ORIGINAL, {**evaluated, **model}, data, self._evaluate_original))
        ranked: tuple[str, ...] = ()
        if recipe.prune.criterion in SEEING:
            section = {**model, "criterion": recipe.prune.criterion, "calibration": self.recipe.calibration, **images}
            steps.append(Step("rank", "all", section, data, self._rank))
            ranked = ("rank/all",)
        last = {}
        for size, amount in recipe.prune.sizes.items():
            section = {**model, "criterion": recipe.prune.criterion, **amount, "seed": seed}
            if "threshold" in amount:
                section |= {"search": recipe.prune.search.model_dump(), **images}
            elif recipe.prune.criterion in DIFFERENTIATING:
                section |= {"calibration": self.recipe.calibration, **images}
            elif recipe.prune.promises:
                assert recipe.recover
                section |= {"held_out": recipe.prune.held_out, "damping": recipe.recover.damping, **images}
            inputs = data if recipe.prune.criterion in DIFFERENTIATING else ranked
            steps.append(Step("prune", size, section, inputs, partial(self._prune, size=size, amount=amount)))
            last[size] = f"prune/{size}"
        if recipe.recover:
            for size in last:
                section = {"recover": recipe.recover.model_dump(), **images}
                steps.append(Step("recover", size, section, (last[size], *data), partial(self._recover, size=size)))
                last[size] = f"recover/{size}"
        if recipe.distill:
            for size in last:
                section = {**_training("distill", recipe.distill), **images}
                steps.append(Step("distill", size, section, (last[size], *data), partial(self._distill, size=size)))
                last[size] = f"distill/{size}"
        if recipe.tune_text:
            for size in last:
                section = {**_training("tune_text", recipe.tune_text), "seed": seed}
                steps.append(Step("tune_text", size, section, (last[size], *data), partial(self._tune_text, size=size)))
                last[size] = f"tune_text/{size}"
        if evaluated:
            for size in last:
                inputs = (*self.model_keys(size).values(), *data)
                steps.append(Step("evaluate", size, evaluated, inputs, partial(self._evaluate, size=size)))
        if recipe.compare:
            section = {**recipe.compare.model_dump(exclude={"workers"}), "seed": seed, **model}
            section |= {f"{key}_files": fingerprint(path) for key, path in recipe.compare.paths.items()}
            for size in last:
                steps.append(Step("compare", size, section, (last[size], *data), partial(self._compare, size=size)))
        if recipe.export:
            section = {**recipe.export.model_dump(exclude={"measure"}), **images}
            steps.append(Step("export", ORIGINAL, {**section, **model}, data, self._export_original))
            section["evaluate"] = evaluated if recipe.export.measure else None
            for size in last:
                inputs = (last[size], f"export/{ORIGINAL}", *data)
                steps.append(Step("export", size, section, inputs, partial(self._export, size=size)))
        return steps

    def model_keys(self, size: str) -> dict[str, str]:
        """The steps that make a model of this size: ``{"pruned": "prune/…", "recovered": …, "distilled": …}``."""
        return {label: f"{stage}/{size}" for stage, label in MODEL_STAGES.items() if getattr(self.recipe, stage)}

    def original(self) -> OpenedModel:
        return open_model(**self.recipe.model.options, pretrained=self.recipe.model.pretrained)

    @property
    def not_zero_shot(self) -> list[str]:
        """Data sets of the kind of captions that the text tower is tuned on."""
        if not self.recipe.tune_text or not self.recipe.evaluate:
            return []
        return [
            entry.dataset for entry in self.recipe.evaluate.datasets if _siblings(self.recipe.tune_text.captions, entry)
        ]

    def data_path(self, path: str) -> Path:
        """A path of the recipe; ``scenes:NAME`` is a generated set of this run."""
        name = path.removeprefix("scenes:")
        return self.folder("scenes/all") / name if name != path else Path(path)

    @property
    def _images(self) -> str | Path:
        """Where the recipe's unlabelled images are."""
        source = self.recipe.images
        return source if is_url(source) else self.data_path(source)

    def train_here(self, stage: str, size: str) -> None:
        """What every launched process of ``distill`` or ``tune_text`` runs; rank 0 leaves the model and its figures."""
        step = next((s for s in self.steps if s.key == f"{stage}/{size}"), None)
        if step is None:
            raise DgmrError(
                f"this run's recipe has no {stage} for a size {size!r}; sizes: {', '.join(self.recipe.prune.sizes)}"
            )
        if self.figures(step.key) is not None:
            print(f"{step.key}: done before", flush=True)
            return
        if unfinished := [key for key in step.inputs if self.figures(key) is None]:
            stage = unfinished[0].split("/")[0]
            raise DgmrError(
                f"{unfinished[0]} is not finished, which {step.key} reads; run dgmr-tp run RECIPE -o {self.directory} --until {stage}"
            )
        self.check_still_true(step)
        # Rank 0 prepares the folder; the others meet it in the first collective.
        folder = self.partial(step) if os.environ.get("RANK", "0") == "0" else self.aside(step)
        model = open_model(str(self.folder(step.inputs[0]) / "model"))
        figures = self._distill_here(model, folder, step) if stage == "distill" else self._tune_text_here(model, folder)
        if figures is not None:
            shutil.rmtree(folder / "model", ignore_errors=True)
            model.save(folder / "model", self._plan(size), final=self.folder(step.key) / "model")
            write_whole(folder / "figures.json", json.dumps(figures, indent=1) + "\n")

    def _distill_here(self, student: OpenedModel, folder: Path, step: Step) -> dict[str, Any] | None:
        from dgmr_tp.distillation.config import DistillSettings
        from dgmr_tp.distillation.distill import distill

        assert self.recipe.distill
        settings = DistillSettings.of(self.recipe.distill.model_dump(), self.recipe.seed)
        kept = self._kept_features(step) if self.recipe.distill.keep_features else None
        return distill(self.original(), student, find_images(self._images), settings, folder, kept)

    def _kept_features(self, step: Step) -> Path:
        """Where the sizes share the original's features; another recipe has other ones."""
        model = self.recipe.model
        made_from = [
            step.section,
            model.model_dump(),
            fingerprint(model.source),
            model.pretrained and fingerprint(model.pretrained),
        ]
        known = self.versions | versions(
            ("torchvision", "pillow", "transformers")
        )  # what crops, and what may be the original
        return self.directory / "distill" / f".features-{digest([*made_from, known])[:16]}"

    def _tune_text_here(self, model: OpenedModel, folder: Path) -> dict[str, Any] | None:
        from dgmr_tp.data.captions import Captioned
        from dgmr_tp.distillation.config import TextSettings
        from dgmr_tp.distillation.text import tune_text

        section = self.recipe.tune_text
        assert section
        pairs = Captioned.find(self.data_path(section.captions), section.images)
        return tune_text(model, pairs, TextSettings.of(section.model_dump(), self.recipe.seed), folder)

    # Each of the following fills the folder of one step and returns its figures.

    def _scenes(self, folder: Path) -> dict[str, Any]:
        from dgmr_tp.data import scenes

        counts = self.recipe.scenes
        assert counts
        scenes.write_classification(folder / "images", counts.images, SCENE_SEEDS["images"])
        scenes.write_classification(folder / "classes", counts.classes, SCENE_SEEDS["classes"])
        scenes.write_retrieval(folder / "captions", counts.captions, SCENE_SEEDS["captions"])
        if counts.pairs:
            scenes.write_retrieval(folder / "pairs", counts.pairs, SCENE_SEEDS["pairs"])
        return {}

    def _rank(self, folder: Path) -> dict[str, Any]:
        model = self.original()
        model.module.to(self.device)
        options = {"calibration": self.recipe.calibration, "seed": self.recipe.seed}
        rankings = rank(model, self.recipe.prune.criterion, self._images, **options)
        rankings.save(folder / "rankings.safetensors")
        return {"sensitivity": {name: ranking.sensitivity for name, ranking in rankings.sites.items()}}

    def _prune(self, folder: Path, size: str, amount: dict[str, Any]) -> dict[str, Any]:
        model = self.original()
        before = self._cost(model)
        if self.recipe.prune.criterion in (*SEEING, *DIFFERENTIATING):
            model.module.to(self.device)  # to look at images there, and to measure a budget of latency
        found: dict[str, Any] = {}
        if "threshold" in amount:
            plan, found["entropy"], image_blocks = self._search(model, folder, amount["threshold"])
            found["image_forwards"] = image_blocks / len(model.adapter.blocks())
        elif self.recipe.prune.promises:
            plan, found["promise"] = self._keep_promise(model, amount)
        elif self.recipe.prune.criterion in SEEING:
            plan = Rankings.read(self.folder("rank/all") / "rankings.safetensors").plan(model, **amount)
        else:
            options: dict[str, Any] = {"criterion": self.recipe.prune.criterion, "seed": self.recipe.seed, **amount}
            if self.recipe.prune.criterion in DIFFERENTIATING:
                options |= {"images": self._images, "calibration": self.recipe.calibration}
            plan = make_plan(model, **options)
        model.module.cpu()
        result = prune(model, plan=plan)
        shutil.rmtree(folder / "model", ignore_errors=True)
        result.model.save(folder / "model", result.plan, final=self.folder(f"prune/{size}") / "model")
        sites = [{"site": row.site, "width": row.width, "hidden": row.hidden, "kept": row.kept} for row in result.table]
        return {"original": before, "pruned": self._cost(result.model), "sites": sites, **found}

    def _search(self, model: OpenedModel, folder: Path, threshold: float) -> Found:
        options = self.recipe.prune.search.model_dump()
        return search(
            model,
            self._images,
            threshold=threshold,
            calibration=options.pop("images"),
            seed=self.recipe.seed,
            journal=folder / JOURNAL,
            **options,
        )

    def _keep_promise(self, model: OpenedModel, amount: dict[str, Any]) -> tuple[Plan, dict[str, Any]]:
        """The widths, and how they were found; the recovery stage then makes the very encoder that was judged."""
        from dgmr_tp.compression.quality_target import prune_to_promise

        section = self.recipe.recover
        assert section
        kept = prune_to_promise(
            model,
            self.data_path(self.recipe.images),
            calibration=section.images,
            held_out=self.recipe.prune.held_out,
            damping=section.damping,
            seed=self.recipe.seed,
            rankings=Rankings.read(self.folder("rank/all") / "rankings.safetensors"),
            **amount,
        )
        return kept.pruned.plan, {**kept.judged._asdict(), "trials": [trial._asdict() for trial in kept.trials]}

    def _recover(self, folder: Path, size: str) -> dict[str, Any]:
        section = self.recipe.recover
        assert section
        model = self.original()
        model.module.to(self.device)
        images = find_images(self._images)
        result = prune(
            model,
            images.sample(section.images, self.recipe.seed, model.preprocess),
            plan=self._plan(size),
            damping=section.damping,
        )
        result.model.module.cpu()
        result.model.save(folder / "model", result.plan, final=self.folder(f"recover/{size}") / "model")
        return {
            "sites": [row._asdict() for row in result.table],
            "broken_images": images.broken,
            "other_files": images.other_files,
        }

    def _distill(self, folder: Path, size: str) -> dict[str, Any]:
        assert self.recipe.distill
        kept = None
        if self.recipe.distill.keep_features:
            kept = self._kept_features(next(step for step in self.steps if step.key == f"distill/{size}"))
        for other in folder.parent.glob(".features-*"):  # of another recipe, or wanted no more
            if other != kept:
                other.unlink()
        figures = self._train("distill", self.recipe.distill, folder, size)
        if kept and all(self.figures(f"distill/{other}") for other in self.recipe.prune.sizes if other != size):
            kept.unlink(missing_ok=True)
        return figures

    def _tune_text(self, folder: Path, size: str) -> dict[str, Any]:
        assert self.recipe.tune_text
        return self._train("tune-text", self.recipe.tune_text, folder, size)

    def _train(self, command: str, section: Training, folder: Path, size: str) -> dict[str, Any]:
        from dgmr_tp.distillation.launch import launch
        from dgmr_tp.distillation.loop import STOP, curves_of, read_curve

        if not (folder / "figures.json").exists():
            launch(
                [command, str(self.directory), "--size", size],
                section.processes,
                section.batch_size,
                folder / STOP,
                section.hostfile,
            )
        if not (folder / "figures.json").exists():
            raise DgmrError("the deepspeed launcher was killed; run again to go on from the last checkpoint")
        figures = json.loads((folder / "figures.json").read_text())
        shown = {"losses": "loss", "scores": "score", "knn": "knn"}
        details = {name: read_curve(folder, name) for name in curves_of(folder) if name not in shown.values()}
        return {**figures, **{key: read_curve(folder, name) for key, name in shown.items()}, "details": details}

    def _evaluate_original(self, folder: Path) -> dict[str, Any]:
        from dgmr_tp.evaluation.zero_shot import as_clip

        model = self.original()
        return {"original": self._measure(model, as_clip(model), ImageEncoder(model.adapter), folder, "original")}

    def _evaluate(self, folder: Path, size: str) -> dict[str, Any]:
        from dgmr_tp.evaluation.zero_shot import as_clip

        figures = {}
        for label, key in self.model_keys(size).items():
            model = open_model(str(self.folder(key) / "model"))
            figures[label] = self._measure(model, as_clip(model), ImageEncoder(model.adapter), folder, label)
        return figures

    def _compare(self, folder: Path, size: str) -> dict[str, Any]:
        from dgmr_tp.evaluation.class_embeddings import class_embeddings
        from dgmr_tp.evaluation.index_compatibility import ComparedEncoder, compare_encoders

        section = self.recipe.compare
        assert section
        old, new = self.original(), self._final(size)
        return compare_encoders(
            *(
                ComparedEncoder(ImageEncoder(model.adapter).to(self.device).eval(), model.preprocess)
                for model in (old, new)
            ),
            self.data_path(section.images),
            classifier=class_embeddings(old, self.data_path(section.classes)) if section.classes else None,
            count=section.count,
            queries=section.queries,
            thresholds=section,
            seed=self.recipe.seed,
            device=self.device,
            workers=section.workers,
        )

    def _export_original(self, folder: Path) -> dict[str, Any]:
        model = self.original()
        source = self.recipe.model.source
        if model.source:
            source = os.path.relpath(Path(model.source).resolve(), self.folder(f"export/{ORIGINAL}").resolve())
        return self._bundle(model, folder, source, latency_batches=())

    def _export(self, folder: Path, size: str) -> dict[str, Any]:
        from dgmr_tp.evaluation.zero_shot import as_clip
        from dgmr_tp.export.bundle import failures
        from dgmr_tp.export.formats import open_exported

        assert self.recipe.export
        model = self._final(size)
        figures = self._bundle(
            model, folder, f"../../{self._last(size)}/model", dense=self.folder(f"export/{ORIGINAL}")
        )
        figures["metrics"] = {}
        measured = self.recipe.evaluate and self.recipe.export.measure
        for name, entry in figures["towers"]["image"]["files"].items() if measured else ():
            if FORMATS[name].measured and entry["file"] not in failures(figures):
                exported = open_exported(folder / entry["file"])
                figures["metrics"][name] = self._measure(model, as_clip(model, exported), exported, folder, name)
        return figures

    def _bundle(self, model: OpenedModel, folder: Path, source: str, **options: Any) -> dict[str, Any]:
        from dgmr_tp.export.layouts import export_model
        from dgmr_tp.export.verify import NUM_EXAMPLES

        section = self.recipe.export
        assert section
        images = torch.cat(list(find_images(self._images).sample(NUM_EXAMPLES, self.recipe.seed, model.preprocess)))
        return export_model(model, images, folder, source=source, **section.model_dump(exclude={"measure"}), **options)

    def _measure(
        self,
        model: OpenedModel,
        clip: torch.nn.Module,
        embed: Callable[[torch.Tensor], torch.Tensor],
        folder: Path,
        label: str,
    ) -> dict[str, dict[str, float]]:
        """clip_benchmark's metrics on every data set of the recipe, by data set, and, but for exported files, the accuracy by k-NN and by a
        linear head, which look at far more images."""
        from dgmr_tp.evaluation.knn import knn_accuracy
        from dgmr_tp.evaluation.linear_head import head_accuracy, read_head
        from dgmr_tp.evaluation.zero_shot import evaluate

        section = self.recipe.evaluate
        assert section
        metrics: dict[str, dict[str, float]] = {}
        exported = label in FORMATS
        device = "cpu" if exported else self.device
        clip = clip.to(device).eval()
        on_images: list[tuple[str, Any, list[Images], Callable[..., dict[str, float]]]] = []
        if (asked := section.knn) and not exported:
            bank = Images.find(self.data_path(asked.train))
            on_images.append(("knn", asked, [bank], partial(knn_accuracy, train=bank)))
        if (judged := section.head) and not exported:
            head = read_head(Path(judged.weights)) if judged.weights else None
            on_images.append(("head", judged, [], partial(head_accuracy, head=head)))
        for name, given, others, measure in on_images:
            test = Images.find(self.data_path(given.test))
            options = {"device": device, "batch_size": section.batch_size, "workers": given.workers}
            found = measure(embed, model.preprocess, test=test, **options)
            if left_out := sum(len(images.broken) for images in (test, *others)):
                found["images_left_out"] = left_out
            metrics[NOT_CLIP_BENCHMARKS[name]] = found
            write_whole(folder / f"{label}-{name}.json", json.dumps(found, indent=1) + "\n")
        for entry in section.datasets:
            metrics[entry.dataset] = evaluate(
                clip,
                model.preprocess,
                model.tokenizer,
                dataset=entry.dataset,
                root=self.data_path(entry.root),
                output=folder / f"{label}-{entry.dataset.replace('/', '_')}.json",
                name=f"{self.recipe.name}-{label}",
                task=entry.task,
                batch_size=section.batch_size,
            )
        return metrics

    def _cost(self, model: OpenedModel) -> dict[str, int]:
        from dgmr_tp.pruning.cost import flops, parameters

        tower = model.tower
        return {"parameters": parameters(tower), "flops": flops(tower, model.image_size)}

    def _last(self, size: str) -> str:
        """The step that makes the last model of a size."""
        return list(self.model_keys(size).values())[-1]

    def _final(self, size: str) -> OpenedModel:
        return open_model(str(self.folder(self._last(size)) / "model"))

    def _plan(self, size: str) -> Plan:
        return Plan.read(self.folder(f"prune/{size}") / "model" / "plan.json")


def _training(stage: str, section: Training) -> dict[str, Any]:
    """What decides a training: its section, and the files that the section names."""
    files = {
        f"{key}_files": fingerprint(path) for key in ("captions", "images") if (path := getattr(section, key, None))
    }
    if section.deepspeed and Path(section.deepspeed).is_file():
        files["deepspeed_sha256"] = sha256(Path(section.deepspeed))
    return {stage: section.deciding, **files}


def _siblings(captions: str, entry: DatasetConfig) -> bool:
    """Whether the text tower was tuned on captions of the data set's kind, which makes its figures no zero-shot ones."""
    here, there = captions.lower(), f"{entry.dataset} {entry.root}".lower()
    if here.endswith(".json"):  # Karpathy's says whose captions they are
        with suppress(OSError, ValueError):
            here += str(json.loads(Path(captions).read_text("utf-8")).get("dataset", "")).lower()
    return any(family in here and family in there for family in ("scenes:", "flickr", "coco"))
