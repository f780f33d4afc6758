"""Measures a training step of a real model on the CPU, by what its bytes are for.

Weights are drawn at random and nothing is downloaded. The step is a second one, so that the
optimiser has its state; it begins without gradients. What torch's allocator hands out is counted;
:mod:`neuroada_kernels.benchmarks.allocations` says what this misses.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from neuroada_kernels.benchmarks import llama
from neuroada_kernels.benchmarks.allocations import allocated_peak
from neuroada_kernels.benchmarks.memory_model.encoder import LABELS, POSITIONS
from neuroada_kernels.benchmarks.memory_model.methods import Method
from neuroada_kernels.benchmarks.memory_model.predict import Bytes
from neuroada_kernels.benchmarks.memory_model.shapes import Setting


def measure(setting: Setting, method: Method) -> Bytes:
    """Build the model, adapt it, and take a step under the profiler, once warm."""
    step = Step(setting, method)
    with _without_onednn():
        step()
        kept = step.kept_bytes()
        step.zero_grad()
        peak = allocated_peak(step)
    parameters = list(step.model.parameters())
    return Bytes(
        weights=_bytes(p for p in parameters if not p.requires_grad),
        trained=_bytes(step.trained),
        selection=_bytes(_selection(step.model)),
        optimizer=_bytes(step.optimizer_state()),
        gradients=_bytes(step.gradients()),
        kept=kept,
        step_peak=peak,
    )


@contextmanager
def _without_onednn() -> Iterator[None]:
    """Without oneDNN, whose 16-bit GEMMs pack operands into scratch that depends on the CPU."""
    before = torch.backends.mkldnn.set_flags(_enabled=False)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=before[0])


class Step:
    """One training step of an adapted model, callable again and again."""

    def __init__(self, setting: Setting, method: Method) -> None:
        torch.manual_seed(0)
        self.model = method.adapt(build(setting), setting.sizes.linears)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4) if self.trained else None
        shape = setting.batch, setting.sequence
        self.tokens = torch.randint(setting.sizes.vocabulary, shape)
        encoder = setting.sizes.is_encoder
        self.labels = torch.randint(LABELS, (setting.batch,)) if encoder else self.tokens
        self.embedded: Tensor | None = None
        if not self.trained:  # so that there is a backward to measure
            embeddings = self.model.get_input_embeddings()
            self.embedded = embeddings(self.tokens).detach().requires_grad_()

    def forward(self) -> Tensor:
        if self.embedded is None:
            loss: Tensor = self.model(input_ids=self.tokens, labels=self.labels).loss
        else:
            loss = self.model(inputs_embeds=self.embedded, labels=self.labels).loss
        return loss

    def __call__(self) -> None:
        self.forward().backward()
        if self.optimizer is not None:
            self.optimizer.step()

    def zero_grad(self) -> None:
        for tensor in (*self.trained, self.embedded):
            if tensor is not None:
                tensor.grad = None

    def gradients(self) -> list[Tensor]:
        return [
            t.grad for t in (*self.trained, self.embedded) if t is not None and t.grad is not None
        ]

    def optimizer_state(self) -> list[Tensor]:
        states = self.optimizer.state.values() if self.optimizer is not None else []
        return [value for state in states for value in state.values() if isinstance(value, Tensor)]

    def kept_bytes(self) -> int:
        """Bytes of the storages that a forward saves, beside what the model holds anyway."""
        held = {storage.data_ptr() for storage in _storages(_held(self.model))}
        held |= {
            t.untyped_storage().data_ptr() for t in (self.tokens, self.embedded) if t is not None
        }
        saved: weakref.WeakSet[_Saved] = weakref.WeakSet()

        def pack(tensor: Tensor) -> _Saved:
            saved.add(packed := _Saved(tensor))
            return packed

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.tensor):
            loss = self.forward()
        storages = {s.data_ptr(): s.nbytes() for s in _storages(p.tensor for p in saved)}
        del loss  # held until here: its graph keeps the storages
        return sum(nbytes for address, nbytes in storages.items() if address not in held)


class _Saved:
    """A saved tensor, freed with its node, so that those of branches that ended do not count."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def build(setting: Setting) -> nn.Module:
    """The real model, frozen, in training mode and without dropout."""
    sizes = setting.sizes
    model = _encoder(setting) if sizes.kv_heads is None else _llama(setting, sizes.kv_heads)
    if setting.checkpointing:
        # Older transformers, the newest for Python 3.10 among them, have the other name.
        enable = getattr(model, "activation_checkpointing_enable", None)
        enable = enable or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})  # type: ignore[operator]
    return model


def _llama(setting: Setting, kv_heads: int) -> nn.Module:
    sizes = setting.sizes
    made = llama.Sizes(
        sizes.hidden,
        sizes.intermediate,
        sizes.layers,
        sizes.heads,
        kv_heads,
        sizes.vocabulary,
    )
    model: nn.Module = llama.build(made, setting.sequence, setting.torch_dtype, "cpu")
    return model


def _encoder(setting: Setting) -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    sizes = setting.sizes
    config = RobertaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=POSITIONS,
        type_vocab_size=1,
        num_labels=LABELS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    model: nn.Module = RobertaForSequenceClassification(config).to(setting.torch_dtype)
    return model.requires_grad_(False).train()


def _held(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    yield from _shira(model)


def _selection(model: nn.Module) -> Iterator[Tensor]:
    names = {"index", "plan", "columns", "kept_index", "merged_index", "base_values", "mask"}
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2] in names:
            yield buffer
    yield from _shira(model)


def _shira(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        yield from getattr(module, "shira_indices", {}).values()


def _storages(tensors: Iterable[Tensor]) -> Iterator[torch.UntypedStorage]:
    for tensor in tensors:
        if tensor.is_sparse:
            yield from _storages((tensor._indices(), tensor._values()))
        else:
            yield tensor.untyped_storage()


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages, each counted once."""
    return sum({s.data_ptr(): s.nbytes() for s in _storages(tensors)}.values())
