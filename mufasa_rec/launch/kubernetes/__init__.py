"""Manifests of jobs on Kubernetes: made from a TorchX app, changed by a pod overlay, checked before they are sent."""
