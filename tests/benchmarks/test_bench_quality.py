"""The suite ``neuroada bench quality``: what is compared is fair, and nothing is run twice."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from neuroada_kernels.benchmarks import suites
from neuroada_kernels.demo.transformer import Config, Transformer

pytest.importorskip("scipy")
pytest.importorskip("sklearn")
pytest.importorskip("peft")

from neuroada_kernels.benchmarks.html import quality as shown
from neuroada_kernels.benchmarks.html import write_html
from neuroada_kernels.benchmarks.html.source import Source
from neuroada_kernels.benchmarks.quality import command, tasks
from neuroada_kernels.benchmarks.quality.methods import BUDGET_TOLERANCE, Given, adapt, linears
from neuroada_kernels.benchmarks.quality.settings import Settings
from neuroada_kernels.benchmarks.quality.suite import SEARCH_SEED, Key, Run, Store, Suite, pick
from neuroada_kernels.benchmarks.quality.summary import Group, Interval, Row, as_json, summarise
from neuroada_kernels.benchmarks.quality.variants import OURS, Variant, groups, unique

ROOT = Path(__file__).parents[2]
QUICK = Settings.quick()
TINY = replace(
    QUICK,
    text=replace(
        QUICK.text,
        model=Config(d_model=16, layers=1, heads=2, d_hidden=32, context=16),
        batch=2,
        windows=4,
        pretrain_steps=5,
        steps=3,
    ),
    digits=replace(QUICK.digits, shifts=("rotated",), width=16, pretrain_steps=10, steps=5),
    rates=(1e-3, 1e-2),
    seeds=2,
    k=2,
    every_k=(1, 2),
    budgets=(),
    fractions=(0.5,),
)
DIGITS = "digits, rotated"


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished() -> Suite:
    suite = Suite(TINY, Store.open(TINY, None))
    suite.run(lambda done, total, name: None)
    return suite


def results(suite: Suite) -> dict[Key, tuple]:
    return {key: (run.trainable, run.loss, run.accuracy) for key, run in suite.store.runs.items()}


def test_every_variant_is_searched_once_and_has_a_result_for_each_seed(finished):
    assert len(finished.store.runs) == finished.total
    for task in finished.tasks:
        for variant in unique(groups(task.name, TINY)):
            runs = [
                run
                for run in finished.store.runs.values()
                if (run.task, run.variant) == (task.name, variant.name)
            ]
            searched = [run for run in runs if run.part == "search"]
            tested = [run for run in runs if run.part == "test"]
            frozen = variant.method == "frozen"
            assert [run.rate for run in searched] == ([] if frozen else list(TINY.rates))
            assert {run.seed for run in searched} <= {SEARCH_SEED}
            assert [run.seed for run in tested] == [0, 1]
            assert {run.rate for run in tested} == {pick(searched)}


def test_masked_tuning_of_the_same_connections_learns_what_neuroada_learns(finished):
    for task in finished.tasks:
        ours, masked = (
            [r.loss for r in finished.store.runs.values() if (r.task, r.variant) == (task.name, v)]
            for v in (OURS, "masked, the same connections")
        )
        assert len(ours) == 4
        assert masked == pytest.approx(ours, rel=1e-5)
        assert len(set(ours)) == 4, "rates and seeds make a difference"


def test_training_moves_every_method_from_where_frozen_stays(finished):
    losses = {
        run.variant: run.loss
        for run in finished.store.runs.values()
        if (run.task, run.part, run.seed) == (DIGITS, "test", 0)
    }
    frozen = losses.pop("frozen")
    assert len(losses) == 9
    assert frozen not in losses.values()


@pytest.mark.parametrize("settings", [QUICK, Settings.full()], ids=["quick", "full"])
def test_budgets_are_equal_within_the_stated_tolerance(settings):
    models = Transformer(settings.text.model), tasks._mlp(settings.digits.width, torch.Generator())
    budgeted = [
        v for v in groups("text", settings)["methods"] if v.method not in ("full", "frozen")
    ]
    assert len(budgeted) == 5
    batches = (
        torch.randint(256, (1, 9)),
        (torch.rand(4, 64), torch.randint(10, (4,))),
    )
    every = tasks.make_tasks(settings)
    for model, batch, name in zip(models, batches, ("text", DIGITS), strict=True):
        state = model.state_dict()
        ours = settings.k * sum(linear.out_features for linear in linears(model).values())
        for variant in budgeted:
            fresh = _fresh(model, state)
            trainable = adapt(fresh, variant, Given(0, [batch], every[name].loss))
            assert abs(trainable / ours - 1) <= BUDGET_TOLERANCE, (name, variant.name)


def _fresh(model: nn.Module, state: dict) -> nn.Module:
    found = copy.deepcopy(model)
    found.load_state_dict(state)
    return found


def test_the_rest_of_a_masked_weight_does_not_train():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    variant = Variant("masked", "masked-layer", 2)
    batch = torch.randn(3, 6), torch.tensor([0, 1, 2])
    loss = tasks.DigitsTask(TINY.digits, "rotated").loss
    assert adapt(model, variant, Given(0, [batch], loss)) == 8
    loss(model, batch).backward()
    gradient = model[0].weight.grad
    dense = torch.autograd.functional.jacobian(
        lambda weight: nn.functional.cross_entropy(batch[0] @ weight.T, batch[1]),
        model[0].weight.detach(),
    )
    largest = dense.abs().flatten().topk(8).indices
    assert set(gradient.flatten().nonzero().flatten().tolist()) == set(largest.tolist())


def _run(part: str, rate: float | None, loss: float | None, **more) -> Run:
    fields = {"task": "text", "variant": OURS, "seed": 0, "trainable": 1, "accuracy": None}
    return Run(**(fields | {"seconds": 0.0} | more), part=part, rate=rate, loss=loss)


def test_the_rate_is_that_of_the_lowest_loss_in_the_search():
    searched = [_run("search", 1e-3, 2.0), _run("search", 1e-2, 1.5), _run("search", 1e-1, None)]
    assert pick(searched) == 1e-2
    assert pick([*searched, _run("test", 1e-3, 0.1)]) == 1e-2
    assert pick([_run("search", 1e-2, 1.0), _run("search", 1e-3, 1.0)]) == 1e-3
    assert pick([_run("search", 1e-2, None)]) is None


class Watched(tasks.DigitsTask):
    """Notes which held-out data it is asked to score."""

    def score(self, model, held_out):
        self.scored.append(held_out)
        return super().score(model, held_out)


def test_a_search_sees_validation_data_alone_and_a_result_test_data_alone():
    task = Watched(TINY.digits, "rotated")
    task.scored = []
    suite = Suite(TINY, Store.open(TINY, None), [DIGITS])
    variant = Variant(OURS, "neuroada", 2)
    for part in ("search", "test"):
        suite._train(task, variant, Key(DIGITS, OURS, part, 1e-2, 0))
    world = suite._world(task, 0)
    validated, tested = task.scored
    assert validated is world.validation
    assert tested is world.test


def test_no_image_is_in_two_parts_and_all_seeds_test_on_the_same():
    def parts(seed):
        generator = torch.Generator().manual_seed(seed)
        found = tasks._digits(generator, [800, 200, 250])
        return [[tuple(image.tolist()) for image in images] for images, _ in found]

    first, second = parts(0), parts(1)
    assert first[-1] == second[-1]
    assert first[0] != second[0]
    assert len(set().union(*first)) == sum(map(len, first))
    assert set(first[-1]).isdisjoint(image for part in second[:-1] for image in part)


def test_text_is_held_out_twice():
    world = tasks.TextTask(TINY.text).world(0)
    validation, test = (
        {tuple(w.tolist()) for w in part} for part in (world.validation, world.test)
    )
    assert len(validation) == len(test) == TINY.text.windows
    assert not validation & test


class Stopped(Exception):  # noqa: N818 - as one who interrupts
    pass


def test_a_stopped_suite_goes_on_where_it_was(finished, tmp_path):
    path = tmp_path / "quality.json"

    def stop(done: int, total: int, name: str) -> None:
        if done == 9:
            raise Stopped

    suite = Suite(TINY, Store.open(TINY, path), [DIGITS])
    with pytest.raises(Stopped):
        suite.run(stop)
    stopped = json.loads(path.read_text())
    assert len(stopped["runs"]) == 9

    resumed = Suite(TINY, Store.open(TINY, path), [DIGITS])
    new = []
    train = resumed._train
    resumed._train = lambda *arguments: new.append(arguments[2]) or train(*arguments)
    resumed.run(lambda done, total, name: None)
    assert len(new) == resumed.total - 9
    assert not set(new) & {Run(**row).key for row in stopped["runs"]}
    assert json.loads(path.read_text())["runs"][:9] == stopped["runs"]
    assert len(resumed.store.sessions) == 2
    whole = {key: value for key, value in results(finished).items() if key.task == DIGITS}
    assert results(resumed) == whole

    again = Suite(TINY, Store.open(TINY, path), [DIGITS])
    again._train = lambda *arguments: pytest.fail("ran again")
    again.run(lambda done, total, name: None)


def test_runs_of_other_settings_and_other_files_are_refused_and_kept(tmp_path):
    path = tmp_path / "quality.json"
    Store.open(TINY, path).write()
    before = path.read_text()
    with pytest.raises(ValueError, match="runs of other settings"):
        Store.open(replace(TINY, seeds=3), path)
    assert path.read_text() == before
    for text in ("", "{}", "[]"):
        path.write_text(text)
        with pytest.raises(ValueError, match="holds no runs of this suite"):
            Store.open(TINY, path)


def test_runs_of_another_torch_are_not_mixed_with_new_ones(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command.Settings, "quick", classmethod(lambda cls: TINY))
    path = tmp_path / "quality.json"
    store = Store.open(TINY, path)
    store.open_session()
    store.sessions[0]["torch"] = "1.0"
    store.write()
    before = path.read_text()
    with pytest.raises(SystemExit):
        command.main(["--quick", "--tasks", DIGITS, "--json", str(path)])
    shown = " ".join(capsys.readouterr().err.split())
    assert f"has runs of torch 1.0, expected {torch.__version__}" in shown
    assert path.read_text() == before


@pytest.mark.parametrize("settings", [TINY, Settings.full()])
def test_settings_survive_json(settings):
    assert Settings.from_dict(json.loads(json.dumps(settings.as_dict()))) == settings


def test_the_interval_is_students():
    # t = 2.776445 at 4 degrees of freedom, s = sqrt(2.5), n = 5.
    found = Interval.of([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776445 * math.sqrt(2.5 / 5)
    assert (found.mean, found.half) == (3.0, pytest.approx(half, rel=1e-6))
    assert found.lower == pytest.approx(3 - half)
    assert Interval.of([2.0, 2.0, 2.0]) == Interval(2.0, 2.0, 2.0)
    assert math.isnan(Interval.of([2.0]).half)


def test_differences_are_paired_by_seed():
    store = Store.open(TINY, None)
    for seed, ours, theirs in ((0, 1.0, 1.5), (1, 2.0, 2.6), (2, 3.0, 3.4)):
        store.runs |= {
            run.key: run
            for run in (
                _run("test", 1e-2, ours, seed=seed),
                _run("test", 1e-3, theirs, seed=seed, variant="LoRA"),
            )
        }
    rows = {row.variant: row for row in summarise(Suite(TINY, store, ["text"]))[0].rows}
    difference = rows["LoRA"].difference
    assert difference.mean == pytest.approx(0.5)
    # t = 4.302653 at 2 degrees of freedom, s = 0.1: far less than the seeds differ.
    assert difference.half == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
    assert rows["LoRA"].verdict == "worse"
    assert rows["LoRA"].at_edge
    assert rows[OURS].difference is None
    store.runs[Key("text", "LoRA", "test", 1e-3, 1)] = _run("test", 1e-3, None, variant="LoRA")
    rows = {row.variant: row for row in summarise(Suite(TINY, store, ["text"]))[0].rows}
    assert rows["LoRA"].loss is None
    plain = {
        row["variant"]: row
        for row in as_json([Group("", "", "methods", [*rows.values()])])[0]["rows"]
    }
    assert shown.cells(plain["LoRA"], plain[OURS])[3] == "diverged"


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [((-0.2, -0.3, -0.1), "better"), ((-0.2, -0.5, 0.1), "even"), ((1e-5, 9e-6, 2e-5), "even")],
)
def test_the_verdict_is_that_of_the_interval(difference, verdict):
    row = Row("a", 1, 1e-2, False, Interval(1, 1, 1), Interval(*difference), None, 1, "lora")
    assert row.verdict == verdict


def test_the_page_shows_every_variant(finished, tmp_path):
    path, again = tmp_path / "a.html", tmp_path / "b.html"
    document = {**finished.store.as_dict(), "summary": as_json(summarise(finished))}
    for page in (path, again):
        write_html({"quality.json": document}, page)
    page = path.read_text()
    assert page == again.read_text()
    for group in document["summary"]:
        for row in group["rows"]:
            assert f">{row['variant']}</td>" in page


def test_the_command_writes_what_it_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command.Settings, "quick", classmethod(lambda cls: TINY))
    data, page = tmp_path / "quality.json", tmp_path / "quality.html"
    arguments = ["quality", "--quick", "--seeds", "1", "--tasks", DIGITS]
    assert suites.main([*arguments, "--json", str(data), "--html", str(page)]) == 0
    found = json.loads(data.read_text())
    assert found["settings"]["seeds"] == 1
    assert {group["task"] for group in found["summary"]} == {DIGITS}
    assert found["sessions"][0]["torch"] == torch.__version__
    shown = capsys.readouterr().out
    assert all(name in shown for name in (OURS, "LoRA", "SHiRA", "frozen"))
    assert page.read_text().startswith("<!doctype html>")
    assert suites.main([*arguments, "--json", str(data)]) == 0
    assert f"{len(found['runs'])} runs are done already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quality", "--tasks", "nothing"], "tasks: ['nothing'], expected of ['text', "),
        (["quality", "--seeds", "0"], "0, expected at least 1"),
        (["--cases", "nothing"], "--cases: none has such a name"),
        (["linear", "--cases", "nothing"], "--cases: none has such a name"),
    ],
)
def test_bench_runs_the_suite_that_is_named_and_linear_by_default(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        suites.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_package_is_named_before_anything_is_run(monkeypatch, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        command.main(["--quick"])
    assert "scipy is missing, pip install 'neuroada-kernels[bench]'" in capsys.readouterr().err


def test_methods_that_need_peft_are_skipped_with_the_reason_where_it_is_missing(monkeypatch):
    from neuroada_kernels.benchmarks.quality import methods

    monkeypatch.setattr(methods, "find_spec", lambda name: None)
    suite = Suite(replace(TINY, seeds=1, rates=(1e-2,)), Store.open(TINY, None), [DIGITS])
    suite.run(lambda done, total, name: None)
    assert suite.store.skipped.keys() == {"LoRA", "SHiRA"}
    assert len(suite.store.runs) == suite.total
    (left_out,) = shown.section(Source("quality.json", "quality", suite.store.as_dict())).blocks[
        -1:
    ]
    assert left_out.count("peft is missing") == 2


def test_the_committed_summary_is_that_of_the_committed_runs():
    path = ROOT / "benchmarks/results/cpu/quality.json"

    def rounded(text: str) -> dict:
        return json.loads(text, parse_float=lambda number: round(float(number), 6))

    found = rounded(path.read_text())
    settings = Settings.from_dict(json.loads(path.read_text())["settings"])
    suite = Suite(settings, Store.open(settings, path))
    assert len(found["runs"]) == suite.total
    assert found["summary"] == rounded(json.dumps(as_json(summarise(suite))))
