"""The examples run as they stand, and the README shows lines of theirs."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from peft.tuners.tuners_utils import BaseTunerLayer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.fixture
def run(monkeypatch, tmp_path):
    """An example's ``main``, run in an empty folder; what it returns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return lambda name, *argv: runpy.run_path(str(ROOT / "examples" / name))["main"]([*argv])


def test_a_causal_model_is_adapted_saved_loaded_and_merged(run, tmp_path, capsys):
    found = run("hf_causal_lm.py", "--steps", "40")
    assert "16,384 of 377,472 parameters train" in capsys.readouterr().out
    assert found["losses"][-1] < found["losses"][0] - 1
    assert found["difference"] < 1e-4
    assert found["text"].startswith("The statement ")
    assert (tmp_path / "adapter.safetensors").stat().st_size < 200_000


def test_peft_and_the_trainer_train_save_serve_and_merge(run, tmp_path):
    found = run("peft_trainer.py", "--steps", "40")
    assert found["losses"][-1] < found["losses"][0] - 1
    default, untrained, base = found["mixed"]
    assert found["merged"][0].equal(default)
    assert untrained.equal(base)
    assert not default.equal(base)
    saved = {path.name for path in (tmp_path / "peft-trainer" / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= saved
    assert not any(isinstance(module, BaseTunerLayer) for module in found["model"].modules())


def test_the_readme_shows_lines_of_the_examples():
    shown = re.findall(r"^<!-- (examples/\w+\.py) -->\n```python\n(.*?)^```$", README, re.S | re.M)
    assert [path for path, _ in shown] == [
        "examples/torchrun_fsdp.py",
        "examples/hf_causal_lm.py",
        "examples/peft_trainer.py",
    ]
    for path, block in shown:
        lines = iter([line.strip() for line in (ROOT / path).read_text().splitlines()])
        for line in filter(None, map(str.strip, block.splitlines())):
            assert line in lines, f"README: {line!r} does not stand in {path}, or in this order"
