"""A Llama of the analytical model. T tokens, d the width, m the MLP's, e bytes per element."""

from __future__ import annotations

from functools import partial

from neuroada_kernels.benchmarks.memory_model.linears import (
    Build,
    Linear,
    Place,
    Siblings,
    plus,
    product,
    times,
)
from neuroada_kernels.benchmarks.memory_model.modules import (
    RMSNorm,
    activation,
    attention,
    cross_entropy,
    layer_of,
    rotated,
    with_gradient,
)
from neuroada_kernels.benchmarks.memory_model.shapes import Setting
from neuroada_kernels.benchmarks.memory_model.tape import Tape, Value


class Attention:
    """q, k, v, their rotation, ``scaled_dot_product_attention`` by torch's flash kernel, o.

    Saves q and k as rotated, v and the result, ``(2 d + 2 d_kv) T e``, and 4 bytes per token
    and head. (On a GPU the flash kernel saves the same; without one, the math path also saves the
    probabilities, ``heads T^2 e``.)
    """

    def __init__(self, tape: Tape, setting: Setting, build: Build) -> None:
        sizes, e = setting.sizes, setting.itemsize
        assert sizes.kv_heads is not None
        self.tape, self.heads, self.width = tape, sizes.heads, sizes.hidden
        d, kv = sizes.hidden, sizes.hidden // sizes.heads * sizes.kv_heads
        readers = Siblings(d, kv, kv)
        self.q = build(tape, Place("q_proj", d, d, readers), e)
        self.k = build(tape, Place("k_proj", kv, d, readers), e)
        self.v = build(tape, Place("v_proj", kv, d, readers), e)
        self.o = build(tape, Place("o_proj", d, d, Siblings(d), made_by_attention=True), e)

    @property
    def linears(self) -> list[Linear]:
        return [self.q, self.k, self.v, self.o]

    def __call__(self, x: Value, angles: Value) -> Value:
        q, k, v = self.q(x), self.k(x), self.v(x)
        q, k = rotated(self.tape, q, angles), rotated(self.tape, k, angles)
        attended = attention(self.tape, q, k, v, x.numel // self.width * self.heads)
        del q, k, v
        return self.o(attended)


class MLP:
    """``down(silu(gate(x)) * up(x))``: saves gate's and up's results and SiLU's, ``3 T m e``."""

    def __init__(self, tape: Tape, setting: Setting, build: Build) -> None:
        sizes, e = setting.sizes, setting.itemsize
        d, m = sizes.hidden, sizes.intermediate
        self.tape = tape
        readers = Siblings(m, m)
        self.gate = build(tape, Place("gate_proj", m, d, readers), e)
        self.up = build(tape, Place("up_proj", m, d, readers), e)
        self.down = build(tape, Place("down_proj", d, m, Siblings(d)), e)

    @property
    def linears(self) -> list[Linear]:
        return [self.gate, self.up, self.down]

    def __call__(self, x: Value) -> Value:
        gate = self.gate(x)
        active = activation(self.tape, "silu", gate)
        del gate
        return self.down(times(self.tape, active, self.up(x)))


class DecoderLayer:
    """``h = x + attention(norm(x))``, then ``h + mlp(norm(h))``."""

    def __init__(self, tape: Tape, setting: Setting, build: Build, trains: bool) -> None:
        d, e = setting.sizes.hidden, setting.itemsize
        self.tape = tape
        self.norms = [RMSNorm(tape, d, e, trains) for _ in range(2)]
        self.attention, self.mlp = Attention(tape, setting, build), MLP(tape, setting, build)
        self.linears = [*self.attention.linears, *self.mlp.linears]

    def __call__(self, x: Value, angles: Value) -> Value:
        x = plus(self.tape, x, self.attention(self.norms[0](x), angles))
        return plus(self.tape, x, self.mlp(self.norms[1](x)))


class Llama:
    """Embeddings, layers, a norm, and a head of the vocabulary's size."""

    def __init__(self, tape: Tape, setting: Setting, build: Build, trains: bool) -> None:
        sizes, e = setting.sizes, setting.itemsize
        self.tape, self.setting = tape, setting
        rows = sizes.vocabulary * sizes.hidden
        self.embeddings = tape.parameter(rows, e, trains=trains)
        self.layers = [DecoderLayer(tape, setting, build, trains) for _ in range(sizes.layers)]
        self.norm = RMSNorm(tape, sizes.hidden, e, trains)
        self.head = tape.parameter(rows, e, trains=trains)
        norms = [self.norm, *(norm for layer in self.layers for norm in layer.norms)]
        self.linears = [linear for layer in self.layers for linear in layer.linears]
        # In update order, before and after the linears, except for norms, which are small.
        self.before = [self.embeddings]
        self.after = [*(norm.weight for norm in norms), self.head]
        self.logits = sizes.vocabulary

    def embed(self) -> Value:
        """Rows of the embeddings; the gradient is dense, of all rows."""
        tape, setting, rows = self.tape, self.setting, self.embeddings
        nbytes = setting.tokens * setting.sizes.hidden * setting.itemsize
        x = tape.op("embedding", [rows], nbytes, rows.itemsize, gradients=[rows.nbytes])
        return with_gradient(tape, setting, x)

    def __call__(self, x: Value | None) -> Value:
        tape, setting = self.tape, self.setting
        sizes, e = setting.sizes, setting.itemsize
        angles = tape.constant(2 * setting.sequence * sizes.hidden // sizes.heads, e)
        embedded = x = self.embed() if x is None else x
        for number, layer in enumerate(self.layers):
            tape.layer = f"layer {number}, "
            x = layer_of(tape, setting, partial(layer, angles=angles), x)
        tape.layer = ""
        x = self.norm(x)
        del embedded  # held until here by a variable of transformers' forward
        logits = product(tape, x, self.head, sizes.hidden, "head")
        return cross_entropy(tape, logits, sizes.vocabulary)
