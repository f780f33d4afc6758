"""The README's table says what the results file says, and nothing else of the README changes."""

import json

import pytest

from neuroada_kernels.benchmarks import readme


def _row(candidate: str, ratio: float, automatic: bool = False) -> dict:
    case = {"name": "a", "tokens": 16, "d_in": 8, "d_out": 4, "k": 2}
    return {
        "key": f"a float32 {candidate}",
        "case": case,
        "dtype": "float32",
        "candidate": candidate,
        "automatic": automatic,
        "ratio_to_frozen": {"median": ratio},
    }


HOST_COST = {"over_frozen_us": {"median": 14.4}, "frozen_us": {"median": 3.1}}
SESSION = {
    "threads": 2,
    "cpu": "a processor",
    "cpu_capability": "AVX2",
    "torch": "2.13.0",
    "commit": "0123456789abcdef",
}
RESULTS = {
    "kind": "linear",
    "command": "neuroada bench linear",
    "settings": {"rounds": 9},
    "sessions": [SESSION],
    "results": [
        _row("frozen", 1.0),
        _row("neuroada-cpu", 1.043, True),
        _row("lora-r8", 1.127),
        {"key": "host-cost", "host_cost": HOST_COST},
    ],
}


def test_the_table_has_a_row_a_case_with_ours_in_bold():
    lines = readme.table(RESULTS).splitlines()
    assert lines[0] == "| T | d_in × d_out | dtype | k | **neuroada-cpu** | lora-r8 |"
    assert lines[2] == "| 16 | 8 × 4 | float32 | 2 | **1.04** | 1.13 |"
    assert "9 interleaved rounds" in lines[-1]
    assert "costs 14 µs of host time more" in lines[-1]


def _kept(method: str, count: int) -> dict:
    linears = count - (2 << 20)
    return {
        "dtype": "float32",
        "method": method,
        "kept_bytes": count,
        "kept_bytes_by_the_linears": linears,
    }


MEMORY = {
    "kind": "block-memory",
    "command": "neuroada bench memory --block",
    "commit": "0123456789abcdef",
    "sizes": {"tokens": 8, "width": 16, "hidden": 64, "k": 1},
    "results": [_kept("frozen", 2 << 20), _kept("full", 10 << 20), _kept("compact", 8 << 20)],
}


def test_the_memory_table_says_how_much_less_is_kept(tmp_path):
    lines = readme.memory_table(MEMORY).splitlines()
    assert lines[0] == "|  | block, float32 | by its linears, float32 |"
    assert lines[2:5] == [
        "| frozen | 2.0 | 0.0 |",
        "| full | 10.0 | 8.0 |",
        "| compact | 8.0 (−20%) | 6.0 (−25%) |",
    ]
    path, results = tmp_path / "README.md", tmp_path / "block-memory.json"
    results.write_text(json.dumps(MEMORY))
    both = f"{readme._BEGIN}\nold\n{readme._END}\n"
    path.write_text(f"{both}{readme._MEMORY_BEGIN}\n{readme._MEMORY_END}\n")
    assert readme.main([str(results), str(path)]) == 0
    assert path.read_text().startswith(both)
    assert readme.memory_table(MEMORY) in path.read_text()


def test_only_what_stands_between_the_markers_is_replaced(tmp_path):
    path, results = tmp_path / "README.md", tmp_path / "results.json"
    results.write_text(json.dumps(RESULTS))
    path.write_text(f"before\n{readme._BEGIN}\nold\n{readme._END}\nafter\n")
    assert readme.main([str(results), str(path)]) == 0
    text = path.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert readme.table(RESULTS) in text
    assert "old" not in text


def test_a_readme_without_markers_is_refused_and_kept(tmp_path, capsys):
    path, results = tmp_path / "README.md", tmp_path / "results.json"
    results.write_text(json.dumps(RESULTS))
    path.write_text("nothing here\n")
    with pytest.raises(SystemExit):
        readme.main([str(results), str(path)])
    assert "has no <!-- benchmark table -->" in capsys.readouterr().err
    assert path.read_text() == "nothing here\n"
