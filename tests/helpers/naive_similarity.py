"""DMAE as it is written down: one candidate, one event, one modality, one head at a time, in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mufasa_rec.modules.history import Candidates, History
from mufasa_rec.modules.similarity_encoding import ContentEncoding, SimilarityEncoding, TimeEncoding
from mufasa_rec.modules.similarity_fusion import InterestFusion, _Attention, _Gate
from mufasa_rec.modules.similarity_interest import SimilarityInterestExtractor


class Naive(NamedTuple):
    vectors: Tensor
    loss_sum: Tensor
    num_histograms: int


def naive_similarity_interest(model: SimilarityInterestExtractor, history: History, candidates: Candidates) -> Naive:
    """What `SimilarityInterestExtractor.restored` must give."""
    vectors, losses = [], []
    for user in range(history.offsets.numel() - 1):
        events = range(int(history.offsets[user]), int(history.offsets[user + 1]))
        for candidate in range(int(candidates.offsets[user]), int(candidates.offsets[user + 1])):
            if not len(events):
                vectors.append(model.empty)
                continue
            vector, more = _of_candidate(model, history, candidates, list(events), candidate)
            vectors.append(vector)
            losses += more
    loss = torch.stack(losses).sum() if losses else torch.zeros(())
    return Naive(torch.stack(vectors), loss, len(losses))


def _of_candidate(
    model: SimilarityInterestExtractor, history: History, candidates: Candidates, events: list[int], candidate: int
) -> tuple[Tensor, list[Tensor]]:
    config, names = model.config, list(model.modalities)

    def r_of(name: str, event: int) -> Tensor | None:
        if not (history.present[name][event] and candidates.present[name][candidate]):
            return None
        return (F.cosine_similarity(history.content[name][event], candidates.content[name][candidate], dim=0) + 1) / 2

    def mean_r(event: int) -> float:
        known = [r for r in (r_of(name, event) for name in names) if r is not None]
        return sum(float(r.detach()) for r in known) / len(known) if known else 0.0

    if config.selection == "newest":
        events = events[-config.max_events :]
    else:
        events = sorted(sorted(events, key=lambda event: (-mean_r(event), -event))[: config.max_events])
    r = [[r_of(name, event) for event in events] for name in names]
    encoded = []
    for m, name in enumerate(names):
        row = []
        for j, event in enumerate(events):
            bucket = None
            if config.num_time_buckets:
                assert history.timestamps_ms is not None
                assert candidates.request_time_ms is not None
                gap = max(int(candidates.request_time_ms[candidate] - history.timestamps_ms[event]), 0) / 1000
                bucket = min(math.floor(math.log2(1 + gap)), config.num_time_buckets - 1)
            if isinstance(model.encoding, SimilarityEncoding):
                row.append(_encode(model.encoding, m, r[m][j], bucket))
            else:
                own = history.content[name][event] if history.present[name][event] else None
                target = candidates.content[name][candidate] if candidates.present[name][candidate] else None
                row.append(_encode_content(model.encoding, m, own, target, bucket))
        encoded.append(row)
    target = candidates.embedded[candidate]
    if isinstance(model.fusion, InterestFusion):
        u, per_modality = _fuse(model.fusion, encoded, r, target)
    else:
        per_modality = [torch.stack(row).mean(0) for row in encoded]
        u = torch.stack(per_modality).mean(0)
    return torch.cat([u, *per_modality]), _losses(model, u, r)


def _encode(unit: SimilarityEncoding, m: int, r: Tensor | None, bucket: int | None) -> Tensor:
    if r is None:
        return unit.null[m] @ unit.project[m] + _time(unit.time, m, bucket)
    r_hat = unit.scale[m] * r + unit.shift[m]
    k = min(max(math.floor(float(r_hat.detach()) * unit.num_buckets), 0), unit.num_buckets - 1)
    return (r_hat * unit.buckets[m, k]) @ unit.project[m] + _time(unit.time, m, bucket)


def _encode_content(
    unit: ContentEncoding, m: int, event: Tensor | None, target: Tensor | None, bucket: int | None
) -> Tensor:
    of_event, of_target = (modules[m] for modules in (unit.of_event, unit.of_target))
    found = unit.null[m] if event is None else of_event(F.normalize(event, dim=0))
    if target is not None:
        found = found + of_target(F.normalize(target, dim=0))
    return found + _time(unit.time, m, bucket)


def _time(unit: TimeEncoding, m: int, bucket: int | None) -> Tensor:
    if bucket is None or unit.table is None or unit.project is None:
        return unit.bias[m]
    return unit.table.weight[bucket] @ unit.project[m] + unit.bias[m]


def _fuse(
    unit: InterestFusion, s: list[list[Tensor]], r: list[list[Tensor | None]], target: Tensor
) -> tuple[Tensor, list[Tensor]]:
    count, places = len(s), range(len(s[0]))
    if unit.cross is not None:
        others = [[x for k in range(count) if k != m for x in s[k]] for m in range(count)]
        s = [[s[m][j] + _attend(unit.cross, s[m][j], others[m]) for j in places] for m in range(count)]
    s = [[s[m][j] + _attend(unit.self_attention, s[m][j], s[m]) for j in places] for m in range(count)]
    x = [[unit.norm(y + unit.ffn(unit.ffn_norm(y))) for y in row] for row in s]
    fused = []
    for j in places:
        here = [x[m][j] for m in range(count)]
        if unit.gate is None:
            fused.append(here[0])
            continue
        weights = _gate(unit.gate, here, [r[m][j] is not None for m in range(count)], target)
        fused.append(sum((w * y for w, y in zip(weights, here, strict=True)), torch.zeros_like(here[0])))
    query = unit.query(target)
    return _pool(query, fused), [_pool(query, row) for row in x]


def _attend(unit: _Attention, x: Tensor, keys: list[Tensor]) -> Tensor:
    width = len(x)
    size = width // unit.num_heads
    q = unit.qkv(unit.norm(x))[:width]
    kv = [unit.qkv(unit.norm(key)) for key in keys]
    heads = []
    for head in range(unit.num_heads):
        part = slice(head * size, (head + 1) * size)
        logits = torch.stack([q[part] @ y[width : 2 * width][part] for y in kv]) / math.sqrt(size)
        values = torch.stack([y[2 * width :][part] for y in kv])
        heads.append(logits.softmax(0) @ values)
    return unit.out(torch.cat(heads))


def _gate(unit: _Gate, x: list[Tensor], has: list[bool], target: Tensor) -> list[Tensor]:
    if len(x) == 2:
        if has[0] != has[1]:
            return [torch.ones(()) * has[0], torch.ones(()) * has[1]]
        g = torch.sigmoid(unit.events(torch.cat([x[0], x[1], x[0] * x[1]])) + unit.target(target))[0]
        return [g, 1 - g]
    logits = unit.events(torch.cat(x)) + unit.target(target)
    known = [m for m in range(len(x)) if has[m]] or list(range(len(x)))
    shares = logits[known].softmax(0)
    return [shares[known.index(m)] if m in known else torch.zeros(()) for m in range(len(x))]


def _pool(query: Tensor, x: list[Tensor]) -> Tensor:
    rows = torch.stack(x)
    return (rows @ query / math.sqrt(len(query))).softmax(0) @ rows


def _losses(model: SimilarityInterestExtractor, u: Tensor, r: list[list[Tensor | None]]) -> list[Tensor]:
    """Divergence of every histogram that is not empty."""
    unit = model.decoder
    if unit is None:
        return []
    hidden, bins, losses = F.gelu(unit.into(u)), unit.num_bins, []
    for m, row in enumerate(r):
        known = [_bin(x, bins) for x in row if x is not None]
        logits = unit.out(hidden)[m * bins : (m + 1) * bins]
        losses += _divergence(known, logits)
    if unit.joint is not None:
        assert isinstance(unit.out_joint, nn.Linear)
        first, second = (r[place] for place in unit.joint)
        both = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
        losses += _divergence([_bin(a, bins) * bins + _bin(b, bins) for a, b in both], unit.out_joint(hidden))
    return losses


def _bin(r: Tensor, bins: int) -> int:
    return min(max(math.floor(float(r.detach()) * bins), 0), bins - 1)


def _divergence(values: list[int], logits: Tensor) -> list[Tensor]:
    if not values:
        return []
    log_q, total = logits.log_softmax(0), torch.zeros((), dtype=logits.dtype)
    for value in set(values):
        share = values.count(value) / len(values)
        total = total + share * (math.log(share) - log_q[value])
    return [total]
