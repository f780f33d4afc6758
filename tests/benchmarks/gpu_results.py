"""Results of a GPU as the suites linear and model write them, with made-up times and peaks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

from neuroada_kernels.benchmarks.llama import Sizes
from neuroada_kernels.testing import GPU_BENCH_CASES

GIB = 1 << 30
SESSION = {
    "gpu": "NVIDIA H200",
    "cpu": "a processor",
    "threads": 16,
    "torch": "2.11.0",
    "driver": "580.1",
    "commit": "0123456789abcdef",
}
#: Nanoseconds of a linear's forward and backward, round by round.
Times = Sequence[int] | Callable[[int, int], Sequence[int]]


def linear(
    times: Mapping[str, Times], automatic: str = "neuroada-cuda", tokens: Sequence[int] = (8192,)
) -> dict:
    """Times by candidate, the same for every linear or a function of d_in and d_out."""
    return {
        "kind": "linear",
        "command": "neuroada bench linear",
        "settings": {"rounds": 3},
        "sessions": [SESSION],
        "results": [
            _row(case, name, own(case.d_in, case.d_out) if callable(own) else own, automatic)
            for case in GPU_BENCH_CASES
            if case.tokens in tokens
            for name, own in times.items()
        ],
    }


def _row(case, name: str, times: Sequence[int], automatic: str) -> dict:
    spread = {"lower": min(times) / 1e3, "median": sorted(times)[1] / 1e3, "upper": 9.0}
    return {
        "key": f"{case.name} bfloat16 {name}",
        "case": {"name": case.name, **asdict(case)},
        "dtype": "bfloat16",
        "candidate": name,
        "automatic": name == automatic,
        **dict.fromkeys(
            ("forward_us", "backward_us", "total_us", "ratio_to_frozen", "host_us"), spread
        ),
        "tflop_per_s": 765.4,
        "gb_per_s": 468.0,
        "peak_bytes": 200 << 20,
        "peak_bytes_beyond_y_and_dx": 80 << 20,
        "kept_bytes": 48 << 20,
        "samples_ns": {"forward": [0] * len(times), "backward": list(times)},
    }


def model(peaks: Mapping[str, float], skipped: Mapping[str, str], **sizes: int) -> dict:
    """Peaks in GiB and reasons by method, in mode plain; ``sizes`` override Llama-3-8B's."""
    return {
        "kind": "model",
        "command": "neuroada bench model --device cuda",
        "settings": {
            "sizes": {**asdict(Sizes()), **sizes},
            "dtype": "bfloat16",
            "batch": 1,
            "sequence": 4096,
            "k": 20,
        },
        "sessions": [SESSION],
        "results": [
            *(_step(method, int(peak * GIB)) for method, peak in peaks.items()),
            *(
                {"key": f"plain/{m}", "mode": "plain", "method": m, "skipped": why}
                for m, why in skipped.items()
            ),
        ],
    }


def _step(method: str, peak: int) -> dict:
    return {
        "key": f"plain/{method}",
        "mode": "plain",
        "method": method,
        "source": "ours",
        "trainable": 12,
        "step_ms": {"lower": 1.0, "median": 2.0, "upper": 3.0},
        "tokens_per_second": 8765.4,
        "ratio_to_frozen": None,
        "held_bytes": peak // 2,
        "step_bytes": peak - peak // 2,
        "peak_bytes": peak,
    }
