"""A results file is whole after every row, and goes on where it stopped."""

import json

import pytest

from neuroada_kernels.benchmarks import records as module
from neuroada_kernels.benchmarks.records import Records, RecordsError


@pytest.fixture
def here(monkeypatch):
    """Where the suite says that it runs."""
    facts = {"package": "1", "commit": "a", "torch": "2", "cpu": "c", "threads": 2}
    monkeypatch.setattr(module, "environment", lambda device: {**facts, "device": device})
    return facts


def _open(path, **settings):
    return Records.open("some", "neuroada bench some", settings, path)


def test_a_row_is_measured_once(here, tmp_path):
    path = tmp_path / "some.json"
    records = _open(path, sizes=(1, 2))
    assert records.once("a", lambda: {"value": 1}) == {"key": "a", "value": 1}
    found = json.loads(path.read_text())
    assert found["results"] == [{"key": "a", "value": 1}]
    assert found["sessions"] == [{**here, "device": "cpu"}]
    again = _open(path, sizes=(1, 2))
    again.once("a", lambda: pytest.fail("measured twice"))
    assert len(again.sessions) == 1  # nothing new ran
    again.once("b", lambda: {"value": 2})
    assert list(_open(path, sizes=(1, 2)).rows) == ["a", "b"]
    assert len(again.sessions) == 2


def test_a_row_that_fails_is_not_there(here, tmp_path):
    records = _open(tmp_path / "some.json")
    records.once("a", dict)
    with pytest.raises(ZeroDivisionError):
        records.once("b", lambda: {"value": 1 / 0})
    assert list(_open(tmp_path / "some.json").rows) == ["a"]


@pytest.mark.parametrize("content", ["{", "[]", '{"kind": "some"}', '{"results": [{}]}'])
def test_a_foreign_file_is_refused(content, here, tmp_path):
    path = tmp_path / "some.json"
    path.write_text(content)
    with pytest.raises(RecordsError, match="holds no results of some"):
        _open(path)
    assert path.read_text() == content


def test_other_settings_are_refused(here, tmp_path):
    _open(tmp_path / "some.json", k=1).once("a", dict)
    with pytest.raises(RecordsError, match="has rows of k 1, expected 2"):
        _open(tmp_path / "some.json", k=2)
    with pytest.raises(RecordsError, match="has rows of kind some, expected other"):
        Records.open("other", "neuroada bench other", {"k": 1}, tmp_path / "some.json")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cpu": "d"}, "has rows of cpu c, expected d"),
        ({"environment": {"A": "b"}}, "has rows of environment None, expected {'A': 'b'}"),
    ],
)
def test_rows_of_another_machine_are_refused(changed, message, here, tmp_path):
    _open(tmp_path / "some.json").once("a", dict)
    here |= changed
    records = _open(tmp_path / "some.json")
    with pytest.raises(RecordsError, match=message):
        records.once("b", dict)
