"""What a method must compute before its steps are timed."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import neuroada_kernels as nk
from neuroada_kernels.benchmarks.baselines import MaskedDenseLinear, MaterialisedLinear
from neuroada_kernels.benchmarks.llama import LINEARS
from neuroada_kernels.benchmarks.methods import METHODS, plain_name, training
from neuroada_kernels.nn._layer import BypassLayer
from neuroada_kernels.testing.tolerances import rms_error, tolerance


class WrongMethodError(RuntimeError):
    """A method computes something else than it should, so that timing it is worth nothing."""


@dataclass(frozen=True)
class Facts:
    """Of one forward and backward."""

    loss: float
    grad: Tensor  # of the embeddings, which are the input
    chosen: dict[str, Tensor]  # linear to the gradient of its selected entries, by column
    norms: dict[str, float]  # of the gradient of everything that trains


class Reference(Protocol):
    """See :class:`neuroada_kernels.benchmarks.training_step.References`."""

    @property
    def frozen(self) -> Facts: ...

    @property
    def gradients(self) -> dict[str, Tensor] | None: ...


def allowed(dtype: torch.dtype, layers: int) -> float:
    """The largest relative RMS error of a gradient through so many layers.

    Each layer adds the error of about a dozen successive GEMMs, forward and backward; the squares
    of independent rounding errors add up.
    """
    return 4 * float(tolerance(dtype, 1024)) * math.sqrt(12 * layers)


def take_facts(model: nn.Module, loss: Tensor, inputs: Tensor) -> Facts:
    """Run the backward; gradients stay in ``.grad``."""
    loss.backward()
    assert inputs.grad is not None
    trained = training(model)
    without = [name for name, parameter in trained.items() if parameter.grad is None]
    if without:
        raise WrongMethodError(f"{without[0]}: trains, and a backward gives it no gradient")
    norms = {name: float(_norm(parameter.grad)) for name, parameter in trained.items()}
    return Facts(loss.item(), inputs.grad.detach(), _chosen(model), norms)


def check_adapted(
    method: str, model: nn.Module, facts: Facts, known: Reference, dtype: torch.dtype, expected: int
) -> dict[str, float | None]:
    """Before the first step: the model computes what the frozen one does and trains as it should.

    Returns
    -------
    dict
        Relative errors: ``loss`` and ``input_gradient`` against the frozen model, and
        ``gradients``, the largest of a layer's against the materialised scheme; None where that is
        not known, or where the method trains something else.
    """
    check_what_trains(method, model, expected)
    errors: dict[str, float | None] = {
        "loss": abs(facts.loss - known.frozen.loss) / abs(known.frozen.loss),
        "input_gradient": rms_error(facts.grad, known.frozen.grad),
        "gradients": None,
    }
    if METHODS[method].chosen and known.gradients is not None:
        if facts.chosen.keys() != known.gradients.keys():
            raise WrongMethodError(f"{method}: other linears are adapted than by materialised")
        errors["gradients"] = max(
            rms_error(facts.chosen[name], gradient) for name, gradient in known.gradients.items()
        )
    refuse_beyond(method, errors, allowed(dtype, layers_of(model)))
    return errors


def check_drop(method: str, found: float, expected: float, limit: float) -> None:
    """Check that the loss falls as in the materialised scheme, with nonzero bypasses."""
    error = abs(found - expected) / abs(expected)
    refuse_beyond(method, {"the loss's drop": error}, limit)


def check_what_trains(method: str, model: nn.Module, expected: int) -> int:
    """Check the number of trained values and the names of their parameters; returns the number."""
    trained = training(model)
    pattern = METHODS[method].trains
    strange = [name for name in trained if not re.search(pattern, name)]
    if strange:
        raise WrongMethodError(f"{method}: {strange[0]} trains, expected what matches {pattern}")
    found: int = sum(parameter.numel() for parameter in trained.values())
    if found != expected:
        raise WrongMethodError(f"{method}: {found} numbers train, expected {expected}")
    return found


def check_step(method: str, model: nn.Module, before: dict[str, int]) -> None:
    """Check that a step has changed nothing but what trains.

    Parameters
    ----------
    before : dict
        The plain model's :func:`fingerprints`.
    """
    resident = method == "neuroada-resident"
    if resident:  # its weights hold the bypass; leaving restores their bits
        nk.set_strategy(model, "bypass")
    trained = {plain_name(name) for name in training(model)}
    after = fingerprints(model)
    for name, value in before.items():
        if name not in trained and after.get(name) != value:
            raise WrongMethodError(f"{method}: {name} has changed, and does not train")
    if resident:
        nk.set_strategy(model, "resident")


def check_compiled(
    method: str, facts: Facts, eager: Facts, dtype: torch.dtype, layers: int
) -> float:
    """The largest error of the compiled model's loss and gradients against the eager one's."""
    errors: dict[str, float | None] = {
        "compiled loss": abs(facts.loss - eager.loss) / abs(eager.loss),
        "compiled input gradient": rms_error(facts.grad, eager.grad),
    }
    largest = max(eager.norms.values(), default=0.0)
    for name, norm in eager.norms.items():
        errors[f"compiled gradient of {name}"] = abs(facts.norms[name] - norm) / largest
    refuse_beyond(method, errors, allowed(dtype, layers))
    return max(error for error in errors.values() if error is not None)


def fingerprints(model: nn.Module) -> dict[str, int]:
    """The sum of each parameter's bits, by the name that it has in a plain model."""
    return {plain_name(name): _bits(parameter) for name, parameter in model.named_parameters()}


def _norm(gradient: Tensor | None) -> Tensor:
    """The norm in float32, without a copy of the gradient."""
    assert gradient is not None
    norm: Tensor = torch.linalg.vector_norm(gradient, dtype=torch.float32)
    return norm


def _bits(parameter: Tensor) -> int:
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
    return int(parameter.detach().view(width).sum(dtype=torch.int64))


def layers_of(model: nn.Module) -> int:
    """How many layers the transformer has."""
    return len([name for name, _ in model.named_modules() if name.endswith(LINEARS[0])])


def _chosen(model: nn.Module) -> dict[str, Tensor]:
    """Linear to ``[d_out, k]`` on the CPU, sorted by column, as methods store them differently."""
    found = {}
    for name, module in model.named_modules():
        gradient = _of_layer(module)
        if gradient is not None:
            found[plain_name(name)] = gradient.float().cpu()
    return found


def _of_layer(module: nn.Module) -> Tensor | None:
    if isinstance(module, MaskedDenseLinear):
        grad = module.weight.grad
        assert grad is not None
        if bool(grad[module.mask == 0].any()):
            raise WrongMethodError("masked-dense: a gradient outside of the mask")
        chosen: Tensor = grad[module.mask != 0].view(len(grad), -1)
        return chosen
    layer: Any = module
    if isinstance(module, BypassLayer | MaterialisedLinear):
        index, delta = layer.index, layer.delta
    elif hasattr(module, "neuroada_delta"):
        index, delta = layer.neuroada_index["default"], layer.neuroada_delta["default"]
    else:
        return None
    if delta.grad is None:
        return None  # another check covers whether it trains
    by_column: Tensor = delta.grad.gather(1, index.argsort(1))
    return by_column


def refuse_beyond(method: str, errors: dict[str, float | None], limit: float) -> None:
    """Raise WrongMethodError for an error beyond the limit or NaN."""
    for name, error in errors.items():
        if error is not None and not error <= limit:
            raise WrongMethodError(
                f"{method}: a relative error of {error:.2g} in {name}, expected at most {limit:.2g}"
            )
