"""How a file is written: whole, to the disk, and under its own name and rights."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from adapted import adapted

import neuroada_kernels as nk
from neuroada_kernels.adapter_file import read_adapter


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "adapter.safetensors"


def test_a_folder_is_no_place_for_the_file(tmp_path):
    with pytest.raises(ValueError, match="is a folder, expected a file"):
        nk.save_adapter(adapted(), tmp_path)
    with pytest.raises(FileNotFoundError):
        nk.save_adapter(adapted(), tmp_path / "missing" / "adapter")
    assert not list(tmp_path.iterdir())


def test_a_link_keeps_pointing_to_the_file(path, tmp_path):
    link = tmp_path / "latest"
    link.symlink_to(path.name)
    nk.save_adapter(adapted(), link)
    assert link.is_symlink()
    assert read_adapter(path).modules


def test_a_file_can_be_read_by_whom_the_umask_lets(path):
    umask = os.umask(0o027)
    try:
        nk.save_adapter(adapted(), path)
    finally:
        os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o640


def test_the_file_is_on_the_disk_before_it_is_renamed_and_the_name_after(path, monkeypatch):
    steps = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        steps.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def record_replace(old: Path, new: Path) -> None:
        steps.append(("replace", Path(new)))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    nk.save_adapter(adapted(), path)
    (first, temporary), *rest = steps
    assert first == "fsync"
    assert temporary.name.endswith(".tmp")
    assert rest == [("replace", path), ("fsync", path.parent)]


def test_a_failing_save_leaves_the_old_file_and_nothing_else(path, tmp_path, monkeypatch):
    nk.save_adapter(adapted(), path)
    before = path.read_bytes()

    def full(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        nk.save_adapter(adapted(seed=1), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
