"""Queries of one step against the KV memory of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from split_model.attention import Geometry, Tiles
from split_model.cache import Bound


def attend(queries: Tensor, tiles: Tiles, bound: Bound, index: int) -> Tensor:
    """`[n, heads, head_dim]`, already scaled, against the memory of layer `index`: `[n, heads * head_dim]`."""
    shape, found, first = tiles.geometry, [], 0
    if tiles.sources is not None:
        queries = queries.index_select(0, tiles.sources)
    for part, read in zip(tiles.parts, bound.readers, strict=True):
        stop = first + len(part.slots) * part.width
        own = queries if len(tiles.parts) == 1 else queries[first:stop]
        if part.width > 1:  # the rows of a key head together; those of one position are already
            own = own.view(-1, part.width, shape.kv_heads, shape.group, shape.head_dim).transpose(1, 2)
        rows = own.reshape(-1, part.width * shape.group, shape.head_dim)
        mixed = _in_pieces(rows, *read(index, rows), shape)
        if part.width > 1:
            mixed = mixed.view(own.shape).transpose(1, 2)
        found.append(mixed.reshape(stop - first, -1))
        first = stop
    whole = found[0] if len(found) == 1 else torch.cat(found)
    return whole if tiles.places is None else whole.index_select(0, tiles.places)


def _in_pieces(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, shape: Geometry) -> Tensor:
    """As many rows at a time as may have scores."""
    most = shape.rows(keys.shape[1])
    if queries.shape[1] <= most or mask.shape[1] == 1:
        return _mixed(queries, mask, keys, values, shape.keys)
    pieces = zip(queries.split(most, 1), mask.split(most, 1), strict=True)
    return torch.cat([_mixed(own, hidden, keys, values, shape.keys) for own, hidden in pieces], 1)


def _mixed(queries: Tensor, mask: Tensor, keys: Tensor, values: Tensor, most: int) -> Tensor:
    """Softmax attention `[batch, rows, head_dim]`, with copies of at most `most` keys at a time."""
    if keys.shape[1] <= most:
        weights = _weights(torch.bmm(queries, keys.transpose(1, 2)), mask)
        return torch.bmm(weights, values)
    scores = [torch.bmm(queries, some.contiguous().transpose(1, 2)) for some in keys.split(most, 1)]
    weights = _weights(torch.cat(scores, 2), mask).split(most, 2)
    total = torch.zeros_like(queries, dtype=torch.float32)
    for own, some in zip(weights, values.split(most, 1), strict=True):
        total += torch.bmm(own.contiguous(), some.contiguous())
    return total.to(queries.dtype)


def _weights(scores: Tensor, mask: Tensor) -> Tensor:
    hidden = mask.shape[2]
    scores.narrow(2, scores.shape[2] - hidden, hidden).add_(mask)
    return scores.softmax(-1)
