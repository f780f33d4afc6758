"""What the parts of a transformer allocate and save, as transformers computes them on a CPU.

T tokens, d the width, V the vocabulary, e bytes per element of the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable

from neuroada_kernels.benchmarks.memory_model.linears import FLOAT32, INT64, plus, times
from neuroada_kernels.benchmarks.memory_model.shapes import Setting
from neuroada_kernels.benchmarks.memory_model.tape import Tape, Value


def cast(tape: Tape, x: Value, itemsize: int) -> Value:
    """A cast, and of its gradient back; nothing if x has that dtype already."""
    if x.itemsize == itemsize:
        return x
    return tape.op("cast", [x], x.numel * itemsize, itemsize, gradients=[x.nbytes])


class RMSNorm:
    """``w * (x rsqrt(mean(x^2) + eps))``, in float32.

    Saves x in float32, ``4 T d`` (a copy of a 16-bit x, or the float32 residual stream itself), and
    a float per token. If w trains, also the factor that w is multiplied with, ``T d e``.
    """

    def __init__(self, tape: Tape, width: int, itemsize: int, trains: bool) -> None:
        self.tape, self.width = tape, width
        self.weight = tape.parameter(width, itemsize, trains=trains)

    def __call__(self, x: Value) -> Value:
        tape, dtype = self.tape, x.itemsize
        wide = cast(tape, x, FLOAT32)
        # The backward of a power of 2 allocates x^1 and 2 x^1 as temporaries.
        square = tape.op(
            "pow",
            [wide],
            wide.nbytes,
            FLOAT32,
            gradients=[wide.nbytes],
            saves=[wide],
            backward_scratch=2 * wide.nbytes,
        )
        row = wide.numel // self.width * FLOAT32
        mean = tape.op("mean", [square], row, FLOAT32, gradients=[wide.nbytes])
        del square
        root = tape.op("rsqrt", [mean], row, FLOAT32, gradients=[row], saves_output=True)
        del mean
        wide = times(tape, root, wide)
        return times(tape, self.weight, cast(tape, wide, dtype))


class LayerNorm:
    """In one op: saves x, ``T d e``, and a mean and a deviation per token, ``2 T e``."""

    def __init__(self, tape: Tape, width: int, itemsize: int, trains: bool) -> None:
        self.tape, self.width = tape, width
        self.parameters = [tape.parameter(width, itemsize, trains=trains) for _ in range(2)]

    def __call__(self, x: Value) -> Value:
        rows = 2 * x.numel // self.width
        statistics = self.tape.constant(rows, x.itemsize)
        return self.tape.op(
            "layer_norm",
            [x, *self.parameters],
            x.nbytes,
            x.itemsize,
            gradients=[x.nbytes, *(value.nbytes for value in self.parameters)],
            saves=(x, statistics),
            saves_after=True,  # the statistics are results of the op
        )


def with_gradient(tape: Tape, setting: Setting, x: Value) -> Value:
    """The embeddings' result, which transformers makes require grad when it checkpoints."""
    return tape.leaf(x) if setting.checkpointing and x.node is None else x


def layer_of(tape: Tape, setting: Setting, layer: Callable[[Value], Value], x: Value) -> Value:
    """A layer's result; with checkpointing, the backward runs its forward again."""
    return tape.checkpoint(layer, x) if setting.checkpointing else layer(x)


def activation(tape: Tape, name: str, x: Value) -> Value:
    """SiLU or GELU: saves x."""
    return tape.op(name, [x], x.nbytes, x.itemsize, gradients=[x.nbytes], saves=[x])


def rotated(tape: Tape, x: Value, angles: Value) -> Value:
    """``x cos + turned(x) sin``: cos and sin are shared by all layers, nothing else is saved."""
    with_cos = times(tape, angles, x)
    # Negate the second half, then concatenate; the gradient of a slice has the size of the whole.
    negative = tape.op("neg", [x], x.nbytes // 2, x.itemsize, gradients=[x.nbytes])
    turned = tape.op("cat", [negative], x.nbytes, x.itemsize, gradients=[x.nbytes // 2])
    del negative
    with_sin = times(tape, angles, turned)
    del turned
    return plus(tape, with_cos, with_sin)


def attention(tape: Tape, q: Value, k: Value, v: Value, rows: int) -> Value:
    """torch's flash kernel: saves its inputs, its result and the log-sum-exp of each row."""
    log_sum_exp = tape.constant(rows, FLOAT32)
    return tape.op(
        "attention",
        (q, k, v),
        q.nbytes,
        q.itemsize,
        gradients=(q.nbytes, k.nbytes, v.nbytes),
        saves=(q, k, v, log_sum_exp),
        saves_output=True,
    )


def cross_entropy(tape: Tape, logits: Value, vocabulary: int) -> Value:
    """In float32, of labels shifted by one: saves the log-probabilities, ``4 T V``.

    Beside these the forward holds the logits, ``T V e``, and if these have 16 bits a float32
    copy; the backward the gradients of log-probabilities and of logits, ``8 T V``.
    """
    wide = cast(tape, logits, FLOAT32)
    targets = tape.constant(wide.numel // vocabulary, INT64)
    logs = tape.op(
        "log_softmax", [wide], wide.nbytes, FLOAT32, gradients=[wide.nbytes], saves_output=True
    )
    return tape.op(
        "nll_loss",
        [logs],
        FLOAT32,
        FLOAT32,
        gradients=[wide.nbytes],
        saves=[logs, targets],
    )
