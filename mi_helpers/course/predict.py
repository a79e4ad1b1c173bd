"""`predict`: an answer and how sure one is of it, before the cell below shows what is so.

A lesson's `exercises.py` registers what is right, by measuring it or under a seal, so that neither
the notebook nor the progress file gives it away:

    @prediction("3.4", question="Which layer?", options=["layer 0", "layer 1", "layer 2"])
    def best_layer() -> str:
        return f"layer {int(sweep(shipped_model()).argmax())}"

    @prediction("3.5", question=…, options=…, sealed="9f2c…")  # seal("3.5", "layer 2")
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mi_helpers.course import exercise as cards
from mi_helpers.course import record, session
from mi_helpers.course.answers import code, describe
from mi_helpers.course.record import SURE


@dataclass(frozen=True)
class Prediction:
    """One prediction: its question, its options as texts, and how it is known which is right.

    measure     returns the right option
    sealed      or the seal of the right option, and "" where it is measured
    """

    id: str
    question: str
    options: tuple[str, ...]
    measure: Callable[[], object]
    sealed: str = ""

    def right(self, answer: str) -> bool:
        """Whether an option is the right one; measured where that is how it is known."""
        if self.sealed:
            return seal(self.id, answer) == self.sealed
        return str(self.measure()) == answer


def seal(id: str, option: str) -> str:
    """What stands for the right option where it is not to be read: a hash of it."""
    return hashlib.sha256(f"{id}\n{option}".encode()).hexdigest()[:16]


def prediction(
    id: str, question: str, options: Sequence, sealed: str = ""
) -> Callable[[Callable], Callable]:
    """Declare a prediction, above the function that measures which option is right.

    Args:
        id: "LESSON.NUMBER"
        question, options: as the notebook gives them to `predict`
        sealed: `seal(id, right option)`, where the right option cannot be measured; the function
            is not called then
    """

    def declare(measure: Callable[[], object]) -> Callable[[], object]:
        made = Prediction(id, question, tuple(map(str, options)), measure, sealed)
        measure.prediction = made
        return measure

    return declare


# -- what a notebook calls -------------------------------------------------------------------


def predict(
    id: str, question: str, options: Sequence, answer: object = None, sure: int | None = None
) -> None:
    """Ask for a prediction, by buttons, and keep it; what is right is not said here.

    Without buttons: `predict("3.4", "Which layer?", options, "layer 2", sure=70)`. The first answer
    counts.

    Args:
        options: what may be answered, in words or numbers
        answer: one of them
        sure: how sure one is of it, 50, 70, 90 or 99 per cent
    """
    options = [str(each) for each in options]
    try:
        cards.look_up(id, "prediction")
    except LookupError as error:
        session.display(f"⚠️ {error.args[0]}")
        return
    kept, text = record.predictions().get(id), sentence(id, question, options)
    if answer is not None and kept is None:
        session.display(keep(id, options, answer, sure))
    elif session.static():
        session.display(text)
    elif kept is not None:
        session.display(told(id, kept))
    else:
        session.show_live(box(id, question, options), text)


def keep(id: str, options: list[str], answer: object, sure: int | None) -> str:
    """Record a prediction; what is said of it."""
    if str(answer) not in options:
        return f"⚠️ {describe(answer)} is none of the options: {', '.join(map(code, options))}."
    if sure not in SURE:
        return (
            f"⚠️ Say how sure you are: `sure=` {', '.join(map(str, SURE[:-1]))} or {SURE[-1]}, in "
            "per cent."
        )
    new = {"answer": str(answer), "sure": sure}
    problem = record.save({"predictions": {id: new}})
    return " ".join(part for part in (told(id, record.predictions()[id]), problem) if part)


def told(id: str, kept: dict) -> str:
    """What was predicted, in a sentence."""
    return f"🔮 **{id}** Your prediction: **{kept['answer']}**, {kept['sure']} % sure. Now look."


def sentence(id: str, question: str, options: list[str]) -> str:
    """What stands where there are no buttons."""
    listed = ", ".join(options[:-1]) + f" or {options[-1]}"
    return f"🔮 **Predict {id}.** {question} *{listed}?* Decide, and how sure you are."


def box(id: str, question: str, options: list[str]):
    """The question with a button for each option, then one for each confidence."""
    import ipywidgets

    place = ipywidgets.Output()
    title = ipywidgets.HTML()
    title.value = f"<b>🔮 Predict {session.plain(id)}.</b> {session.plain(question)}"
    choice = ipywidgets.ToggleButtons(
        options=options, value=None, tooltips=[f"Predict: {each}" for each in options]
    )
    choice.style.button_width = "auto"

    def commit(sure: int) -> None:
        if choice.value is None:
            session.put(place, "⚠️ Choose an answer first, then how sure you are of it.")
            return
        session.put(place, keep(id, options, choice.value, sure))
        for each in (choice, *buttons):
            each.disabled = True

    buttons = [
        session.button(
            f"{sure} % sure", f"Keep this answer; I am {sure} % sure", lambda s=sure: commit(s)
        )
        for sure in SURE
    ]
    call = session.calls(f'predict("{id}", …, …, answer="{options[0]}", sure=70)')
    return ipywidgets.VBox([title, choice, ipywidgets.HBox(buttons), call, place])


# -- how well one predicts -------------------------------------------------------------------


def settle() -> dict[str, dict]:
    """Every prediction made, each with "right" where its lesson can tell; kept in the file."""
    table, new = record.predictions(), {}
    for id, made in table.items():
        if "right" in made:
            continue
        try:
            new[id] = made | {"right": bool(cards.look_up(id, "prediction").right(made["answer"]))}
        except Exception:  # the lesson is another one by now, or cannot measure it here
            continue
    if new:
        record.save({"predictions": new})
    return table | new


def progress() -> None:
    """How many exercises of each lesson are passed, investigations, and predictions' hits.

    Of predictions it says, for each confidence, how many were right and how many should have been.
    """
    done = record.everything()
    rows = ["| Lesson | Passed | | Investigation |", "|---|---|---|---|"]
    for lesson, exercises in cards.lessons().items():
        marks = ["■" if each.id in done["passed"] else "□" for each in exercises]
        ids = [each.id for each in cards.declared(lesson, "investigation")]
        scores = [done["investigations"][id] for id in ids if id in done["investigations"]]
        rows.append(
            f"| {lesson:02d} | {marks.count('■')} of {len(marks)} | {''.join(marks)} "
            f"| {', '.join(f'{score:.3g}' for score in scores)} |"
        )
    session.display("\n".join([*rows, *predicted()]))


def predicted() -> list[str]:
    """The lines on predictions, their calibration included; none where there are none."""
    known = [each for each in settle().values() if "right" in each]
    if not known:
        return []
    total, expected = sum(each["right"] for each in known), sum(each["sure"] for each in known)
    rows = [
        "",
        f"**Predictions:** {total} of {len(known)} right; as sure as you were, "
        f"{expected / 100:.1f} would be.",
        "",
        "| You were | Predictions | Right | Expected |",
        "|---|---|---|---|",
    ]
    for sure in SURE:
        hits = [each["right"] for each in known if each["sure"] == sure]
        if n := len(hits):
            rows.append(
                f"| {sure} % sure | {n} | {sum(hits)} ({sum(hits) / n:.0%}) "
                f"| {sure * n / 100:.1f} ({sure}%) |"
            )
    return rows
