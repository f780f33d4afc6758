"""A transformer's block as in Llama, adapted, and what its forward saves."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neuroada_kernels as nk

WIDTH, HEADS, TOKENS = 32, 4, 10


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        heads = [
            p(x).unflatten(-1, (HEADS, -1)).transpose(-2, -3)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        ]
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        return self.o_proj(attended.transpose(-2, -3).flatten(-2))


class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, 4 * WIDTH) for _ in range(2))
        self.down_proj = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.self_attn, self.mlp = Attention(), GatedMLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm(x))
        return x + self.mlp(self.norm_mlp(x))


def unadapted_block(dtype: torch.dtype = torch.float32) -> Block:
    """The same block each time; the first quarter of the inputs has the largest weights."""
    torch.manual_seed(0)
    block = Block()
    with torch.no_grad():
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.weight[:, : module.in_features // 4] *= 4
                module.weight /= 2
    return block.to(dtype)


def block_of(dtype: torch.dtype = torch.float32, k: int = 2, **options: object) -> Block:
    """:func:`unadapted_block`, adapted: every linear chooses among the first quarter."""
    block = unadapted_block(dtype)
    nk.adapt(block, k, **options)
    with torch.no_grad():
        for layer in layers_of(block):
            layer.delta.normal_(std=0.1)
    return block


def layers_of(model: nn.Module) -> list[nk.NeuroAdaLinear]:
    return [m for m in model.modules() if isinstance(m, nk.NeuroAdaLinear)]


def qkv_of(model: Block) -> list[nk.NeuroAdaLinear]:
    """q, k and v, which are siblings."""
    attention = model.self_attn
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def choose(layer: nk.NeuroAdaLinear, first: int, count: int) -> None:
    """Have the layer choose ``count`` columns from ``first`` on, one per neuron."""
    layer.index = (first + torch.arange(layer.out_features)[:, None] % count).int()


def tokens(dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(
    model: nn.Module, x: Tensor, call: Callable[..., Tensor] | None = None
) -> list[Tensor]:
    """The output, dx and every delta's gradient of one step."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = (model if call is None else call)(x)
    y.float().square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    return [y.detach(), x.grad, *(p.grad.clone() for p in trained)]


def assert_same_bits(results: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    assert all(r.equal(e) for r, e in zip(results, expected, strict=True))


def kept_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes of the storages that a forward saves, except the model's own and indices."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            # Kept alive, so that no address is reused.
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)
