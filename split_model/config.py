"""What a checkpoint directory says about its model, in one record."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from split_model.families import family
from split_model.fields import Fields, ModelError, read_object
from split_model.generation import read_generation
from split_model.part import model_name
from split_model.rope import Rope, read_rope
from split_model.settings import Precision, Sampling

__all__ = ["ModelConfig", "ModelError", "read_object"]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder, as data.

    `rotary` dims of a head turn, in pairs that lie side by side (`interleaved`) or half of them apart. A query sees
    `window` positions, its own included, or all where that is None. `stops` are the ids that end an answer, `stored` is
    how weights lie there as integers, `usual` how to draw where a request does not say.
    """

    name: str
    architecture: str
    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    context: int
    rope: Rope
    rotary: int
    interleaved: bool
    window: int | None
    qkv_bias: bool
    qk_norm: bool
    post_norms: bool
    fused_gate_up: bool
    norm_eps: float
    tied: bool
    bos: int | None
    stops: frozenset[int]
    stored: Precision | None = None
    usual: Sampling = Sampling(temperature=1.0)  # noqa: RUF009 - frozen

    @classmethod
    def read(cls, folder: Path) -> ModelConfig:
        """Reads `config.json` and, where there is one, `generation_config.json`. Raises ModelError."""
        path = folder / "config.json"
        field = Fields(read_object(path), path)
        architecture, own = family(field)
        heads, width = field.integer("num_attention_heads"), field.integer("hidden_size")
        layers, context = field.integer("num_hidden_layers"), field.integer("max_position_embeddings")
        head_dim = field.integer("head_dim", own.head_dim or width // heads)
        kv_heads = field.integer("num_key_value_heads", heads)
        if heads % kv_heads or head_dim % 2:
            raise ModelError(f"{path}: {heads} heads, {kv_heads} key heads, head_dim {head_dim}")
        rope, rope_fields = read_rope(field, context)
        stops, usual = read_generation(folder, field)
        return cls(
            name=model_name(folder),
            architecture=architecture,
            vocabulary=field.integer("vocab_size"),
            width=width,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            inner=field.integer("intermediate_size"),
            context=context,
            rope=rope,
            rotary=own.rotary_dims(rope_fields, head_dim),
            interleaved=own.interleaved,
            window=own.window_of(field, layers, context),
            qkv_bias=own.has_qkv_bias(field),
            qk_norm=own.qk_norm,
            post_norms=own.post_norms,
            fused_gate_up=own.fused_gate_up,
            norm_eps=field.real("rms_norm_eps", own.norm_eps),
            tied=field.flag("tie_word_embeddings", False),
            bos=next(iter(field.ids("bos_token_id")), None),
            stops=stops,
            stored=_stored(field),
            usual=usual,
        )

    @property
    def arithmetic(self) -> str:
        """What changes the numbers and does not show in the weights."""
        always = (self.heads, self.kv_heads, self.head_dim, self.rope.theta, self.norm_eps, self.tied)
        more = (self.rope, self.rotary, self.interleaved, self.window)
        return repr(always if more == (Rope(self.rope.theta), self.head_dim, False, None) else always + more)


def _stored(field: Fields) -> Precision | None:
    """Quantised by this package, or not at all."""
    scheme = field.raw.get("quantization_config")
    if scheme is None:
        return None
    method = scheme.get("quant_method") if isinstance(scheme, dict) else scheme
    if method != "tandem":
        raise field.unsupported("quantization_config.quant_method", method, "'tandem'")
    precision = scheme.get("precision")
    if precision not in (Precision.INT8, Precision.INT4):
        raise field.unsupported("quantization_config.precision", precision, "'int8' and 'int4'")
    return Precision(precision)
