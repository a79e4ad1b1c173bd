"""A tuned lens from one's own text: for every family, by command, and what is refused."""

import itertools
import re

import pytest
import torch
from families import CONFIGS, build, make_tokenizer
from tiny_models import sentences, tiny_model

from mi_helpers.__main__ import main
from mi_helpers.files import RunError
from mi_helpers.lens import TunedLens, read_out, sample_stream
from mi_helpers.models import LanguageModel
from mi_helpers.saes import tuned
from mi_helpers.saes.sources import open_source
from mi_helpers.tinyworld.world import World


@pytest.fixture
def own(tmp_path):
    """A text of one's own."""
    path = tmp_path / "my.txt"
    path.write_text("\n\n".join(sentences(600)), "utf-8")
    return path


@pytest.mark.parametrize("family", CONFIGS)
def test_it_is_closer_on_text_it_was_not_trained_on(family, tmp_path):
    model = LanguageModel(build(family), make_tokenizer(), family)
    documents = itertools.islice(World().documents(3), 400)
    path = tmp_path / "my.txt"
    path.write_text("\n\n".join(" ".join(d.text.split()) for d in documents), "utf-8")
    lens, plain, better = tuned.tune(model, open_source(str(path)), 2_000, steps=60)
    assert lens.name == family and better.kl[-1].abs().max() == 0
    assert plain.kl.shape == (model.n_layers + 1, 500)
    assert (better.kl.mean(1)[:-1] < plain.kl.mean(1)[:-1]).all()


def test_what_is_held_out_comes_before_what_is_trained_on(own, monkeypatch):
    model, seen, real = tiny_model(), [], tuned.sample_stream

    def noted(model, texts, n, seed):
        read = []
        stream = real(model, (read.append(text) or text for text in texts), n, seed)
        seen.append(read)
        return stream

    monkeypatch.setattr(tuned, "sample_stream", noted)
    tuned.tune(model, open_source(str(own)), 400, steps=1)
    held, trained = seen
    every = list(open_source(str(own)).texts())
    assert held + trained == every[: len(held) + len(trained)] and len(held) > 3 < len(trained)


def test_the_command_writes_a_lens_that_is_read_again(own, tmp_path, monkeypatch, capsys):
    model, folder = tiny_model(), tmp_path / "lens"
    monkeypatch.setattr(tuned, "load_model", lambda name, device: model)
    given = ["lens", "--text", str(own), "--folder", str(folder), "--tokens", "1000"]
    assert main([*given, "--steps", "40"]) == 0
    said = capsys.readouterr().out
    lens = TunedLens.load(folder, model)
    held = sample_stream(model, open_source(str(own)).texts(), 250)
    for number in (
        read_out(model, held).kl[1].mean(),
        read_out(model, held, lens=lens).kl[1].mean(),
    ):
        assert f"{float(number):.3f}" in said
    assert len(re.findall(r"^ +(embed|\d+) ", said, re.MULTILINE)) == model.n_layers + 1
    before = lens.weight.clone()
    assert main(given) == 2  # what is there already is left alone
    assert "is there already: choose another --folder" in capsys.readouterr().err
    assert torch.equal(TunedLens.load(folder).weight, before)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--tokens", "100000"], "is too short: The texts have"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--tokens", "0"], "tokens is 0"),
        (["--steps", "-1"], "steps is -1"),
        (["--device", "tpu"], "tpu"),
        (["--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_writes_nothing(more, said, own, tmp_path, capsys):
    folder = tmp_path / "lens"
    assert main(["lens", "--text", str(own), "--folder", str(folder), *more]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and not folder.exists()


def test_too_little_text_says_how_to_go_on(own):
    with pytest.raises(RunError, match="Give more text, or ask for fewer with --tokens"):
        tuned.tune(tiny_model(), open_source(str(own)), 10**6)
