"""Starting jobs on clusters: what TorchX leaves to its users."""
