"""The learner's copies of the lessons: three ways to be updated, and nothing of theirs is lost."""

import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from mi_helpers.__main__ import main
from mi_helpers.course import notebooks

FIRST, SECOND = "00_one.ipynb", "03_two.ipynb"


def write(path, *sources, printed="") -> None:
    cells = [new_code_cell(source, id=f"c{i}") for i, source in enumerate(sources)]
    if printed:
        cells[0].outputs = [new_output("stream", text=printed)]
    nbformat.write(new_notebook(cells=cells), path)


@pytest.fixture
def lessons(tmp_path):
    """`lessons(*arguments)` runs the command; .course and .mine are its two folders."""

    class Lessons:
        course, mine = tmp_path / "notebooks", tmp_path / "work"

        def __call__(self, *arguments) -> int:
            folders = ["--course", str(self.course), "--folder", str(self.mine)]
            return main(["lessons", *arguments, *folders])

        def names(self) -> list[str]:
            return sorted(path.name for path in self.mine.glob("*.ipynb"))

        def texts(self) -> set[str]:
            return {path.read_text("utf-8") for path in self.mine.glob("*.ipynb")}

    Lessons.course.mkdir()
    write(Lessons.course / FIRST, "1")
    write(Lessons.course / SECOND, "a = ...", "check(a)")
    return Lessons()


def test_the_first_start_makes_copies_and_the_next_does_nothing(lessons, capsys):
    assert lessons() == 0
    assert "2 lessons are in" in capsys.readouterr().out
    assert lessons.names() == [FIRST, SECOND]
    assert all(
        (lessons.mine / n).read_bytes() == (lessons.course / n).read_bytes()
        for n in lessons.names()
    )
    stamps = [path.stat().st_mtime_ns for path in sorted(lessons.mine.iterdir())]
    assert lessons() == 0 and capsys.readouterr().out == ""
    assert [path.stat().st_mtime_ns for path in sorted(lessons.mine.iterdir())] == stamps


def test_a_copy_in_which_nothing_was_written_is_replaced_though_it_was_run(lessons, capsys):
    lessons()
    write(lessons.mine / SECOND, "a = ...", "check(a)", printed="not attempted yet")
    write(lessons.course / SECOND, "a = ...", "check(a)", "new")
    capsys.readouterr()
    assert lessons() == 0
    assert capsys.readouterr().out.startswith(f"{SECOND} is the course's new one")
    assert (lessons.mine / SECOND).read_bytes() == (lessons.course / SECOND).read_bytes()
    assert lessons.names() == [FIRST, SECOND]
    write(lessons.course / SECOND, "a = ...", "check(a)", "new", printed="other numbers")
    assert lessons() == 0
    assert (lessons.mine / SECOND).read_bytes() == (lessons.course / SECOND).read_bytes()


def test_a_changed_copy_is_kept_where_the_course_has_not_changed(lessons, capsys):
    lessons()
    write(lessons.mine / SECOND, "a = 4", "check(a)")
    before = (lessons.mine / SECOND).read_bytes()
    capsys.readouterr()
    assert lessons() == 0 and capsys.readouterr().out == ""
    write(lessons.course / SECOND, "a = ...", "check(a)", printed="run once more")
    assert lessons() == 0 and capsys.readouterr().out == ""
    assert (lessons.mine / SECOND).read_bytes() == before and lessons.names() == [FIRST, SECOND]


def test_where_both_changed_the_learners_is_kept_and_the_new_one_put_beside_it_once(
    lessons, capsys
):
    lessons()
    write(lessons.mine / SECOND, "a = 4", "check(a)")
    mine = (lessons.mine / SECOND).read_text("utf-8")
    for round, new in enumerate(("first", "second")):
        write(lessons.course / SECOND, "a = ...", "check(a)", new)
        capsys.readouterr()
        assert lessons() == 0
        said = capsys.readouterr().out
        assert said.startswith(f"{SECOND} is as you left it") and said.count("\n") == 1
        assert lessons() == 0 and capsys.readouterr().out == ""
        assert (lessons.mine / SECOND).read_text("utf-8") == mine
        aside = said.strip().split(": ")[-1]
        assert (lessons.mine / aside).read_bytes() == (lessons.course / SECOND).read_bytes()
        assert len(lessons.names()) == 3 + round


def test_a_learner_who_has_the_new_cells_already_is_left_alone(lessons, capsys):
    lessons()
    write(lessons.course / SECOND, "a = 4", "check(a)")
    write(lessons.mine / SECOND, "a = 4", "check(a)", printed="right")
    before = (lessons.mine / SECOND).read_bytes()
    capsys.readouterr()
    assert lessons() == 0 and capsys.readouterr().out == ""
    assert (lessons.mine / SECOND).read_bytes() == before


@pytest.mark.parametrize("record", ["", "[]", "{", '{"03_two.ipynb": 3}', None])
def test_without_a_record_nothing_of_the_learners_is_replaced(lessons, record):
    lessons()
    write(lessons.mine / SECOND, "mine")
    mine = (lessons.mine / SECOND).read_bytes()
    if record is None:
        (lessons.mine / notebooks.RECORD).unlink()
    else:
        (lessons.mine / notebooks.RECORD).write_text(record)
    assert lessons() == 0
    assert (lessons.mine / SECOND).read_bytes() == mine
    assert len(lessons.names()) == 3  # which version it was made of is not known: both are there


@pytest.mark.parametrize("content", ["", "{", "[]", '{"cells": 3}', '{"cells": [{}]}', "\udcff"])
def test_a_damaged_copy_is_kept_too(lessons, content):
    lessons()
    damaged = content.encode("utf-8", "surrogateescape")
    (lessons.mine / SECOND).write_bytes(damaged)
    write(lessons.course / SECOND, "new")
    assert lessons() == 0
    assert (lessons.mine / SECOND).read_bytes() == damaged
    assert len(lessons.names()) == 3


def test_a_damaged_notebook_of_the_course_replaces_nothing(lessons):
    lessons()
    before = (lessons.mine / SECOND).read_bytes()
    (lessons.course / SECOND).write_text("<<<<<<< HEAD")
    assert lessons() == 0
    assert (lessons.mine / SECOND).read_bytes() == before


def test_what_is_the_learners_own_or_was_deleted(lessons):
    lessons()
    write(lessons.mine / "notes.ipynb", "mine")
    (lessons.mine / FIRST).unlink()
    (lessons.course / SECOND).unlink()
    assert lessons() == 0
    assert lessons.names() == [FIRST, SECOND, "notes.ipynb"]


def test_fresh_gives_a_clean_copy_and_keeps_what_was_there_each_time(lessons, capsys):
    lessons()
    for number in range(3):
        write(lessons.mine / SECOND, f"a = {number}")
        before = lessons.texts()
        assert lessons("03", "--fresh") == 0
        assert "yours is beside it" in capsys.readouterr().out
        assert (lessons.mine / SECOND).read_bytes() == (lessons.course / SECOND).read_bytes()
        assert before <= lessons.texts() and len(lessons.names()) == 3 + number
    assert lessons("03", "--fresh") == 0
    assert capsys.readouterr().out == f"{SECOND} is clean already.\n"


def test_fresh_wants_the_name_of_a_lesson_that_exists(lessons, capsys):
    lessons()
    assert lessons("--fresh") == 2 and lessons("99", "--fresh") == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("Say which lesson") and said[1].endswith("begins with '99'.")


def test_a_folder_that_cannot_be_written_gets_one_sentence(lessons, capsys):
    lessons.mine.write_text("a file")
    assert lessons() == 2
    said = capsys.readouterr().err
    assert "work" in said and said.count("\n") == 1


def test_a_start_that_has_nothing_to_do_loads_no_torch(lessons):
    lessons()
    folders = f"['--course', {str(lessons.course)!r}, '--folder', {str(lessons.mine)!r}]"
    command = "import sys; from mi_helpers.__main__ import main; "
    command += f"main(['lessons', *{folders}]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command]).returncode == 0
