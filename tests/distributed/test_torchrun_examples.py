"""The examples for torchrun: in two processes they train as one does, and save what it would."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import neuroada_kernels as nk

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS = 10


#: Runs a script, and leaves without the interpreter's end: torch lets gloo's threads go on where a
#: model holds the process group, and one that asks for the GIL just then aborts the process.
LEAVING = Path(__file__).parent / "leave_at_once.py"


@pytest.fixture(scope="module")
def tiny():
    spec = importlib.util.spec_from_file_location("tiny", EXAMPLES / "tiny_transformer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_one_process(tiny, **options: object) -> list[float]:
    model = tiny.pretrained()
    nk.adapt(model, k=4, **options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = tiny.loss_of(model, tiny.batch(step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return [*losses, tiny.loss_of(model, tiny.batch(STEPS)).item()]


@pytest.mark.parametrize(
    ("script", "arguments", "options", "allowed"),
    [
        ("torchrun_ddp", [], {}, 1e-5),
        ("torchrun_fsdp", ["--checkpoint", "parts"], {}, 2**-7),
        ("torchrun_tensor_parallel", [], {"exclude_modules": ["head"]}, 1e-5),
        ("deepspeed_zero3", [], {}, 1e-5),
    ],
)
def test_an_example_trains_as_one_process(tiny, script, arguments, options, allowed, tmp_path):
    if script.startswith("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", LEAVING, EXAMPLES / f"{script}.py"]
    done = subprocess.run(
        [*command, "--steps", str(STEPS), "--out", tmp_path / "adapter.safetensors", *arguments],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(loss) for loss in re.findall(r"step \d+ loss (\S+)", done.stdout)]
    model = tiny.pretrained()
    nk.load_adapter(model, tmp_path / "adapter.safetensors")
    losses.append(tiny.loss_of(model, tiny.batch(STEPS)).item())
    expected = in_one_process(tiny, **options)
    assert expected[-1] < 0.9 * expected[0]
    torch.testing.assert_close(losses, expected, rtol=allowed, atol=0)
    assert (tmp_path / "parts").exists() == ("parts" in arguments)
