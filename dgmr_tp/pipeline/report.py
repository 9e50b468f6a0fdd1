"""The report of a run: one table on the terminal, and one HTML file that needs no network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from rich.console import Console
from rich.table import Table

from dgmr_tp.compression.prune import describe_shortage
from dgmr_tp.distillation.validation import describe_fall, describe_result
from dgmr_tp.export.formats import FORMATS
from dgmr_tp.pipeline.stages import STAGES
from dgmr_tp.pipeline.stages.evaluate import DENSE, HEAD_TITLE, KNN_TITLE
from dgmr_tp.utils.files import atomic_write

METRIC_COLUMNS = 3
"""Columns of metrics that fit into 80 characters next to size, stage and cost."""
METRIC_TITLES = {
    "acc1": "top-1",
    "text_retrieval_recall@5": "image→text R@5",
    "image_retrieval_recall@5": "text→image R@5",
    "knn@20": "top-1",
    "head@1": "top-1",
}
"""Metrics that the tables show, and what they are called there."""
OWN_TOOL = "dgmr-tp"
"""What the tables name as the tool of figures that clip_benchmark does not compute."""
Figures = Mapping[str, dict[str, Any] | None]
"""The figures of every step, by key, such as ``prune/mlp_ratio-1``; None for a step that has not run."""


class Curve(NamedTuple):
    """A curve of a training: points ``(step, value)``."""

    title: str
    points: list[tuple[int, float]]
    logarithmic: bool


class Measurement(NamedTuple):
    """A metric of a model or an exported file."""

    model: str
    dataset: str
    metric: str
    value: float


class TrainingReport(NamedTuple):
    """The curves of one training."""

    title: str
    curves: list[Curve]
    details: list[Curve]
    result: str | None
    """A sentence on the step whose weights were kept, if it is not the start."""
    warnings: list[str]
    """Sentences if no step improved the model, or if its score fell in the first steps."""


@dataclass(frozen=True)
class SizeReport:
    """Content of the report for one size."""

    name: str
    cost: dict[str, int] | None
    """``parameters`` and ``flops`` of the pruned tower; None if it has not run."""
    rows: list[dict[str, Any]]
    """``label`` and ``metrics`` of every model and exported file."""
    sites: list[dict[str, Any]]
    has_tuned_blocks: bool
    shortage: str | None
    """A line on the sites that lacked calibration images."""
    trainings: list[TrainingReport]
    files: list[dict[str, Any]]
    threads: int | None
    quality_target: str | None
    compatibility: dict[str, Any] | None
    not_zero_shot: list[str]
    """Data sets of the kind that the text tower was tuned on."""
    skipped: dict[str, int]
    """Number of images that did not decode, by stage."""
    broken: list[str]
    """Training images that did not decode."""


@dataclass(frozen=True)
class Report:
    """Content of the report."""

    name: str
    directory: str
    columns: list[dict[str, str]]
    """``dataset``, ``metric`` and ``tool`` of every column of metrics."""
    dense: dict[str, Any]
    """``metrics`` and ``cost`` of the dense model."""
    left_out: dict[str, int]
    """Images that did not decode in the evaluation, by data set. All models are evaluated on the same images."""
    others: list[Measurement] = field(default_factory=list)
    """Metrics without a column."""
    sizes: list[SizeReport] = field(default_factory=list)


def collect(directory: Path, name: str, figures: Figures, not_zero_shot: Iterable[str] = ()) -> Report:
    """Collect what the report shows from the figures of the steps.

    Args:
        directory: the run directory.
        name: of the run.
        figures: of every step.
        not_zero_shot: data sets of the kind that the text tower was tuned on.
    """
    done = {key: value for key, value in figures.items() if value is not None}
    dense = done.get(f"evaluate/{DENSE}", {}).get(DENSE, {})
    measurements = _measurements(done)
    columns = _columns(measurements)
    titles = [
        {
            "dataset": dataset.removeprefix("wds/"),
            "metric": METRIC_TITLES.get(metric, metric),
            "tool": OWN_TOOL if dataset in (KNN_TITLE, HEAD_TITLE) else "clip_benchmark",
        }
        for dataset, metric in columns
    ]
    names = [key.split("/")[1] for key in figures if key.startswith("prune/")]
    costs = [cost for size in names if (cost := done.get(f"prune/{size}", {}).get("dense"))]
    return Report(
        name=name,
        directory=str(directory),
        columns=titles,
        dense={"metrics": _pick(dense, columns), "cost": costs[-1] if costs else None},
        left_out={name: metrics["images_left_out"] for name, metrics in dense.items() if "images_left_out" in metrics},
        others=[entry for entry in measurements if (entry.dataset, entry.metric) not in columns],
        sizes=[_size_report(size, done, columns, not_zero_shot) for size in names],
    )


def _measurements(done: Mapping[str, dict[str, Any]]) -> list[Measurement]:
    """Return every metric of every model and exported file."""
    measurements = []
    for key, figures in done.items():
        stage, size = key.split("/")
        measured = figures.get("metrics", {}) if stage == "export" else figures
        if stage not in ("evaluate", "export"):
            continue
        for label, by_dataset in measured.items():
            model = label if size == DENSE else f"{size.replace('-', ' ', 1)}, {label}"
            for dataset, metrics in by_dataset.items():
                measurements += [Measurement(model, dataset, *metric) for metric in metrics.items()]
    return [entry for entry in measurements if entry.metric != "images_left_out"]


def _columns(measurements: Iterable[Measurement]) -> list[tuple[str, str]]:
    """Return data set and metric of every column: the metrics of :data:`METRIC_TITLES`, or all if there is none."""
    metrics: dict[str, list[str]] = {}
    for entry in measurements:
        metrics.setdefault(entry.dataset, []).append(entry.metric)
    columns = []
    for dataset, names in metrics.items():
        known = [name for name in METRIC_TITLES if name in names]
        columns += [(dataset, name) for name in known or dict.fromkeys(names)]
    return columns


def _size_report(
    size: str, done: Mapping[str, dict[str, Any]], columns: list[tuple[str, str]], not_zero_shot: Iterable[str]
) -> SizeReport:
    def of(stage: str) -> dict[str, Any]:
        return done.get(f"{stage}/{size}", {})

    pruned, exported, recovered = of("prune"), of("export"), of("recover")
    measured = {**of("evaluate"), **exported.get("metrics", {})}
    labels = [stage.model_label for stage in STAGES if stage.model_label]
    rows = [label for label in (*labels, *FORMATS) if label in measured]
    rows += [label for label in measured if label not in rows]
    errors = {row["site"]: row for row in recovered.get("sites", [])}
    trained = [stage for stage in STAGES if stage.training_title and of(stage.name)]
    broken = {name for stage in trained for name in of(stage.name).get("broken_images", {})}
    is_tuned = bool(of("tune_text"))
    return SizeReport(
        name=size.replace("-", " ", 1),
        cost=pruned.get("pruned"),
        rows=[{"label": label, "metrics": _pick(measured[label], columns)} for label in rows],
        sites=[{**row, **_errors(errors.get(row["site"], {}))} for row in pruned.get("sites", [])],
        has_tuned_blocks=any(row.get("tuned_error") is not None for row in errors.values()),
        shortage=describe_shortage([row.get("images_needed") for row in errors.values()]),
        trainings=[_training_report(str(stage.training_title), of(stage.name)) for stage in trained],
        files=_files(exported),
        threads=exported.get("threads"),
        quality_target=describe_target(size, pruned["quality_target"]) if "quality_target" in pruned else None,
        compatibility=of("compare") or None,
        not_zero_shot=[dataset.removeprefix("wds/") for dataset in not_zero_shot] if is_tuned else [],
        skipped=_skipped(of, done.get("rank/all", {})),
        broken=sorted(broken),
    )


def _training_report(title: str, training: dict[str, Any]) -> TrainingReport:
    scores, best_step = training.get("scores", []), training.get("best_step")
    result: str | None = None
    warnings: list[str] = []
    if scores and best_step is not None and not training.get("ema"):  # an average is not of one step
        sentence = describe_result(scores, best_step)
        result, warnings = (sentence, []) if best_step else (None, [sentence])
    if fall := describe_fall(scores):
        warnings.append(fall)
    return TrainingReport(title, _curves(training), _details(training), result, warnings)


def _skipped(of: Callable[[str], dict[str, Any]], ranking: dict[str, Any]) -> dict[str, int]:
    """Return the number of images that did not decode, by stage."""
    counts = {"rank": len(ranking.get("broken_images", {}))}
    counts |= {stage.name: len(of(stage.name).get("broken_images", {})) for stage in STAGES if stage.name != "rank"}
    counts["compare"] = of("compare").get("left_out", 0)
    return {name: count for name, count in counts.items() if count}


def _pick(metrics: Mapping[str, dict[str, float]], columns: list[tuple[str, str]]) -> list[float | None]:
    return [metrics.get(dataset, {}).get(metric) for dataset, metric in columns]


def _errors(row: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("cut_error", "recovered_error", "fit_rejected", "block_error", "tuned_error")
    return {key: row.get(key) for key in keys}


def _curves(training: dict[str, Any]) -> list[Curve]:
    """Return the main curves of a training."""
    teacher = training.get("teacher", {}).get("knn")
    teacher_note = "" if teacher is None else f"; the teacher: {percent(teacher)} %"
    curves = [
        Curve("loss, logarithmic", training.get("losses", []), True),
        Curve("mean cosine to the teacher on held-out images", training.get("scores", []), False),
        Curve(f"k-NN accuracy on held-out images{teacher_note}", training.get("knn", []), False),
    ]
    return [curve for curve in curves if len(curve.points) > 1]


def _details(training: dict[str, Any]) -> list[Curve]:
    """Return the curves of the parts of the loss, the gradient, and the speed."""
    details = training.get("details", {})
    parts = [name for name in details if name.startswith("loss_")]
    curves = []
    if len(parts) > 1:
        for name in parts:
            title = name.removeprefix("loss_").replace("_", " ")
            curves.append(Curve(f"loss, {title}, logarithmic", details[name], True))
    for name, title, logarithmic in (
        ("gradient_norm", "norm of the gradient, logarithmic", True),
        ("samples_per_second", "images per second", False),
        ("share_of_peak", "fraction of the throughput of a large matrix product", False),
    ):
        curves.append(Curve(title, details.get(name, []), logarithmic))
    return [curve for curve in curves if len(curve.points) > 1]


def print_table(report: Report, console: Console) -> None:
    """Print parameters, FLOPs and accuracy of every stage and size, at most 80 columns wide."""
    for first in range(0, max(1, len(report.columns)), METRIC_COLUMNS):
        console.print(_table(report, slice(first, first + METRIC_COLUMNS), with_cost=first == 0))
    for tool in dict.fromkeys(column["tool"] for column in report.columns):
        names = dict.fromkeys(column["dataset"] for column in report.columns if column["tool"] == tool)
        console.print(f"measured by {tool}: {', '.join(names)}", highlight=False, soft_wrap=True)
    for name, count in report.left_out.items():
        console.print(f"{name}: {count} images do not decode and are left out", highlight=False)
    for size in report.sizes:
        if size.quality_target:
            console.print(f"{size.name}: {size.quality_target}", highlight=False, soft_wrap=True)
        for training in size.trainings:
            for sentence in filter(None, (training.result, *training.warnings)):
                line = f"{size.name}, {training.title.lower()}: {sentence}"
                console.print(line, highlight=False, soft_wrap=True)
        if size.shortage:
            console.print(f"{size.name}: {size.shortage}", highlight=False)
        for stage, count in size.skipped.items():
            console.print(f"{size.name}, {stage}: {count} images did not decode and were skipped", highlight=False)
        if size.not_zero_shot:
            console.print(f"{size.name}: {tuned_warning(size.not_zero_shot)}", highlight=False)
        if size.compatibility:
            line = f"{size.name}, {describe_compatibility(size.compatibility)}"
            console.print(line, highlight=False, soft_wrap=True)
        for entry in size.files:
            _print_file(size, entry, console)


def _print_file(size: SizeReport, entry: dict[str, Any], console: Console) -> None:
    if not entry["verified"]:
        console.print(f"{size.name}, {entry['file']}: {entry['status']}", highlight=False)
    for batch, times in entry["latency"].items():
        if "dense" in times:
            before, after = times["dense"]["median"], times["pruned"]["median"]
            console.print(
                f"{size.name}, {entry['file']}, batch {batch}: {before:.1f} → {after:.1f} ms "
                f"({before / after:.2f} ×, {plural(size.threads, 'thread')})"
            )


def _table(report: Report, metrics: slice, with_cost: bool) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("size", no_wrap=True)
    table.add_column("stage", no_wrap=True)
    cost_titles = ("M params", "GFLOPs") if with_cost else ()
    metric_titles = [f"{column['dataset']}\n{column['metric']}" for column in report.columns[metrics]]
    for title in (*cost_titles, *metric_titles):
        table.add_column(title, justify="right")
    cost = _cost(report.dense["cost"])[: len(cost_titles)]
    table.add_row(DENSE, "", *cost, *map(percent, report.dense["metrics"][metrics]))
    for size in report.sizes:
        name, cost = size.name, _cost(size.cost)[: len(cost_titles)]
        for row in size.rows or [{"label": "pruned", "metrics": []}]:
            table.add_row(name, row["label"], *cost, *map(percent, row["metrics"][metrics]))
            name, cost = "", ("",) * len(cost_titles)
    return table


def write_html(content: Report | Mapping[str, Any], path: Path, template: str = "report.html.j2") -> Path:
    """Write a page from a template, atomically."""
    loader = jinja2.PackageLoader("dgmr_tp.pipeline", "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        percent=percent,
        plural=plural,
        polyline=polyline,
        warning=tuned_warning,
        million=lambda n: f"{n / 1e6:.2f} M",
        giga=lambda n: f"{n / 1e9:.3f} G",
        spread=lambda t: f"{t['median']:.1f} ({t['low']:.1f}–{t['high']:.1f})",
        basename=lambda name: Path(name).name,
    )
    variables = vars(content) if isinstance(content, Report) else content
    atomic_write(path, environment.get_template(template).render(variables))
    return path


def _files(exported: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row per exported file, from the figures of an export."""
    rows = []
    for tower, entries in exported.get("towers", {}).items():
        for name, entry in entries["files"].items():
            errors, cosines = entry.get("relative_error", {}), entry.get("cosine", {})
            rows.append(
                {
                    "tower": tower,
                    "format": name,
                    "file": entry["file"],
                    "megabytes": entry["megabytes"],
                    "status": entry["status"],
                    "verified": entry["status"] == "verified",
                    "errors": {output: _extreme(values, max) for output, values in errors.items()},
                    "cosines": {output: _extreme(values, min) for output, values in cosines.items()},
                    "memory": entry.get("peak_memory_mb"),
                    "latency": entry.get("latency_ms", {}),
                }
            )
    return rows


def _extreme(by_batch: dict[str, float | None], pick: Callable[[Iterable[float]], float]) -> float | None:
    """Return the extreme value over the batch sizes; None if one of them has no value."""
    values = list(by_batch.values())
    return None if None in values else pick(value for value in values if value is not None)


def describe_target(size: str, figures: dict[str, Any]) -> str:
    """Return one line on a size that was found by a quality target."""
    metric, side = ("mean cosine", "at least") if size.startswith("min_cosine") else ("k-NN accuracy lost", "at most")
    tried = f"the smallest of {len(figures['trials'])} sizes tried that meets the target"
    return (
        f"recovered, {metric} {figures['value']:.4f} on held-out images, {side} {figures['bound']:.4f} (95 %); {tried}"
    )


def describe_compatibility(figures: dict[str, Any]) -> str:
    """Return one line on the compatibility of two encoders."""
    agreement = "" if figures["agreement"] is None else f", decisions {percent(figures['agreement'])} %"
    mixed = [way["recall@10"] for name, way in figures["ways"].items() if name != "new queries, new index"]
    return f"{figures['verdict']}: neighbors {percent(min(mixed))} %{agreement}"


def tuned_warning(datasets: list[str]) -> str:
    """Return a warning about the tuned text tower's figures on data of the kind that it was tuned on."""
    return f"the text tower was tuned on captions of this kind: tuned is not zero-shot on {', '.join(datasets)}"


def percent(value: float | None) -> str:
    """Format a fraction in percent."""
    return "–" if value is None else f"{100 * value:.1f}"


def plural(count: int | None, noun: str) -> str:
    """Return a count with its noun, such as ``1 thread`` or ``2 threads``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def polyline(points: list[tuple[int, float]], width: int, height: int, logarithmic: bool = True) -> str:
    """Return the points of an SVG polyline, with steps from left to right."""
    values = [math.log10(max(value, 1e-12)) if logarithmic else value for _, value in points]
    low, high, last_step = min(values), max(values), points[-1][0]
    scale = (height - 1) / ((high - low) or 1)
    pairs = zip(points, values, strict=True)
    return " ".join(
        f"{width * step / last_step:.1f},{height - (value - low) * scale:.1f}" for (step, _), value in pairs
    )


def _cost(cost: dict[str, int] | None) -> tuple[str, ...]:
    return (f"{cost['parameters'] / 1e6:.2f}", f"{cost['flops'] / 1e9:.3f}") if cost else ("–", "–")
