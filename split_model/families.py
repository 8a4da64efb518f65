"""In what the supported architectures differ, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace

from split_model.fields import Fields

# An option that would change the numbers, with the value that every family computes.
FIXED = {"hidden_act": "silu", "mlp_bias": False, "rope_interleaved": False, "use_mrope": False}


@dataclass(frozen=True, slots=True)
class Family:
    """What an architecture has whatever its config says, and what holds where the config says nothing."""

    qkv_bias: bool | None = False  # None: as `attention_bias` says
    qk_norm: bool = False  # queries and keys are normalised head by head
    post_norms: bool = False  # what attention and MLP give is normalised once more
    fused_gate_up: bool = False  # gate and up are one tensor
    interleaved: bool = False  # the pairs that turn lie side by side, not half a head apart
    rotary: float | None = None  # the share of a head that turns; None: all of it, always
    head_dim: int | None = None  # None: width / heads
    norm_eps: float = 1e-6
    window: int | None = None  # None: there is none
    chooses_window: bool = False  # it holds only where `use_sliding_window` is set

    def has_qkv_bias(self, field: Fields) -> bool:
        if self.qkv_bias is None:
            return field.flag("attention_bias", True)
        if not self.qkv_bias and field.flag("attention_bias", False):
            raise field.unsupported("attention_bias", True, "False")
        return self.qkv_bias

    def rotary_dims(self, field: Fields, head_dim: int) -> int:
        """Dims of a head that turn."""
        share = field.real("partial_rotary_factor", self.rotary or 1.0)
        dims = int(head_dim * share)
        if dims < 2 or dims % 2 or dims > head_dim or (self.rotary is None and dims < head_dim):
            raise field.unsupported("partial_rotary_factor", share, f"{self.rotary or 1.0}")
        return dims

    def window_of(self, field: Fields, layers: int, context: int) -> int | None:
        """Positions that a query sees where it does not see all. All layers share one cut of the attention."""
        absent = self.window if "sliding_window" not in field.raw else None  # null says that there is none
        width = absent if field.raw.get("sliding_window") is None else field.integer("sliding_window")
        if self.chooses_window and not field.flag("use_sliding_window", False):
            return None
        if width is None or width >= context:
            return None
        if self.window is None:
            raise field.unsupported("sliding_window", width, "null")
        sliding = self._sliding_layers(field, layers)
        if 0 < sliding < layers:
            raise field.unsupported("sliding_window", width, f"in all layers or none, not in {sliding} of {layers}")
        return width if sliding else None

    def _sliding_layers(self, field: Fields, layers: int) -> int:
        kinds = field.raw.get("layer_types")
        if isinstance(kinds, list):
            return kinds.count("sliding_attention")
        return max(0, layers - field.integer("max_window_layers", 28, least=0)) if self.chooses_window else layers


GLM = Family(qkv_bias=None, fused_gate_up=True, interleaved=True, rotary=0.5, head_dim=128, norm_eps=1.5625e-7)
FAMILIES = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(window=4096),
    "Qwen2ForCausalLM": Family(qkv_bias=True, window=4096, chooses_window=True),
    "Qwen3ForCausalLM": Family(qk_norm=True, head_dim=128, window=4096, chooses_window=True),
    "GlmForCausalLM": GLM,
    "Glm4ForCausalLM": replace(GLM, post_norms=True),
}


def family(field: Fields) -> tuple[str, Family]:
    """The architecture's name, and what it is. Raises ModelError for an unknown one and for options without support."""
    names = field.raw.get("architectures")
    name = names[0] if isinstance(names, list) and names else names
    if not isinstance(name, str) or name not in FAMILIES:
        raise field.unsupported("architectures", name, ", ".join(FAMILIES))
    for option, value in FIXED.items():
        if field.raw.get(option) not in (None, value):
            raise field.unsupported(option, field.raw[option], repr(value))
    kinds = field.raw.get("layer_types")
    known = ("full_attention", "sliding_attention")
    if kinds is not None and (not isinstance(kinds, list) or any(kind not in known for kind in kinds)):
        raise field.unsupported("layer_types", kinds, " and ".join(known))
    return name, FAMILIES[name]
