"""The ledger: verdicts by hand, the file's mechanism, and what the repository's own file says."""

import math

import pytest

from mi_helpers.__main__ import main
from mi_helpers.course import ledger as claims
from mi_helpers.course.ledger import FAILS, HOLDS, UNMEASURED, Claim
from mi_helpers.files import between

ROWS = claims.read()
FAST = [claim for claim in claims.all_claims() if claim.fast]


def half(seed: int) -> float:
    """A measurement to test with: 0.50, 0.51, 0.52, …"""
    return 0.5 + seed / 100


def claim(**changes) -> Claim:
    values = {
        "lesson": 77,
        "id": "half",
        "claim": "Half of one",
        "source": "derived: 1/2",
        "published": "1/2",
        "tolerance": "± 0.02",
        "measure": half,
        "seeds": 3,
    }
    return Claim(**(values | changes))


def declare(monkeypatch, declared: list[Claim]) -> None:
    """Let these be all claims there are."""
    monkeypatch.setattr(claims, "all_claims", lambda: declared)


# -- the repository's ledger -----------------------------------------------------------------


def test_the_ledger_holds():
    assert claims.problems(ROWS) == []
    assert main(["claims"]) == 0


def test_ids_are_unique_and_every_claim_has_five_seeds_and_a_source():
    declared = claims.all_claims()
    assert len({each.id for each in declared}) == len(declared)
    assert all(each.source and each.seeds >= 5 for each in declared if each.lesson == 1)


@pytest.mark.parametrize("each", FAST, ids=lambda each: each.id)
def test_one_seed_measured_again_agrees_with_the_ledger(each):
    (row,) = [row for row in ROWS if row["id"] == each.id]
    assert each.agrees(value := each.value(seed=0), row), f"{value}, and {claims.ours(row)}"


def test_the_page_shows_the_ledger_as_it_is():
    shown = between(claims.PAGE.read_text("utf-8"), claims.BEGIN, claims.END)
    assert shown == claims.markdown(ROWS)


# -- verdicts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("published", "ours", "tolerance", "wanted"),
    [
        ("2/5", 0.41, "± 0.02", HOLDS),
        ("2/5", 0.43, "± 0.02", FAILS),
        ("0.784", 0.784, "± 0", HOLDS),
        ("", 0.9, ">= 0.9", HOLDS),
        ("", 0.89, ">=0.9", FAILS),
        ("0", 2e-6, "<= 1e-5", HOLDS),
        ("", 2e-5, "<= 1e-5", FAILS),
        ("1", math.nan, "± 1", FAILS),
    ],
)
def test_verdicts_by_hand(published, ours, tolerance, wanted):
    assert claims.verdict(published, ours, tolerance) == wanted


@pytest.mark.parametrize(("published", "tolerance"), [("", "± 0.1"), ("1", "about 1"), ("1", "")])
def test_a_tolerance_that_cannot_be_applied_is_said(published, tolerance):
    with pytest.raises(ValueError, match="cannot be applied"):
        claims.verdict(published, 1.0, tolerance)


def test_a_row_by_hand():
    row = claims.row_of(claim(), [0.5, 0.51, 0.52])
    assert list(row) and set(row) == set(claims.COLUMNS)
    assert (row["lesson"], row["ours"], row["sd"], row["seeds"]) == ("77", "0.51", "0.01", "3")
    assert row["verdict"] == HOLDS and claims.ours(row) == "0.510 ± 0.01"
    assert claims.row_of(claim(), [])["verdict"] == UNMEASURED
    assert claims.ours(claims.row_of(claim(), [])) == UNMEASURED
    assert claims.ours(claims.row_of(claim(), [2e-7])) == "2.0e-07"


def test_a_value_measured_again_is_held_to_its_row():
    """Closer than four standard deviations, or a fiftieth of the tolerance; and to its verdict."""
    row = claims.row_of(claim(), [0.5, 0.51, 0.52])
    assert claim().agrees(0.472, row) is False  # another verdict
    assert claim().agrees(0.515, row) and not claim(tolerance="± 0.2").agrees(0.56, row)
    none = claims.row_of(claim(published="0", tolerance="± 0.05"), [0.0, 0.0, 0.0])
    assert claim(published="0", tolerance="± 0.05").agrees(0.001, none)
    assert not claim(published="0", tolerance="± 0.05").agrees(0.002, none)


@pytest.mark.parametrize("measured", [0.0, 7.3e-8, 9.9e-6])
def test_rounding_measured_again_is_held_to_its_bound_and_never_to_a_value(measured):
    sums = claim(published="0", tolerance="<= 1e-5")
    row = claims.row_of(sums, [measured] * 3)
    assert all(sums.agrees(value, row) for value in (0.0, 1e-9, 1.43e-7, 1e-5))
    assert not any(sums.agrees(value, row) for value in (1.01e-5, 1.0, math.nan))
    assert claims.ours(row) == "<= 1e-5"


def test_no_row_is_held_closer_than_float32_can_tell():
    """Else its value is rounding, read off one machine, and it needs a bound instead.

    Shares, ratios, logits and losses are made of numbers of size 1 and more: eight times float32's
    epsilon is the least that another order of the sums may change.
    """
    for each, row in zip(claims.all_claims(), ROWS, strict=True):
        ours = float(row["ours"])
        off = 8 * 2**-23 * max(1, abs(ours))
        assert each.agrees(ours + off, row) and each.agrees(ours - off, row), each.id


# -- the file --------------------------------------------------------------------------------


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    """A ledger of two lessons in a folder of its own, measured."""
    declare(monkeypatch, [claim(), claim(lesson=78, id="other", seeds=1)])
    path = tmp_path / "claims.csv"
    claims.measure_anew([], path)
    return path


def test_measured_rows_are_written_and_read_back(ledger):
    rows = claims.read(ledger)
    assert [row["id"] for row in rows] == ["half", "other"]
    assert rows[0]["ours"] == "0.51" and rows[1]["seeds"] == "1"
    assert claims.problems(rows) == []
    assert [path.name for path in ledger.parent.iterdir()] == ["claims.csv"]


def test_measuring_one_lesson_keeps_the_others(ledger, monkeypatch):
    rows = claims.read(ledger)
    rows[1]["ours"] = "0.49"
    claims.write(rows, ledger)
    claims.measure_anew([77], ledger)
    assert [row["ours"] for row in claims.read(ledger)] == ["0.51", "0.49"]


def test_rows_that_others_declare_are_kept_until_their_lesson_is_measured(ledger, monkeypatch):
    declare(monkeypatch, [claim()])
    claims.measure_anew([77], ledger)
    assert [row["id"] for row in claims.read(ledger)] == ["half", "other"]
    assert claims.problems(claims.read(ledger)) == ["other: no claim of this name is declared."]
    claims.measure_anew([], ledger)
    assert [row["id"] for row in claims.read(ledger)] == ["half"]


def test_a_failing_claim_stays_and_the_command_says_so(ledger, monkeypatch, capsys):
    declare(monkeypatch, [claim(tolerance="± 0.001")])
    assert main(["claims", "--measure", "77", "--ledger", str(ledger)]) == 1
    assert claims.read(ledger)[0]["verdict"] == FAILS
    assert "half: fails. Half of one: 0.510 ± 0.01." in capsys.readouterr().out


def test_a_ledger_that_holds_ends_well(ledger, capsys):
    assert main(["claims", "--ledger", str(ledger)]) == 0
    assert "All 2 claims hold." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"verdict": FAILS}, "the row says 'fails', its numbers 'holds'"),
        ({"ours": "0.7"}, "fails"),
        ({"ours": ""}, "not measured"),
        ({"claim": "Another"}, "claim differs"),
        ({"id": "unknown"}, "no claim of this name is declared"),
    ],
)
def test_problems_are_found(ledger, change, fragment):
    rows = claims.read(ledger)
    rows[0] = rows[0] | change
    assert any(fragment in problem for problem in claims.problems(rows))


def test_a_file_with_other_columns_is_refused_in_a_sentence(ledger, capsys):
    ledger.write_text("a,b\n1,2\n")
    assert main(["claims", "--ledger", str(ledger)]) == 1
    assert "expected" in capsys.readouterr().err


def test_a_lesson_without_claims_is_refused(capsys):
    assert main(["claims", "--measure", "99"]) == 2
    assert "Lesson 99 has no claims" in capsys.readouterr().err


# -- the page ------------------------------------------------------------------------------


def test_the_table_goes_between_the_markers(ledger, tmp_path):
    page, rows = tmp_path / "README.md", claims.read(ledger)
    page.write_text(f"# T\n\n{claims.BEGIN}\nOUTDATED\n{claims.END}\n\nend\n", "utf-8")
    assert claims.update_page(rows, page)
    text = page.read_text("utf-8")
    assert text.startswith("# T\n\n") and text.endswith("\n\nend\n") and "OUTDATED" not in text
    assert between(text, claims.BEGIN, claims.END) == claims.markdown(rows)
    assert "| 77 | Half of one | derived: 1/2 | 1/2 | 0.510 ± 0.01 | 3 | ± 0.02 | holds |" in text


def test_a_page_without_markers_stays(ledger, tmp_path):
    page = tmp_path / "README.md"
    page.write_text("# T\n", "utf-8")
    assert not claims.update_page(claims.read(ledger), page)
    assert page.read_text("utf-8") == "# T\n"
