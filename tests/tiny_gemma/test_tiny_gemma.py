"""Training tiny-gemma: a run that was killed goes on and ends where it would have ended."""

import csv
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Gemma2Config

from mi_helpers.tiny_gemma import skills
from mi_helpers.tiny_gemma import training as tiny_gemma
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


def test_only_its_own_old_checkpoints_and_killed_writes_are_removed(run, tmp_path):
    stale = tmp_path / ".mi-helpers-abcd_123.part"
    stale.mkdir()
    others = ["mistral-7.safetensors", "model-00001-of-00002.safetensors", "x.part", ".tmp123456"]
    for name in others:
        (tmp_path / name).write_text(name)
    run(tmp_path)
    assert not stale.exists() and not (tmp_path / "model-2.safetensors").exists()
    assert [(tmp_path / name).read_text() for name in others] == others


def test_a_finished_run_is_not_trained_again(run, tmp_path):
    first = run(tmp_path)
    again = run(tmp_path, killed_at=0)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_every_parameter_is_trained_once_and_only_matrices_decay():
    model = tiny_gemma.Gemma2ForCausalLM(SMALL)
    groups = tiny_gemma.adamw(model, 3e-3).param_groups
    trained = [id(p) for group in groups for p in group["params"]]
    assert sorted(trained) == sorted(map(id, model.parameters()))
    for group in groups:
        assert group["peak"] == 3e-3
        assert {p.ndim == 2 for p in group["params"]} == {group["weight_decay"] > 0}


def test_the_checkpoint_holds_the_optimizer(run, tmp_path):
    model = run(tmp_path)
    moments = load_file(tmp_path / "moments-4.safetensors")
    keys = ("step", "exp_avg", "exp_avg_sq")
    assert set(moments) == {f"{name}/{key}" for name, _ in model.named_parameters() for key in keys}


def test_a_loss_that_is_not_finite_stops_the_run_in_one_sentence(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_gemma.F, "cross_entropy", lambda x, y: x.sum() * float("nan"))
    with pytest.raises(RuntimeError, match=r"^The loss became nan at step 0; .* --no-compile"):
        run(tmp_path)


@pytest.mark.parametrize("steps", [100, 1_200, 12_800])
def test_log_steps(steps):
    checks = tiny_gemma.checkpoint_steps(steps)
    assert {0, steps} <= checks
    assert all(0 <= step <= steps and step % tiny_gemma.BLOCK == 0 for step in checks)
    if steps >= 12_800:
        assert len(checks) >= 20


def test_learning_rate_rises_and_falls():
    steps, peak = 2_000, 3e-3
    rates = [tiny_gemma.learning_rate(step, steps, peak) for step in range(steps + 1)]
    top = tiny_gemma.WARM_UP
    assert max(rates) == pytest.approx(peak)
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    tail = rates[-tiny_gemma.TAIL - 1 :]
    assert tail == pytest.approx([peak / 100] * len(tail))
    assert rates[-tiny_gemma.TAIL - 2] > 1.00001 * tail[0]
