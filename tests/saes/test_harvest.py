"""The harvest against single runs of the model; shards, manifest, resuming, shuffled reading."""

import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import sentences, tiny_model, word_tokenizer

from mi_helpers import files as durable
from mi_helpers.files import RunError
from mi_helpers.layouts import NORMALIZED, ModelError
from mi_helpers.models import LanguageModel, read_sites, site_width
from mi_helpers.saes import harvest as module
from mi_helpers.saes.activations import Activations, Shuffled
from mi_helpers.saes.harvest import HarvestConfig, batches, harvest, harvest_together, pieces
from mi_helpers.saes.plan import check_model
from mi_helpers.saes.processes import Processes
from mi_helpers.saes.sources import open_source

SMALL = {"context": 12, "shard_tokens": 150, "batch_tokens": 60}


def harvested(model, source, folder, site, target=None, **settings):
    """A harvest in small shards."""
    config = HarvestConfig(site, target, **SMALL | settings)
    return harvest(model, source, folder, config, progress=False)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(sentences(120)) + "\n")
    return open_source(str(path))


@pytest.fixture
def held(model, source, tmp_path):
    return harvested(model, source, tmp_path / "h", ("resid_post", 1), tokens=1_000)


def content(folder):
    """Every file's bytes by name."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# -- pieces and batches ----------------------------------------------------------------------


class Lines:
    def __init__(self, *texts):
        self.held = texts

    def texts(self, start=0):
        return iter(self.held[start:])


def spell(texts):
    return [[ord(c) for c in text] for text in texts]


def test_long_texts_are_cut_and_can_be_taken_up_anywhere():
    source = Lines("abcde", "", "fg", "hijkl")
    found = [(p.document, p.offset, "".join(map(chr, p.ids))) for p in pieces(source, spell, 2)]
    assert found == [
        (0, 0, "ab"),
        (0, 2, "cd"),
        (0, 4, "e"),
        (2, 0, "fg"),
        (3, 0, "hi"),
        (3, 2, "jk"),
        (3, 4, "l"),
    ]
    for place, (document, offset, ids) in enumerate(found):
        after = pieces(source, spell, 2, document, offset + len(ids))
        assert [p.offset for p in after] == [each[1] for each in found[place + 1 :]]


def test_batches_hold_each_text_once_and_little_padding():
    lengths = torch.randint(1, 50, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    found = list(batches(lengths, 200))
    assert sorted(i for batch in found for i in batch) == list(range(200))
    padded = [len(batch) * max(lengths[i] for i in batch) for batch in found]
    assert max(padded) <= 200 and sum(padded) < 1.15 * sum(lengths)
    assert list(batches([500, 3], 200)) == [[1], [0]]


# -- what is harvested -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "site", [("resid_post", 1), ("z", 2), ("embed", None), ("resid_final", None)]
)
def test_every_row_is_the_models_own_activation(model, source, tmp_path, site):
    held = harvested(model, source, tmp_path, site, tokens=400)
    assert held.rows == 400 and held.manifest["left_out"]["outliers"] == 0
    texts = model.tokenizer(list(source.texts()), add_special_tokens=False)["input_ids"]
    checked = 0
    for index in range(len(held.sizes)):
        shard = held.shard(index)
        for row in range(0, held.sizes[index], 17):
            document, position = shard.place[row].tolist()
            assert shard.tokens[row] == texts[document][position]
            start = position - position % 11  # pieces of 11 tokens and BOS
            ids = torch.tensor([[2, *texts[document][start : position + 1]]])
            (expected,) = read_sites(model, ids, [site])
            expected = expected[0, -1].to(torch.bfloat16).float()
            assert (shard.source[row].float() - expected).abs().max() <= 0.01 * expected.abs().max()
            checked += 1
    assert checked > 20


def test_source_and_target_belong_together(model, source, tmp_path):
    sites = ("mlp_in", 1), ("mlp_out", 1)
    held = harvested(model, source, tmp_path, *sites, tokens=300)
    assert held.source == ("mlp_in", 1) and held.target == ("mlp_out", 1)
    x, y = held.slice(0, 300)
    mlp = model.part("ln2_post", 1)(model.part("mlp", 1)(x))
    assert (mlp - y).abs().max() < 0.03 * y.abs().max()


@pytest.mark.parametrize("family", ["gemma2", "llama", "gpt_neox"])
def test_the_normalized_input_lacks_only_the_gain(family):
    model = tiny_model(family=family)
    ids = torch.tensor([[2, 5, 9, 7, 12]])
    plain, full = read_sites(model, ids, [(NORMALIZED, 1), ("mlp_in", 1)])
    norm = model.part("ln2", 1)
    gain = 1 + norm.weight if family == "gemma2" else norm.weight
    bias = getattr(norm, "bias", None)
    again = plain * gain + (0 if bias is None else bias)
    assert torch.allclose(again, full, atol=1e-5)
    assert torch.allclose(plain.pow(2).mean(-1), torch.ones(1, 5), atol=1e-3)


def test_widths_and_sites_that_cannot_be_harvested(model):
    sizes = {"resid_pre": 12, "z": 16, "k": 8, "post": 20, NORMALIZED: 12, "mlp_out": 12}
    assert {name: site_width(model, (name, 0)) for name in sizes} == sizes
    with pytest.raises(ModelError, match="holds no vector per token"):
        site_width(model, ("pattern", 0))
    with pytest.raises(ModelError, match="Did you mean 'resid_post'"):
        site_width(model, ("resid_posts", 0))
    with pytest.raises(ModelError, match="layer from 0 to 2"):
        site_width(model, ("resid_post", 3))
    with pytest.raises(ModelError, match="needs a layer"):
        site_width(model, ("resid_post", None))


def test_the_model_is_run_no_further_than_needed(model, monkeypatch):
    seen = []
    for layer, block in enumerate(model.blocks):
        monkeypatch.setattr(block, "forward", wrapped(block.forward, seen, layer))
    for site, last in ((("resid_pre", 2), 1), (("z", 1), 1), (("embed", None), None)):
        seen.clear()
        read_sites(model, torch.tensor([[2, 5, 6]]), [site])
        assert seen == ([] if last is None else list(range(last + 1)))


def wrapped(forward, seen, layer):
    def run(*args, **kwargs):
        seen.append(layer)
        return forward(*args, **kwargs)

    return run


def test_outliers_are_left_out_and_counted(source, tmp_path):
    model = tiny_model(seed=1)
    loud = model.tokenizer.encode(" cat", add_special_tokens=False)[0]
    with torch.no_grad():
        model.hf.model.embed_tokens.weight[loud] *= 1_000
    held = harvested(model, source, tmp_path, ("embed", None), tokens=500)
    kept = torch.cat([held.shard(i).tokens for i in range(len(held.sizes))])
    all_ids = torch.cat([held.shard(i).ids for i in range(len(held.sizes))])
    assert (all_ids == loud).sum() == held.manifest["left_out"]["outliers"] > 5
    assert loud not in kept and held.rows == 500 - held.manifest["left_out"]["outliers"]


def test_a_tokenizer_without_bos_loses_no_position(source, tmp_path):
    model = tiny_model(tokenizer=word_tokenizer(bos=False))
    held = harvested(model, source, tmp_path, ("embed", None), tokens=200)
    assert held.rows == 200 and held.manifest["left_out"]["bos"] == 0


def test_a_source_that_ends_early_gives_what_it_has(model, tmp_path):
    (tmp_path / "t.txt").write_text("the cat sat\n\nthe dog ran far\n")
    source = open_source(str(tmp_path / "t.txt"))
    held = harvested(model, source, tmp_path / "h", ("embed", None), tokens=10**4)
    assert held.rows == held.manifest["tokens"] == 7 and held.manifest["asked"] == 10**4


# -- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, says",
    [
        ({"tokens": 0}, "tokens is 0: it has to be 1 or more"),
        ({"context": 1}, "reads 2 to 32 tokens"),
        ({"context": 33}, "reads 2 to 32 tokens"),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
    ],
)
def test_bad_numbers_are_said(model, source, tmp_path, change, says):
    with pytest.raises(RunError, match=says):
        harvested(model, source, tmp_path, ("embed", None), **change)
    assert not list(tmp_path.iterdir())


def test_an_empty_text_is_said(model, tmp_path):
    (tmp_path / "t.txt").write_text(" \n\n \n")
    with pytest.raises(RunError, match="has no text"):
        harvested(model, open_source(str(tmp_path / "t.txt")), tmp_path, ("embed", None))


def test_a_model_without_a_tokenizer_is_said(model, source, tmp_path):
    bare = LanguageModel(model.hf, None, "bare")
    with pytest.raises(ModelError, match="bare has no tokenizer"):
        harvested(bare, source, tmp_path, ("embed", None))


def test_activations_that_are_not_finite_are_said(source, tmp_path):
    model = tiny_model(seed=2)
    with torch.no_grad():
        model.hf.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(RunError, match="resid_post 1 are not finite .* first in text 0"):
        harvested(model, source, tmp_path, ("resid_post", 1), tokens=100)


def test_a_harvest_of_another_model_is_said(held, model):
    check_model(held, model)
    with pytest.raises(
        RunError, match="was made with the model tiny gemma2 0, not with tiny gemma2 9"
    ):
        check_model(held, tiny_model(seed=9))
    other = tiny_model(seed=9)
    other.name = model.name
    with pytest.raises(RunError, match="was made with other weights"):
        check_model(held, other)


def test_a_folder_with_another_harvest_is_said(held, model, source):
    with pytest.raises(RunError, match="holds a harvest with the setting context = 12, not 10"):
        harvested(model, source, held.folder, ("resid_post", 1), tokens=1_000, context=10)


def test_too_little_disk_is_said_first(model, source, tmp_path):
    with pytest.raises(RunError, match=r"needs .* GB of disk and .* free"):
        harvested(model, source, tmp_path, ("embed", None), tokens=10**15)
    assert not list(tmp_path.glob("shard*"))


# -- resuming --------------------------------------------------------------------------------


def test_an_unfinished_harvest_is_said(tmp_path, held):
    with pytest.raises(RunError, match="is not there: run the harvest first"):
        Activations.open(tmp_path / "none")
    (held.folder / "manifest.json").unlink()
    with pytest.raises(RunError, match="is not finished"):
        Activations.open(held.folder)


def test_a_finished_harvest_is_not_made_again(held, model, source, monkeypatch):
    before = content(held.folder)
    monkeypatch.setattr(module, "read_sites", None)
    harvested(model, source, held.folder, ("resid_post", 1), tokens=1_000)
    assert content(held.folder) == before


@pytest.mark.parametrize("damage", ["truncated", "changed", "gone"])
def test_a_damaged_shard_is_named_and_made_again_alone(held, model, source, damage, capsys):
    before = content(held.folder)
    path = held.folder / "shard-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data if damage == "changed" else data[:-7])
    said = {"gone": "missing", "truncated": "truncated", "changed": "checksum differs"}[damage]
    with pytest.raises(RunError, match=f"shard-00002.safetensors.*{said}.*Run the harvest again"):
        Activations.open(held.folder).shard(2)
    times = {p.name: p.stat().st_mtime_ns for p in held.folder.glob("shard*")}
    harvested(model, source, held.folder, ("resid_post", 1), tokens=1_000)
    assert content(held.folder) == before
    after = {p.name: p.stat().st_mtime_ns for p in held.folder.glob("shard*")}
    assert [name for name in after if after[name] != times.get(name)] == [path.name]
    assert damage == "gone" or "made again" in capsys.readouterr().out


class Killed(BaseException):
    """Stands for a kill at a chosen place."""


@pytest.mark.parametrize("at", range(0, 40, 3))
def test_stopped_at_any_step_of_writing_it_ends_with_the_same_bytes(
    held, model, source, tmp_path, at, monkeypatch
):
    """The n-th call of write, fsync or rename does not come back; then the harvest is run again."""
    calls = iter(range(10**6))

    def dies(function):
        def run(*args, **kwargs):
            if next(calls) == at:
                raise Killed
            return function(*args, **kwargs)

        return run

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(durable, "save_file", dies(durable.save_file))
        patch.setattr(durable, "flush", dies(durable.flush))
        patch.setattr(durable.os, "replace", dies(os.replace))
        harvested(model, source, tmp_path / "k", ("resid_post", 1), tokens=1_000)
        raise Killed  # it ended before: nothing left to kill
    harvested(model, source, tmp_path / "k", ("resid_post", 1), tokens=1_000)
    assert content(tmp_path / "k") == content(held.folder)


def test_a_full_disk_is_named_and_nothing_is_lost(held, model, source, tmp_path, monkeypatch):
    calls, real = [], durable.save_file

    def full(tensors, path, metadata):
        calls.append(path)
        real(tensors, path, metadata)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(durable, "save_file", full)
        with pytest.raises(RunError, match="The disk is full: shard-00003.* nothing that was"):
            harvested(model, source, tmp_path / "f", ("resid_post", 1), tokens=1_000)
    assert len(list((tmp_path / "f").glob("shard-*.safetensors"))) == 3
    assert not list((tmp_path / "f").glob("*.part"))
    harvested(model, source, tmp_path / "f", ("resid_post", 1), tokens=1_000)
    assert content(tmp_path / "f") == content(held.folder)


def test_a_write_that_the_system_cuts_short_is_named(tmp_path):
    """The kernel refuses to let the file grow: the same path as a full disk, without a fake."""
    script = (
        "import resource, signal, sys, torch; from pathlib import Path\n"
        "from mi_helpers.files import save_tensors\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "save_tensors(Path(sys.argv[1]), {'x': torch.zeros(10**5)})\n"
    )
    path = tmp_path / "x.safetensors"
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True)
    assert "RunError: The disk is full: x.safetensors could not be written" in done.stderr
    assert not list(tmp_path.iterdir())


def test_two_processes_make_the_same_harvest(held, model, source, tmp_path, monkeypatch):
    """Both in turn, without waiting for one another: each makes every other shard."""
    folder = tmp_path / "two"
    monkeypatch.setattr(Processes, "wait", lambda self: None)
    plan = durable.read_sealed(held.folder / "plan.json")
    for rank in (0, 1):
        reader, own = module.Reader(model, source, plan), module.Harvester(folder, plan)
        count = reader.shards([own], Processes(rank, 2), False)
        assert count == len(held.sizes)
        made = {int(path.stem[-5:]) for path in folder.glob("shard-*")}
        assert made == {i for i in range(count) if i % 2 <= rank}
    both, one = content(folder), content(held.folder)
    assert both == {name: one[name] for name in both}


# -- several sites in one pass -----------------------------------------------------------------


def several(folder, **settings):
    """{folder: config} of four harvests: sites of three layers, and a transcoder's pair."""
    own = {"tokens": 1_000} | SMALL | settings
    pairs = {"a": (("resid_post", 1), None), "b": (("resid_post", 0), None)}
    pairs |= {"c": (("mlp_in", 1), ("mlp_out", 1)), "d": (("embed", None), None)}
    return {folder / n: HarvestConfig(*pair, **own) for n, pair in pairs.items()}


@pytest.fixture(scope="module")
def apart(model, source, tmp_path_factory):
    """A folder of those harvests, each made alone."""
    folder = tmp_path_factory.mktemp("apart")
    for own, config in several(folder).items():
        harvest(model, source, own, config, progress=False)
    return folder


@pytest.fixture
def alone(apart):
    """{name: the bytes of that harvest alone}."""
    return {folder.name: content(folder) for folder in apart.iterdir()}


def test_harvests_in_one_pass_are_what_each_is_alone(model, source, alone, tmp_path, monkeypatch):
    runs, real = [], module.read_sites
    monkeypatch.setattr(module, "read_sites", lambda *a: runs.append(a[2]) or real(*a))
    wanted = several(tmp_path)
    held = harvest_together(model, source, wanted, progress=False)
    assert {folder.name: content(folder) for folder in wanted} == alone
    assert [each.source for each in held] == [each.site for each in wanted.values()]
    once = len(runs)
    assert all(len(sites) == 5 for sites in runs)  # a, b, d, and the pair of c
    runs.clear()
    harvest(model, source, tmp_path / "one", several(tmp_path)[tmp_path / "a"], progress=False)
    assert len(runs) == once  # as many runs of the model as one harvest takes


def test_only_what_lacks_a_shard_is_run_again(model, source, alone, tmp_path, monkeypatch):
    wanted = several(tmp_path)
    harvest_together(model, source, wanted, progress=False)
    (tmp_path / "b" / "shard-00001.safetensors").unlink()
    shard = tmp_path / "c" / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    runs, real = [], module.read_sites
    monkeypatch.setattr(module, "read_sites", lambda *a: runs.append(a[2]) or real(*a))
    harvest_together(model, source, wanted, progress=False)
    assert {tuple(sites) for sites in runs} == {(("resid_post", 0), ("mlp_in", 1), ("mlp_out", 1))}
    assert {folder.name: content(folder) for folder in wanted} == alone


@pytest.mark.parametrize("at", range(0, 130, 13))
def test_several_stopped_at_any_step_of_writing_end_with_the_same_bytes(
    model, source, alone, tmp_path, at, monkeypatch
):
    calls, wanted = iter(range(10**6)), several(tmp_path)

    def dies(function):
        def run(*args, **kwargs):
            if next(calls) == at:
                raise Killed
            return function(*args, **kwargs)

        return run

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(durable, "save_file", dies(durable.save_file))
        patch.setattr(durable, "flush", dies(durable.flush))
        patch.setattr(durable.os, "replace", dies(os.replace))
        harvest_together(model, source, wanted, progress=False)
    harvest_together(model, source, wanted, progress=False)
    assert {folder.name: content(folder) for folder in wanted} == alone


def test_several_harvests_of_two_processes(model, source, apart, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(Processes, "wait", lambda self: None)
    plans = {n: durable.read_sealed(apart / n / "plan.json") for n in alone}
    for rank in (0, 1):
        own = [module.Harvester(tmp_path / name, plan) for name, plan in plans.items()]
        module.Reader(model, source, own[0].plan).shards(own, Processes(rank, 2), False)
    for name, files in alone.items():
        shards = {n: data for n, data in files.items() if n.startswith("shard-")}
        assert content(tmp_path / name) == shards


def test_what_is_no_harvest_is_said(model, source, tmp_path):
    good = several(tmp_path)[tmp_path / "a"]
    wrong = {"outlier": "x", "context": 12.5, "site": "resid_post"}
    for changes in [{each: value} for each, value in wrong.items()]:
        with pytest.raises(RunError, match=f"{next(iter(changes))} is"):
            harvest(model, source, tmp_path / "x", replace(good, **changes), progress=False)
    for configs in (None, [(tmp_path / "x", good)], {tmp_path / "x": {"tokens": 3}}):
        with pytest.raises(RunError, match="expected .*HarvestConfig"):
            harvest_together(model, source, configs, progress=False)
    assert not (tmp_path / "x").exists()


def test_what_cannot_be_one_pass_is_said(model, source, tmp_path):
    wanted = several(tmp_path)
    wanted[tmp_path / "b"] = replace(wanted[tmp_path / "b"], context=11)
    with pytest.raises(RunError, match="context is 12 and 11: give them one value"):
        harvest_together(model, source, wanted, progress=False)
    twice = {tmp_path / "a": wanted[tmp_path / "a"], f"{tmp_path}/x/../a": wanted[tmp_path / "a"]}
    for bad in (twice, {}):
        with pytest.raises(RunError, match="a folder of its own: name at least one, each once"):
            harvest_together(model, source, bad, progress=False)
    assert not any(tmp_path.iterdir())


# -- reading ---------------------------------------------------------------------------------


def test_every_row_comes_once_an_epoch_and_in_another_order(held):
    n = held.rows - 37
    rows = held.slice(0, n)[0]
    order = Shuffled(held, n, seed=1, memory=400 * 24)  # about two and a half shards
    assert len(order.groups(0)) > 2
    first, second = order.rows(0, n)[0], order.rows(n, 2 * n)[0]
    assert torch.equal(first.sort(0).values, rows.sort(0).values)
    assert torch.equal(second.sort(0).values, rows.sort(0).values)
    assert not torch.equal(first, second) and not torch.equal(first, rows)
    assert not torch.equal(first, Shuffled(held, n, seed=2).rows(0, n)[0])


def test_any_part_of_the_order_can_be_asked_for_alone(held):
    n, memory = held.rows, 400 * 24
    whole = Shuffled(held, n, seed=3, memory=memory).rows(0, 2 * n)[0]
    for begin, end in ((0, 5), (390, 410), (n - 3, n + 4), (n + 100, n + 700)):
        assert torch.equal(Shuffled(held, n, 3, memory).rows(begin, end)[0], whole[begin:end])


def test_no_more_is_in_memory_than_asked_for(held):
    order = Shuffled(held, held.rows, memory=400 * 24)
    for begin in range(0, held.rows, 100):
        order.rows(begin, begin + 100)
        assert len(order._loaded[1]) <= 400


def test_shuffling_mixes_shards(held):
    order = Shuffled(held, held.rows, seed=0)
    rows = held.slice(0, held.rows)[0]
    batch = order.rows(0, 100)[0]
    at = [int((rows == row).all(-1).nonzero()[0]) for row in batch]
    assert len({held.locate(i)[0] for i in at}) == len(held.sizes)


def test_a_row_out_of_range_is_said(held):
    assert held.locate(held.sizes[0]) == (1, 0)
    with pytest.raises(RunError, match="Row 1000 is out of range: the harvest has 1,000 rows"):
        held.locate(1_000)
