"""An encoder of the analytical model, as RoBERTa, that classifies texts; without dropout.

T tokens, d the width, m the MLP's, e bytes per element.
"""

from __future__ import annotations

from neuroada_kernels.benchmarks.memory_model.linears import (
    INT64,
    Build,
    Linear,
    Place,
    Siblings,
    plus,
    product,
)
from neuroada_kernels.benchmarks.memory_model.modules import (
    LayerNorm,
    activation,
    attention,
    cross_entropy,
    layer_of,
    with_gradient,
)
from neuroada_kernels.benchmarks.memory_model.shapes import Setting
from neuroada_kernels.benchmarks.memory_model.tape import Tape, Value

POSITIONS = 514
LABELS = 2


class EncoderLayer:
    """Attention and MLP, each followed by its residual sum and a norm.

    Saves q, k, v and attention's result, ``4 T d e``, what both norms read, ``2 T d e``, and what
    GELU reads, ``T m e``; and 4 bytes per token and head, two elements per token and norm.
    """

    def __init__(self, tape: Tape, setting: Setting, build: Build, trains: bool) -> None:
        sizes, e = setting.sizes, setting.itemsize
        d, m = sizes.hidden, sizes.intermediate
        self.tape, self.heads, self.width = tape, sizes.heads, d
        readers = Siblings(d, d, d)

        def linear(
            name: str, d_out: int, d_in: int, siblings: Siblings, made: bool = False
        ) -> Linear:
            return build(tape, Place(name, d_out, d_in, siblings, made, bias=True), e)

        self.query, self.key, self.value = (
            linear(name, d, d, readers) for name in ("query", "key", "value")
        )
        self.output = linear("attention.output.dense", d, d, Siblings(d), True)
        self.up = linear("intermediate.dense", m, d, Siblings(m))
        self.down = linear("output.dense", d, m, Siblings(d))
        self.norms = [LayerNorm(tape, d, e, trains) for _ in range(2)]
        self.linears = [self.query, self.key, self.value, self.output, self.up, self.down]

    def __call__(self, x: Value) -> Value:
        q, k, v = self.query(x), self.key(x), self.value(x)
        attended = attention(self.tape, q, k, v, x.numel // self.width * self.heads)
        del q, k, v
        x = self._added_and_normed(self.norms[0], self.output(attended), x)
        del attended
        hidden = activation(self.tape, "gelu", self.up(x))
        return self._added_and_normed(self.norms[1], self.down(hidden), x)

    def _added_and_normed(self, norm: LayerNorm, made: Value, x: Value) -> Value:
        """``norm(made + x)``, both of which are held until it returns."""
        return norm(plus(self.tape, made, x))


class Encoder:
    """Embeddings of tokens, positions and a type, a norm, layers, a classifier of two linears."""

    def __init__(self, tape: Tape, setting: Setting, build: Build, trains: bool) -> None:
        sizes, e, d = setting.sizes, setting.itemsize, setting.sizes.hidden
        self.tape, self.setting = tape, setting
        self.embeddings = [
            tape.parameter(rows * d, e, trains=trains) for rows in (sizes.vocabulary, POSITIONS, 1)
        ]
        self.norm = LayerNorm(tape, d, e, trains)
        self.layers = [EncoderLayer(tape, setting, build, trains) for _ in range(sizes.layers)]
        self.head = [
            tape.parameter(numel, e, trains=trains) for numel in (d * d, d, LABELS * d, LABELS)
        ]
        norms = [self.norm, *(norm for layer in self.layers for norm in layer.norms)]
        self.linears = [linear for layer in self.layers for linear in layer.linears]
        self.before = self.embeddings
        self.after = [*(p for norm in norms for p in norm.parameters), *self.head]

    def embed(self, words: Value | None) -> Value:
        """The sum of three rows per token; ``words``, if given, are the first of them."""
        tape, setting = self.tape, self.setting
        of_words, of_positions, of_types = self.embeddings
        if words is None:
            words = with_gradient(tape, setting, self._rows(of_words, given=True))
        return plus(tape, plus(tape, words, self._rows(of_types)), self._rows(of_positions))

    def _rows(self, table: Value, given: bool = False) -> Value:
        """A row per token; the gradient is dense. Saves the rows' numbers, 8 T, unless given."""
        tape, setting = self.tape, self.setting
        numbers = tape.constant(0 if given else setting.tokens, INT64)
        nbytes = setting.tokens * setting.sizes.hidden * setting.itemsize
        gradients = [table.nbytes]
        return tape.op(
            "embedding", [table], nbytes, table.itemsize, gradients=gradients, saves=[numbers]
        )

    def __call__(self, x: Value | None) -> Value:
        tape, setting, d = self.tape, self.setting, self.setting.sizes.hidden
        embedded = x = self.norm(self.embed(x))
        for number, layer in enumerate(self.layers):
            tape.layer = f"layer {number}, "
            x = layer_of(tape, setting, layer, x)
        tape.layer = ""
        del embedded  # held until here by a variable of transformers' forward
        first = tape.op("first token", [x], x.storage, x.itemsize, gradients=[x.nbytes])
        del x
        dense, dense_bias, out, out_bias = self.head
        rows = setting.batch * d * setting.itemsize
        # A GEMM whose input is a view of all tokens: saving the view keeps all of them.
        hidden = tape.op(
            "classifier",
            (first, dense, dense_bias),
            rows,
            setting.itemsize,
            gradients=(rows, dense.nbytes, dense_bias.nbytes),
            saves=([first] if dense.node else []) + ([dense] if first.node else []),
            views=True,
        )
        del first
        hidden = tape.op(
            "tanh",
            [hidden],
            hidden.nbytes,
            hidden.itemsize,
            gradients=[hidden.nbytes],
            saves_output=True,
        )
        logits = product(tape, hidden, out, d, "classifier", out_bias)
        return cross_entropy(tape, logits, LABELS)
