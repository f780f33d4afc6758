"""What each method's linear holds, allocates and saves.

T tokens, N = ``d_out``, K = ``d_in``, e bytes per element of the model's dtype; W is ``N K e``.
Every class lists its terms in addition to W and to what all have in common: y, ``T N e``, and in
the backward dx, ``T K e``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from neuroada_kernels.benchmarks.memory_model.tape import AT_REST, PASSED, Tape, Value
from neuroada_kernels.plan import filled_up, plan_size

BOOL, INT32, INT64, FLOAT32 = 1, 4, 8, 4


@dataclass(frozen=True)
class Place:
    """A linear in its model: its shape, and facts about the x that it reads."""

    name: str
    d_out: int
    d_in: int
    siblings: Siblings
    made_by_attention: bool = False  # which saves its result anyway
    bias: bool = False


class Siblings:
    """Linears that read one x, and the copy of its columns that they share."""

    def __init__(self, *neurons: int) -> None:
        self.neurons = neurons
        self.columns: Value | None = None  # their numbers, if a copy is shared
        self._copy: Value | None = None
        self._readers = 0  # that have not read the copy yet

    def copy_of(self, tape: Tape, x: Value, d_in: int) -> Value:
        """The columns of x: copied for the first reader, dropped after the last one."""
        assert self.columns is not None
        if self._copy is None:
            numel = x.numel // d_in * self.columns.numel
            self._copy, self._readers = tape.constant(numel, x.itemsize), len(self.neurons)
        copy, self._readers = self._copy, self._readers - 1
        if self._readers == 0:
            self._copy = None
        return copy


class Linear:
    """Frozen. Its backward reads W alone, for dx."""

    trains = bias_trains = False  # whether W and b do
    hook = False  # whether a hook makes a new tensor of W's gradient

    def __init__(self, tape: Tape, place: Place, itemsize: int) -> None:
        self.tape, self.place, self.itemsize = tape, place, itemsize
        self.numel = place.d_out * place.d_in
        hook = self.numel * itemsize if self.hook else 0
        self.weight = tape.parameter(self.numel, itemsize, trains=self.trains, hook=hook)
        self.trained: list[Value] = [self.weight] if self.trains else []
        self.bias: Value | None = None
        if place.bias:
            self.bias = tape.parameter(place.d_out, itemsize, trains=self.bias_trains)
            self.trained += [self.bias] if self.bias_trains else []
        self.selection: list[Value] = []

    def __call__(self, x: Value) -> Value:
        return self._product(x, self.weight)

    def _product(self, x: Value, weight: Value) -> Value:
        return product(self.tape, x, weight, self.place.d_in, self.place.name, self.bias)

    def _train(self, numel: int, itemsize: int) -> Value:
        self.trained.append(self.tape.parameter(numel, itemsize, trains=True))
        return self.trained[-1]

    def _select(self, numel: int, itemsize: int) -> Value:
        self.selection.append(self.tape.constant(numel, itemsize, AT_REST))
        return self.selection[-1]


class Full(Linear):
    """W trains, and b: saves x for the gradient of W, ``N K e``."""

    trains = bias_trains = True


class MaskedDense(Full):
    """W trains, and its gradient is multiplied by a mask.

    Mask: ``N K`` bytes, of bool. Gradient ``N K e``, twice while it is masked.
    """

    bias_trains = False
    hook = True

    def __init__(self, tape: Tape, place: Place, itemsize: int) -> None:
        super().__init__(tape, place, itemsize)
        self._select(self.numel, BOOL)


class Materialised(Linear):
    """``F.linear(x, W.scatter_add(1, index, delta))``, k per neuron.

    delta ``N k e``, index ``8 N k``. Saves x and ``W + delta``, ``N K e``. The backward makes a
    dense gradient of ``W + delta``, ``N K e``, and gathers ``N k e`` from it. In 16 bits torch's
    ``scatter_add`` on a CPU sums in a temporary float32 copy of W: ``4 N K``.
    """

    def __init__(self, tape: Tape, place: Place, itemsize: int, k: int) -> None:
        super().__init__(tape, place, itemsize)
        self.delta = self._train(place.d_out * k, itemsize)
        self.index = self._select(place.d_out * k, INT64)

    def __call__(self, x: Value) -> Value:
        merged = self.tape.op(
            "scatter_add",
            (self.weight, self.delta),
            self.weight.nbytes,
            self.itemsize,
            gradients=(PASSED, self.delta.nbytes),
            saves=[self.index],
            scratch=self.numel * FLOAT32 if self.itemsize < FLOAT32 else 0,
        )
        return self._product(x, merged)


class Shira(Linear):
    """PEFT's: ``F.linear(x, W.clone() + sparse(indices, values))``, ``n = r (N + K)`` values.

    values ``n e``, indices ``8 n``, which each forward converts to ``16 n`` for the sparse matrix.
    Saves x, these, and ``W + sparse``, ``N K e``; a dense gradient as in :class:`Materialised`.
    """

    def __init__(self, tape: Tape, place: Place, itemsize: int, rank: int) -> None:
        super().__init__(tape, place, itemsize)
        self.entries = rank * (place.d_out + place.d_in)
        self.values = self._train(self.entries, itemsize)
        self._select(2 * self.entries, INT32)

    def __call__(self, x: Value) -> Value:
        tape, nbytes = self.tape, self.values.nbytes
        copy = tape.constant(self.numel, self.itemsize)
        scaled = tape.op("scaling", [self.values], nbytes, self.itemsize, gradients=[nbytes])
        indices = tape.constant(2 * self.entries, INT64)
        sparse = tape.op(
            "sparse",
            [scaled],
            scaled.storage,
            self.itemsize,
            gradients=[nbytes],
            saves=(indices, scaled),
        )
        merged = tape.op(
            "add sparse", (copy, sparse), copy.storage, self.itemsize, gradients=(PASSED, PASSED)
        )
        return self._product(x, merged)


class Lora(Linear):
    """PEFT's, of rank r, in the model's dtype: ``W x + scaling B(A(x))``.

    A and B: ``r (K + N) e``. Saves x, and ``A(x)``, ``T r e``. Beside y the forward holds two more
    tensors of its size, and the backward one.
    """

    def __init__(self, tape: Tape, place: Place, itemsize: int, rank: int) -> None:
        super().__init__(tape, place, itemsize)
        self.rank = rank
        self.a = self._train(rank * place.d_in, itemsize)
        self.b = self._train(rank * place.d_out, itemsize)

    def __call__(self, x: Value) -> Value:
        result = super().__call__(x)
        return plus(self.tape, result, self._scaled(self._branch(x)))

    def _branch(self, x: Value) -> Value:
        hidden = product(self.tape, x, self.a, self.place.d_in, "lora_A")
        return product(self.tape, hidden, self.b, self.rank, "lora_B")

    def _scaled(self, y: Value) -> Value:
        return self.tape.op("scaling", [y], y.nbytes, y.itemsize, gradients=[y.nbytes])


class Dora(Lora):
    """PEFT's: LoRA and a magnitude m per neuron, ``s = m / ||W + scaling B A||``.

    Beside LoRA's: m, ``N e``; saves ``W x`` and ``B(A(x))``, ``2 T N e``. Each forward computes
    ``B A`` from an identity, ``K K e``, and the norm of ``W + scaling B A``: ``3 N K e``. Where
    there is a bias, ``W x`` is saved without it, ``T N e`` more until the forward ends.
    """

    def __init__(self, tape: Tape, place: Place, itemsize: int, rank: int) -> None:
        super().__init__(tape, place, itemsize, rank)
        self.magnitude = self._train(place.d_out, itemsize)

    def __call__(self, x: Value) -> Value:
        tape, place = self.tape, self.place
        result = Linear.__call__(self, x)
        eye = tape.constant(place.d_in**2, self.itemsize)
        lora_weight = self._branch(eye)
        del eye
        norm = self._norm(lora_weight)
        scale = tape.op(
            "magnitude / norm",
            [self.magnitude],
            self.magnitude.nbytes,
            self.itemsize,
            gradients=[norm.nbytes],
            saves=[norm],
        )
        branch = self._branch(x)
        less_one = tape.op("scale - 1", [scale], norm.nbytes, self.itemsize, gradients=[PASSED])
        of_base = times(tape, less_one, self._without_bias(result))
        of_branch = self._scaled(times(tape, scale, branch))
        extra = plus(tape, of_base, of_branch)
        del of_base, of_branch, branch, lora_weight
        return plus(tape, result, extra)

    def _without_bias(self, result: Value) -> Value:
        if self.bias is None:
            return result
        return self.tape.op("- bias", [result], result.nbytes, self.itemsize, gradients=[PASSED])

    def _norm(self, lora_weight: Value) -> Value:
        scaled = self.tape.constant(self.numel, self.itemsize)
        merged = self.tape.constant(self.numel, self.itemsize)
        del scaled, merged
        return self.tape.constant(self.place.d_out, self.itemsize)


class IA3(Linear):
    """PEFT's: ``l * (W x)`` for keys and values, ``W (l * x)`` at the end of an MLP, else frozen.

    l: ``N e`` or ``K e``. Saves the factor that l is multiplied with.
    """

    before = ("down_proj", "output.dense", "attention.output.dense")
    scaled = ("k_proj", "v_proj", "key", "value", *before)

    def __init__(self, tape: Tape, place: Place, itemsize: int) -> None:
        super().__init__(tape, place, itemsize)
        if place.name in self.scaled:
            before = place.name in self.before
            self.scale = self._train(place.d_in if before else place.d_out, itemsize)

    def __call__(self, x: Value) -> Value:
        if not self.trained:
            return super().__call__(x)
        tape = self.tape
        scale = tape.op(
            "scale", [self.scale], self.scale.nbytes, self.itemsize, gradients=[self.scale.nbytes]
        )
        if self.place.name in self.before:
            return super().__call__(times(tape, scale, x))
        return times(tape, scale, super().__call__(x))


class NeuroAda(Linear):
    """Ours, k bypasses per neuron.

    delta ``4 N k``, index ``4 N k``, and for the backward the plan, ``4 (K + 1 + 65 + N k)``.
    Saves x itself (``save_activations="full"``), or a copy of its c chosen columns, ``T c e``
    once for all siblings, with their numbers, ``4 c``, and an index into them, ``4 N k``: in
    ``"compact"`` if c is less than K, in ``"auto"`` if it is at most half of that. The strategy
    ``resident`` keeps the weights that it has overwritten: ``N k e`` and their index, ``4 N k``.
    """

    def __init__(
        self,
        tape: Tape,
        place: Place,
        itemsize: int,
        k: int,
        save: str,
        resident: bool,
    ) -> None:
        super().__init__(tape, place, itemsize)
        entries = place.d_out * k
        self.delta = self._train(entries, FLOAT32)
        self.index = self._select(entries, INT32)
        self._select(plan_size(place.d_in, entries), INT32)
        columns = chosen_columns(sum(place.siblings.neurons), k, place.d_in)
        most = {"full": 0, "auto": place.d_in // 2, "compact": place.d_in - 1}[save]
        self.compact = columns <= most
        if self.compact:
            self._select(entries, INT32)
            if place.siblings.columns is None:
                place.siblings.columns = self._select(columns, INT32)
        if resident:
            self._select(entries, INT32)
            self._select(entries, itemsize)

    def __call__(self, x: Value) -> Value:
        place = self.place
        return self.tape.op(
            place.name,
            (x, self.delta),
            x.numel // place.d_in * place.d_out * x.itemsize,
            x.itemsize,
            gradients=(x.nbytes, self.delta.nbytes),
            saves=[self._kept(x)],
            saves_after=True,
            views=True,
        )

    def _kept(self, x: Value) -> Value:
        if not self.compact or self.place.made_by_attention:
            return x
        return self.place.siblings.copy_of(self.tape, x, self.place.d_in)


def chosen_columns(neurons: int, k: int, d_in: int) -> int:
    """Expected number of columns that any neuron chose, if all are equally likely.

    Random weights are so; pretrained ones repeat columns more, so that fewer are saved.
    """
    return filled_up(round(d_in * (1 - (1 - k / d_in) ** neurons)), d_in)


def product(
    tape: Tape, x: Value, weight: Value, d_in: int, name: str, bias: Value | None = None
) -> Value:
    """``x W^T``: saves W where x needs a gradient, and x where W does."""
    output = x.numel // d_in * (weight.numel // d_in) * x.itemsize
    saves = ([x] if weight.node else []) + ([weight] if x.node else [])
    inputs = (x, weight) if bias is None else (x, weight, bias)
    gradients = [value.nbytes for value in inputs]
    return tape.op(name, inputs, output, x.itemsize, gradients=gradients, saves=saves, views=True)


def plus(tape: Tape, left: Value, right: Value) -> Value:
    """A sum: saves nothing, and passes its gradient on."""
    inputs = (left, right)
    return tape.op("add", inputs, left.nbytes, left.itemsize, gradients=(PASSED, PASSED))


def times(tape: Tape, small: Value, large: Value) -> Value:
    """An elementwise product, ``small`` of a row's size or as large: each saves the other.

    The gradient of a row is reduced from a temporary of all elements.
    """
    saves = ([large] if small.node else []) + ([small] if large.node else [])
    row = small.nbytes < large.nbytes and small.node is not None
    return tape.op(
        "mul",
        (small, large),
        large.nbytes,
        large.itemsize,
        gradients=(small.nbytes, large.nbytes),
        saves=saves,
        backward_scratch=large.nbytes if row else 0,
    )


#: Builds one method's linear.
Build = Callable[[Tape, Place, int], Linear]
