"""Instructions of the CPU kernels over a small fixed case, against the committed figures.

python tests/cpp/count_instructions.py DRIVER            # exit status 1 where one differs
python tests/cpp/count_instructions.py DRIVER --write    # tests/data/instructions.json anew

Times on shared machines are unreliable, counts are not: the same code has the same count on any
machine, whatever else runs there. Counts ignore caches and the cost of wide instructions, so a
change that lowers them need not be faster; one that raises them has to be intended. The AVX2 form
is counted, the widest that valgrind supports.

Compilers generate different code, so the figures name their compiler; with any other the check is
skipped, as on a machine without valgrind. With one compiler, runs agree to the last instruction,
also in another environment; another link order changed counts by 0.01 %, and the C library's copies
and allocations below a kernel may differ. One instruction more in an innermost loop changed counts
by 9 % to 12 %. TOLERANCE lies between.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

COMMITTED = Path(__file__).parents[1] / "data" / "instructions.json"
ISA = "avx2"
DTYPES = ("float32", "bfloat16")
TOLERANCE = 0.01
NOT_HERE = 77  # the driver's status where the instruction set does not run

Counts = dict[str, dict[str, int]]  # dtype, kernel


def counts_of(profile: str) -> dict[str, int]:
    """Instructions in and below each kernel, of a callgrind profile with uncompressed names."""
    kernel = re.compile(rf"cfn=neuroada::cpu::{ISA}::(\w+)\([\w:]+ const&, [\w:]+ const&\)\n")
    calls = re.compile(r"calls=1 .*\n\S+ (\d+)\n")
    found: dict[str, int] = {}
    for match in kernel.finditer(profile):
        if inclusive := calls.match(profile, match.end()):
            found[match[1]] = int(inclusive[1])
    return found


def count(driver: Path, valgrind: str) -> Counts | None:
    """What the kernels take, or None where the instruction set does not run."""
    found: Counts = {}
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "profile"
        options = ["--tool=callgrind", "--compress-strings=no", "--compress-pos=no"]
        for dtype in DTYPES:
            command = [valgrind, *options, f"--callgrind-out-file={profile}", driver, ISA, dtype]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == NOT_HERE:
                return None
            if done.returncode:
                sys.exit(f"{driver} under callgrind: status {done.returncode}\n{done.stderr}")
            found[dtype] = counts_of(profile.read_text())
    return found


def differences(committed: Counts, found: Counts) -> Iterator[tuple[str, int, int]]:
    """Each kernel and dtype of either, with its two counts."""
    for dtype in dict.fromkeys([*committed, *found]):
        old, new = committed.get(dtype, {}), found.get(dtype, {})
        for kernel in dict.fromkeys([*old, *new]):
            yield f"{kernel} {dtype}", old.get(kernel, 0), new.get(kernel, 0)


def judge(committed: Counts, found: Counts) -> int:
    """Print every count; returns 1 if one differs by more than the tolerance."""
    status = 0
    for name, old, new in differences(committed, found):
        differs = abs(new - old) > TOLERANCE * old
        status |= differs
        change = f"{new / old - 1:+.2%}" if old else "is new"
        print(f"{name:28} {old:9} {new:9}  {change}{'  DIFFERS' if differs else ''}")
    if status:
        print(
            f"more than {TOLERANCE:.0%} off: where that is meant, make count-instructions WRITE=1"
        )
    return status


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("driver", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--committed", type=Path, default=COMMITTED)
    options = parser.parse_args(argv)
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        print("skipped: valgrind is not found")
        return 0
    compiler = subprocess.check_output([options.driver], text=True).strip()
    if not options.write:
        committed = json.loads(options.committed.read_text())
        if committed["compiler"] != compiler:
            print(f"skipped: the figures are of {committed['compiler']}, not of {compiler}")
            return 0
    found = count(options.driver, valgrind)
    if found is None:
        print(f"skipped: {ISA} does not run here under valgrind")
        return 0
    if not options.write:
        return judge(committed["instructions"], found)
    document = {"compiler": compiler, "isa": ISA, "instructions": found}
    options.committed.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
