"""Reading a transformers ``config.json`` field by field: every one is understood, or refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sextant.axes.kv import AnyScaling, LinearScaling, Llama3Scaling, RoPE, YaRNScaling
from sextant.core.errors import UsageError

BOOKKEEPING = frozenset({
    "_attn_implementation_autoset", "_name_or_path", "architectures", "auto_map", "bos_token_id",
    "cache_implementation", "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label", "is_encoder_decoder",
    "label2id", "model_type", "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id",
    "pretraining_tp", "problem_type", "return_dict", "torch_dtype", "transformers_version", "use_cache",
})
"""Fields that say nothing about the function: names, token numbers, what a call returns."""

NUMBER = (int, float)


class Fields:
    """A configuration that remembers which of its fields were understood; JSON's null counts as absent."""

    def __init__(self, data: Mapping[str, Any], where: str = "config.json"):
        self.where = where
        self.left = {name: value for name, value in data.items() if value is not None and name not in BOOKKEEPING}

    def take(self, name: str, kind: type | tuple[type, ...], default: Any = None, *, zero: bool = False) -> Any:
        """The value of a field of this kind, or ``default``. A truth value is no number; numbers are positive."""
        value = self.left.pop(name, default)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool) != (kind is bool)):
            raise self._refused("bad value in a model configuration", name, value, _kind(kind))
        if isinstance(value, NUMBER) and kind is not bool and not (value > 0 or (zero and value == 0)):
            raise self._refused("bad value in a model configuration", name, value, "more than 0")
        return value

    def need(self, name: str, kind: type | tuple[type, ...] = int) -> Any:
        """The value of a field that has no default."""
        value = self.take(name, kind)
        if value is None:
            raise self._refused("a model configuration lacks a field", name, "nothing", _kind(kind))
        return value

    def choose(self, name: str, options: Mapping[str, Any], default: str) -> Any:
        """What ``options`` holds for the field's value."""
        value = self.take(name, str, default)
        if value not in options:
            raise self._refused("unsupported field in a model configuration", name, value, " or ".join(options))
        return options[value]

    def only(self, **neutral: Any) -> None:
        """Fields whose other values would change the function in a way that we do not have."""
        for name, value in neutral.items():
            if (found := self.left.pop(name, value)) != value:
                raise self._refused("unsupported field in a model configuration", name, found, value)

    def done(self) -> None:
        """Refuse what nobody asked for."""
        for name, value in self.left.items():
            raise self._refused("unknown field in a model configuration", name, value, "no such field")

    def _refused(self, what: str, name: str, got: object, expected: object) -> UsageError:
        return UsageError(what, where=f"{self.where}: {name}", got=repr(got), expected=expected)


def _kind(kind: type | tuple[type, ...]) -> str:
    return " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))


# --- rotary codes ---------------------------------------------------------------------------------------------------


def _linear(fields: Fields, context: int) -> LinearScaling:
    return LinearScaling(factor=float(fields.need("factor", NUMBER)))


def _llama3(fields: Fields, context: int) -> Llama3Scaling:
    return Llama3Scaling(
        factor=float(fields.need("factor", NUMBER)),
        low_factor=float(fields.need("low_freq_factor", NUMBER)),
        high_factor=float(fields.need("high_freq_factor", NUMBER)),
        original=fields.take("original_max_position_embeddings", int, context),
    )


def _yarn(fields: Fields, context: int) -> YaRNScaling:
    original = fields.take("original_max_position_embeddings", int, context)
    mscale, mscale_all_dim = (fields.take(name, NUMBER, zero=True) for name in ("mscale", "mscale_all_dim"))
    both = mscale and mscale_all_dim  # cosine and sine heed neither unless both are given and not 0
    factor = float(fields.take("factor", NUMBER, context / original))
    temperature = fields.take("attention_factor", NUMBER)
    if mscale_all_dim and not both and temperature is None:
        temperature = YaRNScaling(factor=factor, original=original).temperature
    return YaRNScaling(
        factor=factor,
        original=original,
        beta_fast=float(fields.take("beta_fast", NUMBER, 32.0)),
        beta_slow=float(fields.take("beta_slow", NUMBER, 1.0)),
        attention_factor=temperature,
        truncate=fields.take("truncate", bool, True),
        mscale=float(mscale) if both else 1.0,
        mscale_all_dim=float(mscale_all_dim) if mscale_all_dim else None,  # DeepSeek's scores heed it alone, too
    )


SCALINGS: dict[str, Callable[[Fields, int], AnyScaling] | None] = {
    "default": None, "linear": _linear, "llama3": _llama3, "yarn": _yarn,
}


def _rope(data: Mapping[str, Any], theta: float, context: int) -> RoPE:
    """One rotary code from its dictionary; ``type`` is the older name of ``rope_type``."""
    fields = Fields(data, "config.json: rope_parameters")
    base = float(fields.take("rope_theta", NUMBER, theta))
    kind = fields.take("type", str, "default")
    scaling = fields.choose("rope_type", SCALINGS, kind)
    fields.only(partial_rotary_factor=1.0)
    code = RoPE(base=base, scaling=scaling and scaling(fields, context))
    fields.done()
    return code


def one_rope(fields: Fields, context: int, theta: float = 10_000.0) -> RoPE:
    """The rotary code of all layers: ``rope_parameters``, or ``rope_theta`` and ``rope_scaling`` in older files."""
    theta = float(fields.take("rope_theta", NUMBER, theta))
    older, newer = fields.take("rope_scaling", dict, {}), fields.take("rope_parameters", dict, {})
    return _rope(older or newer, theta, context)


def ropes_by_type(fields: Fields, context: int) -> dict[str, RoPE]:
    """Gemma 3's two codes: scaling in an older file concerns the global layers alone."""
    codes: dict[str, Any] = fields.take("rope_parameters", dict, {})
    thetas = {
        "full_attention": float(fields.take("rope_theta", NUMBER, 1e6)),
        "sliding_attention": float(fields.take("rope_local_base_freq", NUMBER, 1e4)),
    }
    older = {"full_attention": fields.take("rope_scaling", dict, {})}
    Fields({name: code for name, code in codes.items() if name not in thetas}, "config.json: rope_parameters").done()
    given = {kind: {**(codes.get(kind) or {}), **older.get(kind, {})} for kind in thetas}
    return {kind: _rope(given[kind], theta, context) for kind, theta in thetas.items()}
