"""Commands for a single model: export it, list its MLPs, and update the path in its config.

The library is imported inside the commands, so that ``--help`` does not load torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from dgmr_tp.cli.common import (
    MODEL_HELP,
    PretrainedOption,
    merge_distinct,
    names_in,
    numbers_by_name,
    out,
    path_argument,
    path_option,
    print_skipped,
)
from dgmr_tp.errors import DgmrError
from dgmr_tp.export.formats import FORMATS, LAYOUTS, OUTPUTS
from dgmr_tp.utils.files import check_output_directory, scratch_directory

if TYPE_CHECKING:
    from torch import Tensor

    from dgmr_tp.encoders import OpenedModel

app = typer.Typer()


def _summaries(summaries: dict[str, str]) -> str:
    return "; ".join(f"{name}: {summary}" for name, summary in summaries.items())


FORMATS_HELP = _summaries({name: file_format.summary for name, file_format in FORMATS.items()})
LAYOUTS_HELP = _summaries({name: layout.summary for name, layout in LAYOUTS.items()})


@app.command()
def export(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    out_dir: Annotated[Path, path_option("--out", "-o", help="Output directory.", kind="directory")],
    pretrained: PretrainedOption = None,
    dense: Annotated[
        str | None, typer.Option(help="The unpruned model. Its files are timed in turn with the new ones.")
    ] = None,
    dense_pretrained: Annotated[str | None, typer.Option(help="Weights of the unpruned model, for a NAME.")] = None,
    formats: Annotated[str, typer.Option(help=f"Comma-separated file formats. {FORMATS_HELP}.")] = "onnx,torchscript",
    outputs: Annotated[
        str, typer.Option(help=f"Comma-separated outputs of the image tower: {', '.join(OUTPUTS)}.")
    ] = "embedding",
    normalized: Annotated[
        bool, typer.Option("--normalized", help="Normalize the embeddings to length 1 inside the files.")
    ] = False,
    text: Annotated[bool, typer.Option("--text", help="Export the text tower of a CLIP too.")] = False,
    layout: Annotated[str, typer.Option(help=f"Names, folders and side files. {LAYOUTS_HELP}.")] = "plain",
    images: Annotated[str | None, typer.Option(help="Images for the verification [default: generated scenes].")] = None,
    tolerance: Annotated[
        list[str] | None,
        typer.Option(help="Largest allowed relative error of a format, such as onnx-int8=0.3. May be repeated."),
    ] = None,
) -> None:
    """Export a model's towers. Every file is verified against PyTorch in its own process, and timed."""
    from dgmr_tp.encoders import open_model
    from dgmr_tp.export.bundle import failures
    from dgmr_tp.export.layouts import export_model, recorded_source

    names = names_in("--formats", formats, FORMATS)
    output_names = names_in("--outputs", outputs, OUTPUTS)
    tolerances = merge_distinct(
        "--tolerance", [numbers_by_name("--tolerance", entry, "onnx-int8=0.3") for entry in tolerance or []]
    )
    if low := [entry for entry in tolerances.items() if entry[1] <= 0]:
        raise DgmrError(
            f"--tolerance {low[0][0]}={low[0][1]:g} is not above 0. Give the largest allowed relative error."
        )
    check_output_directory(out_dir)
    opened = open_model(model, pretrained)
    examples = _example_images(opened, images)
    options: dict[str, Any] = {
        "outputs": tuple(output_names),
        "normalized": normalized,
        "layout": layout,
        "formats": names,
        "tolerance": tolerances,
    }
    with scratch_directory(out_dir / "dense", "export is writing") as scratch:
        dense_dir = None
        if dense:
            dense_dir, dense_model = scratch, open_model(dense, dense_pretrained)
            if dense_model.image_size != opened.image_size:
                raise DgmrError(
                    f"{dense} takes images of {dense_model.image_size} pixels (height, width), and {model} of "
                    f"{opened.image_size}. Give the model that was pruned as --dense."
                )
            export_model(dense_model, examples, dense_dir, source=dense, latency_batches=(), **options)
        source = recorded_source(model, opened, out_dir)
        bundle = export_model(opened, examples, out_dir, source=source, text=text, dense=dense_dir, **options)
    for name in names:
        if notice := FORMATS[name].notice:
            out.print(f"{name}: {notice}")
    for note in bundle["notes"]:
        out.print(note)
    for tower in bundle["towers"].values():
        for entry in tower["files"].values():
            _print_file(out_dir, entry)
    if failed := failures(bundle):
        raise DgmrError("; ".join(f"{out_dir / file}: {status}" for file, status in failed.items()))


@app.command()
def inspect(model: Annotated[str, typer.Argument(help=MODEL_HELP)]) -> None:
    """List the MLPs of a vision tower with their widths, and its parameters and FLOPs. Reads no weights."""
    from dgmr_tp.encoders import open_model
    from dgmr_tp.pruning import find_sites
    from dgmr_tp.pruning.cost import flops, parameters

    opened = open_model(model, weights="none")
    tower = opened.tower
    table = Table("site", "width", "hidden", "share of parameters", box=None)
    total = parameters(tower)
    for site in find_sites(tower):
        share = parameters(tower.get_submodule(site.name)) / total
        table.add_row(site.name, str(site.width), str(site.hidden), f"{share:.1%}")
    out.print(table)
    gflops = flops(tower, opened.image_size) / 1e9
    out.print(f"{opened.name}: {total / 1e6:.2f} M parameters, {gflops:.2f} GFLOPs per image")


@app.command()
def relocate(
    directory: Annotated[Path, path_argument(help="A model directory that was moved.", kind="directory")],
) -> None:
    """Write a model directory's new path into its config. Only open_clip models with a pruned timm trunk need it."""
    from dgmr_tp.utils.lazy_imports import require

    changed = require("dgmr_tp.encoders.open_clip_models", "encoders").relocate(directory)
    out.print(f"{directory}: {'updated the path in its config' if changed else 'its config has no path to update'}")


def _example_images(model: OpenedModel, images: str | None) -> Tensor:
    """Return preprocessed images for the verification, ``[n, 3, size, size]``: the user's, or generated scenes."""
    import torch

    from dgmr_tp.export.verify import NUM_EXAMPLES

    if images is not None:
        from dgmr_tp.data.streams import find_images

        source = find_images(images)
        examples = torch.cat(list(source.sample(NUM_EXAMPLES, 0, model.preprocess)))
        print_skipped(source.broken, source.others)
        return examples
    from PIL import Image

    from dgmr_tp.data.scenes import Scene

    scenes = [Image.fromarray(Scene.draw(0, i).image()) for i in range(NUM_EXAMPLES)]
    return torch.stack([model.preprocess(scene) for scene in scenes])


def _print_file(directory: Path, entry: dict[str, Any]) -> None:
    """Print the status, size, errors and latency of one exported file."""
    out.print(f"{directory / entry['file']}: {entry['status']}, {entry['megabytes']:.1f} MB")
    if entry["status"] != "verified":
        return
    error = max(value for by_batch in entry["relative_error"].values() for value in by_batch.values())
    cosine = min(value for by_batch in entry["cosine"].values() for value in by_batch.values())
    out.print(f"  relative error {error:.0e}, cosine {cosine:.6f}, {entry['peak_memory_mb']:.0f} MB of memory")
    for batch, times in entry["latency_ms"].items():
        dense = f"dense {times['dense']['median']:.1f} ms, " if "dense" in times else ""
        out.print(f"  batch {batch}: {dense}this {times['pruned']['median']:.1f} ms")
