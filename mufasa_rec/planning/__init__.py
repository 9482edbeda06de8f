"""Plans of a run on a cluster, made without its devices: what fits, where memory and time go."""
