"""Export of a vision tower to ONNX and TorchScript, each verified against PyTorch, with latency beside the original."""

from dgmr_tp.export.bundle import FORMATS, export_bundle, open_exported

__all__ = ["FORMATS", "export_bundle", "open_exported"]
