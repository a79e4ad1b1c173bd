"""Training tiny-gemma: a run that was killed goes on and ends where it would have ended."""

import csv
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Gemma2Config

from mi_helpers import skills, tiny_gemma
from mi_helpers.tinyworld.world import World

SMALL = Gemma2Config(
    vocab_size=3_840,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=128,
    attn_implementation="eager",
)


class Killed(Exception):
    pass


@pytest.fixture
def run(monkeypatch):
    """run(folder, killed_at=None): four steps with a checkpoint every two."""
    monkeypatch.setattr(tiny_gemma, "BLOCK", 2)
    monkeypatch.setattr(skills.Suite, "brief", lambda self, model: {"loss": 0.0})
    tokenizer = AutoTokenizer.from_pretrained(tiny_gemma.SHIPPED)
    world = World()

    def run(folder, killed_at=None, steps=4):
        rate = tiny_gemma.learning_rate

        def killing(step, steps, peak):
            if step == killed_at:
                raise Killed
            return rate(step, steps, peak)

        with monkeypatch.context() as patch:
            patch.setattr(tiny_gemma, "learning_rate", killing)
            return tiny_gemma.train(
                folder,
                steps,
                rows=2,
                compiled=False,
                world=world,
                tokenizer=tokenizer,
                model_config=SMALL,
                save_every=2,
            )

    return run


def log(folder) -> list[str]:
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        return [row["step"] for row in csv.DictReader(file)]


def test_killed_between_checkpoints_it_ends_bit_identical(run, tmp_path):
    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", killed_at=3)
    assert json.loads((tmp_path / "killed" / "state.json").read_text())["step"] == 2
    resumed = run(tmp_path / "killed")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert log(tmp_path / "whole") == log(tmp_path / "killed")
    assert [p.name for p in (tmp_path / "killed").glob("model-*")] == ["model-4.safetensors"]


def test_a_finished_run_is_not_trained_again(run, tmp_path):
    first = run(tmp_path)
    again = run(tmp_path, killed_at=0)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_every_parameter_is_trained_once_and_only_matrices_decay():
    model = tiny_gemma.Gemma2ForCausalLM(SMALL)
    names = {id(p): name for name, p in model.named_parameters()}
    muon, adam = tiny_gemma.optimizers(model, 3e-3)
    groups = [*muon.param_groups, *adam.param_groups]
    trained = [id(p) for group in groups for p in group["params"]]
    assert sorted(trained) == sorted(names)
    for group in groups:
        assert len({p.ndim for p in group["params"]}) == 1
        assert (group["weight_decay"] > 0) == (group["params"][0].ndim == 2)
    by_muon = {names[id(p)].split(".")[-2] for p in muon.param_groups[0]["params"]}
    assert by_muon == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert muon.param_groups[0]["peak"] == 2 * adam.param_groups[0]["peak"] == 6e-3


def test_the_checkpoint_holds_the_optimizer(run, tmp_path):
    run(tmp_path)
    names = load_file(tmp_path / "moments-4.safetensors")
    moments = {}
    for name in names:
        parameter, key = name.rsplit("/", 1)
        moments.setdefault(parameter, set()).add(key)
    for parameter, keys in moments.items():
        muon = "self_attn" in parameter
        assert keys == ({"momentum_buffer"} if muon else {"step", "exp_avg", "exp_avg_sq"})


@pytest.mark.parametrize("steps", [100, 1_200, 8_000])
def test_log_steps(steps):
    checks = tiny_gemma.checkpoint_steps(steps)
    assert {0, steps} <= checks
    assert all(0 <= step <= steps and step % tiny_gemma.BLOCK == 0 for step in checks)
    if steps >= 8_000:
        assert len(checks) >= 20


def test_learning_rate_rises_and_falls():
    steps, peak = 1_000, 3e-3
    rates = [tiny_gemma.learning_rate(step, steps, peak) for step in range(steps + 1)]
    top = tiny_gemma.WARM_UP
    assert max(rates) == pytest.approx(peak)
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] == pytest.approx(peak / 100)
