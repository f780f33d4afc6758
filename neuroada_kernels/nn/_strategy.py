"""The two strategies to train a bypass, and the reasons why a weight may not be written."""

from __future__ import annotations

from torch import Tensor, nn

from neuroada_kernels._dtypes import FLOATING, NAMES
from neuroada_kernels.config import STRATEGIES


def check_known(strategy: str) -> None:
    """Raise ValueError if ``strategy`` is unknown."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: {strategy!r}, expected one of {list(STRATEGIES)}")


def check_strategy(strategy: str, weight: Tensor) -> None:
    """Raise ValueError if ``strategy`` is unknown, or ``"resident"`` is refused for ``weight``.

    A weight on the meta device is not checked: its real counterpart may be allowed.
    """
    check_known(strategy)
    if weight.is_meta:
        return
    if strategy == "resident" and (reason := why_not_resident(weight)) is not None:
        raise ValueError(refusal(reason))


def refusal(reason: str) -> str:
    """The error message for a refused ``"resident"``."""
    return f"strategy: 'resident' is refused: {reason}; expected 'bypass' or 'auto'"


def why_not_resident(weight: Tensor) -> str | None:
    """Why this weight may not be written, or None.

    Whether other modules read it cannot be determined here;
    :func:`neuroada_kernels.strategies.shared_weights` searches a model.
    """
    if type(weight) not in (Tensor, nn.Parameter):
        return (
            f"weight is a {type(weight).__name__}, expected a plain tensor: what is sharded, "
            "quantised or wrapped cannot be patched"
        )
    if weight.dtype not in FLOATING:
        return f"weight has dtype {weight.dtype}, expected {NAMES}"
    if weight.is_meta:
        return "weight is on the meta device"
    if weight.is_inference():
        return "weight was made under inference_mode, and its changes cannot be followed"
    return _why_not_storage(weight)


def _why_not_storage(weight: Tensor) -> str | None:
    storage = weight.untyped_storage()
    if weight._is_view() or storage.nbytes() != weight.nbytes:
        return "weight is a view of a tensor that others may read"
    if weight.is_cpu and storage.filename is not None:
        return f"weight is mapped from {storage.filename}, which patching would write"
    if weight.is_cpu and storage.is_shared():
        return "weight lies in memory that is mapped from a file or shared with other processes"
    return None
