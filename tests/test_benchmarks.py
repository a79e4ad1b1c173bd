"""The benchmark's tables: written, read back, and shown on their page as they were measured."""

import pytest
import torch
from families import build_empty

from benchmarks import coders as coder_bench
from benchmarks import patching as bench
from mi_helpers.loading import load_model
from mi_helpers.patching import activation_patch

ROWS = [dict(zip(bench.COLUMNS, "abcdefg", strict=True))]


def test_tables_are_kept_apart_and_shown_together(tmp_path):
    page, folder = tmp_path / "README.md", tmp_path / "results"
    page.write_text(f"before\n{bench.BEGIN}\nold\n{bench.END}\nafter\n", "utf-8")
    for name in ("gemma_2_2b", "tiny_gemma"):
        bench.save(name, [row | {"what": name} for row in ROWS], folder)
    assert bench.update_page(page, folder)
    text = page.read_text("utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert text.index("| tiny_gemma | b |") < text.index("| gemma_2_2b | b |")
    assert bench.update_page(page, folder) and page.read_text("utf-8") == text
    page.write_text("no markers", "utf-8")
    assert not bench.update_page(page, folder)


def test_the_page_shows_what_was_measured():
    if any((bench.RESULTS / f"{name}.csv").is_file() for name in bench.TABLES):
        assert bench.markdown() in bench.PAGE.read_text("utf-8")


SPEEDS = {  # milliseconds with the same float32 product, and as they come
    coder_bench.OURS: (10.0, 12.0),
    f"{coder_bench.OURS}, float32 product": (15.0, 18.0),
    "plain dense": (80.0, 120.0),
    "encoder's product": (9.0, 20.0),
    "encoder's product, bfloat16": (None, 6.0),
}


def test_how_many_times_faster_by_hand():
    rows = [
        {"contender": name, "ms, highest": high, "memory, MB": 7}
        | ({} if medium is None else {"ms, medium": medium})
        for name, (medium, high) in SPEEDS.items()
    ]
    failed = {"size": "small", "contender": "SAELens"}
    (only,) = coder_bench.speed_table("small", [*rows, failed])
    assert only["against"] == "plain dense" and only["wanted, as it comes"] == 8
    assert only["times faster, same float32 product"] == 8.0
    assert only["times faster, as it comes"] == 10.0
    said = coder_bench.bounds("reference", rows)
    assert "12 ms: 2.00 times" in said and "takes 18 ms, 2.00 times the float32" in said
    assert f"wanted at most {coder_bench.BOUND}" in said


def test_the_coders_tables_on_the_page(tmp_path, monkeypatch):
    page, folder = tmp_path / "README.md", tmp_path / "results"
    monkeypatch.setattr(coder_bench, "RESULTS", folder)
    page.write_text(f"before\n{coder_bench.BEGIN}\nold\n{coder_bench.END}\nafter\n", "utf-8")
    gradients = [{"difference": "3e-7"}, {"difference": "1.2e-06"}, {"difference": "9e-8"}]
    coder_bench.keep("coders_gradients", gradients)
    coder_bench.keep("coders_files", [{"file": "one", "read here": "0.0e+00"}])
    assert coder_bench.update_page(page, folder)
    text = page.read_text("utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "1.2e-06" in text and "| one | 0.0e+00 |" in text
    page.write_text("no markers", "utf-8")
    assert not coder_bench.update_page(page, folder)


def test_the_page_shows_what_was_measured_of_coders():
    assert coder_bench.markdown() in coder_bench.PAGE.read_text("utf-8")


def test_the_median_of_ways_that_take_turns():
    calls = []
    ways = {name: lambda name=name: calls.append(name) or torch.ones(1) for name in "ab"}
    times, results = bench.race(ways, 2)
    assert calls == list("ab" * 3) and set(times) == set(results) == {"a", "b"}


@pytest.mark.parametrize("over", ["positions", "heads x positions"])
def test_one_patch_per_forward_is_the_same_sweep(over):
    """The benchmark's own reference, on a few of its patches."""
    task = bench.cities(load_model())
    assert task.clean.shape == task.corrupted.shape == (1, 32)
    assert (task.clean != task.corrupted).nonzero()[0].tolist() == [0, 1]
    site = "resid_pre" if over == "positions" else "z"
    every = bench.places(task.model, 32, over)
    few = slice(5, None, len(every) // 6)
    found = bench.forward_per_patch(task, site, over, every[few])
    whole = activation_patch(task.model, task.clean, task.corrupted, site, task.metric, over=over)
    assert torch.allclose(found, whole.flatten()[few], atol=1e-5)
    assert torch.allclose(bench.sweep(task, site, over), whole, atol=1e-6)


def test_the_large_models_table_on_a_tiny_one(monkeypatch, capsys):
    monkeypatch.setattr(bench, "empty_gemma2_2b", lambda: build_empty("gemma2"))
    (row,) = bench.gemma_2_2b(quick=False)
    assert list(row) == bench.COLUMNS and float(row["times faster"]) > 0
    assert float(row["difference"]) < 0.1  # bfloat16
    assert row["what"] in capsys.readouterr().out
