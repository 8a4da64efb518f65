"""The model, cut anywhere: embed, run any layers, logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from split_model.attend import reads_alike
from split_model.attention import Geometry, Span, Tiles
from split_model.cache import Cache
from split_model.check import is_exact, numerics
from split_model.config import ModelConfig
from split_model.integers import shared_table
from split_model.layers import Layer, beside_negative, read_layer, rms_norm
from split_model.layout import EMBEDDING, HEAD, NORM
from split_model.linear import Linear, linear
from split_model.quantised import DTYPES, Matrix, lookup
from split_model.settings import Precision
from split_model.sparse import BUDGET, Budget
from split_model.weights import Checkpoint


class Model:
    """Layers `[first, stop)` of a decoder, with its embedding and head where asked for.

    `exact`: the self-check at load found that a row's bits do not depend on the batch or the chunking; False where it
    was left out. `weights_digest` (16 bytes) is the same whatever part is held; equal `numerics` (16 bytes) on two
    machines mean that the same inputs give the same bits.
    """

    def __init__(self, config: ModelConfig, first: int, layers: Sequence[Layer], embedding: Matrix | None,
                 norm: Tensor | None, head: Linear | None, precision: Precision, weights_digest: bytes,
                 budget: Budget = BUDGET):  # fmt: skip
        self.config, self.precision, self.weights_digest = config, precision, weights_digest
        self.dtype = DTYPES[precision]
        self.first, self.stop = first, first + len(layers)
        self._layers = tuple(layers)
        self._embedding, self._head = embedding, head
        self._norm = None if norm is None else rms_norm(norm, config.norm_eps)
        self._geometry = Geometry(config, self.dtype, budget)
        with torch.inference_mode():
            self._geometry.in_place = reads_alike(self._geometry)
        self.numerics = numerics(precision)
        self.exact = False

    @classmethod
    def load(cls, folder: Path, first: int = 0, stop: int | None = None, *, embedding: bool = True, head: bool = True,
             precision: Precision | None = None, check: bool = True, budget: Budget = BUDGET,
             own_head: bool = False, context: int | None = None) -> Model:  # fmt: skip
        """Reads only what is asked for; `precision`: else as it is stored, or bf16; `context`: positions at most.

        `own_head`: a tied head of integers may be a copy beside the embedding, where several rows are sooner so.
        Raises ModelError for a bad checkpoint, ValueError for bad layers.
        """
        config = ModelConfig.read(folder)
        stop = config.layers if stop is None else stop
        if not 0 <= first <= stop <= config.layers:
            raise ValueError(f"layers [{first}, {stop}) of a model with {config.layers}")
        checkpoint, precision = Checkpoint(folder), precision or config.stored or Precision.BF16
        checkpoint.check(config, first, stop, embedding=embedding, head=head)
        shape = (config.vocabulary, config.width)
        table = norm = rows = None
        with torch.inference_mode():
            if embedding or (head and config.tied):
                table = checkpoint.matrix(EMBEDDING, shape, precision)
            if head:
                norm = checkpoint.tensor(NORM, (config.width,), DTYPES[precision])
                rows = table if config.tied else checkpoint.matrix(HEAD, shape, precision)
            if table is rows and table is not None:
                table = rows = shared_table(table)
            layers = [read_layer(checkpoint, config, index, precision) for index in range(first, stop)]
            product = None if rows is None else linear(rows, shared=rows is table and embedding and not own_head)
            digest = checkpoint.digest(config.arithmetic)
        config = replace(config, context=min(config.context, context or config.context))
        model = cls(config, first, layers, table if embedding else None, norm, product, precision, digest, budget)
        model.exact = check and is_exact(model)
        return model

    @property
    def has_head(self) -> bool:
        return self._head is not None

    def new_cache(self, slots: int, context: int | None = None) -> Cache:
        """KV memory for the layers held."""
        return Cache(self.config, slots, self.first, self.stop, self.dtype, context, self._geometry.budget)

    @torch.inference_mode()
    def tiles(self, spans: Sequence[Span]) -> Tiles:
        """Raises ValueError for positions outside the context."""
        return Tiles.cut(spans, self._geometry)

    @torch.inference_mode()
    def embed(self, tokens: Tensor) -> Tensor:
        """int64 `[n]` to `[n, width]`. Raises ValueError when the embedding is not held."""
        if self._embedding is None:
            raise ValueError("this part of the model holds no embedding")
        return lookup(self._embedding, tokens, self.dtype)

    @torch.inference_mode()
    def run(self, x: Tensor, start: int, stop: int, cache: Cache, tiles: Tiles) -> Tensor:
        """`[n, width]`, the first `n` rows of `tiles`, through layers `[start, stop)`, keys and values into `cache`."""
        if not self.first <= start <= stop <= self.stop:
            raise ValueError(f"layers [{start}, {stop}), held are [{self.first}, {self.stop})")
        if start == stop:
            return x
        assert cache.first <= start
        tiles = tiles.head(len(x))
        bound = cache.bind(tiles)
        both = beside_negative(x)
        for index in range(start, stop):
            both = self._layers[index - self.first](both, tiles, bound, index - cache.first)
        return both[:, : x.shape[1]].contiguous()

    @torch.inference_mode()
    def logits(self, x: Tensor) -> Tensor:
        """`[n, width]` to float32 `[n, vocabulary]`: final norm and head."""
        if self._norm is None or self._head is None:
            raise ValueError("this part of the model holds no head")
        return self._head(self._norm(x)).float()
