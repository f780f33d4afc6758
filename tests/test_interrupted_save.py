"""A save that is killed leaves a file that loads: the old one, or the new."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

KILLS = 50

#: Forks a process that saves without end, kills it after a random time, and checks the file, in
#: which all deltas have one value. It is of 5 MB, so that writing takes a good part of a save.
KILLER = f"""
import os, random, signal, sys, time
import torch
from torch import nn
import neuroada_kernels as nk
from neuroada_kernels.adapter_file import read_adapter

path = sys.argv[1]
torch.set_num_threads(1)
model = nn.Sequential(*[nn.Linear(64, 1024) for _ in range(24)])
nk.adapt(model, 32)


def save(value):
    with torch.no_grad():
        for layer in model:
            layer.delta.fill_(value)
    nk.save_adapter(model, path)


start = time.perf_counter()
save(0)
takes = time.perf_counter() - start
generator = random.Random(0)
values = set()
for kill in range({KILLS}):
    child = os.fork()
    if child == 0:
        for value in range(1_000_000):
            save(kill + value / 1024)
    time.sleep(generator.uniform(0, 3 * takes))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    deltas = [module.delta.unique() for module in read_adapter(path).modules.values()]
    (value,) = set(torch.cat(deltas).tolist())
    values.add(value)
print(len(values))
"""


def test_whatever_the_moment_of_the_kill_the_file_is_old_or_new(tmp_path: Path):
    path = tmp_path / "adapter.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", KILLER, path], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    # Some kills struck before the first save and some after, some in the midst of writing.
    assert 1 < int(done.stdout) < KILLS
    torn = list(tmp_path.glob(".adapter.safetensors.*.tmp"))
    assert torn
    assert set(tmp_path.iterdir()) == {path, *torn}
