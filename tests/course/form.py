"""The measure of a lesson's form: its size and its English. Quick, and dumb on purpose.

A notebook is of the new form when its metadata say `"mi_helpers": {"form": 2}`. What stands under
the heading "Going further" is not counted.
"""

import re
from dataclasses import dataclass

WORDS, LINES, READ, DO = 3000, 250, 45, 60  # the budget: prose, code, minutes to read, to do
EACH_IDEA = 150  # words at most in one Markdown cell
SENTENCE = 40  # words at most
OUTPUTS_CHECKED = 4  # cells with # NBVAL_CHECK_OUTPUT
FURTHER = re.compile(r"^#+ +Going further\b", re.MULTILINE)
TIME = re.compile(r"about (\d+) minutes to read(?: and run)?, (\d+) minutes for")
TURNS = (  # phrases that a native reader stumbles over
    "as dear as",
    "or dearer",
    "the answer goes along",
    "goes along with the",
    "a gemma 2 in small",
    " in small,",
    "next to nobody",
    "are not owed to",
    "is not owed to",
    "owed to the algorithm",
    "has hardly a ",
    "have hardly a ",
    "from which on",
    "from here on out",
    "it is not for nothing",
    "the more so",
    "all the same to",
    "nothing is ever",
    "dressed as",
)


@dataclass(frozen=True)
class Size:
    """Words of prose, lines of code, minutes stated to read and to do."""

    words: int
    lines: int
    read: int
    do: int


def main_path(notebook: dict) -> list[tuple[str, str]]:
    """(kind, source) of every cell before "Going further"; the rest of a lesson is not counted.

    What follows "Going further" under a heading of the same level or a higher one is counted again.
    """
    kept, level = [], 0
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and (found := re.match(r"(#+) ", source)):
            if FURTHER.match(source):
                level = len(found[1])
            elif level and len(found[1]) <= level:
                level = 0
        if not level:
            kept.append((cell["cell_type"], source))
    return kept


def prose(source: str) -> str:
    """Markdown without what is no prose: code, mathematics, tables, HTML, links' addresses."""
    for pattern in (r"```.*?```", r"\$\$.*?\$\$", r"<!--.*?-->"):
        source = re.sub(pattern, " ", source, flags=re.DOTALL)
    source = re.sub(r"^\s*\|.*$", " ", source, flags=re.MULTILINE)
    source = re.sub(r"`[^`\n]*`|\$[^$\n]*\$", " x ", source)
    source = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", source)
    return re.sub(r"<[^>\n]+>", " ", source)


def words(text: str) -> list[str]:
    """The words of a text."""
    return re.findall(r"[A-Za-z0-9][\w'’–-]*", text)


def size(notebook: dict) -> Size:
    """How large the main path is, and how long it is said to take (0 where nothing is said)."""
    cells = main_path(notebook)
    texts = [source for kind, source in cells if kind == "markdown"]
    code = [source for kind, source in cells if kind == "code"]
    stated = next((found for text in texts if (found := TIME.search(text))), None)
    read, do = (int(stated[1]), int(stated[2])) if stated else (0, 0)
    lines = [line for source in code for line in source.splitlines() if is_code(line)]
    return Size(sum(len(words(prose(text))) for text in texts), len(lines), read, do)


def is_code(line: str) -> bool:
    """Whether a line of a cell is code, not blank and no comment alone."""
    return bool(line.strip()) and not line.lstrip().startswith("#")


def sentences(text: str) -> list[str]:
    """The sentences of a Markdown cell's prose; headings, list items and paragraphs end one."""
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:[-*+]|\d+\.|#+|>)\s)", prose(text))
    found = []
    for block in blocks:
        flat = re.sub(r"\s+", " ", block).strip()
        found += re.split(r"(?<=[.!?:;])[\"”’)*_]*\s+(?=[\"“‘(*_A-Z0-9])", flat)
    return [each for each in found if each]


def problems(notebook: dict) -> list[str]:
    """What is wrong with a lesson of the new form, a sentence each; empty when nothing is."""
    return over_budget(notebook) + bad_english(notebook)


def over_budget(notebook: dict) -> list[str]:
    """What is larger than it may be."""
    found, now = [], size(notebook)
    for what, got, most in (
        ("words of prose", now.words, WORDS),
        ("lines of code", now.lines, LINES),
        ("minutes to read and run", now.read, READ),
        ("minutes for the exercises", now.do, DO),
    ):
        if got > most:
            found.append(f"The main path has {got} {what}, {most} are allowed.")
        if not got:
            found.append(f"The main path has no {what}, or does not say how many.")
    texts = [source for kind, source in main_path(notebook) if kind == "markdown"]
    for text in texts:
        if (count := len(words(prose(text)))) > EACH_IDEA:
            found.append(f"A cell has {count} words, {EACH_IDEA} are allowed: {text[:50]!r}…")
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    checked = sum("NBVAL_CHECK_OUTPUT" in source for source in cells)
    if checked > OUTPUTS_CHECKED:
        found.append(f"{checked} cells have NBVAL_CHECK_OUTPUT, {OUTPUTS_CHECKED} are allowed.")
    return found


def bad_english(notebook: dict) -> list[str]:
    """Turns that are not English, and sentences that are too long; everywhere in the notebook."""
    found = []
    for cell in notebook["cells"]:
        if cell["cell_type"] != "markdown":
            continue
        text = "".join(cell["source"])
        flat = re.sub(r"\s+", " ", text.lower())
        found += [f"'{turn.strip()}' is a turn to avoid." for turn in TURNS if turn in flat]
        for sentence in sentences(text):
            if (count := len(words(sentence))) > SENTENCE:
                found.append(f"A sentence has {count} words, {SENTENCE} are allowed: {sentence!r}")
    return found
