"""The suite ``neuroada bench quality``: what is compared is fair, and nothing is run twice."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from neuroada_kernels.demo.transformer import Transformer

pytest.importorskip("scipy")
pytest.importorskip("sklearn")
pytest.importorskip("peft")

from quality_runs import DIGITS, QUICK, TINY, run_of

from neuroada_kernels.benchmarks.environment import environment
from neuroada_kernels.benchmarks.html import quality as shown
from neuroada_kernels.benchmarks.html import write_html
from neuroada_kernels.benchmarks.html.source import Source
from neuroada_kernels.benchmarks.options import threads
from neuroada_kernels.benchmarks.quality import command, tasks
from neuroada_kernels.benchmarks.quality.methods import BUDGET_TOLERANCE, Given, adapt, linears
from neuroada_kernels.benchmarks.quality.settings import Settings
from neuroada_kernels.benchmarks.quality.suite import SEARCH_SEED, Key, Suite, open_records, pick
from neuroada_kernels.benchmarks.quality.summary import as_json, summarise
from neuroada_kernels.benchmarks.quality.variants import OURS, Variant, groups, unique

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished() -> Suite:
    suite = Suite(TINY, open_records(TINY))
    with threads(1):
        suite.run(lambda done, total, name: None)
    return suite


def results(suite: Suite, task: str = DIGITS) -> dict[str, tuple]:
    runs = [run for run in suite.runs if run.task == task]
    return {str(run): (run.trainable, run.loss, run.accuracy) for run in runs}


def test_every_variant_is_searched_once_and_has_a_result_for_each_seed(finished):
    assert len(finished.runs) == finished.total
    for task in finished.tasks:
        for variant in unique(groups(task.name, TINY)):
            runs = [
                run for run in finished.runs if (run.task, run.variant) == (task.name, variant.name)
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
            [r.loss for r in finished.runs if (r.task, r.variant) == (task.name, v)]
            for v in (OURS, "masked, the same connections")
        )
        assert len(ours) == 4
        assert masked == pytest.approx(ours, rel=1e-5)
        assert len(set(ours)) == 4, "rates and seeds make a difference"


def test_training_moves_every_method_from_where_frozen_stays(finished):
    losses = {
        run.variant: run.loss
        for run in finished.runs
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


def test_the_rate_is_that_of_the_lowest_loss_in_the_search():
    searched = [
        run_of("search", 1e-3, 2.0),
        run_of("search", 1e-2, 1.5),
        run_of("search", 1e-1, None),
    ]
    assert pick(searched) == 1e-2
    assert pick([*searched, run_of("test", 1e-3, 0.1)]) == 1e-2
    assert pick([run_of("search", 1e-2, 1.0), run_of("search", 1e-3, 1.0)]) == 1e-3
    assert pick([run_of("search", 1e-2, None)]) is None


class Watched(tasks.DigitsTask):
    """Notes which held-out data it is asked to score."""

    def score(self, model, held_out):
        self.scored.append(held_out)
        return super().score(model, held_out)


def test_a_search_sees_validation_data_alone_and_a_result_test_data_alone():
    task = Watched(TINY.digits, "rotated")
    task.scored = []
    suite = Suite(TINY, open_records(TINY), [DIGITS])
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

    suite = Suite(TINY, open_records(TINY, path), [DIGITS])
    with pytest.raises(Stopped):
        suite.run(stop)
    stopped = json.loads(path.read_text())["results"]
    assert len(stopped) == 9

    resumed = Suite(TINY, open_records(TINY, path), [DIGITS])
    new = []
    train = resumed._train
    resumed._train = lambda *arguments: new.append(str(arguments[2])) or train(*arguments)
    resumed.run(lambda done, total, name: None)
    assert len(new) == resumed.total - 9
    assert not set(new) & {row["key"] for row in stopped}
    assert json.loads(path.read_text())["results"][:9] == stopped
    assert len(resumed.records.sessions) == 2
    assert results(resumed) == results(finished)

    again = Suite(TINY, open_records(TINY, path), [DIGITS])
    again._train = lambda *arguments: pytest.fail("ran again")
    again.run(lambda done, total, name: None)


def test_a_file_from_before_the_frame_goes_on_too(finished, tmp_path):
    path, now = tmp_path / "quality.json", finished.records.as_dict()
    runs = [{name: row[name] for name in row if name != "key"} for row in now["results"]]
    before = {name: now[name] for name in ("sessions", "settings")}
    path.write_text(json.dumps({**before, "skipped": {}, "summary": [], "runs": runs}))
    records = open_records(TINY, path)
    assert records.as_dict() == now
    suite = Suite(TINY, records)
    suite._train = lambda *arguments: pytest.fail("ran again")
    suite.run(lambda done, total, name: None)


def test_runs_of_other_settings_and_other_files_are_refused_and_kept(tmp_path):
    path = tmp_path / "quality.json"
    open_records(TINY, path).write()
    before = path.read_text()
    with pytest.raises(ValueError, match="has rows of seeds 2, expected 3"):
        open_records(replace(TINY, seeds=3), path)
    assert path.read_text() == before
    for text in ("", "{}", "[]"):
        path.write_text(text)
        with pytest.raises(ValueError, match="holds no results of quality"):
            open_records(TINY, path)


def test_runs_of_another_torch_are_not_mixed_with_new_ones(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command.Settings, "quick", classmethod(lambda cls: TINY))
    path = tmp_path / "quality.json"
    records = open_records(TINY, path)
    records.sessions.append({**environment(), "torch": "1.0"})
    records.write()
    before = path.read_text()
    with pytest.raises(SystemExit):
        command.main(["--quick", "--tasks", DIGITS, "--json", str(path)])
    shown = " ".join(capsys.readouterr().err.split())
    assert f"has rows of torch 1.0, expected {torch.__version__}" in shown
    assert path.read_text() == before


@pytest.mark.parametrize("settings", [TINY, Settings.full()])
def test_settings_survive_json(settings):
    assert Settings.from_dict(json.loads(json.dumps(settings.as_dict()))) == settings


def test_the_page_shows_every_variant(finished, tmp_path):
    path, again = tmp_path / "a.html", tmp_path / "b.html"
    answers = as_json(summarise(finished))
    document = {**finished.records.as_dict(), "summary": {"groups": answers, "skipped": {}}}
    for page in (path, again):
        write_html({"quality.json": document}, page)
    page = path.read_text()
    assert page == again.read_text()
    for group in answers:
        for row in group["rows"]:
            assert f">{row['variant']}</td>" in page


def test_methods_that_need_peft_are_skipped_with_the_reason_where_it_is_missing(monkeypatch):
    from neuroada_kernels.benchmarks.quality import methods

    monkeypatch.setattr(methods, "find_spec", lambda name: None)
    suite = Suite(replace(TINY, seeds=1, rates=(1e-2,)), open_records(TINY), [DIGITS])
    suite.run(lambda done, total, name: None)
    assert suite.skipped.keys() == {"LoRA", "SHiRA"}
    assert len(suite.runs) == suite.total
    suite.records.summary = {"groups": [], "skipped": suite.skipped}
    document = suite.records.as_dict()
    *_, left_out = shown.section(Source("quality.json", "quality", document)).blocks
    assert left_out.count("peft is missing") == 2
