"""Files appear whole, know what they are, and refuse to be mistaken."""

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedamole.artifacts import Header, read_record, replacing, write_record
from fedamole.errors import FedamoleError


def test_a_record_comes_back_with_its_header(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "record.json"
    header = Header("metrics", "d1", {"pool": "abc"})
    write_record(path, header, {"b": [1.5, None], "a": "ü"})
    assert read_record(path, "metrics", "d1") == (header, {"a": "ü", "b": [1.5, None]})
    assert json.loads(path.read_text())["header"]["package"] == "0.1.0"


def test_a_record_has_the_same_bytes_every_time(tmp_path: Path) -> None:
    for name, content in (("a", {"x": 1, "y": 2}), ("b", {"y": 2, "x": 1})):
        write_record(tmp_path / name, Header("metrics", "d"), content)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"header": {"kind": "metr', "is not a whole JSON file"),
        ("[1, 2]", "is not a file of fedamole"),
        ('{"a": 1}', "is not a file of fedamole"),
        ('{"header": {"kind": "pool", "digest": "d"}}', "holds pool; metrics is needed"),
        ('{"header": {"kind": "metrics", "digest": 5}}', "is not a file of fedamole"),
        ('{"header": {"kind": "metrics", "format": 99}}', "is not a file of fedamole"),
        ('{"header": {"kind": "metrics", "digest": "d", "format": 99}}', "has format 99"),
        ('{"header": {"kind": "metrics", "digest": "d", "format": 99, "x": 1}}', "has format 99"),
        (
            '{"header": {"kind": "metrics", "digest": "other"}}',
            "was made with other settings (digest other, the config gives d); move it away",
        ),
    ],
)
def test_a_wrong_record_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(FedamoleError) as raised:
        read_record(path, "metrics", "d")
    assert str(raised.value).startswith(f"{path}: ")
    assert message in str(raised.value)


def test_a_missing_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(FedamoleError, match=r"no.json: cannot be read \(No such file"):
        read_record(tmp_path / "no.json", "metrics")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="halfway"), replacing(path) as scratch:
        scratch.write_text("half")
        raise RuntimeError("halfway")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for text in ("one", "two"):
        with replacing(folder) as scratch:
            scratch.mkdir()
            (scratch / f"{text}.txt").write_text(text)
    assert [path.name for path in folder.iterdir()] == ["two.txt"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_keeps_its_name_if_it_cannot_be_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    # The block makes nothing, so that the old folder has moved away when the second move fails.
    with pytest.raises(FileNotFoundError), replacing(folder):
        pass
    assert (folder / "old.txt").read_text() == "old"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_linked_folder_is_replaced_and_its_target_kept(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.mkdir()
    (target / "model").write_text("far away")
    link.symlink_to(target)
    with replacing(link) as scratch:
        scratch.mkdir()
    assert link.is_dir() and not link.is_symlink()
    assert (target / "model").read_text() == "far away"
    assert sorted(tmp_path.iterdir()) == [link, target]


def test_a_terminated_command_leaves_no_scratch_file(tmp_path: Path) -> None:
    code = (
        "import sys, time, signal\n"
        "from pathlib import Path\n"
        "from fedamole.artifacts import replacing\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "with replacing(Path(sys.argv[1])) as scratch:\n"
        "    scratch.write_text('half')\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "file")], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.terminate()
        assert process.wait(timeout=30) == 143
    assert list(tmp_path.iterdir()) == []


def test_a_path_through_a_file_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FedamoleError, match="cannot be written, a part of the path is a file"):
        write_record(tmp_path / "file" / "x.json", Header("metrics", "d"), {})


def failure(path: Path, error: Callable[[Path], Exception]) -> Exception:
    """Give what comes out of a block that fails with an error, made from its scratch path."""
    with pytest.raises(Exception) as raised, replacing(path) as scratch:
        raise error(scratch)
    return raised.value


@pytest.mark.parametrize(
    "error",
    [
        lambda _: PermissionError(errno.EACCES, "Permission denied", "/data/source.json"),
        lambda _: PermissionError(errno.EACCES, "Permission denied", b"/data/source.json"),
        lambda _: OSError("unable to open file: name = '/data/pool.h5', errno = 13, error ..."),
        lambda _: OSError(errno.EIO, "Input/output error"),
        lambda _: RuntimeError("Permission denied (os error 13)"),
        lambda _: FedamoleError("/data/cache: No space left on device"),
    ],
)
def test_errors_of_reading_are_not_blamed_on_the_output(
    tmp_path: Path, error: Callable[[Path], Exception]
) -> None:
    found = failure(tmp_path / "out", error)
    expected = error(tmp_path)
    assert (type(found), str(found)) == (type(expected), str(expected))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (lambda _: OSError(errno.ENOSPC, "No space left on device"), "no space left"),
        (lambda to: OSError(errno.EROFS, "Read-only", str(to / "inner")), "is read-only"),
        (lambda to: PermissionError(errno.EACCES, "denied", str(to)), "permission denied"),
        # What shutil.copyfile raises on a full disk: it names the source first.
        (lambda to: OSError(errno.ENOSPC, "No space", "/data/x", None, str(to)), "no space left"),
        (
            lambda to: OSError(f"write failed: filename = '{to}', errno = 28, error"),
            "no space left",
        ),
        (lambda _: RuntimeError("I/O error: No space left on device (os error 28)"), "no space"),
        (lambda _: Exception("No space left on device"), "no space left"),
    ],
)
def test_errors_of_writing_are_one_clear_line(
    tmp_path: Path, error: Callable[[Path], Exception], reason: str
) -> None:
    found = failure(tmp_path / "out", error)
    assert isinstance(found, FedamoleError)
    assert str(found).startswith(f"{tmp_path / 'out'}: cannot be written, ")
    assert reason in str(found)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        ("numpy.save(scratch / 'x.npy', array)", "no space left on the device, or a limit"),
        ("save_file({'x': array}, scratch / 'x.safetensors')", "the file size limit is exceeded"),
        ("(scratch / 'x').write_bytes(array.tobytes())", "the file size limit is exceeded"),
    ],
)
def test_every_library_that_runs_out_of_room_ends_in_one_line(
    tmp_path: Path, write: str, reason: str
) -> None:
    code = (
        "import resource, sys, numpy\n"
        "from pathlib import Path\n"
        "from safetensors.numpy import save_file\n"
        "from fedamole.artifacts import replacing\n"
        "from fedamole.errors import FedamoleError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))\n"
        "array = numpy.zeros(100_000)\n"
        "try:\n"
        "    with replacing(Path(sys.argv[1])) as scratch:\n"
        "        scratch.mkdir()\n"
        f"        {write}\n"
        "except FedamoleError as error:\n"
        "    print(error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{tmp_path / 'out'}: cannot be written, {reason}")
    assert list(tmp_path.iterdir()) == []
