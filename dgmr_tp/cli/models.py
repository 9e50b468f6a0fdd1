"""Commands for a single model: its files for deployment, its sites, its place."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from dgmr_tp.cli.common import MODEL_HELP, PretrainedOption, out
from dgmr_tp.errors import DgmrError

app = typer.Typer()


@app.command()
def export(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    out_dir: Annotated[Path, typer.Option("--out", "-o", help="The folder for the files.")],
    pretrained: PretrainedOption = None,
    original: Annotated[str | None, typer.Option(help="The model before pruning, to be timed beside it.")] = None,
    original_pretrained: Annotated[str | None, typer.Option(help="Its weights, for a NAME.")] = None,
    formats: Annotated[
        str, typer.Option(help="By commas: onnx, onnx-fp16, onnx-int8, torchscript, pt2, aotinductor.")
    ] = "onnx,torchscript",
    outputs: Annotated[str, typer.Option(help="By commas: embedding, patches.")] = "embedding",
    normalised: Annotated[
        bool, typer.Option("--normalised", help="Make embeddings of length 1 inside the files.")
    ] = False,
    text: Annotated[bool, typer.Option("--text", help="Export a CLIP's text tower too.")] = False,
    layout: Annotated[str, typer.Option(help="Names and side files: plain, huggingface, immich.")] = "plain",
    images: Annotated[
        str | None, typer.Option(help="Your own images, to prove the files with [default: generated scenes].")
    ] = None,
    tolerance: Annotated[
        list[str] | None,
        typer.Option(help="The relative error that a format may have, such as onnx-int8=0.3; may be repeated."),
    ] = None,
) -> None:
    """Export the towers; every file is proved against PyTorch in a process of its own, and timed beside the original's."""
    import tempfile

    from dgmr_tp.encoders import open_model
    from dgmr_tp.export.bundle import failures
    from dgmr_tp.export.layouts import export_model

    named = [name.strip() for name in formats.split(",")]
    allowed = dict(_tolerance(entry) for entry in tolerance or [])
    opened = open_model(model, pretrained)
    shown = _proof_images(opened, images)
    options: dict[str, Any] = {"outputs": tuple(name.strip() for name in outputs.split(",")), "normalised": normalised}
    options |= {"layout": layout, "formats": named, "tolerance": allowed}
    out_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir, prefix=".original-") as scratch:
        before = None
        if original:
            before, dense = Path(scratch), open_model(original, original_pretrained)
            if dense.image_size != opened.image_size:
                raise DgmrError(
                    f"{original} takes images of {dense.image_size} pixels, {model} of {opened.image_size}; name its own original"
                )
            export_model(dense, shown, before, source=original, latency_batches=(), **options)
        source = os.path.relpath(Path(opened.source).resolve(), out_dir.resolve()) if opened.source else model
        bundle = export_model(opened, shown, out_dir, source=source, text=text, original=before, **options)
    if "torchscript" in named:
        out.print("torchscript: PyTorch has deprecated it; pt2 comes after it")
    for tower in bundle["towers"].values():
        for entry in tower["files"].values():
            _print_file(out_dir, entry)
    if failed := failures(bundle):
        raise DgmrError("; ".join(f"{out_dir / file}: {why}" for file, why in failed.items()))


@app.command()
def inspect(model: Annotated[str, typer.Argument(help=MODEL_HELP)]) -> None:
    """Show the MLP sites of an encoder, its parameters and FLOPs. Reads no weights; any size costs nothing."""
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
    out.print(
        f"{opened.name}: {total / 1e6:.2f} M parameters, {flops(tower, opened.image_size) / 1e9:.2f} GFLOPs an image"
    )


@app.command()
def relocate(directory: Annotated[Path, typer.Argument(help="A model directory that was moved.")]) -> None:
    """Write a model directory's new path into its config, for open_clip models whose timm trunk was pruned."""
    from dgmr_tp.utils.lazy_imports import require

    changed = require("dgmr_tp.encoders.open_clip_models", "encoders").relocate(directory)
    out.print(
        f"{directory}: {'its config names the new path' if changed else 'its config holds no path; nothing to do'}"
    )


def _tolerance(text: str) -> tuple[str, float]:
    try:
        name, value = text.split("=")
        return name, float(value)
    except ValueError:
        raise DgmrError(f"--tolerance {text}: write it as onnx-int8=0.3") from None


def _proof_images(opened, images):  # type: ignore[no-untyped-def]
    """Images to prove an export with, as the model takes them."""
    import torch

    from dgmr_tp.export.verify import EXAMPLES

    if images is not None:
        from dgmr_tp.data.streams import find_images

        return torch.cat(list(find_images(images).sample(EXAMPLES, 0, opened.preprocess)))
    from PIL import Image

    from dgmr_tp.data.scenes import Scene

    return torch.stack([opened.preprocess(Image.fromarray(Scene.draw(0, i).image())) for i in range(EXAMPLES)])


def _print_file(directory, entry) -> None:  # type: ignore[no-untyped-def]
    """Two lines at most: what came out, and how fast it is."""
    out.print(f"{directory / entry['file']}: {entry['verdict']}, {entry['megabytes']:.1f} MB", soft_wrap=True)
    if entry["verdict"] != "verified":
        return
    error = max(value for by_batch in entry["relative_error"].values() for value in by_batch.values())
    cosine = min(value for by_batch in entry["cosine"].values() for value in by_batch.values())
    out.print(f"  relative error {error:.0e}, cosine {cosine:.6f}, {entry['peak_memory_mb']:.0f} MB of memory")
    for batch, times in entry["latency_ms"].items():
        old = f"original {times['original']['median']:.1f} ms, " if "original" in times else ""
        out.print(f"  batch {batch}: {old}this {times['pruned']['median']:.1f} ms")
