"""data/MANIFEST lists what ships, and what checks it notices every difference."""

import pytest

from mi_helpers.__main__ import main
from mi_helpers.files import verify_manifest, write_manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b c.txt").write_bytes(b"two\n")
    (tmp_path / "a.csv").write_bytes(b"one\n")
    (tmp_path / ".hidden").write_bytes(b"no\n")
    write_manifest(tmp_path)
    return tmp_path


def test_the_shipped_data_is_what_the_manifest_says():
    assert verify_manifest() == []


def test_a_line_is_hash_size_and_path(folder):
    lines = (folder / "MANIFEST").read_text().splitlines()
    assert [line.split("  ", 2)[1:] for line in lines] == [["4", "a.csv"], ["4", "sub/b c.txt"]]
    assert lines[0].startswith("2c8b08da5ce60398e1f19af0e5dccc744df274b826abe585eaba68c525434806")
    assert verify_manifest(folder) == []


def test_each_difference_is_a_sentence(folder):
    (folder / "a.csv").write_bytes(b"0ne\n")
    (folder / "sub" / "b c.txt").unlink()
    (folder / "new.txt").write_bytes(b"")
    assert verify_manifest(folder) == [
        "sub/b c.txt is listed but missing.",
        "new.txt is not listed.",
        "a.csv differs.",
    ]


def test_a_missing_or_broken_manifest_is_said(folder):
    (folder / "MANIFEST").write_text("what\n")
    assert "Line 1" in verify_manifest(folder)[0]
    (folder / "MANIFEST").unlink()
    assert "is missing" in verify_manifest(folder)[0]


def test_the_command_writes_checks_and_fails(folder, capsys):
    assert main(["manifest", "--folder", str(folder)]) == 0
    (folder / "new.txt").write_bytes(b"")
    assert main(["manifest", "--folder", str(folder)]) == 1
    assert main(["manifest", "--folder", str(folder), "--write"]) == 0
    assert main(["manifest", "--folder", str(folder / "absent")]) == 1
    assert "There is no folder absent." in capsys.readouterr().out
