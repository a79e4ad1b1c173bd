"""What a run would refuse after hours it refuses at once, in a dry run too; streams are bounded."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_pipeline import files, options
from tiny_models import sentences, tiny_model

from mi_helpers import files as durable
from mi_helpers.__main__ import main
from mi_helpers.saes import pipeline, training
from mi_helpers.saes.harvest import PART, parts, pieces
from mi_helpers.saes.sources import LONGEST, HubText, SourceError, open_source

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model's folder and a text."""
    folder = tmp_path_factory.mktemp("place")
    model = tiny_model()
    model.hf.save_pretrained(folder / "model")
    model.tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text("\n\n".join(sentences(120)))
    (folder / "empty.txt").write_text("\n \n")
    (folder / "rows.jsonl").write_text('{"body": "the cat"}\n')
    return folder


@pytest.fixture
def no_work(monkeypatch):
    """No model is loaded."""
    monkeypatch.setattr(pipeline, "load_model", None)


REFUSED = [
    ({"skip": None}, "A skip path would copy an SAE's input"),
    ({"outlier": 0}, "outlier is 0.0: it has to be 1 or more"),
    ({"outlier": "nan"}, "outlier is nan: it has to be 1 or more"),
    ({"seed": -1}, "seed is -1: it has to be a whole number from 0 to"),
    ({"seed": 10**30}, "seed is 10000"),
    ({"layer": -99}, "layer is -99: count from 0"),
    ({"layer": 99}, "needs a layer from 0 to 2"),
    ({"layers": "0,1"}, "layer is 1 and layers is '0,1': give one of them"),
    ({"layer": -1, "layers": "0,-1"}, "layers is '0,-1': give numbers from 0, as 0,2,4, or all"),
    ({"layer": -1, "layers": "0,99"}, "needs a layer from 0 to 2"),
    ({"context": 0}, "The context is 0"),
    ({"context": 99}, "reads 2 to 32 tokens"),
    ({"k": 0}, "k is 0: it has to be 1 or more"),
    ({"k": 49}, "k is 49, and the dictionary has 48 latents"),
    ({"tokens": 1}, "1 tokens are fewer than one batch of 64"),
    ({"tokens": 66}, "66 tokens are fewer than one batch of 64 and the held-out 6"),
    ({"tokens": 10**15}, "GB of disk and"),
    ({"latents": 10**12}, "GB of disk and"),
    ({"memory": 0}, "memory is 0"),
    ({"loss-tokens": 0}, "loss_tokens is 0"),
    ({"save-every": 0}, "save_every is 0"),
    ({"rate": "nan"}, "rate is nan: it has to be 0 or more"),
    ({"rate": "inf"}, "rate is inf"),
    ({"decay": -1}, "decay is -1.0"),
    ({"target": "mlp_ou"}, "There is no site 'mlp_ou'"),
    ({"site": "pattern"}, "holds no vector per token"),
    ({"site": "ln2_normalized"}, "is not passed on by the model"),
    ({"text": "{place}/empty.txt"}, "has no text"),
    ({"text": "{place}/rows.jsonl"}, "no text in 'text', only body: name the field with --column"),
    ({"folder": "{place}/text.txt"}, "text.txt is a file: choose another folder"),
    ({"folder": "{place}/text.txt/below"}, "text.txt is a file: choose another folder"),
    ({"model": "{place}"}, "has no config.json"),
]


@pytest.mark.parametrize("how", [[], ["--dry-run"]], ids=["run", "dry run"])
@pytest.mark.parametrize("change, says", REFUSED, ids=[json.dumps(c) for c, _ in REFUSED])
def test_it_is_refused_at_once(place, tmp_path, change, says, how, no_work, capsys):
    flags = [f"--{name}" for name, value in change.items() if value is None]
    more = {k: str(v).format(place=place) for k, v in change.items() if v is not None}
    folder = more.pop("folder", tmp_path / "run")
    assert main(["run", *options(place, folder, **more), *flags, *how]) == 2
    said = capsys.readouterr()
    assert says in said.err and said.err.count("\n") == 1 and not said.out
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def run(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert main(["run", *options(place, folder)]) == 0
    return folder


@pytest.mark.parametrize(
    "stage, change, says",
    [
        ("run", {"k": 5}, "holds a run with k 4, not 5"),
        ("run", {"context": 10}, "holds a harvest with the setting context = 12, not 10"),
        ("run", {"layer": 2}, "holds a harvest with the setting source"),
        ("train", {"layer": 2}, "holds a harvest with the setting source"),
        ("features", {"site": "mlp_out"}, "holds a harvest with the setting source"),
        ("report", {"target": "mlp_out"}, "holds a harvest with the setting target"),
        ("train", {"batch": 1_000}, "1,000 tokens are fewer than one batch of 1,000"),
    ],
)
def test_what_a_folder_holds_is_compared_first(
    run, place, stage, change, says, no_work, tmp_path, capsys
):
    before = files(run)
    for how in ([], ["--dry-run"]):
        assert main([stage, *options(place, run, **change), *how]) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1
    assert files(run) == before


# -- interrupted, full, closed ---------------------------------------------------------------


def test_ctrl_c_is_one_line_and_the_next_run_goes_on(run, place, tmp_path, monkeypatch, capsys):
    real = training.Run.advance

    def stops(one):
        if one.step_number == 15:
            raise KeyboardInterrupt
        return real(one)

    given = options(place, tmp_path / "run", **{"save-every": 10})
    with monkeypatch.context() as patch:
        patch.setattr(training.Run, "advance", stops)
        assert main(["run", *given]) == 130
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("Stopped. Nothing that was written is lost: run the same command")
    assert not any("Traceback" in line for line in said)
    assert main(["run", *given]) == 0
    same = ("coder/sae_weights.safetensors", "features.safetensors", "log.csv")
    assert all(files(tmp_path / "run")[name] == files(run)[name] for name in same)


@pytest.mark.parametrize(
    "name, code",
    [
        ("log.csv", errno.ENOSPC),
        ("log.csv", errno.EIO),
        ("recipe.json", errno.EROFS),
        ("checkpoint.safetensors", errno.ENOSPC),
        ("features.safetensors", errno.EDQUOT),
        ("latents.jsonl", errno.ENOSPC),
        ("report.md", errno.EACCES),
        ("curves.png", errno.ENOSPC),
    ],
)
def test_a_write_that_fails_is_one_sentence(run, place, tmp_path, name, code, monkeypatch, capsys):
    """Each kind of file, logs too; then the same command goes on and ends with the same bytes."""
    real, save = open, durable.save_file

    def fails(file, mode="r", *args, **kwargs):
        if str(file).endswith(name) and set("wax") & set(mode):
            raise OSError(code, os.strerror(code))
        return real(file, mode, *args, **kwargs)

    given = options(place, tmp_path / "run", **{"save-every": 10})
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", fails)
        patch.setattr("io.open", fails)
        patch.setattr(durable, "save_file", lambda t, to, m: fails(to, "w") and save(t, to, m))
        assert main(["run", *given]) == 2
    said = capsys.readouterr().err.splitlines()
    full = code in (errno.ENOSPC, errno.EDQUOT)
    assert name in said[-1] and ("disk is full" in said[-1]) == full
    assert not any("Traceback" in line for line in said)
    assert main(["run", *given]) == 0
    apart = ("seconds.json", "report.md", "recipe.json", "coder/SHA256SUMS")
    after = {k: v for k, v in files(tmp_path / "run").items() if k not in apart}
    assert after == {k: v for k, v in files(run).items() if k not in apart}


def test_a_closed_pipe_is_no_traceback(place, tmp_path):
    command = [sys.executable, "-m", "mi_helpers", "harvest", *options(place, tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    process.stdout.close()
    error = process.stderr.read().decode()
    assert process.wait(300) == 141 and "Traceback" not in error and "Exception" not in error
    assert (tmp_path / "run/harvest/manifest.json").exists()


def test_a_stream_that_drops_is_one_sentence_and_goes_on(monkeypatch):
    class Rows(list):
        def skip(self, n):
            return Rows(self[n:])

        def __iter__(self):
            for row in list.__iter__(self):
                if row is None:
                    raise ConnectionError("Read timed out.\nA long story")
                yield row

    held = Rows([{"text": "a"}, {"text": None}, None, {"text": "b"}])
    monkeypatch.setattr(
        "mi_helpers.saes.sources.optional",
        lambda *_: type("datasets", (), {"load_dataset": staticmethod(lambda *a, **k: held)}),
    )
    read = []
    with pytest.raises(
        SourceError, match="cannot go on after 1 texts: Read timed out. When it can"
    ):
        for text in HubText("some/set").texts():
            read.append(text)
    assert read == ["a", ""]
    held[2] = {"text": 5}
    with pytest.raises(SourceError, match="Row 2 of hf:some/set::train has no text column 'text'"):
        list(HubText("some/set").texts(2))


# -- bounded streams -------------------------------------------------------------------------


@pytest.mark.parametrize("between", [" ", "\n", ""])
def test_a_long_paragraph_comes_in_parts_and_loses_nothing(tmp_path, between):
    words = [f"w{i}" for i in range(60_000)]
    text = between.join(words)
    (tmp_path / "a.txt").write_text("first one\n\n" + text + "\n \t\n\nlast")
    found = list(open_source(str(tmp_path / "a.txt")).texts())
    assert found[0] == "first one" and found[-1] == "last" and len(found) > 4
    assert max(map(len, found)) <= LONGEST
    assert re.sub(r"\s", "", "".join(found[1:-1])) == re.sub(r"\s", "", text)
    if between:
        assert [w for part in found[1:-1] for w in part.split()] == words
    again = open_source(str(tmp_path / "a.txt"))
    assert list(again.texts(3)) == found[3:]


def test_a_long_row_is_encoded_in_parts_and_stays_one_text():
    text = "ab " * PART
    assert "".join(part for _, part in parts(iter([text]), 0)) == text
    source = type("Lines", (), {"texts": lambda self, start=0: iter([text, "cd"][start:])})()

    def spell(texts):
        assert max(map(len, texts)) <= PART
        return [[ord(c) for c in t] for t in texts]

    found = list(pieces(source, spell, 1_000))
    whole = [p for p in found if p.document == 0]
    assert [i for p in whole for i in p.ids] == [ord(c) for c in text]
    assert [p.offset for p in whole] == [
        sum(len(q.ids) for q in whole[:n]) for n in range(len(whole))
    ]
    for at in (0, 7, 70, len(whole) - 1):
        rest = pieces(source, spell, 1_000, 0, whole[at].offset)
        assert list(rest) == found[at:]


def test_a_line_of_json_that_never_ends_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("mi_helpers.saes.sources.LINE", 50)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * 60}))
    with pytest.raises(SourceError, match="Line 1 of .*a.jsonl is longer than 50 characters"):
        list(open_source(str(tmp_path / "a.jsonl")).texts())


MEASURE = """
import resource, sys, tempfile
from tiny_models import tiny_model
from mi_helpers.saes.harvest import HarvestConfig, harvest
from mi_helpers.saes.sources import open_source
model = tiny_model()
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
config = HarvestConfig(("embed", None), tokens=500, context=12)
with tempfile.TemporaryDirectory() as folder:
    harvest(model, open_source("tinyworld"), folder, config, progress=False)
before = peak()
with tempfile.TemporaryDirectory() as folder:
    harvest(model, open_source(sys.argv[1]), folder, config, progress=False)
print((peak() - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
@pytest.mark.parametrize("form", ["one line", "no blank line", "jsonl", "one row", "parquet"])
def test_a_harvests_memory_does_not_depend_on_the_texts_form(tmp_path, form):
    """30 MB of text; before, one without blank lines took 6 GB."""
    lines = sentences(2_000) * 1_000
    lines = lines[: 30_000_000 // 50]
    path = tmp_path / {"parquet": "a.parquet", "jsonl": "a.jsonl", "one row": "a.jsonl"}.get(
        form, "a.txt"
    )
    if form == "parquet":
        pyarrow, parquet = (pytest.importorskip(m) for m in ("pyarrow", "pyarrow.parquet"))
        parquet.write_table(pyarrow.table({"text": lines}), path)
    elif form == "jsonl":
        path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    elif form == "one row":
        path.write_text(json.dumps({"text": " ".join(lines)}))
    else:
        path.write_text({"one line": " ", "no blank line": "\n"}[form].join(lines))
    assert form == "parquet" or path.stat().st_size > 25_000_000
    place = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, path],
        capture_output=True,
        text=True,
        env=os.environ | place,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 250
    print(form, done.stdout)
