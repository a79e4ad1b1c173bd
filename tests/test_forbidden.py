"""What no committed file may hold: paths of one machine, secrets, unpickling, broken links."""

import re
import subprocess
from pathlib import Path

import nbformat
import pytest

from mi_helpers.course import notebooks

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = {".git", ".venv", ".cache", ".pytest_cache", ".ruff_cache", ".hypothesis", "runs"}
SKIPPED |= {".peers", ".peers-coders", "work", "build", "dist", "__pycache__", ".ipynb_checkpoints"}
TEXT = {"", ".cff", ".cfg", ".csv", ".css", ".ipynb", ".json", ".jsonl", ".md", ".py", ".sh"}
TEXT |= {".svg", ".toml", ".tsv", ".txt", ".yaml", ".yml"}

EVERYWHERE = {
    "a path of one machine": re.compile(
        r"(?<![\w.:/\[])/(?:home|Users|root)/\w|\b[A-Z]:\\+Users\\+\w"
    ),
    "an index address": re.compile(r"index[-_]url|find[-_]links", re.IGNORECASE),
    "a secret": re.compile(
        r"\bhf_[A-Za-z0-9]{30,}|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pous]_[A-Za-z0-9]{30,}"
        r"|\bAKIA[A-Z0-9]{16}\b|-----BEGIN [A-Z ]*PRIVATE KEY"
    ),
    "a skipped cell": re.compile(r"NBVAL[_]SKIP"),
}
IN_HELPERS = re.compile(
    r"\bimport pickle|\bfrom pickle|\bpickle\.loads?\(|\btorch\.load\("
    r"|\bjoblib\.load\(|allow_pickle=True"
)


def committed() -> list[Path]:
    """Tracked files and new ones that git does not ignore; without git, all but caches."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        paths = [p for p in ROOT.rglob("*") if not SKIPPED & set(p.relative_to(ROOT).parts)]
    return sorted({path for path in paths if path.is_file()})


FILES = committed()
NOTEBOOKS = [path for path in FILES if path.suffix == ".ipynb"]
PAGES = [path for path in FILES if path.suffix == ".md"]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def texts() -> list[tuple[Path, str]]:
    """Every text file and its content."""
    wanted = [path for path in FILES if path.suffix in TEXT]
    return [(path, path.read_text("utf-8", errors="replace")) for path in wanted]


@pytest.mark.parametrize("what", EVERYWHERE)
def test_no_file_holds(what):
    hits = {name(path): EVERYWHERE[what].search(text) for path, text in texts()}
    assert {file: hit[0] for file, hit in hits.items() if hit} == {}


def test_no_file_names_the_folder_of_this_copy():
    if len(ROOT.parts) > 2:
        assert [name(path) for path, text in texts() if str(ROOT) in text] == []


def test_nothing_is_unpickled():
    helpers = [(path, text) for path, text in texts() if name(path).startswith("mi_helpers/")]
    assert [name(path) for path, text in helpers if IN_HELPERS.search(text)] == []


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_a_notebook_is_fit_to_commit(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebooks.problems(notebook) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_a_notebook_has_one_title_and_skips_no_level(path):
    cells = nbformat.read(path, as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    levels = [len(marks) for marks in re.findall(r"^(#{1,6}) ", text, flags=re.MULTILINE)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))


def links(text: str) -> list[str]:
    """The targets of a page's links and images that are files."""
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [target for target in found if not re.match(r"[a-z]+:|#", target)]


def test_there_is_a_readme():
    assert ROOT / "README.md" in FILES


@pytest.mark.parametrize("path", PAGES + NOTEBOOKS, ids=name)
def test_links_lead_to_files(path):
    text = path.read_text("utf-8")
    if path.suffix == ".ipynb":
        cells = nbformat.reads(text, as_version=4).cells
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    lost = [to for to in links(text) if not (path.parent / to.split("#")[0]).exists()]
    assert lost == []
