"""Small results files of the suites, as these write them, and the page of one just written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def on_a_page(results: Path) -> str:
    """What ``neuroada report`` makes of a results file."""
    pytest.importorskip("matplotlib")
    from neuroada_kernels.benchmarks.html import write_html

    page = results.with_suffix(".html")
    assert write_html({results.name: json.loads(results.read_text())}, page) == {}
    return page.read_text()


FACTS = {"threads": 2, "cpu": "a processor", "cpu_capability": "AVX2", "commit": "0123456789"}
SPREAD = {"lower": 0.9, "median": 1.25, "upper": 1.5}
CASES = [{"name": f"k{k}", "tokens": 4, "d_in": 8, "d_out": 6, "k": k} for k in (1, 2, 4)]
FIT = {"over": "k", "at": 4, "d_in": 8, "d_out": 6, "bias": False, "dtype": "float32"}
LINEAR = {
    "kind": "linear",
    "command": "neuroada bench linear --sweep k",
    "settings": {"rounds": 9},
    "sessions": [{**FACTS, "torch": "2.13.0"}],
    "results": [
        {
            "key": f"{case['name']} {name}",
            "case": case,
            "dtype": "float32",
            "candidate": name,
            "automatic": name == "neuroada-cpu",
            **dict.fromkeys(
                ("forward_us", "backward_us", "total_us", "ratio_to_frozen", "host_us"), SPREAD
            ),
            "tflop_per_s": 0.25,
            "gb_per_s": 12.0,
            "peak_bytes": 1 << 20,
            "kept_bytes": 0,
        }
        for case in CASES
        for name in ("frozen", "neuroada-cpu")
    ]
    + [{"key": "a", "case": CASES[0], "dtype": "float32", "candidate": "x", "skipped": "too old"}],
    "summary": {
        "fits": [{**FIT, "candidate": "frozen", "values": [1, 2, 4], "a_us": 7e3, "b_us": 2.0}],
        "bars": [{"meaning": "at most 1 of frozen", "value": 1.25, "outcome": "missed"}],
    },
}
LINEAR["summary"]["fits"][0]["residual"] = 0.031
MODEL = {
    "kind": "model",
    "command": "neuroada bench model",
    "settings": {
        "sizes": {"layers": 2, "hidden": 8, "intermediate": 16, "vocabulary": 64},
        "dtype": "float32",
        "batch": 1,
        "sequence": 4,
        "k": 2,
        "left_out": {"unsloth": "there is none for a CPU"},
    },
    "sessions": [{**FACTS, "torch": "2.13.0"}],
    "results": [
        {
            "key": f"plain/{method}",
            "mode": "plain",
            "method": method,
            "source": "ours",
            "trainable": 12,
            "step_ms": SPREAD,
            "tokens_per_second": 3210.4,
            "ratio_to_frozen": SPREAD,
            "held_bytes": 3 << 20,
            "step_bytes": 4 << 20,
            "peak_bytes": 7 << 20,
        }
        for method in ("frozen", "neuroada")
    ]
    + [{"key": "compiled/full", "mode": "compiled", "method": "full", "skipped": "too large"}],
}

GIB = 1 << 30
_PARTS = ("weights", "trained", "selection", "optimizer")
_PARTS = (*_PARTS, "peak_gradients", "peak_kept", "peak_scratch")


def _held(each: int, step: float = 1.0) -> dict:
    """Seven parts of so many bytes each."""
    parts = dict.fromkeys(_PARTS, each)
    whole = {"at_rest": 4 * each, "step_peak": 3 * each * step, "peak": 7 * each, "kept": each}
    return {**parts, **whole, "gradients": each, "at": "backward, mul"}


SETTING = {"batch": 1, "sequence": 4, "dtype": "bfloat16", "k": 1, "checkpointing": False}
MEMORY = {
    "kind": "memory",
    "command": "neuroada bench memory",
    "settings": {"quick": True, "tolerance": 0.03},
    "sessions": [{**FACTS, "torch": "2.13.0"}],
    "results": [
        {
            "key": f"models, large, {method}",
            "part": "models",
            "model": "large",
            "setting": SETTING,
            "method": method,
            "predicted": _held(each * GIB),
            "layer": {"weights": 1 << 20, "kept": 1 << 20},
        }
        for method, each in (("neuroada", 2), ("masked-dense", 4))
    ]
    + [
        {
            "key": "validation, a",
            "part": "validation",
            "method": "neuroada",
            "measured": _held(1 << 20),
            "predicted": _held(1 << 20, 1.04),
            "error": {"peak": 0.0, "step_peak": 0.04, "kept": 0.0},
        },
        {"key": "validation, b", "part": "validation", "skipped": "peft is not installed"},
    ],
}
PEERS = {
    "kind": "peers-training",
    "command": "neuroada bench peers-training",
    "settings": {
        "sizes": {"layers": 2, "hidden": 8},
        "steps": 4,
        "rates": [0.01, 0.1],
        "left_out": {"liger": "on a GPU alone"},
    },
    "sessions": [{**FACTS, "torch": "2.13.0"}],
    "results": [
        {
            "key": method,
            "method": method,
            "source": "ours",
            "trainable": 12,
            "learning_rate": 0.03,
            "curve": [4.0, 3.5, 3.75, 3.0],
            "held_out": {"before": 4.5, "after": 3.25},
            "step_ms": SPREAD,
            "tokens_per_second": 3210.4,
            "ratio_to_full": SPREAD,
            "peak_bytes": 7 << 20,
            "saved_bytes": 2048,
        }
        for method in ("neuroada", "full")
    ]
    + [{"key": "frozen", "method": "frozen", "source": "stand-in", "skipped": "nothing trains"}],
}
