"""A training step of the analytical model: bytes at rest, bytes that it adds, and its peak.

At rest: parameters, the selection of those that train, and AdamW's state. The step begins without
gradients. Its peak is the maximum over every op of the forward, every node of the backward, and the
update of every parameter; :attr:`Bytes.at` names that instant.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from neuroada_kernels.benchmarks.memory_model.encoder import Encoder
from neuroada_kernels.benchmarks.memory_model.llama import Llama
from neuroada_kernels.benchmarks.memory_model.methods import Method
from neuroada_kernels.benchmarks.memory_model.shapes import Setting
from neuroada_kernels.benchmarks.memory_model.tape import GRADIENT, KEPT, SCRATCH, Tape, Value


@dataclass(frozen=True)
class Bytes:
    """Bytes of a model in training."""

    weights: int  # parameters that do not train
    trained: int  # parameters that do
    selection: int  # which connections train: indices, plans, masks
    optimizer: int
    gradients: int  # after the backward
    kept: int  # from the forward for the backward
    step_peak: int  # most that a step adds, gradients included
    at: str = ""  # the instant of that; the fields below are its parts
    peak_kept: int = 0
    peak_gradients: int = 0
    peak_scratch: int = 0

    @property
    def at_rest(self) -> int:
        return self.weights + self.trained + self.selection + self.optimizer

    @property
    def peak(self) -> int:
        return self.at_rest + self.step_peak

    def as_dict(self) -> dict[str, Any]:
        """For JSON, sums included."""
        return {**asdict(self), "at_rest": self.at_rest, "peak": self.peak}


#: Parts of a model's bytes that its layers contribute to.
PER_LAYER = ("weights", "trained", "selection", "optimizer", "gradients", "kept")


def predict(setting: Setting, method: Method) -> Bytes:
    """The bytes of a step by the analytical model."""
    tape = Tape()
    architecture = Encoder if setting.sizes.is_encoder else Llama
    model = architecture(tape, setting, method.build, method.everything_trains)
    trained = [value for linear in model.linears for value in linear.trained]
    if method.everything_trains:
        trained = [*model.before, *trained, *model.after]
    selection = sum(value.nbytes for linear in model.linears for value in linear.selection)
    trained_bytes = sum(value.nbytes for value in trained)
    weights = tape.ledger.now - selection - trained_bytes
    # Two moments of a parameter's dtype, and its number of steps, a float32.
    optimizer = 2 * trained_bytes + 4 * len(trained)
    # If nothing trains, x itself requires a gradient, so that there is a backward.
    x = (
        None
        if trained
        else tape.parameter(setting.tokens * setting.sizes.hidden, setting.itemsize, trains=True)
    )
    at_rest = tape.ledger.now
    tape.ledger.restart()
    loss = model(x)
    kept = tape.ledger.by_kind[KEPT]
    tape.layer = ""
    tape.backward(loss)
    del loss
    gradients = tape.ledger.now - at_rest
    _update(tape, trained)
    at_peak = tape.ledger.at_peak
    return Bytes(
        weights=weights,
        trained=trained_bytes,
        selection=selection,
        optimizer=optimizer,
        gradients=gradients,
        kept=kept,
        step_peak=tape.ledger.peak - at_rest,
        at=tape.ledger.at,
        peak_kept=at_peak[KEPT],
        peak_gradients=at_peak[GRADIENT],
        peak_scratch=at_peak[SCRATCH],
    )


def predict_layer(setting: Setting, method: Method) -> dict[str, int]:
    """What one more layer adds to the bytes at rest, to the gradients and to what is kept."""
    fewer = replace(setting, sizes=replace(setting.sizes, layers=setting.sizes.layers - 1))
    whole, less = asdict(predict(setting, method)), asdict(predict(fewer, method))
    return {name: whole[name] - less[name] for name in PER_LAYER}


def _update(tape: Tape, trained: list[Value]) -> None:
    """AdamW's update, one parameter after the other: temporaries for a root and a quotient.

    The quotient is a variable of torch's loop, which holds it until the next one is made.
    """
    tape.ledger.instant = "update"
    quotient = None
    for value in trained:
        root = tape.hold(value.nbytes)
        quotient = tape.hold(value.nbytes)
        del root
    del quotient
