"""``neuroada bench model``, on a Llama that is tiny."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from results_files import on_a_page
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

from neuroada_kernels.benchmarks import methods, model, suites
from neuroada_kernels.benchmarks.methods import METHODS
from neuroada_kernels.benchmarks.options import threads

TINY = ["--hidden", "32", "--intermediate", "48", "--layers", "2", "--heads", "4"]
TINY += ["--kv-heads", "2", "--vocabulary", "50", "--sequence", "16", "--batch", "2"]
TINY += ["--k", "3", "--steps", "3", "--warmup", "1"]
#: LoRA of another rank is the same code.
COVERED = [name for name in METHODS if name not in ("peft-lora-r16", "peft-lora-r64")]
#: Of a layer's linears, [d_out, d_in].
SHAPES = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("default"),  # other packages' are theirs
]


def run(path: Path, *options: str) -> dict[str, dict]:
    """Rows by key."""
    assert suites.main(["model", *TINY, *options, "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["kind"] == "model"
    return {row["key"]: row for row in found["results"]}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, dict]:
    path = tmp_path_factory.mktemp("model") / "model.json"
    with threads(1):
        run(path, "--modes", "checkpointed", "--methods", "frozen", "neuroada")
        found = run(path, "--modes", "plain", "--methods", *COVERED)
    assert "checkpointed" in on_a_page(path)
    return found


def test_every_method_is_checked_timed_and_weighed(rows):
    checkpointed = ["checkpointed/frozen", "checkpointed/neuroada"]
    assert list(rows) == [*checkpointed, *(f"plain/{method}" for method in COVERED)]
    for row in rows.values():
        assert row["checkpointing"] == (row["mode"] == "checkpointed")
        assert len(row["samples_ms"]) == len(row["frozen_samples_ms"]) == 3
        assert row["tokens_per_second"] == 32 / row["step_ms"]["median"] * 1e3
        assert row["paired"]
        ratios = sorted(map(float.__truediv__, row["samples_ms"], row["frozen_samples_ms"]))
        assert row["ratio_to_frozen"]["median"] == ratios[1]
        assert row["peak_bytes"] == row["held_bytes"] + row["step_bytes"]
        assert row["step_bytes"] > 0
        assert row["checks"]["loss"] < 1e-5
        assert row["checks"]["input_gradient"] < 1e-5
        assert len(row["losses"]) == 1 + 1 + 3 + 1  # checked, warm-up, timed, weighed


def test_what_trains_is_what_the_methods_say(rows):
    trained = {name: rows[f"plain/{name}"]["trainable"] for name in COVERED}
    bypasses = 2 * sum(3 * d_out for d_out, _ in SHAPES)
    assert trained["frozen"] == 0
    for name in COVERED:
        method = METHODS[name]
        if method.chosen and name != "masked-dense":
            assert trained[name] == bypasses
        known = rows[f"plain/{name}"]["checks"]["gradients"]
        assert (known is not None) == method.chosen
        assert known is None or known < 1e-5
    assert trained["masked-dense"] == 2 * sum(d_out * d_in for d_out, d_in in SHAPES)
    assert trained["peft-lora-r8"] == 2 * sum(8 * (d_out + d_in) for d_out, d_in in SHAPES)


def test_memory_is_what_each_method_must_hold(rows):
    held = {name: rows[f"plain/{name}"]["held_bytes"] for name in COVERED}
    weights = 4 * 2 * sum(d_out * d_in for d_out, d_in in SHAPES)
    assert held["masked-dense"] - held["frozen"] > 2 * weights  # two moments of AdamW
    assert held["frozen"] < held["neuroada"] < held["frozen"] + weights
    of_step = {name: rows[f"plain/{name}"]["step_bytes"] for name in COVERED}
    # It copies every weight, and keeps the copies for the backward.
    assert of_step["materialised"] - of_step["neuroada"] > 0.9 * weights
    assert rows["checkpointed/frozen"]["step_bytes"] < of_step["frozen"]


def test_a_second_call_goes_on_where_the_first_stopped(tmp_path, monkeypatch):
    path = tmp_path / "model.json"
    before = run(path, "--modes", "plain", "--methods", "neuroada")
    assert list(before) == ["plain/neuroada"]
    prepared = []
    real = model.prepare
    monkeypatch.setattr(model, "prepare", lambda m, *a: prepared.append(m) or real(m, *a))
    after = run(path, "--modes", "plain", "--methods", "neuroada", "frozen")
    assert after["plain/neuroada"] == before["plain/neuroada"]
    assert list(after) == ["plain/neuroada", "plain/frozen"]
    assert prepared == ["frozen"]


def without_inductor(module: nn.Module) -> None:
    call = torch.compile(module._call_impl, backend="eager")
    object.__setattr__(module, "_compiled_call_impl", call)


def test_compiled_methods_compute_the_same_and_others_say_why_not(tmp_path, monkeypatch):
    def compile_(module: nn.Module) -> None:
        if any("lora" in name for name, _ in module.named_parameters()):
            raise NotImplementedError("no such operator\nand more")
        without_inductor(module)

    monkeypatch.setattr(nn.Module, "compile", compile_)
    options = ["--modes", "compiled", "--methods", "frozen", "neuroada", "peft-lora-r8"]
    rows = run(tmp_path / "model.json", *options)
    assert rows["compiled/neuroada"]["graph_breaks"] == 0
    assert rows["compiled/neuroada"]["checks"]["compiled"] < 1e-5
    reason = rows["compiled/peft-lora-r8"]["skipped"]
    assert reason == "NotImplementedError: no such operator"


def test_what_does_not_fit_says_so_and_the_others_go_on(tmp_path, monkeypatch):
    def exhausted(built: nn.Module, k: int) -> nn.Module:
        raise torch.OutOfMemoryError("out of memory\ntried to allocate")

    monkeypatch.setitem(METHODS, "full", replace(METHODS["full"], adapt=exhausted))
    rows = run(tmp_path / "model.json", "--modes", "plain", "--methods", "full", "frozen")
    assert rows["plain/full"]["skipped"] == "OutOfMemoryError: out of memory"
    assert rows["plain/frozen"]["trainable"] == 0


def _trains_a_norm(built: nn.Module) -> None:
    built.get_submodule("model.norm").weight.requires_grad_()


def _leaves_one_out(built: nn.Module) -> None:
    built.get_submodule("model.layers.1.self_attn.v_proj").delta.requires_grad_(False)


def _starts_elsewhere(built: nn.Module) -> None:
    built.get_submodule("model.layers.0.mlp.up_proj").weight.mul_(1.01)


def _scales_a_gradient(built: nn.Module) -> None:
    delta = built.get_submodule("model.layers.0.mlp.up_proj").delta
    delta.register_hook(lambda gradient: 1.01 * gradient)


def _halves_a_bypass(built: nn.Module) -> None:
    def halve(layer: nn.Module, inputs: tuple[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
        bypass = y - torch.nn.functional.linear(*inputs, layer.weight)
        return y - (bypass / 2).detach()

    built.get_submodule("model.layers.0.mlp.up_proj").register_forward_hook(halve)


def _writes_into_the_base(built: nn.Module) -> None:
    norm = built.get_submodule("model.norm").weight
    hook = built.get_submodule("model.layers.0.mlp.up_proj").delta.register_hook
    hook(lambda gradient: (norm.data.mul_(1.000001), gradient)[1])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_trains_a_norm, "model.norm.weight trains, expected what matches"),
        (_leaves_one_out, "numbers train, expected"),
        (_starts_elsewhere, "a relative error of"),
        (_scales_a_gradient, "in gradients"),
        (_halves_a_bypass, "in the loss's drop"),
        (_writes_into_the_base, "model.norm.weight has changed, and does not train"),
    ],
)
def test_a_wrong_method_is_not_timed(spoil, message, tmp_path, monkeypatch, capsys):
    real = METHODS["neuroada"].adapt

    @torch.no_grad()
    def adapt(built: nn.Module, k: int) -> nn.Module:
        adapted = real(built, k)
        spoil(adapted)
        return adapted

    monkeypatch.setitem(METHODS, "neuroada", replace(METHODS["neuroada"], adapt=adapt))
    path = tmp_path / "model.json"
    options = ["--modes", "plain", "--methods", "neuroada", "--json", str(path)]
    assert model.main([*TINY, *options]) == 1
    assert message in " ".join(capsys.readouterr().out.split())
    assert not path.exists()


def test_a_page_is_that_of_the_results(tmp_path, monkeypatch, capsys):
    pages = {}
    html = SimpleNamespace(write_html=lambda documents, path: pages.update({path: documents}))
    monkeypatch.setitem(sys.modules, "neuroada_kernels.benchmarks.html", html)
    page = tmp_path / "page.html"
    options = ["--modes", "plain", "--methods", "frozen", "--html", str(page)]
    assert model.main([*TINY, *options]) == 0
    (row,) = pages[page]["model.json"]["results"]
    assert row["key"] == "plain/frozen"
    shown = capsys.readouterr().out
    assert "frozen" in shown
    assert "not run: unsloth" in shown


def test_a_method_whose_package_is_missing_says_so(monkeypatch):
    monkeypatch.setattr(methods, "find_spec", lambda name: None)
    assert "peft is missing" in methods.why_not("peft-lora-r8")
    assert "peft is missing" in methods.why_not("neuroada-peft")
    assert methods.why_not("neuroada") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--k", "1000"], "--k: 1000, expected at most 32, the inputs of the narrowest linear"),
        (["--hidden", "30"], "--hidden: 30, expected a multiple of two times 4 heads"),
        (["--kv-heads", "3"], "--heads: 4, expected a multiple of 3, the kv heads"),
        (["--backend", "foo"], "--backend foo: expected one of "),
    ],
)
def test_sizes_that_cannot_be_are_refused_at_once(options, message, capsys):
    with pytest.raises(SystemExit):
        model.main([*TINY, *options])
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is visible")
def test_without_a_gpu_or_transformers_it_stops_at_once(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        model.main(["--device", "cuda"])
    assert "--device cuda: no GPU is visible" in capsys.readouterr().err
    monkeypatch.setattr(model, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        model.main([])
    assert "transformers is missing" in capsys.readouterr().err
