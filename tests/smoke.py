"""Smoke test of an installed package, without pytest: python tests/smoke.py cpu|eager [cuda].

The first argument names the backend that should serve calls on the CPU; a second one says that the
package was built with CUDA, which must not make its import need CUDA's libraries.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile

import torch

import neuroada_kernels as nk


def main(expected: str, *built: str) -> None:
    available = nk.available_backends()
    serving = "cpu" if available["cpu"] is None else "eager"
    assert serving == expected, f"served by {serving}, expected {expected}: {available}"
    if "cuda" in built:
        assert available["cuda"] in (None, "no GPU is visible"), available

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(48, 96), torch.nn.ReLU(), torch.nn.Linear(96, 8))
    x, target = torch.randn(64, 48), torch.randn(64, 8)
    weights = [model[0].weight.clone(), model[2].weight.clone()]
    summary = nk.adapt(model, k=2)
    assert summary.trainable == 2 * (96 + 8), summary

    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    losses = []
    for _ in range(50):
        loss = torch.nn.functional.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses

    y = model(x)
    with tempfile.TemporaryDirectory() as folder:
        nk.save_adapter(model, f"{folder}/adapter.safetensors")
        with torch.no_grad():
            model[0].delta.zero_()
        nk.load_adapter(model, f"{folder}/adapter.safetensors")
    assert torch.equal(model(x), y)
    nk.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    nk.unmerge(model)
    assert torch.equal(model[0].weight, weights[0])
    assert torch.equal(model[2].weight, weights[1])

    information = subprocess.run(
        [sys.executable, "-m", "neuroada_kernels.info"], check=True, capture_output=True, text=True
    ).stdout
    assert f"  {expected}: available" in information, information
    if expected == "eager":
        assert "pure-Python install" in information, information
    print(f"smoke test passed: neuroada_kernels {nk.__version__}, served by {serving}")


if __name__ == "__main__":
    main(*sys.argv[1:])
