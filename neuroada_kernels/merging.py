"""``neuroada merge``: an adapter merged into a checkpoint on disk, shard by shard."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from neuroada_kernels import ops
from neuroada_kernels._dtypes import name_of
from neuroada_kernels._files import beside, replacing, sync
from neuroada_kernels.adapter_file import (
    AdaptedModule,
    Adapter,
    EntryHash,
    read_adapter,
    within,
)
from neuroada_kernels.checkpoint import BLOCK_BYTES, FLOATING, Checkpoint, Stored, blocks
from neuroada_kernels.nn.foreign import CONV1D

#: Called with the bytes written since the last call, and the bytes in all.
Progress = Callable[[int, int], None]

#: Weights in other formats, which would stay unmerged beside the merged ones.
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")


def merge_checkpoint(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    allow_mismatch: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a copy of a checkpoint with an adapter merged into it.

    Each chosen entry is the sum in float32 (float64 for float64), rounded once to the weight's
    dtype, as ``NeuroAdaLinear.merge`` does; every other byte is the base's. At most one block
    of a weight is in memory. ``out`` appears once it is complete on disk.

    Parameters
    ----------
    base : str or path
        A safetensors file, or a folder of shards with an index as Hugging Face writes it. The
        folder's other files are copied, except weights in other formats, which would be unmerged.
    adapter : str or path
        A file of :func:`neuroada_kernels.save_adapter`.
    out : str or path
        A file or a folder, like ``base``; must not exist.
    allow_mismatch : bool
        Merge also if weights have other values or another dtype than the adapter was trained on.
    progress : callable, optional
        Called with the bytes written since the last call, and the bytes there are in all.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    FileExistsError
        If ``out`` exists.
    ValueError
        If a file is damaged or of the wrong kind, if the base lacks a tensor or has one of another
        shape, dtype or other values, or if ``out`` lies inside ``base``.
    """
    loaded = read_adapter(adapter)
    checkpoint = Checkpoint.open(base)
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"out: {out} exists, expected a new name")
    if checkpoint.folder is not None and checkpoint.folder.resolve() in out.resolve().parents:
        raise ValueError(f"out: {out} lies inside {base}, expected another place")
    changes = _changes(checkpoint, loaded, allow_mismatch)
    total = sum(file.stat().st_size for file in checkpoint.files)

    def tell(count: int) -> None:
        if progress is not None:
            progress(count, total)

    if checkpoint.folder is None:
        with replacing(out) as temporary:
            _merge_file(checkpoint.files[0], temporary, changes, allow_mismatch, tell)
        return
    with _new_folder(out) as folder:
        _copy_others(checkpoint.folder, folder, {file.name for file in checkpoint.files})
        for file in checkpoint.files:
            _merge_file(file, folder / file.name, changes, allow_mismatch, tell)
            sync(folder / file.name)


Change = AdaptedModule | Tensor


def _changes(
    checkpoint: Checkpoint, adapter: Adapter, allow_mismatch: bool
) -> list[tuple[str, Stored, Change]]:
    """The tensors to change, each checked to exist in the right shape and dtype."""
    wanted: Mapping[str, Change] = {
        **{within(name, "weight"): module for name, module in adapter.modules.items()},
        **adapter.parameters,
    }
    missing = sorted(wanted.keys() - checkpoint.tensors.keys())
    if missing:
        others = f", nor {len(missing) - 1} more," if len(missing) > 1 else ","
        raise ValueError(
            f"base: has no {missing[0]}{others} which the adapter is for; expected names such as "
            f"{min(checkpoint.tensors, default=None)}; a tied weight is stored under one name only"
        )
    changes = []
    for name, change in wanted.items():
        stored = checkpoint.tensors[name]
        if isinstance(change, AdaptedModule) and change.base.kind == CONV1D:
            raise ValueError(f"{name}: of a {CONV1D}, which is transposed; merge it in memory")
        if isinstance(change, Tensor):
            shape, dtype = tuple(change.shape), name_of(change.dtype)
        else:
            shape, dtype = change.base.shape, change.base.dtype
        if stored.shape != shape:
            raise ValueError(f"{name}: shape {list(stored.shape)}, expected {list(shape)}")
        if stored.dtype not in FLOATING:
            raise ValueError(f"{name}: dtype {stored.dtype}, expected a floating dtype")
        found = name_of(FLOATING[stored.dtype])
        if found != dtype and not allow_mismatch:
            raise ValueError(f"{name}: dtype {found}, expected {dtype}")
        changes.append((name, stored, change))
    return changes


def _merge_file(
    source: Path,
    target: Path,
    changes: list[tuple[str, Stored, Change]],
    allow_mismatch: bool,
    tell: Callable[[int], None],
) -> None:
    """Copy one file of the base and write into the copy what the adapter changes."""
    with source.open("rb") as old, target.open("wb") as new:
        while data := old.read(BLOCK_BYTES):
            new.write(data)
            tell(len(data))
    with target.open("r+b") as file:
        for name, stored, change in changes:
            if stored.file != source:
                continue
            entries = EntryHash()
            for rows, block, write in blocks(stored, file):
                if isinstance(change, Tensor):
                    block.copy_(change.reshape(-1, *stored.shape[1:])[rows])
                else:
                    index, delta = change.index[rows], change.delta[rows]
                    entries.update(ops.merge_(block, index, delta), index)
                write()
            if isinstance(change, Tensor) or allow_mismatch:
                continue
            if entries.hexdigest() != change.base.sha256:
                kind = change.base.kind
                raise ValueError(
                    f"{name}: other values at the chosen connections than the adapter was trained "
                    f"on{f', a {kind}' if kind else ''}; allow_mismatch merges all the same"
                )


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that is renamed to ``out`` when the block ends, and removed where it raises."""
    temporary = beside(out.absolute())
    temporary.mkdir()
    try:
        yield temporary
        sync(temporary)
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    sync(out.absolute().parent)


def _copy_others(source: Path, target: Path, shards: set[str]) -> None:
    """Copy what is no weight, such as config, tokenizer and code, but no hidden files."""
    for path in sorted(source.iterdir()):
        if path.name in shards or path.name.startswith(".") or path.suffix in _OTHER_WEIGHTS:
            continue
        if path.is_dir() and not path.is_symlink():
            (target / path.name).mkdir()
            _copy_others(path, target / path.name, set())
        elif path.is_file():
            shutil.copyfile(path, target / path.name)
            sync(target / path.name)


def main(argv: list[str] | None = None) -> int:
    """Run ``neuroada merge``; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="neuroada merge",
        description="Merge an adapter into a checkpoint; BASE is left as it is.",
    )
    parser.add_argument("base", metavar="BASE", help="a safetensors file, or a folder of shards")
    parser.add_argument("adapter", metavar="ADAPTER", help="a file of save_adapter")
    parser.add_argument("out", metavar="OUT", help="the file or folder to write")
    parser.add_argument(
        "--allow-mismatch",
        action="store_true",
        help="merge also into weights with other values or another dtype",
    )
    arguments = parser.parse_args(argv)
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    with Progress("merging", BarColumn(), DownloadColumn(), TimeRemainingColumn()) as bars:
        bar = bars.add_task("merging", total=None)
        try:
            merge_checkpoint(
                arguments.base,
                arguments.adapter,
                arguments.out,
                allow_mismatch=arguments.allow_mismatch,
                progress=lambda count, total: bars.update(bar, advance=count, total=total),
            )
        except (OSError, ValueError) as error:
            bars.stop()
            parser.exit(1, f"neuroada merge: {error}\n")
    print(f"{arguments.out}: merged")
    return 0
