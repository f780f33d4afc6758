"""A whole training step of a randomly initialised Llama, by method: tokens per second, peak memory.

``python -m neuroada_kernels.benchmarks.model --device cuda --json FILE``. The sizes default to
Llama-3-8B's; values do not matter to either figure, so nothing is downloaded. Every method pays for
the gradient of the embeddings' output, so that frozen does a backward too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import torch
from torch import Tensor, nn

import neuroada_kernels as nk
from neuroada_kernels.benchmarks.baselines import MaskedDenseLinear, MaterialisedLinear
from neuroada_kernels.benchmarks.report import environment
from neuroada_kernels.benchmarks.timing import Quartiles
from neuroada_kernels.testing import Inputs

#: The linears of a block, which every method adapts.
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Sizes:
    """Of a Llama; the defaults are Llama-3-8B's."""

    hidden: int = 4096
    intermediate: int = 14336
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 128256


def build(sizes: Sizes, sequence: int, dtype: torch.dtype, device: str) -> nn.Module:
    """A Llama whose weights are drawn at random on ``device``, frozen."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        vocab_size=sizes.vocabulary,
        max_position_embeddings=sequence,
        use_cache=False,
        attn_implementation="sdpa",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: nn.Module = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False).train()


def _frozen(model: nn.Module, options: argparse.Namespace) -> nn.Module:
    return model


def _neuroada(model: nn.Module, options: argparse.Namespace) -> nn.Module:
    nk.adapt(model, options.k, LINEARS)
    return model


def _materialised(model: nn.Module, options: argparse.Namespace) -> nn.Module:
    return _replace(model, lambda linear: MaterialisedLinear(_inputs(linear, options.k)))


def _masked_dense(model: nn.Module, options: argparse.Namespace) -> nn.Module:
    return _replace(model, lambda linear: MaskedDenseLinear(_inputs(linear, options.k)))


def _peft_lora(model: nn.Module, options: argparse.Namespace) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    rank = options.rank
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=LINEARS)
    adapted: nn.Module = get_peft_model(model, config, autocast_adapter_dtype=False)
    return adapted


METHODS: dict[str, Callable[[nn.Module, argparse.Namespace], nn.Module]] = {
    "frozen": _frozen,
    "neuroada": _neuroada,
    "materialised": _materialised,
    "masked-dense": _masked_dense,
    "peft-lora": _peft_lora,
}


def _replace(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in LINEARS and isinstance(child, nn.Linear):
                setattr(parent, name, make(child))
    return model


def _inputs(linear: nn.Linear, k: int) -> Inputs:
    """What a baseline takes of a layer: no x, no gradient, and a bypass of zeros."""
    weight = linear.weight.detach()
    index = nk.select(weight, k)
    delta = torch.zeros(index.shape, device=weight.device)
    return Inputs(weight.new_empty(0), weight, index, delta, None, weight.new_empty(0))


def measure(method: str, options: argparse.Namespace) -> dict[str, Any]:
    """Times and memory of a method; ``error`` instead where the memory does not suffice."""
    row = {"method": method, "checkpointing": options.checkpointing}
    try:
        return row | _measure(method, options)
    except torch.OutOfMemoryError as error:
        return row | {"error": str(error).splitlines()[0]}
    finally:
        if options.device == "cuda":
            torch.cuda.empty_cache()


def _measure(method: str, options: argparse.Namespace) -> dict[str, Any]:
    on_gpu = options.device == "cuda"
    model = build(options.sizes, options.sequence, getattr(torch, options.dtype), options.device)
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    tokens = torch.randint(
        options.sizes.vocabulary, (options.batch, options.sequence), device=options.device
    )
    embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_()  # type: ignore[operator]
    model = METHODS[method](model, options)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        at_rest = torch.cuda.memory_allocated()
    times, losses = [], []
    with _serving(options.backend):
        for _ in range(options.warmup + options.steps):
            start = perf_counter_ns()
            # Read at the end of a step, as a training loop does; it also waits for the GPU.
            losses.append(_step(model, embeddings, tokens, optimizer).item())
            times.append((perf_counter_ns() - start) / 1e6)
    step = Quartiles.of(times[options.warmup :])
    return {
        "trainable": sum(parameter.numel() for parameter in trained),
        "step_ms": asdict(step),
        "samples_ms": times[options.warmup :],
        "tokens_per_second": tokens.numel() / step.median * 1e3,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "bytes_before_the_first_step": at_rest if on_gpu else None,
        "losses": losses,
    }


def _step(
    model: nn.Module, embeddings: Tensor, tokens: Tensor, optimizer: torch.optim.Optimizer | None
) -> Tensor:
    loss: Tensor = model(inputs_embeds=embeddings, labels=tokens).loss
    loss.backward()
    embeddings.grad = None
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


def _serving(backend: str | None) -> AbstractContextManager[None]:
    return nullcontext() if backend is None else nk.use_backend(backend)


def main(argv: list[str] | None = None) -> int:
    """Measure the methods one after the other; 1 where none fits into the memory."""
    parser = _parser()
    options = parser.parse_args(argv)
    _check(options, parser)
    rows = []
    for method in options.methods:
        rows.append(measure(method, options))
        print(_line(rows[-1]), flush=True)
    if options.json is not None:
        settings = {
            name: value
            for name, value in vars(options).items()
            if name not in ("json", "sizes", "methods")
        }
        settings["transformers"] = _transformers_version()
        found = {**environment(options.device), **settings, "sizes": asdict(options.sizes)}
        options.json.write_text(json.dumps(found | {"results": rows}, indent=1) + "\n")
    return int(all("error" in row for row in rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m neuroada_kernels.benchmarks.model",
        description="Time training steps of a randomly initialised Llama; take their peak memory.",
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    add("--backend", help="of neuroada; default: the one chosen automatically")
    add("--k", type=int, default=20, help="bypasses a neuron; default: 20")
    add("--rank", type=int, default=16, help="of LoRA; default: 16")
    add("--sequence", type=int, default=4096, help="default: 4096")
    add("--batch", type=int, default=1, help="default: 1")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    add("--checkpointing", action="store_true", help="compute activations again in the backward")
    add("--steps", type=int, default=7, help="that count; default: 7")
    add("--warmup", type=int, default=2, help="that do not; default: 2")
    add("--json", type=Path, metavar="FILE", help="write everything measured")
    for name, default in asdict(Sizes()).items():
        add(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default: {default}")
    return parser


def _check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse what would fail after minutes; gather the sizes."""
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU is visible")
    if find_spec("transformers") is None:
        parser.error("transformers is missing: pip install 'neuroada-kernels[peft]'")
    if "peft-lora" in options.methods and find_spec("peft") is None:
        parser.error("--methods peft-lora: peft is missing, pip install 'neuroada-kernels[peft]'")
    options.sizes = Sizes(**{name: options.__dict__.pop(name) for name in asdict(Sizes())})


def _transformers_version() -> str:
    from transformers import __version__

    return str(__version__)


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['method']}: {row['error']}"
    peak = "" if row["peak_bytes"] is None else f", peak {row['peak_bytes'] / 2**30:.1f} GiB"
    return (
        f"{row['method']}: {row['step_ms']['median']:.1f} ms a step, "
        f"{row['tokens_per_second']:.0f} tokens/s{peak}"
    )


if __name__ == "__main__":
    sys.exit(main())
