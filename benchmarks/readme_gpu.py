"""GPU results in the documentation, from the files that ``benchmarks/gpu_run.sh`` writes."""

from __future__ import annotations

from neuroada_kernels.benchmarks import bars_gpu
from neuroada_kernels.benchmarks.html import llama_block, model
from neuroada_kernels.benchmarks.html.source import Source

RESULTS = "benchmarks/results/h200"
FILES = tuple(bars_gpu.FILES.values())
REPEAT = "`benchmarks/gpu_run.sh OUTDIR` repeats it."


def block_table(source: Source) -> str:
    """The linears of a Llama-3-8B block summed; empty if no complete block was measured."""
    content = llama_block.summed(source.document)
    if not content.rows:
        return ""
    title = f"{content.title}, on an {_gpu(source)}:"
    return "\n\n".join((title, content.markdown(), f"{content.note} {_where(source)}"))


def model_table(source: Source) -> str:
    """Tokens per second and peak memory of a training step."""
    content = model.in_short(source.document)
    title = f"A training step of a whole model on an {_gpu(source)}. {model.described(source)}"
    blank = "Blank cells were not measured. " * model.incomplete(source.document)
    return "\n\n".join((title, content.markdown(), blank + _where(source)))


def targets(*sources: Source) -> str:
    """The targets, one per row, and whether each was reached."""
    content = bars_gpu.table(bars_gpu.judged(sources))
    command = f"`neuroada bench gpu-bars {RESULTS}` says the same."
    where = " ".join(dict.fromkeys(_versions(source) for source in sources))
    return "\n\n".join((content.markdown(), f"{content.note} {where} {command}"))


def _gpu(source: Source) -> str:
    return str(source.sessions[-1]["gpu"])


def _where(source: Source) -> str:
    return f"{_rounds(source)}{_versions(source)} {REPEAT}"


def _rounds(source: Source) -> str:
    rounds = source.document["settings"].get("rounds")
    return "" if rounds is None else f"{rounds} interleaved rounds. "


def _versions(source: Source) -> str:
    facts = source.facts()
    return f"{facts['Machine']}; {facts['Versions']}; commit {source.commit}."
