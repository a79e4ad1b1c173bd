"""Devices by name, and a device without float64 (MPS), emulated on the CPU."""

import pytest
import torch
from families import build, make_tokenizer
from tiny_models import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mi_helpers import arguments
from mi_helpers.arguments import exact, resolve_device
from mi_helpers.attribution import direct_logit_attribution
from mi_helpers.circuits.graphs import cumulative_influence, edge_error, node_influence
from mi_helpers.course.cli import main
from mi_helpers.gradients import attribution_patch
from mi_helpers.heads import composition, copying_map, head_scores
from mi_helpers.layouts import ModelError
from mi_helpers.lens import read_out, sample_stream, train_tuned_lens
from mi_helpers.loading import load_model
from mi_helpers.models import LanguageModel
from mi_helpers.patching import LogitDiff, activation_patch
from mi_helpers.paths import path_patch_map
from mi_helpers.plots import as_array
from mi_helpers.saes.coder import SparseCoder, explained_variance
from mi_helpers.saes.processes import start
from mi_helpers.saes.products import Products
from mi_helpers.saes.step import SparseStep, StepConfig
from mi_helpers.saes.training import quality

# ------------------------------------------------------------------------------------- names


@pytest.fixture
def machine(monkeypatch):
    """A machine with as many CUDA devices as one likes, and with MPS or not."""

    def has(cuda=0, mps=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    monkeypatch.delenv("MI_DEVICE", raising=False)
    has()
    return has


@pytest.mark.parametrize(
    ("has", "given", "expected"),
    [
        ({}, None, "cpu"),
        ({}, "auto", "cpu"),
        ({"mps": True}, "auto", "mps"),
        ({"cuda": 2, "mps": True}, "auto", "cuda"),
        ({"cuda": 2}, "cuda:1", "cuda:1"),
        ({"cuda": 2}, None, "cpu"),
        ({"mps": True}, "mps", "mps"),
    ],
)
def test_a_device_by_name(machine, has, given, expected):
    machine(**has)
    assert resolve_device(given) == torch.device(expected)
    assert resolve_device(given if given is None else torch.device(expected)) is not None


@pytest.mark.parametrize(
    ("has", "given", "message"),
    [
        ({}, "cuda", "'cuda', and torch sees no CUDA device here: choose cpu, or auto"),
        ({"cuda": 2}, "cuda:2", "this machine has 2 CUDA"),
        ({}, "mps", "no MPS"),
        ({}, "gpu", "expected auto, cpu, cuda, cuda:1 or mps"),
        ({}, "meta", "expected auto"),
    ],
)
def test_a_device_that_is_not_there(machine, monkeypatch, has, given, message):
    machine(**has)
    with pytest.raises(ModelError, match=f"^The device is .*{message}"):
        load_model(device=given)
    monkeypatch.setenv("MI_DEVICE", given)
    with pytest.raises(ModelError, match=f"^MI_DEVICE is .*{message}"):
        load_model()
    with pytest.raises(ModelError, match=message):
        start()


def test_mi_device_moves_models_and_runs(machine, monkeypatch):
    assert start().device == torch.device("cpu") and load_model().device == torch.device("cpu")
    machine(cuda=1)
    assert start().device.type == "cuda"
    monkeypatch.setenv("MI_DEVICE", "cpu")
    assert start().device == torch.device("cpu")


@pytest.mark.parametrize("command", ["run", "harvest", "train", "report", "features"])
def test_a_command_says_in_one_sentence_that_a_device_is_absent(machine, capsys, tmp_path, command):
    assert main([command, "--device", "cuda", "--folder", str(tmp_path / "new")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "torch sees no CUDA device here: choose cpu" in said
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------- no float64 on MPS


class NoFloat64(TorchDispatchMode):
    """What was fetched by `.cpu()` is on the host; all else is on a device without float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_host = all(hasattr(x, "on_host") for x in given)
        for x in tree_leaves(found):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float64 and not on_host:
                raise TypeError(f"{func} makes float64, which the device has not.")
            if isinstance(x, torch.Tensor) and on_host and given:
                x.on_host = True
        return found


@pytest.fixture
def mps(monkeypatch):
    monkeypatch.setattr(arguments, "NO_FLOAT64", {"cpu"})

    def cpu(x):
        fetched = x.detach().clone()
        fetched.on_host = True
        return fetched

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    with NoFloat64():
        yield


IDS = torch.tensor([[2, 5, 7, 9, 11, 13, 15], [2, 6, 8, 9, 12, 13, 16]])
OTHER = torch.tensor([[2, 5, 21, 9, 23, 13, 15], [2, 6, 4, 9, 12, 18, 22]])


def test_the_emulated_device_refuses_float64(mps):
    with pytest.raises(TypeError, match="which the device has not"):
        torch.ones(2).double()
    with pytest.raises(TypeError, match="which the device has not"):
        torch.zeros_like(torch.ones(2), dtype=torch.float64)
    assert torch.ones(2).cpu().double().sum() == 2
    assert exact(torch.ones(2)).dtype == torch.float32


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_methods_need_no_float64(mps, family):
    model = LanguageModel(build(family), make_tokenizer(), family)
    metric = LogitDiff(torch.tensor([5, 6]), torch.tensor([7, 8]))
    for unit in ("component", "head"):
        split = direct_logit_attribution(model, IDS, 5, 6, unit=unit)
        assert split.terms.dtype == torch.float32 and split.relative_error < 1e-4
    args = model, IDS, OTHER
    activation_patch(*args, "z", metric)
    attribution_patch(*args, ["z", "mlp_out"], metric, over="layers", steps=2)
    path_patch_map(*args, "logits", metric)
    head_scores(model, IDS), composition(model, "K"), copying_map(model, torch.arange(5, 12))
    stream = sample_stream(model, ["The Eiffel Tower is in", "cat sat"], 3)
    lens, _ = train_tuned_lens(model, stream, steps=2, size=2)
    assert as_array(read_out(model, stream, lens=lens).kl).shape == (5, 3)


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_training_a_coder_needs_no_float64(mps, activation):
    torch.manual_seed(0)
    x = torch.randn(32, 12)
    coder = SparseCoder(12, 48, k=4 if activation == "topk" else None, activation=activation)
    step = SparseStep(coder, StepConfig(), products=Products(("float32",), "highest"))
    assert step(x, None)["loss"] > 0
    assert quality(coder, x)["nmse"] > 0 and explained_variance(x, x) == 1


def test_scores_of_a_graph_need_no_float64(mps):
    edges = torch.randn(5, 5).tril(-1)
    influence = node_influence(edges, torch.tensor([0.5, 0.2]))
    assert cumulative_influence(influence).max() <= 1.001
    bias, values = torch.zeros(5), edges.sum(1)
    assert edge_error(edges, bias, values, torch.ones(5, dtype=torch.bool)).scaled < 1e-5


def test_on_the_cpu_float64_stays():
    split = direct_logit_attribution(tiny_model(), IDS, 5, 6)
    assert split.terms.dtype == torch.float64
