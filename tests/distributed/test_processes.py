"""Training in two and four processes gives the losses of one."""

from __future__ import annotations

import pytest
from data_parallel import ddp
from fully_sharded import fsdp, fsdp_replicated
from processes import run_in_processes
from tensor_parallel import tensor_parallel


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("check", [ddp, fsdp, fsdp_replicated, tensor_parallel])
def test_processes_train_as_one(check, count, tmp_path):
    run_in_processes(check, count, tmp_path)
