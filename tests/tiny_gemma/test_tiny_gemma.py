"""Training tiny-gemma: a run that was killed goes on and ends where it would have ended."""

import copy
import csv
import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from mi_helpers.files import DATA
from mi_helpers.tiny_gemma import log as training_log
from mi_helpers.tiny_gemma import skills, step
from mi_helpers.tiny_gemma import training as tiny_gemma
from mi_helpers.tiny_gemma.training import Recipe
from mi_helpers.tinyworld.world import World

SMALL = Gemma2Config(
    vocab_size=3_953,
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
    """run(folder, killed_at=None): four steps with a checkpoint every two, and a log of all.

    Its loss is a weight's value, so that a row tells which weights it is about.
    """
    monkeypatch.setattr(tiny_gemma, "BLOCK", 2)
    monkeypatch.setattr(training_log, "SPARSE", 2)
    monkeypatch.setattr(training_log, "DENSE", 1)
    monkeypatch.setattr(
        skills.Suite,
        "brief",
        lambda self, model: {"loss": model.lm_head.weight[5, 0].item()},
    )
    monkeypatch.setattr(skills.Suite, "head_scores", lambda self, model: (0.0, 0.0))
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tiny_gemma")
    world = World()

    def run(folder, killed_at=None, steps=4, model=None, **options):
        rate = tiny_gemma.learning_rate
        options = {"workers": 1, "rows": 2, "save_every": 2, "compiled": False, **options}

        def killing(step, c):
            if step == killed_at:
                raise Killed
            return rate(step, c)

        with monkeypatch.context() as patch:
            patch.setattr(tiny_gemma, "learning_rate", killing)
            return tiny_gemma.train(
                folder,
                Recipe(steps, **options),
                world=world,
                tokenizer=tokenizer,
                model_config=SMALL,
                model=model,
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


def test_a_model_as_it_is_loaded_is_trained_on(run, tmp_path):
    frozen = Gemma2ForCausalLM(SMALL).requires_grad_(False)
    before = copy.deepcopy(frozen.state_dict())
    after = run(tmp_path, model=frozen).state_dict()
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_every_parameter_is_trained_once_and_only_matrices_decay():
    model = Gemma2ForCausalLM(SMALL)
    groups = tiny_gemma.adamw(model, Recipe(weight_decay=0.2)).param_groups
    trained = [id(p) for group in groups for p in group["params"]]
    assert sorted(trained) == sorted(map(id, model.parameters()))
    for group in groups:
        assert group["betas"] == (0.9, 0.99)
        assert {p.ndim == 2 for p in group["params"]} == {group["weight_decay"] == 0.2}


def test_the_checkpoint_holds_the_optimizer(run, tmp_path):
    model = run(tmp_path)
    moments = load_file(tmp_path / "moments-4.safetensors")
    keys = ("step", "exp_avg", "exp_avg_sq")
    assert set(moments) == {f"{name}/{key}" for name, _ in model.named_parameters() for key in keys}


def test_a_loss_that_is_not_finite_stops_the_run_in_one_sentence(run, tmp_path, monkeypatch):
    def broken(model, length, bf16):
        return lambda ids: model.lm_head.weight.sum() * float("nan")

    monkeypatch.setattr(tiny_gemma, "make_loss", broken)
    with pytest.raises(RuntimeError, match=r"^The loss became nan at step 0; .* --no-compile"):
        run(tmp_path)


def logged(steps, rise):
    return [step for step in range(steps + 1) if training_log.is_logged(step, steps, rise)]


def test_the_log_is_dense_around_the_rise_and_has_both_ends():
    assert logged(900, None) == [0, 400, 800, 900]
    rows = logged(12_000, 950)
    assert rows[:4] == [0, 400, 450, 500]
    assert [step for step in rows if 450 <= step <= 1_450] == list(range(450, 1_451, 50))
    assert rows[-2:] == [11_600, 12_000]
    assert len(rows) < 60


def rises_at(monkeypatch, values):
    """Let the induction score rise when the model is the one whose row says `values`[…]."""
    score = lambda self, model: (float(model.lm_head.weight[5, 0].item() in values), 0.0)  # noqa: E731
    monkeypatch.setattr(skills.Suite, "head_scores", score)


def test_rows_before_the_rise_are_written_when_it_has_come(run, tmp_path, monkeypatch):
    monkeypatch.setattr(training_log, "AROUND", 2)
    with monkeypatch.context() as patch:
        patch.setattr(training_log, "SPARSE", 1)
        run(tmp_path / "dense", steps=8)
    dense = {
        row["step"]: row["loss"] for row in training_log.read_log(tmp_path / "dense" / "log.csv")
    }
    assert len(set(dense.values())) == 9
    monkeypatch.setattr(training_log, "SPARSE", 8)
    rises_at(monkeypatch, {float(dense["5"])})
    run(tmp_path / "whole", steps=8)
    rows = training_log.read_log(tmp_path / "whole" / "log.csv")
    assert [row["step"] for row in rows] == ["0", "3", "4", "5", "6", "7", "8"]
    assert all(row["loss"] == dense[row["step"]] for row in rows)
    assert not list((tmp_path / "whole").glob("copy-*"))
    for killed_at in (3, 5, 7):  # before the rise; after it, before the next checkpoint; after both
        with pytest.raises(Killed):
            run(tmp_path / str(killed_at), killed_at, steps=8)
        run(tmp_path / str(killed_at), steps=8)
        again = training_log.read_log(tmp_path / str(killed_at) / "log.csv")
        assert [(r["step"], r["loss"]) for r in again] == [(r["step"], r["loss"]) for r in rows]


def gradients_of(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def apart(model, ids, **options) -> float:
    """Largest relative difference between the step's loss and gradients and Hugging Face's."""
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn_like(p) * (0.05 if p.ndim == 2 else 0.2)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    theirs = gradients_of(model, F.cross_entropy(logits, ids[:, 1:].flatten()))
    ours = gradients_of(model, step.make_loss(model, ids.shape[1], **options)(ids))
    return max(float((ours[k] - theirs[k]).norm() / theirs[k].norm()) for k in theirs)


@pytest.mark.parametrize("window", [4, 64])
@pytest.mark.parametrize("chunk", [7, 512])
def test_the_step_has_hugging_faces_loss_and_gradients(window, chunk, monkeypatch):
    monkeypatch.setattr(step, "CHUNK", chunk)
    torch.manual_seed(0)
    small = {
        "vocab_size": 50,
        "num_hidden_layers": 2,
        "layer_types": None,
        "sliding_window": window,
    }
    model = Gemma2ForCausalLM(Gemma2Config.from_dict({**SMALL.to_dict(), **small}))
    ids = torch.randint(50, (3, 17))  # with the padding token, whose embedding does not learn
    ids[0, 3] = model.config.pad_token_id
    assert apart(model, ids) < 2e-5


def test_tiny_gemmas_own_step_has_them_too():
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(tiny_gemma.config())
    ids = torch.randint(3, SMALL.vocab_size, (2, 128))
    assert apart(model, ids) < 2e-5
    assert apart(model, ids, bf16=True) < 5e-2


def test_training_uses_this_step(run, tmp_path, monkeypatch):
    made = []
    make = tiny_gemma.make_loss

    def counting(*arguments):
        loss = make(*arguments)
        return lambda ids: (made.append(ids.shape), loss(ids))[1]

    monkeypatch.setattr(tiny_gemma, "make_loss", counting)
    run(tmp_path, rows=4)
    assert made == [(2, 128)] * 8  # four steps of two parts


def test_two_processes_train_what_one_does(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_gemma, "BLOCK", 4)  # all in block 0, as in the second process's 100
    one = run(tmp_path / "one", rows=4, save_every=4)
    two = run(tmp_path / "two", rows=4, save_every=4, workers=2)
    for name, value in one.state_dict().items():
        assert torch.allclose(value, two.state_dict()[name], rtol=1e-4, atol=1e-5), name


def test_learning_rate_rises_and_falls():
    c = Recipe(steps=2_000)
    rates = [tiny_gemma.learning_rate(step, c) for step in range(c.steps + 1)]
    assert max(rates) == pytest.approx(c.peak)
    assert rates[: c.warm_up] == sorted(rates[: c.warm_up])
    assert rates[c.warm_up :] == sorted(rates[c.warm_up :], reverse=True)
    tail = rates[-c.tail - 1 :]
    assert tail == pytest.approx([c.peak / 100] * len(tail))
    assert rates[-c.tail - 2] > 1.00001 * tail[0]


@pytest.mark.parametrize("bad", [{"steps": 0}, {"steps": 150}, {"save_every": 50}, {"workers": 3}])
def test_a_recipe_that_cannot_be_run_is_refused_by_name(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=rf"^{name} is {bad[name]}; "):
        Recipe(**bad)


def test_verdicts_are_read_once_facts_are_known_and_then_in_plenty():
    parts = tiny_gemma.Parts.__new__(tiny_gemma.Parts)
    parts.c, parts.world = Recipe(), World()

    def share(step):
        mixture = parts.world_at(step).mixture
        shares = dict(zip(mixture.items, mixture.probs, strict=True))
        return shares.get("truth", 0.0) + shares.get("told", 0.0)

    first, after = parts.c.judging
    assert share(0) == share(first - 1) == 0
    assert share(after) == share(parts.c.steps) == pytest.approx(220 / sum(World.weights.values()))
    assert share(first) == share(after - 1) > 3 * share(after)
    for beginning in (first, after):
        world = parts.world_at(beginning)
        assert all(world.document(seed).text for seed in range(30))  # each family can be written
    assert first % tiny_gemma.BLOCK == after % tiny_gemma.BLOCK == 0
