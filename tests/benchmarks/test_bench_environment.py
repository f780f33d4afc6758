"""What a results file says of where it was made."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from results_files import LINEAR, MODEL, PEERS

from neuroada_kernels import cli
from neuroada_kernels.benchmarks import environment
from neuroada_kernels.benchmarks.html.source import Source

ROOT = Path(__file__).parents[2]
#: Of the package's own variables, those that leave what runs, and what it computes, as it is.
#: What was built is named by itself, and the last two are the tests'.
CHANGE_NOTHING = {
    "NEUROADA_COMMIT",
    "NEUROADA_BUILD",
    "NEUROADA_CUTLASS",
    "NEUROADA_REQUIRE",
    "NEUROADA_HOST_CUDA_LIBRARY",
}
#: A name that is put together: of all that are set, to show them.
FAMILIES = {"NEUROADA_"}


@pytest.fixture
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in environment.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_variables_that_change_what_runs_are_named_where_one_is_set(nothing_set) -> None:
    nothing_set.setenv("NEUROADA_COMMIT", "abc")
    assert "environment" not in environment.environment()
    nothing_set.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    nothing_set.setenv("NEUROADA_CPU_FUSED", "0")
    expected = {"NEUROADA_CPU_FUSED": "0", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    assert environment.environment()["environment"] == expected


def names_in(root: Path, *patterns: str, before: str = "") -> set[str]:
    """What files below ``root`` call so, a name that is put together in its parts."""
    name = re.compile(before + r"(NEUROADA_\w*(?:\{\w+\}\w*)*)")
    paths = [path for pattern in patterns for path in root.glob(pattern)]
    return {found for path in paths for found in name.findall(path.read_text())}


def variables_in(root: Path) -> set[str]:
    """The package's own variables that its sources name, however they read them.

    CMake has variables too, and C++ has macros: what CMake sets or C++ defines is none of these,
    but for a name in quotes.
    """
    cmake = ("CMakeLists.txt", "csrc/**/CMakeLists.txt", "tests/**/CMakeLists.txt")
    cpp = [f"csrc/**/*.{ending}" for ending in ("cpp", "h", "cu", "cuh")]
    of_cmake = names_in(root, *cmake, before=r"(?<!ENV\{)\b")
    of_cpp = names_in(root, *cpp, before="#define ")
    python = ("neuroada_kernels/**/*.py", "triton_kernels/**/*.py", "benchmarks/**/*.py")
    return (
        names_in(root, *python)
        | names_in(root, *cmake, before=r"ENV\{")
        | names_in(root, *cpp, before=r'(?<!#error )"')
        | (names_in(root, "setup.py", "Makefile", ".ci/run", "benchmarks/*.sh") - of_cmake)
        | (names_in(root, *cpp) - of_cmake - of_cpp)
    )


def test_every_variable_that_the_package_reads_is_known() -> None:
    """A new one is named in results, or said to change nothing."""
    known = {name for name in environment.VARIABLES if name.startswith("NEUROADA_")}
    assert variables_in(ROOT) == known | CHANGE_NOTHING | FAMILIES


def test_the_documentation_names_every_variable_and_no_other() -> None:
    page = (ROOT / "docs/environment.md").read_text()
    assert set(re.findall(r"NEUROADA_\w*", page)) == variables_in(ROOT) - FAMILIES
    assert set(environment.VARIABLES) <= set(re.findall(r"`(\w+)", page))


@pytest.mark.parametrize(
    ("path", "text", "name"),
    [
        ("neuroada_kernels/a.py", 'read = os.environ\nread["NEUROADA_NEW"]', "NEUROADA_NEW"),
        ("triton_kernels/a.py", 'get(f"NEUROADA_{kind}_NEW")', "NEUROADA_{kind}_NEW"),
        ("setup.py", 'NAME = "NEUROADA_NEW"', "NEUROADA_NEW"),
        ("Makefile", "NEW ?= $(NEUROADA_NEW)", "NEUROADA_NEW"),
        (".ci/run", "echo ${NEUROADA_NEW:-}", "NEUROADA_NEW"),
        ("CMakeLists.txt", "set(NEW $ENV{NEUROADA_NEW})", "NEUROADA_NEW"),
        ("csrc/cpu/a.cpp", 'char name[] = "NEUROADA_NEW";', "NEUROADA_NEW"),
        ("csrc/cpu/a.h", 'read(std::string("NEUROADA_") + name);', "NEUROADA_"),
    ],
)
def test_a_variable_is_found_however_it_is_read(
    tmp_path: Path, path: str, text: str, name: str
) -> None:
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(text)
    assert variables_in(tmp_path) == {name}


RESTRICTED = {"ONEDNN_MAX_CPU_ISA": "AVX2", "NEUROADA_CPU_ISA": "avx2"}
SAID = "with ONEDNN_MAX_CPU_ISA=AVX2 NEUROADA_CPU_ISA=avx2"


def restricted(document: dict) -> dict:
    (session,) = document["sessions"]
    return {**document, "sessions": [{**session, "environment": RESTRICTED}]}


def test_a_restricted_machine_is_no_plain_one_wherever_it_is_named(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    source = Source("linear.json", "linear", restricted(LINEAR))
    assert source.machine == f"2 threads of an a processor (AVX2) {SAID}"
    assert source.chip == f"a processor {SAID}"
    assert f" {SAID}" not in Source("linear.json", "linear", LINEAR).machine
    path, page = tmp_path / "a.json", tmp_path / "report.html"
    for document in (LINEAR, MODEL, PEERS):
        path.write_text(json.dumps(restricted(document)))
        assert cli.main(["report", str(path), "-o", str(page)]) == 0
        assert page.read_text().count(SAID) > 1  # at the page's head, and at its section's


def test_the_commit_is_that_of_the_checkout_which_tracks_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEUROADA_COMMIT", "abc")
    assert environment._commit(tmp_path) == ("abc", None)
    monkeypatch.delenv("NEUROADA_COMMIT")
    assert environment._commit(tmp_path) == (None, None)

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "--quiet")
    (tmp_path / "other.py").touch()
    git("add", "other.py")
    git("commit", "--quiet", "--message", "other")
    (tmp_path / "__init__.py").touch()
    assert environment._commit(tmp_path) == (None, None)
    git("add", "__init__.py")
    git("commit", "--quiet", "--message", "package")
    assert environment._commit(tmp_path) == (git("rev-parse", "HEAD"), False)
    (tmp_path / "other.py").write_text("changed")
    assert environment._commit(tmp_path) == (git("rev-parse", "HEAD"), True)


def test_the_processor_and_the_openmp_runtimes_are_unknown_where_proc_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(self: Path) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", missing)
    assert environment._openmp_runtimes() == []
    assert environment._cpu_model()
