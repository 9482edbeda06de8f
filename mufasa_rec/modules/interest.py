"""The sparse interest extractor: MUFASA's alignment layer (SAL) over long histories.

Each pre-norm layer reads the past through three branches, those of Native Sparse Attention (arXiv 2502.11089): the
newest events one by one (*window*), a token for each complete block (*block*), and the events of the blocks whose
tokens suit the query best (*selected*). A sigmoid gate per branch and head adds them up. Time and memory grow with the
events times the window and the selected blocks, where full attention grows with their square.

MUFASA (arXiv 2508.09664) has no public code; this follows its abstract and secondary summaries. The gates, the pooling
of blocks and the block mixer are ours; see `docs/attention.md`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mufasa_rec.modules.block_tokens import Turn
from mufasa_rec.modules.event_embedding import EventEmbedding
from mufasa_rec.modules.history import Candidates, History, InterestExtractor
from mufasa_rec.modules.segmentation import borders_of
from mufasa_rec.modules.sparse_layer import SharedByLayers, SparseAttentionConfig, SparseLayer, reads_tokens
from mufasa_rec.ops.attention import rotation
from mufasa_rec.ops.jagged import last_index, lengths_of, plan_groups, positions, sequence_ids
from mufasa_rec.ops.sparse_attention.api import Backend
from mufasa_rec.ops.sparse_attention.layout import plan_layout


class SparseInterestExtractor(InterestExtractor):
    """Sparse causal transformer with the interface of `InterestExtractor`.

    Blocks are counted from a user's first event ever (`History.start_position`): whoever cuts histories should drop
    whole blocks, or the first block that is left is a short one.

    Args:
        config: Size and pattern; thresholds of a segmentation by pauses or content must be found.
        embedding: What an event is made of; its width is the model's.
        max_history: Longest history, events; what `pattern.max_blocks` is resolved for.
        backend: Path of the operator, for tests; None lets the device decide.

    Raises:
        ValueError: When the heads do not divide the width into even parts, `max_history` is not positive, positions
            are `learned`, or a threshold is missing.

    Example:
        >>> from mufasa_rec.modules.event_embedding import EventEmbeddingConfig
        >>> embedding = EventEmbedding(EventEmbeddingConfig(width=8))
        >>> extractor = SparseInterestExtractor(SparseAttentionConfig(), embedding, max_history=40)
        >>> users = torch.tensor([0, 20, 20, 50])  # the second has no history
        >>> history = History(embedded=torch.randn(50, 8), offsets=users, start_position=torch.zeros(3).long())
        >>> items = Candidates(embedded=torch.randn(4, 8), offsets=torch.tensor([0, 1, 3, 4]))
        >>> extractor.encode(history).shape, extractor(history).shape, extractor(history, items).shape
        (torch.Size([50, 8]), torch.Size([3, 8]), torch.Size([4, 8]))
    """

    def __init__(
        self,
        config: SparseAttentionConfig,
        embedding: EventEmbedding,
        max_history: int,
        *,
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
        width = embedding.config.width
        if width % config.num_heads or width // config.num_heads % 2:
            raise ValueError(f"num_heads={config.num_heads}: must divide the model width {width} into even parts.")
        if config.positions == "learned":
            raise ValueError(
                "positions='learned': sparse attention has no bias by distance; choose 'rotary' or 'none', or full "
                "attention."
            )
        self.pattern = config.pattern.resolve(max_history)
        config.borders.check(self.pattern)
        self.config, self.embedding, self.output_dim = config, embedding, width
        self.head_width = width // config.num_heads
        self.layers = nn.ModuleList(SparseLayer(config, width, self.pattern, backend) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(width)
        self.empty = nn.Parameter(torch.randn(width) * width**-0.5)

    def encode(self, history: History) -> Tensor:
        """Return one causal state per event, `[L, E]`; see `InterestExtractor.encode`.

        Raises:
            ValueError: When the history lacks what the extractor was built with.
        """
        x, batch = self._start(history)
        for layer in self._layers():
            if self.config.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, batch, use_reentrant=False)
            else:
                x = layer(x, batch)
        return self.norm(x) + self.empty[:0].sum()  # keeps the parameter in the graph

    def forward(self, history: History, candidates: Candidates | None = None) -> Tensor:
        """Return one vector per user `[B, E]`, or per candidate `[C, E]`; see `InterestExtractor.forward`.

        Raises:
            ValueError: As `encode`, and when the candidates do not fit the histories.
        """
        if candidates is not None:
            return self._score(history, candidates)
        states = self.encode(history)
        if not len(states):
            return self.empty.expand(history.offsets.numel() - 1, -1) + states.sum()
        missing = (lengths_of(history.offsets) == 0)[:, None]
        return torch.where(missing, self.empty, states[last_index(history.offsets)])

    def _score(self, history: History, candidates: Candidates) -> Tensor:
        """Run the candidates beside the events; the last layer's events are only read as keys and values."""
        x, batch = self._start(history)
        c = self.embedding.embed_candidates(history, candidates)
        owner = sequence_ids(candidates.offsets, len(c))
        after = self._turn((history.start_position + lengths_of(history.offsets))[owner])
        for index, layer in enumerate(self._layers()):
            read = layer.project(x, batch)
            c = layer.read(c, after, read, owner, batch)
            if index + 1 < len(self.layers):
                x = layer.attend(x, read, batch)
        return self.norm(c) + self.empty[:0].sum()

    def _start(self, history: History) -> tuple[Tensor, SharedByLayers]:
        """Embed the events, find their blocks, and turn their positions into angles."""
        x = self.embedding(history)
        self.num_places = len(x)
        borders = borders_of(history, self.pattern, self.config.borders)
        layout = plan_layout(history.offsets, self.pattern, start_position=history.start_position, borders=borders)
        owner = sequence_ids(history.offsets, len(x))
        turn = self._turn(positions(history.offsets, len(x)) + history.start_position[owner])
        if not (self.pattern.block_mixer and reads_tokens(self.pattern)):
            return x, SharedByLayers(layout, turn)
        first = layout.tokens.begin.to(x.device)
        token_turn = None if turn is None else (turn[0][first], turn[1][first])
        return x, SharedByLayers(layout, turn, plan_groups(layout.tokens.offsets, len(first)).to(x.device), token_turn)

    def _turn(self, place: Tensor) -> Turn | None:
        return rotation(place, self.head_width) if self.config.positions == "rotary" else None

    def _layers(self) -> Iterator[SparseLayer]:
        for layer in self.layers:
            assert isinstance(layer, SparseLayer)
            yield layer
