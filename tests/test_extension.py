"""Without its compiled parts, or with broken ones, the package works and says why it is slower."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import neuroada_kernels
from neuroada_kernels import _extension, _registry, cli, info

PACKAGE = Path(neuroada_kernels.__file__).parent
LIBRARY = "libneuroada.so"
MODULE = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
GARBAGE = b"this is no shared object\n" * 100

PROBE = """
import json, os, torch
import neuroada_kernels as nk
from neuroada_kernels import _extension, _registry, _registry

torch.manual_seed(0)
linear = torch.nn.Linear(24, 16)
x = torch.randn(5, 24)
expected = linear(x)
layer = nk.NeuroAdaLinear.from_linear(linear, 3)
plain = nk.ReferenceNeuroAdaLinear.from_linear(linear, 3)
torch.testing.assert_close(layer(x), expected)
with torch.no_grad():
    plain.delta.copy_(layer.delta.normal_())
results = []
for module in (layer, plain):
    given = x.clone().requires_grad_()
    y = module(given)
    y.square().sum().backward()
    results.append([y, given.grad, module.delta.grad])
for ours, formula in zip(*results):
    torch.testing.assert_close(ours, formula, rtol=1e-4, atol=1e-5)
weight = linear.weight.clone()
layer.merge()
torch.testing.assert_close(layer(x), results[0][0])
layer.unmerge()
assert torch.equal(linear.weight, weight)
try:
    nk.check_index(torch.full((2, 1), 9, dtype=torch.int32), 4)
    refused = ""
except ValueError as error:
    refused = str(error)
print(json.dumps({
    "file": nk.__file__,
    "module": _extension.module_error,
    "library": _extension.library_error,
    "backends": nk.available_backends(),
    "serving": _registry.serving("linear", x, *[None] * 4).name,
    "refused": refused,
}))
"""


def run(arguments: list[str], directory: Path, **environment: str) -> str:
    clean = {name: v for name, v in os.environ.items() if not name.startswith("NEUROADA_")}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env={**clean, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def probe(directory: Path, **environment: str) -> dict:
    return json.loads(run(["-W", "error", "-c", PROBE], directory, **environment))


@pytest.fixture
def make_copy(tmp_path):
    """A factory of directories that hold the package's Python files and the given others."""

    def make(**contents: bytes) -> Path:
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        copy = shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=ignored)
        for name, content in contents.items():
            (copy / name).write_bytes(content)
        return tmp_path

    return make


def test_disabled_extension_leaves_the_eager_backend(tmp_path):
    facts = probe(tmp_path, NEUROADA_DISABLE_EXTENSION="1")
    reason = "NEUROADA_DISABLE_EXTENSION is set"
    assert facts["module"] == facts["library"] == reason
    assert facts["backends"]["cpu"] == reason
    assert facts["backends"]["eager"] is None
    assert facts["serving"] == "eager"
    assert "column 9 in row 0 is out of range" in facts["refused"]


def test_zero_does_not_disable_it(tmp_path):
    assert probe(tmp_path, NEUROADA_DISABLE_EXTENSION="0") == probe(tmp_path)


def test_pure_python_files_say_that_they_are(make_copy):
    directory = make_copy()
    facts = probe(directory, PYTHONPATH=str(directory))
    assert Path(facts["file"]).is_relative_to(directory)
    assert "pure-Python install" in facts["module"]
    assert "pure-Python install" in facts["library"]
    assert facts["serving"] == "eager"


@pytest.mark.parametrize("content", [GARBAGE, b""], ids=["garbage", "empty"])
def test_broken_files_keep_their_load_errors(make_copy, content):
    directory = make_copy(**{LIBRARY: content, MODULE: content})
    facts = probe(directory, PYTHONPATH=str(directory))
    assert Path(facts["file"]).is_relative_to(directory)
    for reason, name in ((facts["library"], LIBRARY), (facts["module"], MODULE)):
        assert name in reason
        assert "Error: " in reason
        assert "invalid ELF header" in reason or "file too short" in reason
        assert "Traceback" not in reason
        assert "\n" not in reason.strip()
    assert facts["backends"]["cpu"] == facts["library"]
    assert facts["serving"] == "eager"
    assert "column 9 in row 0 is out of range" in facts["refused"]


def test_a_module_of_another_python_says_so(make_copy):
    directory = make_copy(**{"_C.cpython-27-x86_64-linux-gnu.so": b"", LIBRARY: GARBAGE})
    facts = probe(directory, PYTHONPATH=str(directory))
    expected = (
        f"_C.cpython-27-x86_64-linux-gnu.so is for another Python or machine, expected {MODULE}"
    )
    assert facts["module"] == expected


def test_one_broken_file_does_not_take_the_other_along(make_copy):
    if _extension.module_error or _extension.library_error:
        pytest.skip(f"not built: {_extension.module_error or _extension.library_error}")
    directory = make_copy(
        **{LIBRARY: GARBAGE, MODULE: (PACKAGE / Path(_extension.module.__file__).name).read_bytes()}
    )
    facts = probe(directory, PYTHONPATH=str(directory))
    assert facts["module"] is None
    assert "invalid ELF header" in facts["library"]
    assert facts["serving"] == "eager"


def test_info_of_a_broken_install_says_so_in_words(make_copy):
    directory = make_copy(**{LIBRARY: GARBAGE, MODULE: GARBAGE})
    text = run(["-m", "neuroada_kernels.info"], directory, PYTHONPATH=str(directory))
    for name in ("op library (libneuroada)", "extension module (_C)", "  cpu"):
        line = next(line for line in text.splitlines() if line.startswith(name))
        assert "invalid ELF header" in line
    assert "  eager: available" in text
    assert "served by plain PyTorch" in text


def test_info_of_a_disabled_extension_says_so(tmp_path):
    text = run(["-m", "neuroada_kernels.info"], tmp_path, NEUROADA_DISABLE_EXTENSION="1")
    assert "cpu: NEUROADA_DISABLE_EXTENSION is set" in text
    assert "  NEUROADA_DISABLE_EXTENSION=1" in text


def test_info_as_json_agrees_with_the_package(capsys):
    assert info.main(["--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    expected = neuroada_kernels.available_backends()
    assert facts["backends"].keys() == expected.keys()
    for name, words in facts["backends"].items():
        assert words.startswith(expected[name] or "available")
        assert ("experimental" in words) == (name in _registry.experimental_backends())
    assert facts["op_library"] == (_extension.library_error or "loaded")
    assert facts["extension"] == (_extension.module_error or "loaded")
    assert (facts["build"] is None) == (_extension.module is None)


def test_command_line_runs_info(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"neuroada_kernels {neuroada_kernels.__version__} on Python ")
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == neuroada_kernels.__version__
