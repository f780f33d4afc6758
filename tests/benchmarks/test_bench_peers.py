"""``neuroada bench peers-training``, on a Llama that is tiny."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from results_files import on_a_page

pytest.importorskip("accelerate")
pytest.importorskip("peft")

from neuroada_kernels.benchmarks import suites
from neuroada_kernels.benchmarks.llama import Sizes
from neuroada_kernels.benchmarks.method_checks import WrongMethodError
from neuroada_kernels.benchmarks.methods import METHODS
from neuroada_kernels.benchmarks.peers import command, training
from neuroada_kernels.benchmarks.peers.training import Budget, Peers

TINY = Budget(
    Sizes(32, 48, 1, 4, 2, 256),
    steps=4,
    pretrain_steps=4,
    context=16,
    batch=2,
    k=3,
    rates=(1e-3, 1e-2),
    windows=4,
    source_bytes=1 << 16,
    rounds=1,
    round_steps=4,
)

#: LoRA of another rank is the same code.
COVERED = [name for name in METHODS if name not in ("peft-lora-r16", "peft-lora-r64")]

pytestmark = pytest.mark.filterwarnings("default")  # other packages' are theirs


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, dict]:
    path = tmp_path_factory.mktemp("peers") / "peers-training.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "QUICK", TINY)
        arguments = ["peers-training", "--quick", "--threads", "1", "--json", str(path)]
        arguments += ["--methods", *COVERED]
        assert suites.main(arguments) == 0
        # Everything is there: nothing is pretrained again.
        patch.setattr(command, "Peers", lambda *_: pytest.fail("measured twice"))
        assert suites.main(arguments) == 0
    found = json.loads(path.read_text())
    assert found["kind"] == "peers-training"
    assert "neuroada" in on_a_page(path)
    return {row["key"]: row for row in found["results"]}


def test_every_method_trains_and_comes_back_from_the_disk(rows):
    assert list(rows) == COVERED
    assert rows.pop("frozen")["skipped"] == "nothing trains"
    for method, row in rows.items():
        assert "skipped" not in row, row
        assert len(row["curve"]) == TINY.steps
        assert row["held_out"]["after"] != row["held_out"]["before"]
        tried = {found["validation"]: found["rate"] for found in row["rates"]}
        assert row["learning_rate"] == tried[min(tried)], method
        assert len(row["samples_ms"]) == len(row["full_samples_ms"]) == TINY.rounds
        assert row["tokens_per_second"] == 32 / row["step_ms"]["median"] * 1e3
        assert row["saved_bytes"] == sum(row["saved_files"].values()) > 0
        assert row["round_trip"] < 1e-5
    assert rows["full"]["ratio_to_full"]["median"] == 1
    assert rows["neuroada"]["peak_bytes"] < rows["masked-dense"]["peak_bytes"]
    assert rows["neuroada"]["saved_bytes"] < rows["full"]["saved_bytes"]


def test_one_method_in_five_forms_has_one_curve(rows):
    chosen = [method for method in METHODS if METHODS[method].chosen]
    assert len(chosen) == 6
    for method in chosen:
        # The Trainer rounds what it logs.
        assert rows[method]["curve"] == pytest.approx(rows["materialised"]["curve"], abs=2e-4)
        after = rows["materialised"]["held_out"]["after"]
        assert rows[method]["held_out"]["after"] == pytest.approx(after, rel=1e-5)


def test_an_adapter_that_comes_back_as_another_is_refused(tmp_path, monkeypatch):
    save, load = training.storage("neuroada", TINY.k)
    monkeypatch.setattr(training, "storage", lambda *_: (save, lambda base, folder: base))
    peers = Peers(replace(TINY, pretrain_steps=1), tmp_path)
    with pytest.raises(WrongMethodError, match="logits after loading"):
        peers.measure("neuroada")
    assert load(peers._fresh(), tmp_path / "neuroada") is not None


def test_a_package_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        command.main(["--quick"])
    assert "transformers is missing" in capsys.readouterr().err
    assert torch.is_grad_enabled()
