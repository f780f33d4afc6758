"""The time of each kernel of a step, by torch's profiler, behind ``neuroada bench kernels``.

For work on a kernel: the ratios of ``neuroada bench linear`` say whether a step is fast, these
times say which of its kernels is slow. On a GPU, L2 is overwritten before every step, as there.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from neuroada_kernels.benchmarks.candidates import Run, bench_inputs, prepare, table
from neuroada_kernels.benchmarks.options import positive
from neuroada_kernels.benchmarks.shapes import add_cases, bench_cases
from neuroada_kernels.testing import GPU_BENCH_CASES, Case

#: Larger than any GPU's L2.
_FLUSH_BYTES = 256 << 20
_NOISE = re.compile(r"^void |neuroada::(cuda::)?|\(anonymous namespace\)::|\(.*$")


class KernelTime(NamedTuple):
    """A kernel's time in a step, in microseconds, and how often it runs in one."""

    kernel: str
    us: float
    calls: float


def kernel_times(run: Run, steps: int) -> list[KernelTime]:
    """The kernels of a step, the longest first; on a CPU, torch's operators."""
    on_gpu = run.x.is_cuda
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    flush = torch.empty(_FLUSH_BYTES if on_gpu else 0, dtype=torch.uint8, device=run.x.device)
    with run.serving():
        run.backward(run.forward())
        with profile(activities=[activity], acc_events=True) as record:
            for _ in range(steps):
                if on_gpu:
                    flush.zero_()
                run.backward(run.forward())
            if on_gpu:
                torch.cuda.synchronize()
    times = [
        KernelTime(
            _NOISE.sub("", event.key),
            (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / steps,
            event.count / steps,
        )
        for event in record.key_averages()
        if not _is_flush(event.key)
    ]
    return sorted((t for t in times if t.us > 0), key=lambda t: -t.us)


def _is_flush(key: str) -> bool:
    return "Memset" in key or "FillFunctor<unsigned char>" in key


def main(argv: list[str] | None = None) -> int:
    """Print a table for each case and candidate, every one checked first."""
    options = _parser().parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        _parser().error("--device cuda: no GPU is visible")
    console = Console()
    known = table()
    cases = bench_cases(
        GPU_BENCH_CASES,
        shapes=[shape for shapes in options.shapes or () for shape in shapes],
        tokens=options.tokens,
        k=options.k,
        filters=options.cases,
    )
    for case in cases:
        inputs = bench_inputs(case, getattr(torch, options.dtype), options.device)
        for name in options.candidates:
            times = kernel_times(prepare(known[name], inputs), options.steps)
            _print(console, case, name, times)
    return 0


def _print(console: Console, case: Case, name: str, times: Iterable[KernelTime]) -> None:
    times = list(times)
    rows = Table(
        title=f"{case.name}, {name}: {sum(t.us for t in times):.0f} us", title_justify="left"
    )
    for heading in ("us", "calls", "kernel"):
        rows.add_column(heading, justify="left" if heading == "kernel" else "right")
    for time in times:
        rows.add_row(f"{time.us:.1f}", f"{time.calls:g}", time.kernel)
    console.print(rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="neuroada bench kernels",
        description="Time each kernel of forward and backward by torch's profiler.",
    )
    names = list(table())
    ours = ("neuroada-cuda", "neuroada-triton", "neuroada-eager")
    default = next(name for name in ours if name in names)
    dtypes = ("bfloat16", "float16", "float32")
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda", help="default: cuda")
    add_cases(parser, tokens="the table's")
    add("--dtype", choices=dtypes, default=dtypes[0], help=f"default: {dtypes[0]}")
    add(
        "--candidates",
        nargs="+",
        choices=names,
        default=[default],
        metavar="NAME",
        help=f"default: {default}",
    )
    add("--steps", type=positive, default=5, metavar="N", help="default: 5")
    return parser


if __name__ == "__main__":
    sys.exit(main())
