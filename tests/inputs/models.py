"""Names, files and directories that are given as a model."""

from __future__ import annotations

from inputs import Case

CASES = [
    Case("unknown model name", "inspect open_clip:ViT-Z-99", says="unknown model open_clip:ViT-Z-99"),
]
