"""Industrial-scale embedding training on TorchRec: multimodal item vectors, long histories, honest evaluation."""
