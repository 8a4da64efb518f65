"""Queries of one step against the KV memory of a layer."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from split_model.attention import Geometry, Tiles, reach
from split_model.cache import Bound
from split_model.native import HEADS, Reading, library, turn, uneven


def turned(mixed: Tensor, tiles: Tiles, bound: Bound, index: int) -> Tensor:
    """Queries `[n, heads, head_dim]` of what `[n, (heads + 2 * kv_heads) * head_dim]` holds beside keys and values, all
    turned to their positions; keys and values go into the memory of layer `index`. May write into `mixed`."""
    shape = tiles.geometry
    if shape.in_place and mixed.dtype == shape.dtype:
        width = shape.heads * shape.head_dim
        turn(mixed, tiles.turns, bound.rows, bound.flat[index], width)
        return mixed[:, :width].view(len(mixed), -1, shape.head_dim)
    pairs = mixed.float().view(len(mixed), -1, 2)
    torch.view_as_complex(pairs).mul_(tiles.turns)
    mixed = pairs.to(shape.dtype).view(len(mixed), -1, shape.head_dim)
    bound.write(index, mixed[:, shape.heads :])
    return mixed[:, : shape.heads]


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
        keys, values, sees = read(index, rows)
        if isinstance(sees, Tensor):
            mixed = _in_pieces(rows, keys, values, sees, shape)
        else:
            mixed = sees(rows.contiguous(), keys, values)
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


def reads_alike(shape: Geometry) -> bool:
    """Whether native.Reading gives the bits of torch's products on this machine, for queries of such heads."""
    if library() is None or shape.dtype != torch.bfloat16 or shape.head_dim not in HEADS:
        return False
    return _alike(shape.kv_heads, shape.group, shape.head_dim, shape.fold, shape.keys, reach(shape.context - 1))


@cache
def _alike(heads: int, group: int, head_dim: int, fold: int, most: int, context: int) -> bool:
    """By sums that cancel, see native.uneven."""
    if not _turn_alike(head_dim):
        return False
    for length in (128, 640, 1024, 1536, most + 128):
        for rows in (fold * group, 4 * fold * group):
            half = uneven(heads, length, head_dim // 2)
            keys = torch.cat([half, -half], 2)
            values = torch.cat([(one := half.view(heads, -1, head_dim)), -one], 1)
            queries = keys[:, torch.arange(rows) % length].abs()
            none, every = torch.zeros(1, dtype=torch.int64), torch.tensor([length])
            own = Reading(none, none, every, keys.unsqueeze(0), rows, most)
            if not torch.equal(own.scores(queries, keys), torch.bmm(queries, keys.transpose(1, 2))):
                return False
            alike, mask = torch.zeros_like(queries), torch.zeros(1, 1, 1, dtype=keys.dtype)
            if not torch.equal(own(alike, keys, values), _mixed(alike, mask, keys, values, most)):
                return False
        if length >= context:
            break
    return True


def _turn_alike(head_dim: int) -> bool:
    """By products that cancel: one that was fused with the sum would leave what the other's rounding took."""
    part = torch.arange(6.0 * head_dim).mul_(12.9898).sin_().view(4, -1).bfloat16()
    signs = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=part.dtype).view(4, 1)
    mixed, angles = torch.stack([part, part * signs], 2).flatten(1), part.flip(1).float().exp()
    turns, memory = torch.complex(angles, angles), torch.zeros(8, head_dim, dtype=part.dtype)
    pairs = torch.view_as_complex(mixed.float().view(4, -1, 2)) * turns
    turn(mixed, turns, torch.arange(8), memory, head_dim)
    found = torch.cat([mixed[:, :head_dim], memory.view(4, -1)], 1)
    return torch.equal(found, torch.view_as_real(pairs).flatten(1).bfloat16())


def _weights(scores: Tensor, mask: Tensor) -> Tensor:
    hidden = mask.shape[2]
    scores.narrow(2, scores.shape[2] - hidden, hidden).add_(mask)
    return scores.softmax(-1)
