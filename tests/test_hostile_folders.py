"""Folders and files of strangers: none of their code runs, nothing is unpickled, and neither the
names nor the sizes that they declare are taken at their word."""

import ast
import json
import os
import struct
import zipfile

import nbformat
import numpy as np
import pytest
import torch
from families import build, make_tokenizer
from made_harvest import made_harvest
from safetensors.torch import save_file
from test_forbidden import FILES, ROOT

from mi_helpers import loading
from mi_helpers.circuits import files as graph_files
from mi_helpers.files import (
    RunError,
    is_beside,
    read_about,
    read_json,
    read_sealed,
    read_shapes,
    write_json,
    write_sealed,
)
from mi_helpers.layouts import ModelError
from mi_helpers.lens import TunedLens
from mi_helpers.loading import load_model
from mi_helpers.saes import estimate
from mi_helpers.saes.activations import Activations
from mi_helpers.saes.files import load_coder
from mi_helpers.tiny_gemma.training import load_run

SHARD = "model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"


class Trap:
    """Makes a folder where it is unpickled."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


@pytest.fixture
def sprung(tmp_path):
    """Where a trap leaves its mark; there is none when the test ends."""
    yield tmp_path / "sprung"
    assert not (tmp_path / "sprung").exists()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A tiny model's folder; whoever asks on the terminal gets a yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    build("llama").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(path, **changes):
    write_json(path, read_json(path) | changes)


def change_sealed(path, **changes):
    """The same, with a checksum that fits."""
    write_sealed(path, read_sealed(path) | changes)


# ------------------------------------------------------------------------------ code of their own


def call_without(tree: ast.AST) -> list[int]:
    """The lines that load with one of transformers' Auto classes and may run a folder's code."""
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    loads = [
        n
        for n in calls
        if isinstance(n.func, ast.Attribute)
        and n.func.attr in ("from_pretrained", "from_config")
        and getattr(n.func.value, "id", "").startswith("Auto")
    ]
    told = {"trust_remote_code": False}.items()
    given = [
        (n, {k.arg: k.value.value for k in n.keywords if isinstance(k.value, ast.Constant)})
        for n in loads
    ]
    return [n.lineno for n, options in given if not told <= options.items()]


def test_no_code_of_a_models_folder_is_trusted_anywhere():
    found = {}
    for path in FILES:
        if path.suffix == ".py" and path.relative_to(ROOT).parts[0] != "tests":
            found[path.name] = call_without(ast.parse(path.read_text("utf-8")))
        elif path.suffix == ".ipynb":
            cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
            code = "\n".join(c.source for c in cells if not c.source.startswith("%%"))
            plain = [line for line in code.splitlines() if not line.lstrip().startswith(("%", "!"))]
            found[path.name] = call_without(ast.parse("\n".join(plain)))
    assert len(found) > 50 and {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize("what", ["the model", "the tokenizer"])
def test_code_of_a_models_folder_is_never_run(folder, sprung, what):
    (folder / "modeling_evil.py").write_text(f"import os\nos.mkdir({str(sprung)!r})\n")
    if what == "the model":
        auto = {name: "modeling_evil.Evil" for name in ("AutoConfig", "AutoModelForCausalLM")}
        change(folder / "config.json", model_type="evil", auto_map=auto)
        with pytest.raises(ModelError, match="needs program code of its own.*never run") as caught:
            estimate.shape_of(str(folder))
        assert "\n" not in str(caught.value)
    else:
        auto = {"AutoTokenizer": ["modeling_evil.Evil", "modeling_evil.Evil"]}
        change(folder / "tokenizer_config.json", tokenizer_class="Evil", auto_map=auto)
    with pytest.raises(ModelError, match="needs program code of its own.*never run") as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_a_known_family_is_loaded_without_the_folders_code(folder, sprung):
    (folder / "modeling_evil.py").write_text(f"import os\nos.mkdir({str(sprung)!r})\n")
    change(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    assert load_model(folder).family == "llama"


# ------------------------------------------------------------------------- names of other files


def shard_under(folder, name):
    """Map every weight of the folder to a file of this name, one of them being in the folder."""
    names = read_shapes(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / SHARD)
    write_json(folder / INDEX, {"metadata": {}, "weight_map": {n: name for n in names}})


def test_an_index_of_plain_names_is_read(folder):
    shard_under(folder, SHARD)
    assert load_model(folder).family == "llama"


@pytest.mark.parametrize("name", ["../outside.bin", "weights.bin", "../x.safetensors", 7, None])
def test_an_index_names_safetensors_beside_it_alone(folder, sprung, name):
    torch.save(Trap(sprung), folder / "weights.bin")
    torch.save(Trap(sprung), folder / "../outside.bin")
    save_file({"w": torch.zeros(1)}, folder / "../x.safetensors")
    shard_under(folder, name)
    with pytest.raises(ModelError, match=f"{INDEX}: only .safetensors files") as caught:
        load_model(folder)
    assert repr(name) in str(caught.value) and "\n" not in str(caught.value)


def test_an_index_of_the_hub_is_held_to_the_same(tmp_path, monkeypatch):
    write_json(tmp_path / INDEX, {"weight_map": {"w": "weights.bin"}})
    monkeypatch.setattr(loading, "cached_file", lambda source, file, **_: tmp_path / file)
    monkeypatch.setattr(loading, "is_peft_available", lambda: False)
    with pytest.raises(
        ModelError, match=f"someone/model names the weights 'weights.bin' in its {INDEX}"
    ):
        loading.check_names("someone/model", "someone/model", None)


@pytest.mark.parametrize("name", ["adapter_model.bin", "../x.safetensors", "b.safetensors"])
def test_a_configuration_names_no_weights(folder, sprung, name):
    torch.save(Trap(sprung), folder / "adapter_model.bin")
    change(folder / "config.json", transformers_weights=name)
    with pytest.raises(ModelError, match="in its config.json: only .safetensors files in"):
        load_model(folder)


def test_an_adapter_does_not_lead_to_another_model(folder, monkeypatch):
    monkeypatch.setattr(loading, "is_peft_available", lambda: True)
    write_json(folder / "adapter_config.json", {"base_model_name_or_path": "../other"})
    with pytest.raises(ModelError, match=r"adapter_config.json.*merge the adapter"):
        load_model(folder)


@pytest.mark.parametrize("name", ["../a.safetensors", "/a.safetensors", "b/a.safetensors"])
def test_what_is_no_plain_name(name):
    assert is_beside("a.safetensors") and not is_beside(name)
    assert not is_beside(name.replace("/", "\\")) and not is_beside(name + ".bin")


def test_a_manifest_names_shards_beside_it_alone(tmp_path):
    held = made_harvest(tmp_path / "held", torch.randn(20, 4))
    (held.folder / "shard-00000.safetensors").rename(tmp_path / "out.safetensors")
    shard = held.manifest["shards"][0] | {"file": "../out.safetensors"}
    change_sealed(held.folder / "manifest.json", shards=[shard])
    with pytest.raises(RunError, match="names the shard '../out.safetensors'.*beside it"):
        Activations.open(held.folder)


def test_a_runs_state_names_a_step_alone(tmp_path):
    write_json(tmp_path / "state.json", {"step": "/../../other"})
    with pytest.raises(RunError, match=r"state.json has the step '/../../other', no number"):
        load_run(tmp_path, torch.nn.Linear(1, 1), None)


# ----------------------------------------------------------------------------- sizes as declared


def safetensors_head(path, **entries):
    """A safetensors file of four bytes under this head."""
    head = json.dumps({name: {"dtype": "F32"} | entry for name, entry in entries.items()}).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + bytes(4))
    return path


@pytest.mark.parametrize("end", [4, 4 * 10**18])
@pytest.mark.parametrize("name", ["params.safetensors", "sae.safetensors", "layer_0.safetensors"])
def test_a_safetensors_head_that_declares_more_than_there_is(tmp_path, name, end):
    path = safetensors_head(tmp_path / name, W_enc={"shape": [10**18], "data_offsets": [0, end]})
    (tmp_path / "cfg.json").write_text("{}")
    with pytest.raises(ModelError, match=f"{name} is truncated or damaged"):
        load_coder(path)
    with pytest.raises(RunError, match=f"{name} is truncated or damaged"):
        read_about(path)


def test_a_shape_that_needs_no_bytes_makes_no_room(tmp_path):
    names = ("w_enc", "b_enc", "w_dec", "b_dec", "threshold")
    entries = {name: {"shape": [0, 10**18], "data_offsets": [0, 0]} for name in names}
    entries["filler"] = {"shape": [1], "data_offsets": [0, 4]}
    with pytest.raises(ModelError, match="d_in is 0: it has to be 1 or more"):
        load_coder(safetensors_head(tmp_path / "params.safetensors", **entries))


def npy(shape, data=b"", kind="<f4"):
    """The bytes of an .npy file."""
    head = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + data


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (npy((10**9, 10**9), bytes(4)), r"declares the shape \(1000000000, 1000000000\)"),
        (npy((2,), bytes(4)), r"declares the shape \(2,\) of float32, and has"),
        (npy((20_000_000,), bytes(80_000_000)), "would inflate to 80,000"),
        (npy((10**18,), kind="|O"), "holds Python objects, which are never read"),
    ],
    ids=["a vast shape", "two for one", "zeros", "objects"],
)
def test_an_archive_that_declares_more_than_there_is(tmp_path, content, words, monkeypatch):
    with zipfile.ZipFile(tmp_path / "params.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("W_enc.npy", content)
    monkeypatch.setattr(np, "load", None)  # nothing is read
    with pytest.raises(ModelError, match=f"params.npz is no plain NumPy archive.*{words}"):
        load_coder(tmp_path)


def test_an_array_that_is_no_archive_makes_no_room(tmp_path, monkeypatch):
    (tmp_path / "params.npz").write_bytes(npy((10**15,), bytes(4)))
    monkeypatch.setattr(np, "load", None)
    with pytest.raises(ModelError, match="params.npz is no plain NumPy archive"):
        load_coder(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 10**9}, "asks for 1,000,000,000 layers"),
        ({"vocab_size": 10**7}, "asks for 400,0.* numbers: they do not belong together"),
        ({"intermediate_size": 10**6}, "asks for 240,0.* numbers"),
        ({"hidden_size": 10**18}, "asks for 1,000,.* hidden_size in its config.json"),
    ],
)
def test_a_configuration_that_asks_for_more_than_there_is(folder, changes, words, monkeypatch):
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", None)
    change(folder / "config.json", **changes)
    with pytest.raises(ModelError, match=words):
        load_model(folder)


@pytest.mark.parametrize("key", ["rows", "d_in", "d_out"])
def test_a_manifest_that_declares_more_than_there_is(tmp_path, key):
    x = torch.randn(20, 4)
    held = made_harvest(tmp_path, x, x)
    if key == "rows":
        change_sealed(
            tmp_path / "manifest.json", shards=[held.manifest["shards"][0] | {key: 10**15}]
        )
    else:
        change_sealed(tmp_path / "manifest.json", **{key: 10**15})
    with pytest.raises(RunError, match="shard-00000.safetensors is not the manifest's"):
        Activations.open(tmp_path)


@pytest.mark.parametrize("key", ["n_layers", "d_model"])
def test_a_lens_that_declares_more_than_there_is(tmp_path, key):
    TunedLens(2, 3).save(tmp_path)
    change(tmp_path / "cfg.json", **{key: 10**9})
    with pytest.raises(RunError, match="but cfg.json says"):
        TunedLens.load(tmp_path)


def test_a_graph_of_more_nodes_than_a_matrix_can_hold(tmp_path, monkeypatch):
    kinds = graph_files.FILE_KINDS
    node = {"ctx_idx": 0, "token_prob": 1.0}
    nodes = [
        node | {"node_id": "E_1_0", "layer": "E", "feature_type": kinds[graph_files.EMBEDDING]},
        node | {"node_id": "2_1_0", "layer": "2", "feature_type": kinds[graph_files.LOGIT]},
    ]
    about = {"prompt": "a", "prompt_tokens": ["a"], "scan": "none", "n_layers": 1}
    write_json(tmp_path / "a.json", {"metadata": about, "nodes": nodes, "links": []})
    assert len(graph_files.load_graph(tmp_path / "a.json")) == 2
    monkeypatch.setattr(graph_files, "MOST", 1)
    with pytest.raises(ValueError, match="has 2 nodes and at most 1 are read"):
        graph_files.load_graph(tmp_path / "a.json")
