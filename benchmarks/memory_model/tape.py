"""Autograd over sizes: what a step holds at each instant, without computing values.

A :class:`Storage` costs its bytes for as long as anything refers to it: a variable of a forward, a
node of the graph that saved it, a gradient in flight. The rules are those of torch:

- a node exists where one of its inputs needs a gradient, and keeps what its backward reads;
- the backward runs the node with the highest number of those that have received a gradient; this
  gradient and what the node saved are freed when it returns;
- a second gradient for the same node is added to the first in place, unless the first is a view, as
  a GEMM's is: then into a new tensor;
- a parameter's ``.grad`` is the gradient that reaches it, without a copy.

The peak is the maximum over all instants, and :attr:`Ledger.at` names its instant.
"""

from __future__ import annotations

import heapq
import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

#: What bytes are held for: parameters and the like, a graph node, a ``.grad``, or temporaries.
AT_REST, KEPT, GRADIENT, SCRATCH = KINDS = ("at rest", "kept", "gradient", "scratch")
#: The gradient of an input is the incoming gradient itself, as for a sum or a view.
PASSED = -1
#: Bytes of the random generator's state, on the CPU: each checkpoint saves that of its forward, and
#: the present state is set aside during recomputation.
RANDOM_STATE = 5056


class Ledger:
    """Bytes that are held now and at the peak, by what they are held for."""

    def __init__(self) -> None:
        self.by_kind = dict.fromkeys(KINDS, 0)
        self.instant = ""
        self.restart()

    @property
    def now(self) -> int:
        return sum(self.by_kind.values())

    def restart(self) -> None:
        """Reset the peak."""
        self.peak, self.at, self.at_peak = self.now, "before the step", dict(self.by_kind)

    def look(self) -> None:
        """Update the peak."""
        now = self.now
        if now > self.peak:
            self.peak, self.at, self.at_peak = now, self.instant, dict(self.by_kind)


class Storage:
    """Bytes that are held until the last reference to this goes."""

    __slots__ = ("__weakref__", "kind", "ledger", "nbytes", "viewed")

    def __init__(self, ledger: Ledger, nbytes: int, kind: str, viewed: bool = False) -> None:
        self.viewed = viewed  # a gradient that is a view
        self.ledger, self.nbytes, self.kind = ledger, nbytes, kind
        ledger.by_kind[kind] += nbytes
        ledger.look()

    def become(self, kind: str) -> None:
        """Change what the bytes are held for; storage at rest does not change."""
        if self.kind != AT_REST:
            self.ledger.by_kind[self.kind] -= self.nbytes
            self.ledger.by_kind[kind] += self.nbytes
            self.kind = kind

    def __del__(self) -> None:
        self.ledger.by_kind[self.kind] -= self.nbytes


@dataclass
class Value:
    """A tensor: storage, bytes per element, and the node that made it, if it needs a gradient."""

    storage: Storage
    itemsize: int
    node: Node | None = None

    @property
    def nbytes(self) -> int:
        return self.storage.nbytes

    @property
    def numel(self) -> int:
        return self.storage.nbytes // self.itemsize


@dataclass(eq=False)
class Node:
    """What the backward of one op needs, allocates and returns."""

    name: str
    number: float
    inputs: Sequence[Node | None] = ()
    gradients: Sequence[int] = ()  # bytes of the gradient of each input, or PASSED
    scratch: int = 0  # more bytes, freed when the backward returns
    views: bool = False  # whether its gradients are views
    saved: list[Storage] = field(default_factory=list)
    frame: Frame | None = None  # the checkpoint in which it was made
    grad: Storage | None = None  # of a parameter
    is_leaf: bool = False


@dataclass(eq=False)
class Frame:
    """A checkpointed part of the forward: its nodes save nothing until it is run again."""

    again: Callable[[], object]
    random_state: Storage
    nodes: list[weakref.ref[Node]] = field(default_factory=list)  # that have something to save
    runs_again: bool = False
    saved: int = 0  # number of these nodes that have saved, in the second run


class _StopRecomputing(Exception):  # noqa: N818 - no error: everything needed is there
    pass


class Tape:
    """Runs forwards, given op by op, and their backward."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self._numbers = itertools.count()
        self._frame: Frame | None = None
        self.layer = ""

    def hold(self, nbytes: int, kind: str = SCRATCH, viewed: bool = False) -> Storage:
        return Storage(self.ledger, nbytes, kind, viewed)

    def constant(self, numel: int, itemsize: int, kind: str = SCRATCH) -> Value:
        """A tensor that needs no gradient."""
        return Value(self.hold(numel * itemsize, kind), itemsize)

    def leaf(self, x: Value) -> Value:
        """x as a leaf, whose own node takes the gradient."""
        node = Node("grad", float("inf"), saved=[x.storage], is_leaf=True)
        return Value(x.storage, x.itemsize, node)

    def parameter(self, numel: int, itemsize: int, *, trains: bool, hook: int = 0) -> Value:
        """A parameter; ``hook`` bytes are allocated by a hook that replaces its gradient."""
        node = Node("grad", float("inf"), scratch=hook, is_leaf=True) if trains else None
        return Value(self.hold(numel * itemsize, AT_REST), itemsize, node)

    def op(
        self,
        name: str,
        inputs: Sequence[Value],
        output: int | Storage,
        itemsize: int,
        *,
        gradients: Sequence[int],
        saves: Iterable[Value] = (),
        saves_output: bool = False,
        scratch: int = 0,
        backward_scratch: int = 0,
        saves_after: bool = False,
        views: bool = False,
    ) -> Value:
        """One op: ``output`` new bytes, or the storage of which it is a view.

        ``saves`` is saved, with ``saves_output`` the output too. ``saves_after``: not before the
        forward has returned, as for a Python function, or an op that saves its own results.
        """
        again = self._frame is not None and self._frame.runs_again
        self.ledger.instant = f"{'forward again' if again else 'forward'}, {self.layer}{name}"
        if not any(value.node for value in inputs):
            return Value(self._output(output, scratch), itemsize)
        node = Node(
            name,
            next(self._numbers),
            [value.node for value in inputs],
            gradients,
            backward_scratch,
            views,
        )
        saved = [value.storage for value in saves]
        if not (saves_output or saves_after):
            self._save(node, saved)
        storage = self._output(output, scratch)
        if saves_output or saves_after:
            self._save(node, [*saved, storage] if saves_output else saved)
        return Value(storage, itemsize, node)

    def _output(self, output: int | Storage, scratch: int) -> Storage:
        if isinstance(output, Storage):
            return output
        storage = self.hold(output)
        beside = self.hold(scratch) if scratch else None
        del beside
        return storage

    def _save(self, node: Node, saved: list[Storage]) -> None:
        if not saved:
            return
        frame = self._frame
        if frame is None:
            _keep(node, saved)
        elif not frame.runs_again:
            node.frame = frame
            frame.nodes.append(weakref.ref(node))
        else:
            _keep(node, saved)
            first = frame.nodes[frame.saved]()
            frame.saved += 1
            if first is not None:  # None if freed, as in a branch that ended in the forward
                first.saved = saved
            if frame.saved == len(frame.nodes):
                raise _StopRecomputing

    def checkpoint(self, forward: Callable[[Value], Value], x: Value) -> Value:
        """``forward(x)``, which saves x and the random state; the backward runs it again."""
        frame = Frame(lambda: forward(x), self.hold(RANDOM_STATE))
        x.storage.become(KEPT)
        self._frame = frame
        y = forward(x)
        self._frame = None
        return y

    def _recompute(self, frame: Frame) -> None:
        self._frame, frame.runs_again = frame, True
        aside = self.hold(RANDOM_STATE)
        try:
            frame.again()
        except _StopRecomputing as stop:
            stop.__traceback__ = None  # its frames hold the forward's variables
        del aside
        self._frame = None  # the checkpoint's input stays until the last of its nodes has run

    def backward(self, loss: Value) -> None:
        """From a loss of one element to the ``.grad`` of all leaves."""
        assert loss.node is not None
        arrived: dict[Node, Storage] = {loss.node: self.hold(loss.itemsize)}
        waiting = [(-loss.node.number, loss.node)]
        loss.node = None
        while waiting:
            _, node = heapq.heappop(waiting)
            self.ledger.instant = f"backward, {node.name}"
            for following, gradient in self._run(node, arrived.pop(node)):
                if following.is_leaf:
                    hooked = self.hold(following.scratch) if following.scratch else gradient
                    hooked.become(GRADIENT)
                    following.grad = hooked
                elif following not in arrived:
                    arrived[following] = gradient
                    heapq.heappush(waiting, (-following.number, following))
                elif arrived[following].viewed:
                    arrived[following] = self.hold(gradient.nbytes)
                del gradient

    def _run(self, node: Node, given: Storage) -> list[tuple[Node, Storage]]:
        if node.frame is not None and not node.frame.runs_again:
            self._recompute(node.frame)
            self.ledger.instant = f"backward, {node.name}"
        beside = self.hold(node.scratch) if node.scratch else None
        returned = [
            (following, given if nbytes == PASSED else self.hold(nbytes, viewed=node.views))
            for following, nbytes in zip(node.inputs, node.gradients, strict=True)
            if following is not None
        ]
        del beside
        node.saved, node.inputs, node.frame = [], (), None
        return returned


def _keep(node: Node, saved: list[Storage]) -> None:
    node.saved = saved
    for storage in saved:
        storage.become(KEPT)
