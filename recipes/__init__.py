"""The recipes that ship with the package, one YAML per system."""
