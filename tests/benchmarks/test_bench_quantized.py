"""The benchmark over a 4-bit base, on one that is tiny."""

from __future__ import annotations

import json

import foreign
import pytest

from neuroada_kernels.benchmarks import quantized

TINY = ["--width", "64", "--heads", "2", "--layers", "1", "--batch", "1", "--sequence", "8"]
TINY += ["--steps", "20", "--rate", "0.01", "--dtype", "float32"]


def test_the_loss_falls_and_the_base_stays(tmp_path, capsys):
    foreign.library("bitsandbytes")
    out = tmp_path / "rows.json"
    assert (
        quantized.main([*TINY, "--methods", "neuroada-k1", "neuroada-k4", "--json", str(out)]) == 0
    )
    one, four = json.loads(out.read_text())
    assert (one["trained"], four["trained"]) == (13 * 64, 4 * 13 * 64)
    assert one["optimizer_bytes"] == 8 * one["trained"]
    # Of x the columns that were chosen, where these are few.
    assert 0 < one["kept_bytes"] < four["kept_bytes"]
    assert four["last_loss"] < one["last_loss"] < one["first_loss"]
    assert four["base_unchanged"]
    assert capsys.readouterr().out.count("| yes |") == 2


@pytest.mark.parametrize("library", ["bitsandbytes", "peft"])
def test_what_is_missing_is_said(library, monkeypatch, capsys):
    monkeypatch.setattr(
        "neuroada_kernels.nn.foreign.find_spec", lambda name: None if name == library else name
    )
    assert quantized.main([*TINY, "--methods", "qlora-r8"]) == 1
    text = "".join(capsys.readouterr())
    assert f"{library} is not installed: install the extra '" in text
