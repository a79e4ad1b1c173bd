"""`python -m mi_helpers`: the table of commands, typos, notebooks and the doctor."""

import json
import os
import signal
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import notebook_times
from mi_helpers.__main__ import main
from mi_helpers.course import cli, doctor, notebooks
from mi_helpers.course.cli import BY_NAME, load, sentence
from mi_helpers.files import InUse, RunError
from mi_helpers.layouts import ModelError
from mi_helpers.saes.coder import SparseCoder


@pytest.mark.parametrize("name", BY_NAME)
def test_every_command_has_its_function_and_its_help(name, capsys):
    assert callable(load(name))
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    assert f"usage: python -m mi_helpers {name}" in capsys.readouterr().out


def test_help_loads_no_wing():
    command = "import sys; from mi_helpers.__main__ import main; main(['--help']); "
    command += "sys.exit('torch' in sys.modules or 'IPython' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], capture_output=True).returncode == 0


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in BY_NAME)
    assert main([]) == 2


def test_a_typo_gets_one_sentence(capsys):
    assert main(["exercsies"]) == 2
    message = capsys.readouterr().err
    assert message == "There is no command 'exercsies': did you mean 'exercises'?\n"
    assert main(["qqq"]) == 2
    assert "doctor" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["claims", "--measure", "x"], "Error parsing --measure: "),
        (["claims", "--mesure", "1"], "Unrecognized options: --mesure, 1."),
        (["manifest", "--folder"], "Missing value for argument '--folder'. Expected 1 values."),
        (["doctor", "now"], "Unrecognized options: now."),
    ],
)
def test_a_mistake_in_the_options_gets_one_sentence(arguments, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    error = capsys.readouterr().err
    assert error.startswith(said) and error.count("\n") == 1 and "│" not in error


@pytest.mark.parametrize(
    "box",
    [
        "╭─ Value error ─╮\n│ Error parsing │\n│ --k: no │\n│ ───── │\n│ Helptext │\n╰─────╯\n",
        " Value error \n ----------- \n  Error parsing  \n  --k: no.  \n  ------\n Helptext \n",
    ],
)
def test_a_sentence_is_taken_out_of_a_box(box):
    assert sentence(box) == "Error parsing --k: no."


# -- what goes wrong ---------------------------------------------------------------------------


def stub(monkeypatch, raised):
    """`doctor`, which does nothing but raise this."""

    def command(argv):
        print("half")
        raise raised

    monkeypatch.setattr(cli, "load", lambda name: command)


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (RunError("The disk is full."), 2, "The disk is full."),
        (ModelError("There is no model."), 2, "There is no model."),
        (InUse("It is in use."), 1, "It is in use."),
        (KeyboardInterrupt(), 130, "Stopped. Nothing that was written is lost"),
        (MemoryError(), 1, "doctor needs more memory than there is"),
        (
            FileNotFoundError(2, "No such file or directory", "a.txt"),
            1,
            "doctor stopped: a.txt: No",
        ),
        (ZeroDivisionError("division\nby zero"), 1, "it should not have (ZeroDivisionError: div"),
        (ValueError(""), 1, "it should not have (ValueError: ValueError): please report this"),
    ],
)
@pytest.mark.parametrize("traced", [False, True])
def test_whatever_is_raised_is_one_sentence(raised, code, said, traced, monkeypatch, capsys):
    stub(monkeypatch, raised)
    assert main(["doctor", *["--traceback"] * traced]) == code
    error = capsys.readouterr().err
    assert said in error
    shown = traced and not isinstance(raised, KeyboardInterrupt)
    assert ("Traceback" in error) == shown and (shown or error.count("\n") == 1)


def test_a_value_error_of_our_own_code_is_its_sentence(monkeypatch, capsys):
    """And one that a library raised is not, whoever called it."""
    monkeypatch.setattr(cli, "load", lambda name: lambda argv: SparseCoder(4, 8, k=9) and 0)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err.startswith("k is 9, and the dictionary has 8 latents")
    monkeypatch.setattr(cli, "load", lambda name: lambda argv: json.loads("{"))
    assert main(["doctor"]) == 1
    assert "it should not have (JSONDecodeError: Expecting" in capsys.readouterr().err


def test_the_environment_asks_for_tracebacks(monkeypatch, capsys):
    stub(monkeypatch, RunError("The disk is full."))
    for value, shown in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("MI_TRACEBACK", value)
        assert main(["doctor"]) == 2
        assert ("Traceback" in capsys.readouterr().err) == shown


def outside(command, *arguments, **environment):
    """A command of its own in a process of its own, without anything heavy."""
    code = "import sys, time; from mi_helpers.course import cli\n"
    code += f"cli.load = lambda name: {command}\nsys.exit(cli.main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # where tests ignore it
    )


ARROW = "lambda argv: print('a → b … é 日 \\ud800')"


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", b"a -> b ... e \\u65e5 \\ud800"),
        ("latin-1", b"a -> b ... \xe9 \\u65e5 \\ud800"),
        ("utf-8", "a → b … é 日 \\ud800".encode()),
    ],
)
def test_a_terminal_gets_what_it_can_print(encoding, shown):
    done = outside(ARROW, "doctor", PYTHONIOENCODING=encoding)
    out, err = done.communicate(timeout=60)
    assert (out.strip(), err, done.returncode) == (shown, b"", 0)


@pytest.mark.parametrize("name", ["doctor", "manifest"])
def test_help_is_printed_in_ascii(name):
    arguments = [sys.executable, "-m", "mi_helpers", name, "--help"]
    plain = {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(arguments, capture_output=True, env=os.environ | plain)
    assert done.returncode == 0 and done.stdout.isascii() and not done.stderr


def test_a_pipe_that_is_closed_ends_a_command_quietly():
    endless = "lambda argv: [print(i) for i in range(10**7)]"
    done = outside(endless, "doctor")
    assert done.stdout.readline() == b"0\n"
    done.stdout.close()
    assert done.wait(60) == 141 and done.stderr.read() == b""


def test_ctrl_c_is_one_line():
    waits = "lambda argv: (print('here', flush=True), time.sleep(60))"
    done = outside(waits, "doctor")
    assert done.stdout.readline() == b"here\n"
    done.send_signal(signal.SIGINT)
    assert done.wait(60) == 130 and done.stderr.read().count(b"\n") == 1


# -- notebooks -------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Two small notebooks; the second one fails."""
    good = new_notebook(cells=[new_markdown_cell("# One"), new_code_cell("print(6 * 7)")])
    good.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {}}
    good.cells[1].metadata.update({"execution": {"x": "2020"}, "tags": ["kept"]})
    nbformat.write(good, tmp_path / "00_good.ipynb")
    nbformat.write(new_notebook(cells=[new_code_cell("1 / 0")]), tmp_path / "01_bad.ipynb")
    return tmp_path


def test_a_notebook_is_run_cleaned_and_saved(folder):
    ids = [cell.id for cell in nbformat.read(folder / "00_good.ipynb", 4).cells]
    assert main(["notebooks", "00", "--folder", str(folder)]) == 0
    saved = nbformat.read(folder / "00_good.ipynb", 4)
    assert notebooks.problems(saved) == []
    assert set(saved.metadata) == {"kernelspec", "language_info"}
    assert [cell.id for cell in saved.cells] == ids
    assert saved.cells[1].metadata == {"tags": ["kept"]}
    assert saved.cells[1].outputs[0].text == "42\n" and saved.cells[1].execution_count == 1
    assert sorted(path.name for path in folder.iterdir()) == ["00_good.ipynb", "01_bad.ipynb"]


def test_a_failing_notebook_stays_as_it_was(folder, capsys):
    before = (folder / "01_bad.ipynb").read_bytes()
    assert main(["notebooks", "01", "--folder", str(folder)]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().out
    assert (folder / "01_bad.ipynb").read_bytes() == before


def test_an_unknown_notebook_is_said(folder, capsys):
    assert main(["notebooks", "99", "--folder", str(folder)]) == 2
    assert "No notebook's name begins with '99'." in capsys.readouterr().err


def test_what_must_not_be_committed_is_found():
    cell = new_code_cell("# NBVAL_" + "SKIP\nopen('/ho" + "me/me/x')")
    cell.metadata["execution"] = {}
    cell.outputs = [nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])]
    found = notebooks.problems(new_notebook(cells=[cell], metadata={"widgets": {}}))
    assert len(found) == 6, found


@pytest.mark.parametrize("text", ["/roo" + "t/x", "/tm" + "p/x.png", "C:\\" + "Users\\me"])
def test_a_path_of_one_machine_is_recognised(text):
    assert notebooks.MACHINE_PATH.search(f"see '{text}'")


@pytest.mark.parametrize("text", ["https://a.org/home/x", "~/x", "data/tmp/x", "../root/x"])
def test_other_paths_are_let_be(text):
    assert not notebooks.MACHINE_PATH.search(f"see '{text}'")


def test_times_are_summed_by_notebook(tmp_path, capsys):
    case = '<testcase classname="notebooks.{}_x.ipynb" name="Cell" time="{}" />'
    cases = "".join(case.format(*each) for each in (("00", 1.5), ("01", 61), ("00", 2)))
    (tmp_path / "report.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    notebook_times.main(str(tmp_path / "report.xml"))
    assert capsys.readouterr().out.splitlines() == [
        "    3.5 s  00_x.ipynb",
        "   61.0 s  01_x.ipynb  over a minute",
    ]


# -- doctor ----------------------------------------------------------------------------------


def test_pins_are_read():
    assert doctor.pins("# x\na==1.0\n\nb-c==2\n") == {"a": "1.0", "b-c": "2"}


def test_packages_that_differ_or_lack_are_said():
    version = doctor.installed("numpy")
    wanted = {"numpy": version, "matplotlib": "0.1", "no-such-package": "1"}
    found = [str(finding) for finding in doctor.packages(wanted)]
    assert found[0].endswith("1 of 3 pinned packages have the pinned version.")
    assert "the course was made with 0.1" in found[1]
    assert "no-such-package 1 is pinned but not installed" in found[2]


def test_a_torch_with_cuda_and_what_it_brings_are_fine(monkeypatch):
    requirements = (doctor.ROOT / "requirements.txt").read_text("utf-8")
    wanted = doctor.pins(requirements)
    have = wanted | {"torch": wanted["torch"] + "+cu130", "nvidia-cublas": "13", "triton": "3"}
    monkeypatch.setattr(doctor.importlib.metadata, "version", have.__getitem__)
    (found,) = doctor.packages(wanted)
    assert found.status == doctor.GOOD and f"{len(wanted)} of {len(wanted)} " in found.sentence


def test_an_essential_package_that_lacks_is_bad(monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda name: None)
    statuses = {finding.status for finding in doctor.packages({"torch": "2"})}
    assert doctor.BAD in statuses


def test_what_gemma_needs_is_compared_with_the_memory():
    assert "does not fit" in doctor.gemma(4e9).sentence
    assert "fits in bfloat16;" in doctor.gemma(8e9).sentence
    assert "fits in bfloat16 and float32;" in doctor.gemma(32e9).sentence
    assert "5.2 GB" in doctor.gemma(8e9).sentence and "10.5 GB" in doctor.gemma(8e9).sentence


def test_a_small_machine_is_noted_not_refused():
    assert doctor.machine(8e9, 6e9, 1e10).status == doctor.GOOD
    assert doctor.machine(8e9, 1e9, 1e10).status == doctor.NOTE


def test_damaged_data_is_bad(tmp_path):
    assert doctor.data(tmp_path).status == doctor.BAD


def test_the_report_ends_in_a_verdict(monkeypatch, capsys):
    lines = [doctor.Finding(doctor.GOOD, "fine.")]
    monkeypatch.setattr(doctor, "findings", lambda: iter(lines))
    assert main(["doctor"]) == 0
    assert "offline" in capsys.readouterr().out
    lines.append(doctor.Finding(doctor.BAD, "broken."))
    assert main(["doctor"]) == 1
    assert "FAIL  broken." in capsys.readouterr().out
