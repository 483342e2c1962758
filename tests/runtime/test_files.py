"""Files and folders are complete or absent after full disks and kills, and readable by others."""

import errno
import stat
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from prunekit.runtime import files
from prunekit.runtime.errors import UserError, plain_name
from prunekit.runtime.files import append_row, full_disk_named, write_folder
from prunekit.runtime.tensors import save_tensors
from prunekit.training.checkpoint import Checkpoints

TENSORS = {"a": torch.zeros(3)}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_files_are_readable_by_others_as_the_umask_says(tmp_path):
    """safetensors 0.8 ignores the umask and makes its files private."""
    usual = tmp_path / "usual"
    usual.write_text("")
    save_tensors(tmp_path / "one.safetensors", TENSORS)
    write_folder(tmp_path / "folder", lambda folder: save_file(TENSORS, folder / "x.safetensors"))
    for path in (tmp_path / "one.safetensors", tmp_path / "folder" / "x.safetensors"):
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)


def fail(folder):
    (folder / "part").write_text("half")
    raise SafetensorError('Error while serializing: IoError(Os { code: 28, message: "No space left on device" })')


def test_a_full_disk_is_the_systems_error_and_leaves_nothing(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("old")
    with pytest.raises(OSError, match="No space left on device: free some space") as error:
        write_folder(tmp_path / "kept", fail)
    assert error.value.errno == errno.ENOSPC and names(tmp_path) == ["kept"]
    assert error.value.filename == str(tmp_path / "kept")
    assert (tmp_path / "kept" / "file").read_text() == "old"
    with pytest.raises(SafetensorError, match="other"):
        write_folder(tmp_path / "kept", lambda folder: (_ for _ in ()).throw(SafetensorError("other")))
    assert names(tmp_path) == ["kept"]


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    """Once, if the disk had no room for a rename, the folder stayed under another name until it was written again."""
    folder, replace = tmp_path / "kept", files.Path.replace
    write_folder(folder, lambda made: (made / "file").write_text("old"))

    def full(path, target):
        if path.suffix == ".tmp":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return replace(path, target)

    monkeypatch.setattr(files.Path, "replace", full)
    with pytest.raises(OSError, match="free some space") as error:
        write_folder(folder, lambda made: (made / "file").write_text("new"))
    assert error.value.filename == str(folder)
    assert names(tmp_path) == ["kept"] and (folder / "file").read_text() == "old"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_an_error_of_a_full_disk_names_the_file(tmp_path, number):
    """The error names its file (for a copy, the target) if it has one, else the written file; other errors are kept."""
    raised = [OSError(number, "x"), OSError(number, "x", "/other/file"), SafetensorError(f"x (os error {number})")]
    raised.append(OSError(number, "x", "/source", None, "/other/copy"))
    for error, name in zip(raised, (str(tmp_path), "/other/file", str(tmp_path), "/other/copy"), strict=True):
        with pytest.raises((OSError, SafetensorError)) as found, full_disk_named(tmp_path):
            raise error
        if number == errno.EIO:
            assert found.value is error
        else:
            assert (found.value.errno, found.value.filename) == (number, name) and ": " in found.value.strerror


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_row_that_the_disk_has_no_room_for_is_an_error(tmp_path):
    append_row(tmp_path / "log", {"a": 1})
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left.*/full'"):
        append_row(tmp_path / "full", {"a": 1})
    assert (tmp_path / "log").read_text() == '{"a": 1}\n'


class Killed(BaseException):
    """A kill between two operations on files."""


@pytest.mark.parametrize("at", [1, 2])
def test_a_kill_while_a_folder_is_replaced_leaves_the_old_or_the_new(tmp_path, monkeypatch, at):
    """Once, the old folder was removed before the new one was in place, so a kill could lose both."""
    folder, count = tmp_path / "step-00000001", 0
    write_folder(folder, lambda made: (made / "state").write_text("old"))
    replace = files.Path.replace

    def killed(path, target):
        nonlocal count
        count += path.is_dir()
        if path.is_dir() and count == at:
            raise Killed
        return replace(path, target)

    monkeypatch.setattr(files.Path, "replace", killed)
    monkeypatch.setattr(files.shutil, "rmtree", lambda *given, **named: None)  # a killed process removes nothing
    with pytest.raises(Killed):
        write_folder(folder, lambda made: (made / "state").write_text("new"))
    monkeypatch.undo()
    found = Checkpoints(tmp_path)._all()
    assert [path.name for path in found] == [folder.name] and (folder / "state").read_text() == "old"
    write_folder(folder, lambda made: (made / "state").write_text("new"))
    assert (folder / "state").read_text() == "new" and names(tmp_path) == [folder.name]


@pytest.mark.parametrize("text", ["a", "quickstart-0.7", "Größe 3", "cost $x_{$", "a.b", "-x", "x" * 200])
def test_plain_names(text):
    assert plain_name(text, "name") == text


@pytest.mark.parametrize("text", ["", ".", "..", "a/b", "/a", "..\\a", "a\nb", "a\0", " a", "a ", "x" * 201, "\ud800"])
def test_names_that_are_no_plain_names(text):
    with pytest.raises(UserError, match="give a plain name"):
        plain_name(text, "name")
