"""Models composed from the modules."""
