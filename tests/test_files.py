"""Files are there whole or not at all."""

import errno

import pytest

from distill.errors import OutputError
from distill.files import full_disk_is_an_error, read_json, replace_folder, sha256_json, write_json


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "facts.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert read_json(tmp_path / "none.json") is None


def test_a_folder_is_replaced_whole(tmp_path):
    folder = tmp_path / "student"
    replace_folder(folder, lambda new: (new / "weights").write_text("one"))

    def fail(new):
        (new / "weights").write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        replace_folder(folder, fail)
    assert (folder / "weights").read_text() == "one"
    assert not list(tmp_path.glob("*.writing"))
    replace_folder(folder, lambda new: (new / "other").write_text("two"))
    assert [path.name for path in folder.iterdir()] == ["other"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_line_however_a_library_says_it(tmp_path, error):
    with pytest.raises(OutputError, match=r"the disk is full \(\d+ MB free\)"), full_disk_is_an_error(tmp_path):
        raise error
    with pytest.raises(OSError, match="Permission"), full_disk_is_an_error(tmp_path):
        raise OSError(errno.EACCES, "Permission denied")


def test_the_order_of_keys_does_not_change_a_fingerprint():
    assert sha256_json({"a": 1, "b": 2}) == sha256_json({"b": 2, "a": 1}) != sha256_json({"a": 1, "b": 3})
