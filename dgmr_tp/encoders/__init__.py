"""Open encoders by name or directory, and save them so that their own library opens them again."""

from dgmr_tp.encoders.model import OpenedModel, adapt, is_library_name, load_pruned, open_model, wrap_tower

__all__ = ["OpenedModel", "adapt", "is_library_name", "load_pruned", "open_model", "wrap_tower"]
