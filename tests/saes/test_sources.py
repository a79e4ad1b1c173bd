"""Text sources: the same texts in the same order each time, from any text on."""

import builtins
import itertools
import json
import sys
import types

import pytest

from mi_helpers.saes import sources
from mi_helpers.saes.sources import SourceError, open_source


def first(source, n, start=0):
    return list(itertools.islice(source.texts(start), n))


def test_tinyworld_starts_anywhere_and_depends_on_the_seed():
    world = open_source("tinyworld", seed=3)
    texts = first(world, 12)
    assert first(world, 5, start=7) == texts[7:]
    assert first(open_source("tinyworld", seed=4), 12) != texts
    assert [world.document(i).text for i in range(12)] == texts
    assert world.identity() == open_source("tinyworld", seed=3).identity()
    assert world.identity() != open_source("tinyworld", seed=4).identity()


def test_families_of_tinyworld_can_be_chosen():
    world = open_source("tinyworld:norwegian, years")
    found = {world.document(i).family for i in range(60)}
    assert found == {"norwegian", "years"} and world.name == "tinyworld:norwegian,years"
    with pytest.raises(SourceError, match="no family 'norwegain': did you mean 'norwegian'"):
        open_source("tinyworld:norwegain")


def test_files_are_read_in_the_order_of_their_names(tmp_path):
    (tmp_path / "b.txt").write_text("one\nline\n\n\n  \nthree\n")
    rows = [{"text": "first"}, {"text": "   "}, {"text": "second"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "c.md").write_text("not read")
    folder = open_source(str(tmp_path))
    assert list(folder.texts()) == ["first", "second", "one\nline", "three"]
    assert list(folder.texts(2)) == ["one\nline", "three"]
    assert list(open_source(str(tmp_path / "*.txt")).texts()) == ["one\nline", "three"]
    before = folder.identity()
    (tmp_path / "b.txt").write_text("changed")
    assert open_source(str(tmp_path)).identity() != before


def test_another_field_can_be_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "here"}\n')
    assert list(open_source(str(path), column="body").texts()) == ["here"]
    with pytest.raises(SourceError, match="Line 1 .* no text in 'text', only body"):
        list(open_source(str(path)).texts())


@pytest.mark.parametrize("line", ["{", '["a"]', '{"text": 3}', '{"text": "\\ud800"}', "[" * 10**5])
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(SourceError, match="Line 2 of .*a.jsonl"):
        list(open_source(str(path)).texts())


def test_what_is_not_text_is_said(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SourceError, match="not UTF-8"):
        list(open_source(str(tmp_path / "a.txt")).texts())
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(SourceError, match="a.csv is none of .txt, .jsonl, .parquet"):
        open_source(str(tmp_path / "a.csv"))
    with pytest.raises(SourceError, match="no text at .*give 'tinyworld'"):
        open_source(str(tmp_path / "nothing"))


@pytest.fixture
def without(monkeypatch):
    """Make imports of some packages fail."""

    def hide(*names):
        real = builtins.__import__

        def pretend(name, *args, **kwargs):
            if name.split(".")[0] in names:
                raise ImportError(name)
            return real(name, *args, **kwargs)

        for module in [m for m in sys.modules if m.split(".")[0] in names]:
            monkeypatch.delitem(sys.modules, module)
        load = sources.importlib.import_module

        def pretend_load(name):
            if name.split(".")[0] in names:
                raise ImportError(name)
            return load(name)

        monkeypatch.setattr(sources.importlib, "import_module", pretend_load)
        monkeypatch.setattr(builtins, "__import__", pretend)

    return hide


def test_a_missing_extra_is_said_before_anything_is_read(tmp_path, without):
    without("datasets", "pyarrow")
    with pytest.raises(SourceError, match=r"needs the package datasets: pip install .*\[gemma\]"):
        open_source("hf:someone/something")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(SourceError, match=r"needs the package pyarrow: pip install"):
        open_source(str(tmp_path / "a.parquet"))


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the datasets package: what it was asked for, and what it gives."""
    asked = []

    class Rows(list):
        def skip(self, n):
            return Rows(self[n:])

    def load_dataset(name, configuration, split, streaming):
        asked.append((name, configuration, split, streaming))
        if name == "gone":
            raise ConnectionError("No network.\nA long story")
        return Rows([{"text": f"t{i}"} for i in range(5)])

    module = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_a_dataset_is_streamed(hub):
    source = open_source("hf:someone/something:part:validation")
    assert list(source.texts(2)) == ["t2", "t3", "t4"]
    assert hub == [("someone/something", "part", "validation", True)]
    assert list(open_source("hf:someone/something").texts(9)) == []
    assert hub[-1] == ("someone/something", None, "train", True)
    assert source.name == "hf:someone/something:part:validation"


def test_a_dataset_that_cannot_be_read_is_one_sentence(hub):
    with pytest.raises(SourceError, match="hf:gone::train cannot be read: No network.$"):
        list(open_source("hf:gone").texts())
    with pytest.raises(SourceError, match="no text column 'body', only text"):
        list(open_source("hf:someone/something", column="body").texts())
    with pytest.raises(SourceError, match="is not hf:NAME"):
        open_source("hf:")


def test_parquet_where_the_extra_is_there(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(
        pyarrow.table({"text": ["a", None, "b"], "n": [1, 2, 3]}), tmp_path / "x.parquet"
    )
    assert list(open_source(str(tmp_path / "x.parquet")).texts()) == ["a", "b"]
    with pytest.raises(SourceError, match="holds no text"):
        list(open_source(str(tmp_path / "x.parquet"), column="n").texts())
    with pytest.raises(SourceError, match="no column 'body', only text, n"):
        list(open_source(str(tmp_path / "x.parquet"), column="body").texts())
