"""Configuration of an export, as the ``export`` section of a recipe states it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from dgmr_tp.export.formats import FORMATS, LAYOUTS, OUTPUTS
from dgmr_tp.utils.config import Config, NameIn


class ExportConfig(Config):
    """Files for deployment. See :func:`dgmr_tp.export.layouts.export_model`."""

    formats: list[Annotated[str, NameIn(FORMATS)]] = Field(["onnx", "torchscript"], min_length=1)
    """File formats to write."""
    outputs: list[Annotated[str, NameIn(OUTPUTS)]] = Field(["embedding"])
    """Outputs of the image tower's files. ``embedding`` is required."""
    normalized: bool = False
    """Normalize the embeddings to length 1 inside the files."""
    text: bool = False
    """Export a CLIP's text tower too."""
    layout: Annotated[str, NameIn(LAYOUTS)] = "plain"
    """Names, folders and side files."""
    measure: bool = True
    """Evaluate the ONNX files on the data sets too. They run on the CPU, which takes hours for a large tower."""
    tolerance: dict[Annotated[str, NameIn(FORMATS)], Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Largest allowed relative error of an output, by format. Formats that are not listed use their default."""

    @model_validator(mode="after")
    def _check_outputs(self) -> ExportConfig:
        if "embedding" not in self.outputs:
            raise ValueError("outputs lacks embedding. Add it; patches can only be exported together with it.")
        if self.layout == "immich" and "patches" in self.outputs:
            raise ValueError("layout: immich has no patches output. Remove patches from outputs.")
        return self
