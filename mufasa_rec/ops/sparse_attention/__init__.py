"""Three-branch sparse attention over jagged histories: window, block tokens, and selected blocks.

The branches are those of Native Sparse Attention (arXiv 2502.11089). `reference` is the definition; the other paths are
checked against it.
"""
