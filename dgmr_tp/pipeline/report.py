"""The report of a run: one table on the terminal and one HTML file that needs no network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console
from rich.table import Table

from dgmr_tp.export.formats import FORMATS
from dgmr_tp.utils.files import write_whole

LABELS = ("pruned", "recovered", "distilled", "tuned", *FORMATS)
AT_A_TIME = 3
"""Columns of figures that 80 characters hold beside size, stage and cost."""
TRAININGS = {"distill": "Distillation", "tune_text": "Text tower"}
SHORT = {
    "acc1": "top-1",
    "text_retrieval_recall@5": "image→text R@5",
    "image_retrieval_recall@5": "text→image R@5",
    "knn@20": "top-1",
    "head@1": "top-1",
}


def collect(
    directory: Path, name: str, figures: dict[str, dict[str, Any] | None], not_zero_shot: Iterable[str] = ()
) -> dict[str, Any]:
    """What the report shows, from the figures of the steps (by key, such as ``prune/mlp_ratio-1``; None: not run).

    ``not_zero_shot`` are the data sets of the kind that the text tower was tuned on.
    """
    sizes = [key.split("/")[1] for key in figures if key.startswith("prune/")]
    done = {key: value for key, value in figures.items() if value is not None}
    original = done.get("evaluate/original", {}).get("original", {})
    data: dict[str, Any] = {"name": name, "directory": str(directory), "sizes": []}
    columns = [(dataset, metric) for dataset, metrics in original.items() for metric in SHORT if metric in metrics]
    data["columns"] = [
        {"dataset": dataset.removeprefix("wds/"), "metric": SHORT[metric]} for dataset, metric in columns
    ]
    pick = lambda metrics: [metrics.get(dataset, {}).get(metric) for dataset, metric in columns]  # noqa: E731
    data["original"] = {"metrics": pick(original), "cost": None}
    data["left_out"] = {
        dataset: metrics["images_left_out"] for dataset, metrics in original.items() if "images_left_out" in metrics
    }
    for size in sizes:
        cut = done.get(f"prune/{size}", {})
        data["original"]["cost"] = cut.get("original", data["original"]["cost"])
        exported = done.get(f"export/{size}", {})
        measured = {**done.get(f"evaluate/{size}", {}), **exported.get("metrics", {})}
        recovery = {row["site"]: row for row in done.get(f"recover/{size}", {}).get("sites", [])}
        data["sizes"].append(
            {
                "name": size.replace("-", " ", 1),
                "cost": cut.get("pruned"),
                "promise": promise_in_words(size, cut["promise"]) if "promise" in cut else None,
                "rows": [{"label": label, "metrics": pick(measured[label])} for label in LABELS if label in measured],
                "sites": [
                    {
                        **row,
                        **{
                            k: v
                            for k, v in recovery.get(row["site"], {}).items()
                            if k.endswith("error") or k == "kept_cut"
                        },
                    }
                    for row in cut.get("sites", [])
                ],
                "trainings": [
                    {
                        "title": title,
                        "curves": _curves(done[f"{stage}/{size}"]),
                        "details": _details(done[f"{stage}/{size}"]),
                    }
                    for stage, title in TRAININGS.items()
                    if f"{stage}/{size}" in done
                ],
                "not_zero_shot": [dataset.removeprefix("wds/") for dataset in not_zero_shot]
                if f"tune_text/{size}" in done
                else [],
                "compatibility": done.get(f"compare/{size}"),
                "files": _files(exported),
                "threads": exported.get("threads"),
                "skipped": len(done.get(f"recover/{size}", {}).get("broken_images", {})),
                "broken": sorted(
                    {name for stage in TRAININGS for name in done.get(f"{stage}/{size}", {}).get("broken_images", {})}
                ),
            }
        )
    return data


def _curves(training: dict[str, Any]) -> list[tuple[str, list[tuple[int, float]], bool]]:
    """What a training's curves show, their points, and whether they are drawn on a logarithmic scale."""
    original = training.get("original", {}).get("knn")
    said = "" if original is None else f"; the original: {percent(original)} %"
    curves = [
        ("loss, logarithmic", training.get("losses", []), True),
        ("mean cosine to the original on images held out", training.get("scores", []), False),
        (f"k-NN accuracy on images held out{said}", training.get("knn", []), False),
    ]
    return [(says, points, logarithmic) for says, points, logarithmic in curves if len(points) > 1]


def _details(training: dict[str, Any]) -> list[tuple[str, list[tuple[int, float]], bool]]:
    """The same for the parts of the loss, the gradient, and the speed."""
    known = training.get("details", {})
    parts = [name for name in known if name.startswith("loss_")]
    curves = [
        (f"loss, {name.removeprefix('loss_').replace('_', ' ')}, logarithmic", name, True)
        for name in parts
        if len(parts) > 1
    ]
    curves += [
        ("norm of the gradient, logarithmic", "gradient_norm", True),
        ("images per second", "samples_per_second", False),
    ]
    curves += [("share of what a large matrix product reaches", "share_of_peak", False)]
    return [(says, known[name], logarithmic) for says, name, logarithmic in curves if len(known.get(name, [])) > 1]


def print_table(data: dict[str, Any], console: Console) -> None:
    """Parameters, FLOPs and accuracy of every stage and size, at most 80 columns wide."""
    for first in range(0, max(1, len(data["columns"])), AT_A_TIME):
        console.print(_table(data, slice(first, first + AT_A_TIME), with_cost=first == 0))
    for name, count in data["left_out"].items():
        console.print(f"{name}: {count} images do not decode and are left out", highlight=False)
    for size in data["sizes"]:
        if size["promise"]:
            console.print(f"{size['name']}: {size['promise']}", highlight=False, soft_wrap=True)
        if size["not_zero_shot"]:
            console.print(f"{size['name']}: {warning(size['not_zero_shot'])}", highlight=False)
        if found := size["compatibility"]:
            console.print(f"{size['name']}, {in_words(found)}", highlight=False, soft_wrap=True)
        for entry in size["files"]:
            if not entry["verified"]:
                console.print(f"{size['name']}, {entry['file']}: {entry['status']}", highlight=False)
            for batch, times in entry["latency"].items():
                if "original" in times:
                    before, after = times["original"]["median"], times["pruned"]["median"]
                    console.print(
                        f"{size['name']}, {entry['file']}, batch {batch}: {before:.1f} → {after:.1f} ms "
                        f"({before / after:.2f} ×, {size['threads']} threads)"
                    )


def _table(data: dict[str, Any], shown: slice, with_cost: bool) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("size", no_wrap=True)
    table.add_column("stage", no_wrap=True)
    costs = ("M params", "GFLOPs") if with_cost else ()
    for heading in (*costs, *(f"{column['dataset']}\n{column['metric']}" for column in data["columns"][shown])):
        table.add_column(heading, justify="right")
    table.add_row(
        "original",
        "",
        *_cost(data["original"]["cost"])[: len(costs)],
        *map(percent, data["original"]["metrics"][shown]),
    )
    for size in data["sizes"]:
        rows = size["rows"] or [{"label": "pruned", "metrics": []}]
        for i, row in enumerate(rows):
            cost = _cost(size["cost"])[: len(costs)] if i == 0 else [""] * len(costs)
            table.add_row(size["name"] if i == 0 else "", row["label"], *cost, *map(percent, row["metrics"][shown]))
    return table


def write_html(data: dict[str, Any], path: Path, template: str = "report.html.j2") -> Path:
    """Write a page from a template; it appears whole or not at all."""
    loader = jinja2.PackageLoader("dgmr_tp.pipeline", "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        percent=percent,
        curve=curve,
        warning=warning,
        million=lambda n: f"{n / 1e6:.2f} M",
        giga=lambda n: f"{n / 1e9:.3f} G",
        spread=lambda t: f"{t['median']:.1f} ({t['low']:.1f}–{t['high']:.1f})",
        basename=lambda name: Path(name).name,
    )
    write_whole(path, environment.get_template(template).render(data))
    return path


def _files(exported: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per exported file, from the figures of an export."""
    rows = []
    for tower, entries in exported.get("towers", {}).items():
        for name, entry in entries["files"].items():
            rows.append(
                {
                    "tower": tower,
                    "format": name,
                    "file": entry["file"],
                    "megabytes": entry["megabytes"],
                    "status": entry["status"],
                    "verified": entry["status"] == "verified",
                    "errors": {
                        output: _extreme(values, max) for output, values in entry.get("relative_error", {}).items()
                    },
                    "cosines": {output: _extreme(values, min) for output, values in entry.get("cosine", {}).items()},
                    "memory": entry.get("peak_memory_mb"),
                    "latency": entry.get("latency_ms", {}),
                }
            )
    return rows


def _extreme(by_batch: dict[str, float | None], pick: Callable[[Iterable[float]], float]) -> float | None:
    """Over the batch sizes; None if one of them gave no number."""
    values = list(by_batch.values())
    return None if None in values else pick(value for value in values if value is not None)


def promise_in_words(size: str, found: dict[str, Any]) -> str:
    """What a size that was found by what it keeps does keep."""
    what, side = ("mean cosine", "at least") if size.startswith("min_cosine") else ("k-NN accuracy lost", "at most")
    tried = f"the smallest of {len(found['trials'])} sizes tried that keeps the promise"
    return f"recovered, {what} {found['value']:.4f} on images held out, {side} {found['bound']:.4f} (95 %); {tried}"


def in_words(found: dict[str, Any]) -> str:
    """A compatibility in one line."""
    agreement = "" if found["agreement"] is None else f", decisions {percent(found['agreement'])} %"
    recall = percent(min(way["recall@10"] for name, way in found["ways"].items() if name != "new queries, new index"))
    return f"{found['verdict']}: neighbours {recall} %{agreement}"


def warning(datasets: list[str]) -> str:
    """What to think of the tuned text tower's figures on data of the kind that it was tuned on."""
    return f"the text tower was tuned on captions of this kind: tuned is not zero-shot on {', '.join(datasets)}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def curve(points: list[tuple[int, float]], width: int, height: int, logarithmic: bool = True) -> str:
    """The points of an SVG polyline: steps from left to right."""
    logs = [math.log10(max(value, 1e-12)) if logarithmic else value for _, value in points]
    low, high, last = min(logs), max(logs), points[-1][0]
    scale = (height - 1) / ((high - low) or 1)
    return " ".join(
        f"{width * step / last:.1f},{height - (value - low) * scale:.1f}"
        for (step, _), value in zip(points, logs, strict=True)
    )


def _cost(cost: dict[str, int] | None) -> tuple[str, str]:
    return (f"{cost['parameters'] / 1e6:.2f}", f"{cost['flops'] / 1e9:.3f}") if cost else ("–", "–")
