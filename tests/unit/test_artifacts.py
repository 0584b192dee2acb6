"""Files appear whole, know what they are, and refuse to be mistaken."""

import json
import subprocess
import sys
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
        ('{"header": {"kind": "metrics", "digest": "d", "format": 99}}', "has format 99"),
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
