"""The report of a run: one table on the terminal and one HTML file that needs no network."""

from __future__ import annotations

import math
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dgmr_tp.extras import require
from dgmr_tp.files import write_whole

LABELS = ("pruned", "recovered", "distilled", "tuned", "onnx")
TRAININGS = {"distill": "Distillation", "tune_text": "Text tower"}
SHORT = {"acc1": "top-1", "text_retrieval_recall@5": "image→text R@5", "image_retrieval_recall@5": "text→image R@5", "knn@20": "top-1"}


def collect(directory: Path, name: str, figures: dict[str, dict[str, Any] | None], not_zero_shot: Iterable[str] = ()) -> dict[str, Any]:
    """What the report shows, from the figures of the steps (by key, such as ``prune/mlp_ratio-1``; None: not run).

    ``not_zero_shot`` are the data sets of the kind that the text tower was tuned on.
    """
    sizes = [key.split("/")[1] for key in figures if key.startswith("prune/")]
    done = {key: value for key, value in figures.items() if value is not None}
    original = done.get("evaluate/original", {}).get("original", {})
    data: dict[str, Any] = {"name": name, "directory": str(directory), "sizes": []}
    columns = [(dataset, metric) for dataset, metrics in original.items() for metric in SHORT if metric in metrics]
    data["columns"] = [{"dataset": dataset.removeprefix("wds/"), "metric": SHORT[metric]} for dataset, metric in columns]
    pick = lambda metrics: [metrics.get(dataset, {}).get(metric) for dataset, metric in columns]  # noqa: E731
    data["original"] = {"metrics": pick(original), "cost": None}
    for size in sizes:
        cut = done.get(f"prune/{size}", {})
        data["original"]["cost"] = cut.get("original", data["original"]["cost"])
        exported = done.get(f"export/{size}", {})
        measured = {**done.get(f"evaluate/{size}", {}), **({"onnx": exported["onnx_metrics"]} if "onnx_metrics" in exported else {})}
        recovery = {row["site"]: row for row in done.get(f"recover/{size}", {}).get("sites", [])}
        data["sizes"].append(
            {
                "name": size.replace("-", " ", 1),
                "cost": cut.get("pruned"),
                "rows": [{"label": label, "metrics": pick(measured[label])} for label in LABELS if label in measured],
                "sites": [
                    {**row, **{k: v for k, v in recovery.get(row["site"], {}).items() if k.endswith("error") or k == "kept_cut"}}
                    for row in cut.get("sites", [])
                ],
                "trainings": [
                    {"title": title, **{key: done[f"{stage}/{size}"].get(key, []) for key in ("losses", "scores")}}
                    for stage, title in TRAININGS.items()
                    if f"{stage}/{size}" in done
                ],
                "not_zero_shot": [dataset.removeprefix("wds/") for dataset in not_zero_shot] if f"tune_text/{size}" in done else [],
                "files": exported.get("files", {}),
                "threads": exported.get("threads"),
                "skipped": len(done.get(f"recover/{size}", {}).get("broken_images", {})),
            }
        )
    return data


def print_table(data: dict[str, Any], console: Console) -> None:
    """Parameters, FLOPs and accuracy of every stage and size, at most 80 columns wide."""
    table = Table(box=None, pad_edge=False)
    table.add_column("size", no_wrap=True)
    table.add_column("stage", no_wrap=True)
    for heading in ("M params", "GFLOPs", *(f"{column['dataset']}\n{column['metric']}" for column in data["columns"])):
        table.add_column(heading, justify="right")
    table.add_row("original", "", *_cost(data["original"]["cost"]), *map(percent, data["original"]["metrics"]))
    for size in data["sizes"]:
        rows = size["rows"] or [{"label": "pruned", "metrics": []}]
        for i, row in enumerate(rows):
            table.add_row(
                size["name"] if i == 0 else "", row["label"], *(_cost(size["cost"]) if i == 0 else ("", "")), *map(percent, row["metrics"])
            )
    console.print(table)
    for size in data["sizes"]:
        if size["not_zero_shot"]:
            console.print(f"{size['name']}: {warning(size['not_zero_shot'])}", highlight=False)
        for name, entry in size["files"].items():
            for batch, times in entry["latency_ms"].items():
                if "original" in times:
                    console.print(
                        f"{size['name']}, {name}, batch {batch}: {times['original']:.1f} → {times['pruned']:.1f} ms "
                        f"({times['original'] / times['pruned']:.2f} ×, {size['threads']} threads)"
                    )


def write_html(data: dict[str, Any], path: Path) -> Path:
    """Write the report; it appears whole or not at all."""
    jinja2 = require("jinja2", "export")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        percent=percent, curve=curve, warning=warning, million=lambda n: f"{n / 1e6:.2f} M", giga=lambda n: f"{n / 1e9:.3f} G"
    )
    template = environment.from_string(resources.files("dgmr_tp").joinpath("report.html.j2").read_text())
    write_whole(path, template.render(data))
    return path


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
        f"{width * step / last:.1f},{height - (value - low) * scale:.1f}" for (step, _), value in zip(points, logs, strict=True)
    )


def _cost(cost: dict[str, int] | None) -> tuple[str, str]:
    return (f"{cost['parameters'] / 1e6:.2f}", f"{cost['flops'] / 1e9:.3f}") if cost else ("–", "–")
