"""mufasa_rec: industrial-scale embedding training on TorchRec, with multimodal fusion and long-history interest extraction."""
