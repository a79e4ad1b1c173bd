"""Predictions, investigations and progress: kept, merged, scored, and nothing given away."""

import functools
import importlib
import json
import os
import random
import subprocess
import sys
import types

import ipywidgets
import numpy as np
import pytest
import torch

from mi_helpers.course import exercise as cards
from mi_helpers.course import investigate, predict, progress, prove, record, session
from mi_helpers.course.answers import Wrong
from mi_helpers.course.investigate import investigation, number_in, one_of, some_of

predicting = importlib.import_module("mi_helpers.course.predict")
investigating = importlib.import_module("mi_helpers.course.investigate")
OPTIONS = ["layer 0", "layer 1", "layer 2"]
HEADS = [(layer, head) for layer in range(3) for head in range(4)]
TRUE = {(0, 1), (1, 2), (2, 3)}


@predicting.prediction("77.4", question="Which layer?", options=OPTIONS)
def which_layer():
    return "layer 2"


@predicting.prediction(
    "77.5", question="Which?", options=["a", "b"], sealed=predicting.seal("77.5", "b")
)
def sealed():
    raise AssertionError("is not called")


@investigation(
    "77",
    title="Three heads",
    form="a set of heads, each (layer, head)",
    chance=lambda rng: rng.sample(HEADS, 3),
    best=lambda: TRUE,
    good=lambda: [(0, 1), (1, 2)],
    foolish=["L0H1", {(9, 9)}],
)
def score_heads(answer):
    found = set(some_of(answer, HEADS, "heads"))
    return len(found & TRUE) / len(found | TRUE)


FOUND = score_heads.investigation


@pytest.fixture
def lesson(monkeypatch, tmp_path):
    """A lesson 77 with predictions and an investigation; its progress file."""
    table = {
        "prediction": [which_layer.prediction, sealed.prediction],
        "investigation": [FOUND],
        "exercise": [],
    }
    monkeypatch.setenv("MI_PROGRESS", str(tmp_path / "state" / "progress.json"))
    monkeypatch.setattr(record, "_this_session", {})
    monkeypatch.setattr(cards, "lesson_numbers", lambda: [77])
    for module in (cards, prove):
        monkeypatch.setattr(module, "declared", lambda number, what: table[what])
    return tmp_path / "state" / "progress.json"


def test_what_is_kept_by_a_cache_is_found_and_measured_once(monkeypatch):
    room, calls = types.ModuleType("mi_helpers.lessons.lesson_77.exercises"), []

    @predicting.prediction("77.6", question="Which?", options=["a", "b"])
    @functools.cache
    def measured():
        calls.append(1)
        return "b"

    room.measured, room.again, room.plain, room.sort = measured, measured, which_layer, dict
    monkeypatch.setitem(sys.modules, room.__name__, room)
    found = cards.declared(77, "prediction")
    assert [each.id for each in found] == ["77.6", "77.4"]
    assert found[0].right("b") and not found[0].right("a") and len(calls) == 1


def content(file) -> dict:
    """What a progress file holds, without the parts that are empty."""
    return {part: held for part, held in json.loads(file.read_text()).items() if held}


# -- predictions -----------------------------------------------------------------------------


def test_a_sentence_stands_where_there_is_no_kernel(lesson, capsys):
    predict("77.4", "Which layer?", OPTIONS)
    said = capsys.readouterr().out
    assert "Which layer? *layer 0, layer 1 or layer 2?*" in said and not lesson.exists()


def test_a_prediction_is_kept_and_gives_nothing_away(lesson, capsys):
    for answer in ("layer 1", "layer 2"):
        predict("77.4", "Which layer?", OPTIONS, answer, sure=70)
    assert content(lesson)["predictions"] == {"77.4": {"answer": "layer 1", "sure": 70}}
    assert capsys.readouterr().out.count("Your prediction: layer 1, 70 % sure") == 1


@pytest.mark.parametrize(
    ("answer", "sure", "fragment"),
    [("layer 9", 70, "none of the options"), ("layer 1", 60, "how sure"), ("layer 1", None, "how")],
)
def test_what_is_no_prediction_gets_a_sentence(lesson, capsys, answer, sure, fragment):
    predict("77.4", "Which layer?", OPTIONS, answer, sure)
    assert fragment in capsys.readouterr().out and not lesson.exists()


def test_the_buttons_keep_a_choice_and_its_confidence(lesson):
    box = predicting.box("77.4", "Which <layer>?", OPTIONS)
    title, choice, row, _, place = box.children
    assert "&lt;layer&gt;" in title.value and isinstance(choice, ipywidgets.ToggleButtons)
    row.children[2].click()
    assert "Choose an answer first" in place.outputs[0]["data"]["text/markdown"]
    choice.value = "layer 2"
    row.children[2].click()
    assert content(lesson)["predictions"]["77.4"] == {"answer": "layer 2", "sure": 90}
    assert all(each.disabled for each in (choice, *row.children))
    assert all(each.description and each.tooltip for each in row.children)


def test_progress_shows_hits_and_calibration(lesson, capsys):
    predict("77.4", "Which layer?", OPTIONS, "layer 2", sure=90)
    predict("77.5", "Which?", ["a", "b"], "a", sure=90)
    progress()
    said = capsys.readouterr().out
    assert "1 of 2 right; as sure as you were, 1.8 would be" in said
    assert "| 90 % sure | 2 | 1 (50%) | 1.8 (90%) |" in said
    assert content(lesson)["predictions"]["77.5"]["right"] is False


def test_predictions_are_proved(lesson, monkeypatch):
    assert prove.prediction_problems(77) == []
    bad = predicting.Prediction("77.6", "?", ("a", "a"), lambda: "c")
    monkeypatch.setattr(prove, "declared", lambda number, what: [bad])
    assert len(prove.prediction_problems(77)) == 2


# -- investigations --------------------------------------------------------------------------


def test_the_investigation_is_proved():
    assert prove.investigation_problems(FOUND) == []


@pytest.mark.parametrize(
    ("answer", "score", "fragment"),
    [
        (TRUE, 1.0, "as good as the best known"),
        ([[0, 1], [1, 2]], 2 / 3, "of the way"),
        (np.array([[0, 1], [0, 1]]), 1 / 3, "of the way"),
        (torch.tensor([0, 0]), 0.0, "no better than chance"),
    ],
)
def test_an_answer_is_scored_between_chance_and_best(lesson, capsys, answer, score, fragment):
    assert investigate("77", answer) == pytest.approx(score)
    said = capsys.readouterr().out
    assert fragment in said and "best known 1" in said and "(2, 3)" not in said
    assert content(lesson)["investigations"] == {"77": pytest.approx(score)}


@pytest.mark.parametrize(
    "answer",
    [[], {}, "", "L0H1", 3, {(9, 9)}, float("nan"), object(), lambda: 1, [None], {"a": 1}, b"x"],
)
def test_a_foolish_answer_gets_one_sentence_and_no_score(lesson, capsys, answer):
    assert investigate("77", answer) is None
    said = capsys.readouterr().out
    assert "not scored" in said and said.count("\n") == 1 and not lesson.exists()


def test_the_stub_of_an_investigation_is_neutral(lesson, capsys):
    assert investigate("77", ...) is None and investigate("77") is None
    assert "not attempted yet. Your answer is a set of heads" in capsys.readouterr().out


def test_an_answer_is_not_changed_by_its_measure_and_a_crash_is_a_sentence():
    def measure(answer):
        answer.pop()
        return answer[5]

    found = investigation("1", title="", form="a list", chance=random.Random, best=list)(measure)
    answer = [1]
    with pytest.raises(Wrong, match="cannot be measured"):
        found.investigation.score(answer)
    assert answer == [1]


def test_the_best_score_is_kept(lesson):
    for answer in (TRUE, {(0, 0)}):
        investigate("77", answer)
    assert content(lesson)["investigations"] == {"77": 1.0}


def test_helpers_refuse_what_is_none_of_the_options():
    assert one_of(np.int64(2), [1, 2]) == 2 and one_of([0, 1], HEADS) == (0, 1)
    assert some_of((0, 1), HEADS) == [(0, 1)] and number_in(np.float32(0.5), 0, 1) == 0.5
    for call in (
        lambda: one_of(3, [1, 2]),
        lambda: number_in(2, 0, 1),
        lambda: number_in(True, 0, 1),
        lambda: number_in("a", 0, 1),
        lambda: some_of({}, HEADS),
    ):
        with pytest.raises(Wrong):
            call()


# -- the record ------------------------------------------------------------------------------


def test_what_cannot_be_understood_is_kept_aside_each_time(lesson):
    contents = ["{", "[]", '{"passed": 3}', '{"passed": [1]}', '"x"', "[" * 100000]
    lesson.parent.mkdir()
    for text in contents:
        lesson.write_text(text)
        assert record.passed() == set()
    kept = {path.read_text() for path in lesson.parent.glob("*.bak")}
    assert kept == set(contents)
    assert record.add("77.1") == "" and content(lesson) == {"passed": ["77.1"]}


def test_what_can_be_understood_of_a_spoilt_file_is_kept(lesson):
    lesson.parent.mkdir()
    good = {"answer": "a", "sure": 70}
    spoilt = {"passed": ["1.1", 3], "predictions": {"1.2": good, "1.3": 3}, "later": {"x": 1}}
    lesson.write_text(json.dumps(spoilt))
    assert record.add("1.2") == ""
    assert content(lesson) == {
        "passed": ["1.1", "1.2"],
        "predictions": {"1.2": good},
        "later": {"x": 1},
    }
    assert len(list(lesson.parent.glob("*.bak"))) == 1


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_cannot_be_read_is_not_replaced(lesson):
    lesson.parent.mkdir()
    lesson.write_text('{"passed": ["1.1"]}')
    lesson.chmod(0)
    assert "cannot be read" in record.add("1.2")
    lesson.chmod(0o600)
    assert content(lesson) == {"passed": ["1.1"]}


def test_a_read_that_fails_replaces_nothing(lesson, monkeypatch):
    lesson.parent.mkdir()
    lesson.write_text('{"passed": ["1.1"]}')

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(type(lesson), "read_bytes", refuse)
        assert "cannot be read: Permission denied" in record.add("1.2")
    assert content(lesson) == {"passed": ["1.1"]} and record.passed() == {"1.1", "1.2"}


WRITER = """
import sys
from mi_helpers.course import record
for i in range(10):
    assert record.add(f"{sys.argv[1]}.{i}") == ""
    record._this_session.clear()
"""


def test_processes_that_write_at_once_lose_nothing(lesson):
    pairs = [subprocess.Popen([sys.executable, "-c", WRITER, str(n)]) for n in (1, 2, 3)]
    assert [each.wait(120) for each in pairs] == [0, 0, 0]
    assert len(content(lesson)["passed"]) == 30


def test_without_a_home_progress_lasts_for_the_session(monkeypatch):
    def no_home(*_args, **_kwargs):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MI_PROGRESS", raising=False)
    monkeypatch.setattr(record, "_this_session", {})
    monkeypatch.setattr(record.Path, "home", no_home)
    monkeypatch.setattr(record, "user_state_path", no_home)
    assert "set MI_PROGRESS" in record.add("1.1")
    assert record.passed() == {"1.1"}


def test_a_link_to_the_file_stays_a_link(lesson, tmp_path):
    lesson.parent.mkdir()
    (tmp_path / "elsewhere.json").write_text('{"passed": ["1.1"]}')
    lesson.symlink_to(tmp_path / "elsewhere.json")
    assert record.add("1.2") == "" and lesson.is_symlink() and record.passed() == {"1.1", "1.2"}


# -- what is shown ---------------------------------------------------------------------------


def test_live_widgets_carry_what_stands_without_a_kernel():
    bundle = session.bundle_of(ipywidgets.HBox(), '`check("1.1", f)`')
    assert bundle["text/markdown"] == '`check("1.1", f)`'
    assert "application/vnd.jupyter.widget-view+json" in bundle
