"""MAI-Base-1 (Microsoft AI, "MAI-Thinking-1: Building a Hill-Climbing Machine", June 2026).

Five local layers to one global, positions by rotation in the local ones only, grouped heads with QK-norm, a dense
feed-forward and a LatentMoE in turn, norms on both sides of every sublayer, and attention that starts switched off.
One knob, the depth, gives the whole ladder. Products are in FP8 with delayed scaling; the twins compute in fp32.
"""

from __future__ import annotations

from sextant.axes.attention import Full, Window
from sextant.axes.capacity import Dense, LatentExperts
from sextant.axes.kv import GQA, NoPE, RoPE
from sextant.axes.kv.position import AnyPosition
from sextant.axes.numerics import FP8Delayed
from sextant.axes.routing import Auxiliary, SoftmaxTopK
from sextant.axes.stability import NormalInit, RMSNorm, SandwichNorm
from sextant.core.cost import At
from sextant.core.errors import UsageError
from sextant.model.spec import Layer, ModelSpec, repeat, stack
from sextant.recipes.base import paper_run, twin_run
from sextant.train.optim import AdamW, Decay
from sextant.train.run import Batch, Run
from sextant.train.schedule import Cosine

DEPTHS = range(12, 79, 6)
PERIOD = 6
TWIN_STD = 0.05
DECAY = Decay(default=0.1, attention=0.01, embedding=0.005)


def layers(
    depth: int, *, heads: int, kv_heads: int, head_dim: int, window: int, dense: int, experts: int, top_k: int,
    latent: int, hidden: int, dropout: float, attention_gain: float = 0.0,
) -> tuple[Layer, ...]:
    """The layer pattern at any size: every sixth layer global, every second one a LatentMoE."""

    def kv(position: AnyPosition) -> GQA:
        return GQA(heads=heads, kv_heads=kv_heads, head_dim=head_dim, position=position, qk_norm=RMSNorm())

    moe = LatentExperts(
        experts=experts, hidden=hidden, latent=latent, router=SoftmaxTopK(top_k=top_k),
        balance=(Auxiliary(coef=1e-2, scope="global_batch"),),
    )
    local, local_kv, global_kv = Window(window=window), kv(RoPE(base=10_000.0)), kv(NoPE())
    return stack(
        depth,
        attention=repeat((PERIOD - 1) * [local] + [Full()], depth),
        kv=repeat((PERIOD - 1) * [local_kv] + [global_kv], depth),
        feed_forward=repeat([Dense(hidden=dense), moe], depth),
        residual=SandwichNorm(dropout=dropout, attention_gain=attention_gain),
    )


def _nearest(value: float, unit: int) -> int:
    return unit * round(value / unit)


def _whole_periods(depth: int) -> None:
    if depth < PERIOD or depth % PERIOD:
        raise UsageError("the ladder has no such rung", where="depth", got=depth, expected=f"a multiple of {PERIOD}")


def ladder(depth: int, round_to: int = 128) -> Run:
    """A rung of the depth ladder: everything follows from L, a multiple of 6.

    D = 256 L / 3, heads near L in eights, F = D, latent D / 2 and experts 3/2 of that, both rounded to ``round_to``
    (1,024 gives the two figures printed for 78 layers); head width 128, 8 KV heads, 8 of 512 experts.

    Raises:
        UsageError: another depth.
    """
    _whole_periods(depth)
    width = 256 * depth // 3
    latent, hidden = _nearest(width / 2, round_to), _nearest(width * 3 / 4, round_to)
    model = ModelSpec(
        name=f"mai-base-1-l{depth}", vocab=200_019, width=width, context=16_384, tied=True,
        layers=layers(
            depth, heads=8 * round(depth / 8), kv_heads=8, head_dim=128, window=512, dense=width, experts=512, top_k=8,
            latent=latent, hidden=hidden, dropout=0.15,
        ),
    )
    optimiser = AdamW(lr=2e-4, betas=(0.95, 0.925), decay=DECAY)
    run = paper_run(model, 16_384, optimiser, Cosine(warmup=90), Batch(rows=8192, micro_rows=1), steps=223_517)
    return run.replace(numerics=FP8Delayed())


def paper() -> Run:
    """78 layers: 962 B parameters, 34.7 B active."""
    run = ladder(DEPTHS[-1], round_to=1024)
    return run.replace(name="mai-base-1", model=run.model.replace(name="mai-base-1"))


def twin() -> Run:
    """Six layers, one of them global, three of them LatentMoE: 1.9 M parameters, 1.1 M active.

    Dropout is off: the twin sees its small corpus about once, where dropout only slows it. Matrices start at
    ``TWIN_STD``: at this width 0.02 would leave the experts' sum far below the output norm's eps.
    """
    model = ModelSpec(
        name="mai-base-1-twin", vocab=4096, width=128, context=512, tied=True, init=NormalInit(std=TWIN_STD),
        layers=layers(
            6, heads=4, kv_heads=2, head_dim=32, window=32, dense=128, experts=16, top_k=2, latent=64, hidden=96,
            dropout=0.0,
        ),
    )
    run = twin_run(model, steps=700)
    return run.replace(optimiser=AdamW(lr=6e-3, betas=(0.95, 0.925), decay=DECAY))


def dense_control() -> Run:
    """The twin with each mixture replaced by the dense layer that has as many parameters as a token meets in it."""
    run = twin()
    moe = run.model.layers[1].feed_forward
    met = moe.cost(run.model.width, At(1)).active_params
    dense = Dense(hidden=round(met / (3 * run.model.width)))
    sparse = [layer.feed_forward.kind == moe.kind for layer in run.model.layers]
    layers = tuple(
        layer.replace(feed_forward=dense) if is_moe else layer
        for layer, is_moe in zip(run.model.layers, sparse, strict=True)
    )
    name = "mai-base-1-dense-control"
    return run.replace(name=name, model=run.model.replace(name=name, layers=layers))



def twin_at(depth: int) -> Run:
    """A rung of the CPU ladder: D = 64 L / 3, heads of 32; L a multiple of 6.

    Raises:
        UsageError: another depth.
    """
    _whole_periods(depth)
    width = 64 * depth // 3
    model = ModelSpec(
        name=f"mai-base-1-l{depth}-twin", vocab=4096, width=width, context=512, tied=True,
        init=NormalInit(std=TWIN_STD),
        layers=layers(
            depth, heads=width // 32, kv_heads=2, head_dim=32, window=32, dense=width, experts=16, top_k=2,
            latent=width // 2, hidden=3 * width // 4, dropout=0.0,
        ),
    )
    return twin().replace(name=model.name, model=model)
