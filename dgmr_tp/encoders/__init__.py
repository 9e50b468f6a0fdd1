"""Opening encoders by name or directory, and saving them so that the library they come from opens them again."""

from dgmr_tp.encoders.model import OpenedModel, adapt, load_pruned, open_model

__all__ = ["OpenedModel", "adapt", "load_pruned", "open_model"]
