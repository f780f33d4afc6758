"""``neuroada bench memory``: the stated model by hand, and against steps that are measured."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from neuroada_kernels.benchmarks.allocations import held_after
from neuroada_kernels.benchmarks.memory_model import command
from neuroada_kernels.benchmarks.memory_model.linears import Place, Siblings, chosen_columns
from neuroada_kernels.benchmarks.memory_model.methods import method, table
from neuroada_kernels.benchmarks.memory_model.plan import Work
from neuroada_kernels.benchmarks.memory_model.predict import predict, predict_layer
from neuroada_kernels.benchmarks.memory_model.shapes import Setting, Sizes
from neuroada_kernels.benchmarks.memory_model.tape import KEPT, PASSED, Tape

ROOT = Path(__file__).parents[2]
SIZES = Sizes(hidden=128, intermediate=320, layers=2, heads=4, vocabulary=64, kv_heads=2)
SETTING = Setting(SIZES, batch=2, sequence=24, dtype="float32", k=2)
ENCODER = Setting(Sizes(64, 256, 2, 4, 64), batch=2, sequence=24, dtype="bfloat16", k=2)
T, N, K, k, e = 24, 32, 48, 3, 2  # tokens, outputs, inputs, bypasses a neuron, bytes an element
W, X, Y = N * K * e, T * K * e, T * N * e
PLAN = 4 * (K + 66 + 4 + 64 + N * k)  # of columns in order, by the 64
C = chosen_columns(N, k, K)
SHIRA = 16 * (N + K)


#: Of the same linears as another method.
VARIANTS = ("neuroada-full", "lora-r16", "lora-r64")
#: Bytes that train, that say which of W trains, and that the forward keeps beside W.
BY_HAND = {
    "frozen": (0, 0, 0),
    "full": (W, 0, X),
    "masked-dense": (W, N * K, X),
    "materialised": (N * k * e, 8 * N * k, X + W),
    "neuroada-full": (4 * N * k, 4 * N * k + PLAN, X),
    "neuroada": (4 * N * k, 4 * N * k + PLAN, X),  # more than half of the columns were chosen
    "neuroada-compact": (4 * N * k, 2 * 4 * N * k + PLAN + 4 * C, T * C * e),
    "neuroada-resident": (4 * N * k, 2 * 4 * N * k + PLAN + N * k * e, X),
    "lora-r8": (8 * (N + K) * e, 0, X + T * 8 * e),
    # W x and B A x, and of every neuron the norm, its scale, and that less one
    "dora-r16": ((16 * (N + K) + N) * e, 0, X + T * 16 * e + 2 * Y + 3 * N * e),
    "ia3": (N * e, 0, Y + N * e),
    "shira-r16": (SHIRA * e, 8 * SHIRA, X + W + 16 * SHIRA + SHIRA * e),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_linear_holds_and_keeps_what_its_formula_says(name):
    tape = Tape()
    layer = method(name, k).build(tape, Place("k_proj", N, K, Siblings(N)), e)
    y = layer(tape.leaf(tape.constant(T * K, e)))
    trained, selection = (sum(v.nbytes for v in of) for of in (layer.trained, layer.selection))
    assert (trained, selection, tape.ledger.by_kind[KEPT]) == BY_HAND[name]
    assert y.nbytes == Y


@pytest.mark.parametrize(("itemsize", "float32_copy"), [(2, 4 * N * K), (4, 0)])
def test_the_materialised_scheme_adds_16_bits_up_in_a_float32_copy_of_w(itemsize, float32_copy):
    tape = Tape()
    layer = method("materialised", k).build(tape, Place("k_proj", N, K, Siblings(N)), itemsize)
    x = tape.constant(T * K, itemsize)
    at_rest = tape.ledger.now
    tape.ledger.restart()
    y = layer(x)
    assert tape.ledger.peak == at_rest + N * K * itemsize + max(float32_copy, y.nbytes)


def test_the_peak_of_two_products_is_in_the_backward_of_the_second():
    """Of x, ``w x`` and ``u (w x)``: w and u train, so each product keeps what it multiplies."""
    tape = Tape()
    w, u = (tape.parameter(100, 4, trains=True) for _ in range(2))
    x = tape.constant(100, 4)
    tape.ledger.restart()
    y = tape.op("first", (w, x), 400, 4, gradients=(400, 400), saves=[x])
    y = tape.op("second", (u, y), 400, 4, gradients=(400, PASSED), saves=[y])
    at_rest, loss = 800, tape.op("sum", [y], 4, 4, gradients=[400])
    del y
    assert tape.ledger.peak == at_rest + 3 * 400 + 4
    tape.backward(loss)
    # x, w x, the gradient of both results, which is the same here, and that of u.
    assert tape.ledger.at == "backward, second"
    assert tape.ledger.peak == at_rest + 4 * 400 + 4
    assert tape.ledger.at_peak["gradient"] == 0


def test_checkpointing_keeps_the_input_alone_and_brings_the_rest_back():
    plain, checkpointed = (
        predict(Setting(SIZES, 2, 24, "float32", 2, checkpointing), method("neuroada", 2))
        for checkpointing in (False, True)
    )
    assert checkpointed.kept < plain.kept
    assert checkpointed.step_peak < plain.step_peak
    assert checkpointed.gradients == plain.gradients


# Of torch, once a process, for the sparse matrices of PEFT's SHiRA.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(
    ("name", "setting"),
    [
        *((name, SETTING) for name in table(2) if name not in VARIANTS),
        *(
            (name, Setting(SIZES, 2, 24, "bfloat16", 2, checkpointing=True))
            for name in ("neuroada", "materialised")
        ),
        ("masked-dense", Setting(SIZES, 2, 24, "float32", 2, checkpointing=True)),
        *((name, ENCODER) for name in ("frozen", "lora-r8", "ia3", "full")),
    ],
)
def test_the_model_says_what_a_step_takes(name, setting):
    pytest.importorskip("transformers")
    from neuroada_kernels.benchmarks.memory_model.measure import measure

    of = method(name, setting.k)
    if of.needs is not None and find_spec(of.needs) is None:
        pytest.skip(f"{of.needs} is not installed")
    measured, predicted = measure(setting, of).as_dict(), predict(setting, of).as_dict()
    for part in ("weights", "trained", "optimizer"):
        assert predicted[part] == measured[part], part
    for part in ("selection", "gradients", "kept", "step_peak", "peak"):
        assert predicted[part] == pytest.approx(measured[part], rel=command.TOLERANCE), part


def test_nothing_is_held_at_rest_beside_what_is_counted():
    """Measured parts are looked for by name; the allocator knows of all."""
    pytest.importorskip("transformers")
    from neuroada_kernels.benchmarks.memory_model.measure import Step

    of = method("neuroada-resident", 2)

    def between_steps() -> Step:
        step = Step(SETTING, of)
        step()
        step.zero_grad()
        return step

    _, held = held_after(between_steps)
    assert held == pytest.approx(predict(SETTING, of).at_rest, rel=0.005)


def test_a_layer_is_the_difference_of_two_models():
    layer = predict_layer(SETTING, method("masked-dense", 2))
    kv = SIZES.hidden // SIZES.heads * SIZES.kv_heads
    linears = 2 * SIZES.hidden * (SIZES.hidden + kv) + 3 * SIZES.hidden * SIZES.intermediate
    assert layer["trained"] == layer["gradients"] == 4 * linears
    assert layer["selection"] == linears
    assert layer["optimizer"] == 2 * 4 * linears + 7 * 4
    assert layer["weights"] == 2 * 4 * SIZES.hidden  # of the norms


def test_the_command_goes_on_and_fails_where_the_model_is_off(monkeypatch, tmp_path, capsys):
    predicted = predict(SETTING, method("neuroada", 2)).as_dict()
    row = {"model": "a model", "setting": SETTING.__dict__ | {"sizes": {}}, "predicted": predicted}
    row["layer"] = predict_layer(SETTING, method("neuroada", 2))
    errors = {"peak": 0.0, "step_peak": 0.0, "kept": 0.0}
    found = {**row, "part": "validation", "method": "neuroada", "measured": predicted}
    found["error"] = errors
    names = ["neuroada", *command.PEERS]
    of_models = [
        Work(name, lambda name=name: {**row, "part": "models", "method": name}) for name in names
    ]
    monkeypatch.setattr(command, "validations", lambda quick: [Work("measured", lambda: found)])
    monkeypatch.setattr(command, "model_work", lambda: of_models)
    path = tmp_path / "memory.json"
    assert command.main(["--quick", "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    assert results["kind"] == "memory"
    assert [row["key"] for row in results["results"]] == ["measured", *names]
    assert "a model" in capsys.readouterr().out
    errors["step_peak"] = 0.04
    assert command.main(["--quick", "--json", str(path)]) == 0  # it has that row already
    html = SimpleNamespace(write_html=lambda documents, path: path.write_text(*documents))
    monkeypatch.setitem(sys.modules, "neuroada_kernels.benchmarks.html", html)
    page = tmp_path / "page.html"
    assert command.main(["--quick", "--html", str(page)]) == 1
    assert page.read_text() == "memory.json"


def test_the_committed_measurements_are_enough_and_met():
    results = json.loads((ROOT / "benchmarks/results/cpu/memory.json").read_text())
    measured = [row for row in results["results"] if "measured" in row]
    assert len(measured) >= 12
    assert all(command.off(row) <= command.TOLERANCE for row in measured)
