"""Held-out text is text that nothing was trained on."""

from __future__ import annotations

import pytest
import torch

from neuroada_kernels.demo.data import Batches, Corpus, documentation, python_source, split, windows

SOURCE_BYTES = 1 << 18


@pytest.fixture(scope="module")
def source() -> Corpus:
    return python_source(SOURCE_BYTES)


@pytest.fixture(params=["documentation", "source"])
def corpus(request: pytest.FixtureRequest, source: Corpus) -> Corpus:
    return documentation() if request.param == "documentation" else source


def test_no_document_is_trained_on_and_held_out(corpus: Corpus) -> None:
    assert not corpus.train.keys() & corpus.held_out.keys()
    assert not set(corpus.train.values()) & set(corpus.held_out.values())


def test_both_parts_have_text_to_learn_from_and_to_measure_on(corpus: Corpus) -> None:
    assert corpus.train_bytes > 4 * corpus.held_out_bytes > 0


def test_the_domains_share_no_document(source: Corpus) -> None:
    topics, files = documentation(), source
    texts = {*topics.train.values(), *topics.held_out.values()}
    assert not texts & {*files.train.values(), *files.held_out.values()}
    assert not any("topics" in name for name in {*files.train, *files.held_out})


def test_source_is_bounded_repeatable_and_without_tests(source: Corpus) -> None:
    files = source.train | source.held_out
    assert sum(map(len, files.values())) < SOURCE_BYTES + max(map(len, files.values()))
    assert source == python_source(SOURCE_BYTES)
    assert all(not {"test", "tests"}.intersection(name.split("/")) for name in files)


def test_a_document_that_stands_twice_is_on_one_side_only() -> None:
    documents = [(f"{i}", b"%d" % (i % 9)) for i in range(40)]
    parts = split(documents)
    assert sorted([*parts.train.values(), *parts.held_out.values()]) == [
        b"%d" % i for i in range(9)
    ]


def test_an_empty_corpus_is_refused() -> None:
    with pytest.raises(ValueError, match="corpus: no documents"):
        split([("a", b"text")])


def test_windows_do_not_overlap_and_batches_repeat_with_the_seed() -> None:
    text = {"a": bytes(range(256))}  # so that a byte that comes twice betrays an overlap
    rows = windows(text, count=8, context=15)
    assert rows.shape == (8, 16)
    assert len(rows.unique()) == rows.numel()
    first, again, other = (Batches(text, 4, 15, seed).draw() for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
