"""Lessons of the new form keep to their budget and to plain English; the measure measures."""

import json

import form
import nbformat
import pytest

from mi_helpers.course.notebooks import clean, find, form_of

NEW = [path for path in find(()) if form_of(path) >= 2]


@pytest.mark.parametrize("path", NEW, ids=lambda path: path.name)
def test_the_lesson_keeps_to_the_form(path):
    assert form.problems(json.loads(path.read_text("utf-8"))) == []


TIME = "**Time:** about 30 minutes to read and run, 40 minutes for the exercises."


def notebook(*cells: tuple[str, str]) -> dict:
    """A notebook of (kind, source) cells, with its time."""
    made = [{"cell_type": "markdown", "source": TIME}]
    made += [{"cell_type": kind, "source": [source]} for kind, source in cells]
    return {"metadata": {"mi_helpers": {"form": 2}}, "cells": made}


def test_a_small_lesson_has_no_problems():
    assert form.problems(notebook(("markdown", "Heads read."), ("code", "x = 1"))) == []


def test_the_size_is_of_the_main_path():
    made = notebook(
        ("markdown", "# One two\n\nthree `code words` [four](http://x.y) $a + b$"),
        ("code", "# a comment\n\nx = 1\ny = 2"),
        ("markdown", "## Going further\n\nmany words"),
        ("markdown", "### A part of it\n\nmore words"),
        ("code", "z = 3"),
        ("markdown", "## Questions\n\nfive"),
    )
    size = form.size(made)
    said = len(form.words(TIME))
    assert size == form.Size(said + 4 + 2 + 2, 2, 30, 40)  # code and mathematics count as a word


@pytest.mark.parametrize(
    ("cell", "fragment"),
    [
        (("markdown", "word " * 151), "A cell has 151 words"),
        (("markdown", "A second look is as dear as the first, or dearer."), "as dear as"),
        (("markdown", "It is a Gemma 2\nin small."), "a gemma 2 in small"),
        (("markdown", "The layer from which on the target leads."), "from which on"),
        (("markdown", "a " * 41 + "."), "A sentence has 41 words"),
        (("code", "x = 1\n" * 250), "251 lines of code"),
        (("code", "# NBVAL_CHECK_OUTPUT\nx"), None),
    ],
)
def test_what_is_too_much_is_said(cell, fragment):
    found = form.problems(notebook(cell, ("code", "x")))
    assert found == [] if fragment is None else any(fragment in each for each in found)


def test_three_thousand_words_are_the_most():
    cells = [("markdown", "word. " * 140)] * 22
    assert "words of prose, 3000 are allowed" in form.problems(notebook(*cells, ("code", "x")))[0]


def test_five_checked_outputs_are_too_many():
    cells = [("code", "# NBVAL_CHECK_OUTPUT\nx")] * 5
    assert "5 cells have NBVAL_CHECK_OUTPUT" in form.problems(notebook(*cells))[0]


def test_a_lesson_that_says_no_time_is_told_so():
    made = notebook(("code", "x"))
    made["cells"][0]["source"] = "Some words."
    assert sum("does not say" in each for each in form.problems(made)) == 2


def test_sentences_end_where_they_end():
    text = "# A title\n\nOne here. Two (see Fig. 3) there?\n\n- a list\n- another: yes."
    assert len(form.sentences(text)) == 6


def test_cleaning_a_notebook_keeps_its_form():
    made = nbformat.v4.new_notebook(metadata={"mi_helpers": {"form": 2}, "widgets": {}})
    clean(made)
    assert made.metadata["mi_helpers"]["form"] == 2 and "widgets" not in made.metadata
