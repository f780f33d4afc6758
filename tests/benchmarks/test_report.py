"""``neuroada report``: what it shows comes from the files, and what it cannot show it says."""

from __future__ import annotations

import html
import json
import re

import pytest
from results_files import LINEAR, MEMORY, MODEL, PEERS

pytest.importorskip("matplotlib")

from neuroada_kernels import cli
from neuroada_kernels.benchmarks.html import (
    ReportError,
    figures,
    linear,
    linear_tables,
    memory,
    model,
    page,
    peers_training,
    write_html,
)
from neuroada_kernels.benchmarks.html.source import Source, kind_of
from neuroada_kernels.benchmarks.html.tables import Strong, Table


@pytest.fixture(scope="module")
def whole(committed_page) -> str:
    return committed_page.read_text()


def test_the_page_is_self_contained(whole):
    for forbidden in ("<script", "src=", "@import", "url(http", "http-equiv", '<link rel="style'):
        assert forbidden not in whole
    ids = re.findall(r'\bid="([^"]*)"', whole)
    assert len(ids) == len(set(ids)) > 0
    assert set(re.findall(r"""(?:href="|url\()#([^")]+)""", whole)) <= set(ids)
    assert len(whole) < 4e6


def test_every_figure_and_table_names_its_file_kind_commit_and_command(whole, documents):
    blocks = re.findall("<figure>.*?</figure>", whole, re.DOTALL)
    assert len(blocks) > 15
    sources = [Source(name, kind_of(document), document) for name, document in documents.items()]
    for block in blocks:
        (escaped,) = re.findall("<figcaption>.*?</figcaption>", block, re.DOTALL)
        caption = html.unescape(escaped)
        assert any(
            all(fact in caption for fact in (s.name, f"kind {s.kind}", s.commit, s.command))
            for s in sources
        ), caption


def test_every_committed_measurement_is_on_the_page(whole, documents):
    for name in ("linear.json", "linear-xeon-amx.json"):
        rows = [row for row in documents[name]["results"] if "ratio_to_frozen" in row]
        for row in rows:
            assert f">{row['ratio_to_frozen']['median']:.3f}</td>" in whole


def test_a_file_of_unknown_kind_is_left_out_and_named(documents, tmp_path, capsys):
    strange = {"new.json": {"kind": "x<y", "results": []}, "list.json": [1], "other.json": {"a": 1}}
    for name, content in strange.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "adapting.json").write_text(json.dumps(documents["adapting.json"]))
    path = tmp_path / "report.html"
    files = [str(tmp_path / name) for name in (*strange, "adapting.json")]
    assert cli.main(["report", *files, "-o", str(path)]) == 0
    said = capsys.readouterr()
    assert "left out: new.json: kind 'x<y', expected one of linear, " in said.err
    assert "left out: list.json: not a results file of a suite" in said.err
    assert f"{path}: 1 of 4 files" in said.out
    text = path.read_text()
    assert "kind &#x27;x&lt;y&#x27;" in text
    assert "other.json" in text


@pytest.mark.parametrize("kind", sorted(page.KINDS))
def test_a_damaged_file_is_refused_before_anything_is_written(kind, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(ReportError, match=f"broken.json: holds no whole results of {kind}"):
        write_html({"broken.json": {"kind": kind, "results": [{}], "sessions": [{}]}}, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"results": [', "some.json: is no JSON that can be read"),
        ("[]", "documents: none has results to show (some.json: not a results file"),
        (None, "some.json: is no JSON that can be read"),
    ],
)
def test_what_cannot_be_read_is_an_error(content, message, tmp_path, capsys):
    if content is not None:
        (tmp_path / "some.json").write_text(content)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["report", str(tmp_path / "some.json"), "-o", str(tmp_path / "report.html")])
    assert exit_.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "report.html").exists()


def test_the_page_does_not_replace_its_own_results(tmp_path, capsys):
    results = tmp_path / "results.json"
    results.write_text("{}")
    with pytest.raises(SystemExit):
        cli.main(["report", "-o", str(tmp_path / "." / "results.json"), str(results)])
    assert "results.json is one of the results, expected another file" in capsys.readouterr().err
    assert results.read_text() == "{}"


def test_a_sweep_shows_its_fits_bars_and_what_was_not_timed():
    section = linear.section(Source("linear.json", "linear", LINEAR))
    shown = "".join(section.blocks)
    for title in ("Cost against k", "Time against k", "Roofline", "How time grows", "Bars"):
        assert title in shown
    assert "Against T" not in shown.title()
    assert ">3.1%</td>" in shown
    assert "at most 1 of frozen</td>" in shown
    assert "x, k1, float32: too old" in shown


def test_lines_in_short_are_a_row_a_method_and_a_column_a_sweep():
    (over_k,) = LINEAR["summary"]["fits"]
    fits = [
        over_k,
        {**over_k, "candidate": "full", "b_us": -0.5},
        {**over_k, "over": "tokens", "at": 2, "values": [4, 8, 16], "bias": True},
        {**over_k, "candidate": "not asked for"},
    ]
    table = linear_tables.growth_in_short({"summary": {"fits": fits}}, ["full", "frozen"])
    assert table.headings == (
        "",
        "8 → 6, float32, T 4, k 1 to 4",
        "8 → 6, bias, float32, k 2, T 4 to 16",
    )
    assert table.rows == [
        ["frozen", "7 ms + 2 µs × k (3%)", "7 ms + 2 µs × T (3%)"],
        ["full", "7 ms − 0.5 µs × k (3%)", ""],
    ]


def test_layers_with_and_without_a_bias_are_in_panels_of_their_own():
    rows = [
        {**row, "case": {**row["case"], "bias": bias}}
        for row in LINEAR["results"]
        if "ratio_to_frozen" in row
        for bias in (False, True)
    ]
    names = [name for name, _ in linear._swept(rows, "k")]
    assert names == ["8 → 6, float32, T 4", "8 → 6, bias, float32, T 4"]


def test_a_training_step_shows_time_memory_and_what_did_not_run():
    section = model.section(Source("model.json", "model", MODEL))
    shown = "".join(section.blocks)
    assert "2 layers of width 8" in section.lead
    assert "3,210</td><td>1.250</td>" in shown
    assert ">7</text>" in shown  # MiB at the peak, behind the bar
    assert "compiled/full: too large" in shown
    assert "unsloth: there is none for a CPU" in shown


def test_memory_stands_beside_mask_based_tuning_and_beside_measurements():
    section = memory.section(Source("memory.json", "memory", MEMORY))
    shown = "".join(section.blocks)
    assert "1 of 2 computed peaks" in section.lead
    assert "within 3%; the largest error is 4.00%" in section.lead
    assert "<td>14.0 of 28.0 (−50%)</td>" in shown
    assert ">14.0</text>" in shown
    assert "with gradient checkpointing" not in shown
    assert "<td>+4.00%</td>" in shown
    assert "validation, b: peft is not installed" in shown


def test_peers_show_what_is_learned_and_what_it_costs():
    section = peers_training.section(Source("peers-training.json", "peers-training", PEERS))
    shown = "".join(section.blocks)
    assert "2 layers of width 8" in section.lead
    assert "<strong>neuroada</strong></td><td>12</td><td>0.03</td><td>3.250</td>" in shown
    assert "Held-out loss was 4.500 bits per byte before (dashed)" in shown
    assert "frozen: nothing trains" in shown
    assert "liger: on a GPU alone" in shown


def test_a_running_mean_is_that_of_a_tenth_of_the_steps():
    steps, means = peers_training._smooth([float(x) for x in range(20)])
    assert steps == [float(x) for x in range(2, 21)]
    assert means == [x + 0.5 for x in range(19)]


def test_what_a_file_says_is_text_and_nothing_else(documents, tmp_path):
    document = json.loads(json.dumps(documents["block-memory.json"]).replace("compact", "<b>$x$&"))
    write_html({"<i>.json": document}, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "<b>" not in text
    assert "<i>" not in text
    assert text.count("&lt;b&gt;$x$&amp;") > 4  # in the table, and as it stands in the figure


def test_coordinates_are_rounded_and_numbers_are_not():
    def paint(axes):
        axes.set_xlim(0, 1)
        axes.set_xticks([0.12345], ["0.12345"])

    svg = figures.draw("a", "some", paint)
    assert ">0.12345</text>" in svg
    assert not re.search(r' d="[^"]*\.\d{3}', svg)
    assert "var(--quiet)" in svg
    assert "#fa00" not in svg


def test_a_table_is_the_same_in_markdown_and_html():
    table = Table("some", ("a", Strong("b")), [["x & y", Strong("1")]])
    assert table.markdown() == "| a | **b** |\n|---|---:|\n| x & y | **1** |"
    assert '<td class="word">x &amp; y</td><td><strong>1</strong></td>' in table.html()
