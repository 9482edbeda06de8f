"""Schedulers of ours for `torchx run`, registered beside those of TorchX by entry points of this package."""
