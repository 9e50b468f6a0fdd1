"""Export of the towers to ONNX, TorchScript and torch.export, each file proved against PyTorch in a process of its own."""

from dgmr_tp.export.bundle import export_bundle, failures
from dgmr_tp.export.formats import FORMATS, open_exported
from dgmr_tp.export.parts import Part, parts_of, text_part, vision_part

__all__ = ["FORMATS", "Part", "export_bundle", "failures", "open_exported", "parts_of", "text_part", "vision_part"]
