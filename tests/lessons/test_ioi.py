"""The IOI circuit: prompts by hand, ablation and accounts against brute force, then the shipped
model's own circuit."""

import functools

import pytest
import torch
from families import build
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from mi_helpers import plots
from mi_helpers.ablation import Mean, Resample, Zero, record
from mi_helpers.layouts import ModelError
from mi_helpers.lessons.lesson_05 import circuit as circuits
from mi_helpers.lessons.lesson_05 import claims, ioi
from mi_helpers.lessons.lesson_05 import figures as heads_figures
from mi_helpers.lessons.lesson_05.ioi import ROLES, Task
from mi_helpers.lessons.shared import documents
from mi_helpers.loading import load_model
from mi_helpers.models import LanguageModel
from mi_helpers.tinyworld import lexicon
from mi_helpers.tinyworld.tokenizer import SPLIT

FAMILIES = ("gemma2", "llama", "gpt2", "gpt_neox")


@pytest.fixture(autouse=True, scope="module")
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def tokenizer():
    """One token per word of the sentences with indirect objects."""
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    read = [d.text for d in documents("ioi", 500, 0)]
    words = {piece for text in read for piece, _ in split.pre_tokenize_str(text)}
    words |= {f" {name}" for name in lexicon.people()}
    names = ["<pad>", "<eos>", "<bos>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate(names + sorted(words))}
    made = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = split, decoders.Fuse()
    special = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), names, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tokenizer):
    size = {"vocab_size": len(tokenizer), "max_position_embeddings": 32}
    return LanguageModel(build(request.param, **size), tokenizer, request.param)


@pytest.fixture(scope="module")
def task(model):
    return Task(model, ioi.make_prompts(model, 4, seed=1, others=3))


@pytest.fixture(scope="module")
def shipped():
    return load_model("tiny-gemma")


# -- prompts -------------------------------------------------------------------------------------


def test_prompts_are_aligned_and_named_by_role(shipped):
    prompts = ioi.make_prompts(shipped, 10, seed=2, others=4)
    assert len(prompts) == 10 and prompts.orders == ("ABB",) * 5 + ("BAB",) * 5
    assert prompts.others.shape == (10, 4, prompts.ids.shape[1])
    rows = torch.arange(10)
    for role, want in (("IO", prompts.io), ("S1", prompts.s), ("S2", prompts.s)):
        assert torch.equal(prompts.ids[rows, prompts.at(role)], want)
    assert (prompts.at("S1+1") == prompts.at("S1") + 1).all()
    assert (prompts.at("END") == prompts.ids.shape[1] - 1).all()
    assert (prompts.at("END-2") == prompts.at("END") - 2).all()
    first = prompts.at("IO") < prompts.at("S1")
    assert first.tolist() == [order == "ABB" for order in prompts.orders]
    assert (prompts.role[:, 0] == -1).all()
    for i, text in enumerate(prompts.texts):
        decoded = shipped.tokenizer.decode(prompts.ids[i, 1:])
        answer = shipped.tokenizer.decode(prompts.io[i])
        assert text == f"{decoded}{answer}."


def test_the_pairs_of_names_were_never_trained_on(shipped):
    from mi_helpers.tinyworld.held import is_held

    prompts = ioi.make_prompts(shipped, 10, seed=3)
    for io, s in zip(prompts.io.tolist(), prompts.s.tolist(), strict=True):
        pair = sorted(shipped.tokenizer.decode(i).strip() for i in (io, s))
        assert is_held(*pair)


def test_other_names_change_names_and_nothing_else(shipped):
    prompts = ioi.make_prompts(shipped, 6, seed=0, others=5)
    named = torch.isin(
        prompts.role, torch.tensor([ROLES.index(role) for role in ("IO", "S1", "S2")])
    )
    same = prompts.others == prompts.ids[:, None]
    assert same[~named[:, None].expand_as(same)].all()
    assert not same[named[:, None].expand_as(same)].any()
    for row, others in enumerate(prompts.others.tolist()):
        for ids in others:
            three = [ids[int(prompts.at(role)[row])] for role in ("IO", "S1", "S2")]
            assert len(set(three)) == 3
            assert not set(three) & {int(prompts.io[row]), int(prompts.s[row])}
            assert set(three) <= set(prompts.names.tolist())


def test_seeds_give_other_prompts(shipped):
    a, b = (ioi.make_prompts(shipped, 4, seed=seed) for seed in (0, 1))
    assert a.texts != b.texts and a.texts == ioi.make_prompts(shipped, 4, seed=0).texts


# -- metrics, and circuits by brute force --------------------------------------------------------


def test_metrics_by_hand(task):
    prompts, n = task.prompts, len(task.prompts.names)
    logits = torch.randn(4, task.model.d_vocab)
    names = logits[:, prompts.names]
    rows = torch.arange(4)
    io, s = logits[rows, prompts.io], logits[rows, prompts.s]
    rest = (names.sum(1) - io - s) / (n - 2)
    want = {
        "IO - S": io - s,
        "both - others": (io + s) / 2 - rest,
        "IO - others": io - (names.sum(1) - io) / (n - 1),
    }
    for metric, values in want.items():
        got = Task(task.model, prompts, metric).metric(logits)
        assert got == pytest.approx(float(values.mean()), abs=1e-4)


def test_the_whole_model_is_faithful_and_its_F_is_its_own(task):
    logits = task.model(task.prompts.ids)[:, -1]
    assert task.full == pytest.approx(float(task.metric(logits)), abs=1e-4)
    assert task.faithfulness(task.nodes()) == 1
    assert len(task.nodes()) == task.model.n_layers * task.model.n_heads * len(ROLES)


def brute_hooks(reference, role, circuit):
    """Replace node by node what is not in the circuit, for one prompt."""

    def hook(z, layer):
        for p in range(1, z.shape[1]):
            for h in range(z.shape[2]):
                if (layer, h, ROLES[role[p]]) not in circuit:
                    z[0, p, h] = reference["z", layer].mean(0)[p, h]
        return z

    return {key: functools.partial(hook, layer=key[1]) for key in reference}


@pytest.mark.parametrize("ablation", [Mean(), Resample(), Zero()])
def test_a_circuit_against_brute_force(task, ablation):
    """Prompt by prompt, position by position, with plain hooks on whole runs."""
    model, prompts = task.model, task.prompts
    other = Task(model, prompts, ablation=ablation)
    circuit = {(0, 1, "END"), (1, 2, "S2"), (2, 0, "IO"), (3, 3, "END"), (1, 0, "elsewhere")}
    total = []
    for i in range(len(prompts)):
        mean = record(model, prompts.others[i], "z")
        if ablation == Resample():
            mean = {key: z[:1] for key, z in mean.items()}
        if ablation == Zero():
            mean = {key: torch.zeros_like(z) for key, z in mean.items()}

        with model.hooks(brute_hooks(mean, prompts.role[i], circuit)):
            logits = model(prompts.ids[i : i + 1])[0, -1]
        total.append(float((logits[prompts.names] * other.weights[i]).sum()))
    assert other.F(circuit) == pytest.approx(sum(total) / len(total), rel=1e-3, abs=1e-4)


def test_effects_are_those_of_single_nodes(task):
    effects = task.effects()
    node = (2, 1, "END")
    want = task.full - task.F(task.nodes() - {node})
    assert effects[2, 1, ROLES.index("END")] == pytest.approx(want, abs=1e-5)
    assert effects.shape == task.shape


def test_masks_and_nodes_are_the_same_thing(task):
    nodes = {(0, 1, "END"), (3, 0, "S1+1")}
    assert ioi.to_nodes(task.mask(nodes)) == nodes
    assert task.mask(nodes).sum() == 2


# -- search, completeness, minimality: on a toy F --------------------------------------------------


class Toy(Task):
    """A task whose F is known: what each node is worth, and a spare for one of them."""

    def __init__(self):
        self.shape = (2, 2, len(ROLES))
        self.model = type("Model", (), {"n_layers": 2, "device": torch.device("cpu")})()

    def F(self, circuit):
        nodes = ioi.to_nodes(self.mask(circuit))
        worth = {(0, 0, "END"): 6.0, (1, 1, "S2"): 4.0, (1, 0, "IO"): 0.004}
        total = sum(x for node, x in worth.items() if node in nodes)
        spare = (0, 1, "END") in nodes and (0, 0, "END") not in nodes
        return total + (3.0 if spare else 0.0)


def test_the_search_finds_what_counts():
    toy = Toy()
    assert circuits.find_circuit(toy) == {(0, 0, "END"), (1, 1, "S2")}


def test_minimality_and_completeness_by_hand():
    toy, circuit = Toy(), {(0, 0, "END"), (1, 1, "S2")}
    needed = circuits.minimality(toy, circuit)
    assert needed == {
        (0, 0, "END"): pytest.approx(6 / 10.004),
        (1, 1, "S2"): pytest.approx(4 / 10.004),
    }
    pairs = circuits.completeness(toy, circuit, {"first": {(0, 0, "END")}})
    assert pairs["first"] == (pytest.approx(7.004 / 10.004), pytest.approx(4 / 10.004))


def test_random_circuits_have_the_size_and_if_asked_the_roles():
    toy, circuit = Toy(), {(0, 0, "END"), (1, 1, "S2"), (0, 1, "END")}
    for each in circuits.random_circuits(toy, circuit, 20):
        assert len(each) == 3 and each <= toy.nodes()
    for each in circuits.random_circuits(toy, circuit, 20, same_roles=True):
        assert sorted(role for *_, role in each) == ["END", "END", "S2"]


def test_sets_to_remove_lie_in_the_circuit():
    circuit = {(0, 0, "END"), (1, 1, "S2")}
    groups = {"a": {(0, 0, "END"), (0, 1, "END")}, "none": {(1, 0, "IO")}}
    sets = circuits.removals(groups, circuit, 20, seed=0)
    assert sets["a"] == {(0, 0, "END")} and "none" not in sets
    assert all(K and circuit >= K for K in sets.values())


def test_overlap_of_circuits():
    a, b = {(0, 0, "END"), (1, 0, "END")}, {(1, 0, "END"), (2, 0, "END")}
    assert circuits.overlap(a, b) == pytest.approx(1 / 3) and circuits.overlap(a, a) == 1


# -- jobs, direct effects, repair ------------------------------------------------------------------


def test_jobs_by_thresholds():
    looks = {pair: torch.zeros(3, 3) for pair in circuits.LOOKS}
    own = torch.zeros(3, 3)
    looks["END", "IO"][0, 0], own[0, 0] = 0.8, 3  # to IO, copies
    looks["END", "IO"][0, 1], own[0, 1] = 0.8, -3
    looks["END", "IO"][0, 2] = looks["END", "S1"][0, 2] = 0.45
    own[0, 2] = 3
    looks["END", "S2"][1, 0], own[1, 0] = 0.9, -3
    looks["END", "S2"][1, 1] = 0.9
    looks["S2", "S1"][1, 2] = 0.5
    looks["S2", "S1+1"][2, 0] = 0.5
    looks["S1+1", "S1"][2, 1] = 0.5
    looks["END-2", "S2"][0, 2] = 0.6  # one of the candidates carries the giver's name, too
    looks["END", "END-2"][2, 1] = looks["END", "END-2"][2, 2] = 0.9
    relayed = torch.full((3, 3), torch.nan)
    relayed[2, 1], relayed[2, 2] = -2, 2
    assert circuits.couriers(looks, own) == [(0, 2)]
    got = circuits.jobs(looks, own, relayed)
    assert got == {
        (0, 0, "END"): "name mover",
        (0, 1, "END"): "negative mover",
        (0, 2, "END"): "candidates",
        (0, 2, "END-2"): "courier",
        (1, 0, "END"): "excluder",
        (1, 1, "END"): "giver's reader",
        (1, 2, "S2"): "duplicate token",
        (2, 0, "S2"): "induction",
        (2, 1, "END"): "excluder",
        (2, 1, "S1+1"): "previous token",
    }
    assert {(role, job) for (_, _, role), job in got.items()} == {
        (role, job) for job, (role, _) in circuits.JOBS.items()
    }


def test_parts_add_up_to_the_stream(task):
    parts = task.parts()
    whole = parts.pop("stream")
    assert torch.allclose(sum(parts.values()), whole, atol=1e-4)


def test_direct_effects_add_up_to_the_metric_before_the_soft_cap(task):
    logits = task.model.unembed(task.intact["resid_final"][:, -1], softcap=False)
    constant = 0.0
    if getattr(task.model.ln_final, "bias", None) is not None:
        u = task.weights @ task.model.W_U[:, task.prompts.names].T
        constant = float((u @ task.model.ln_final.bias).mean())
    assert sum(task.direct().values()) + constant == pytest.approx(
        float(task.metric(logits)), abs=1e-4
    )


def test_the_accounts_of_a_repair_balance(task):
    done = circuits.repair(task, {(1, 0, "END"), (1, 1, "END")})
    total = done.before + done.own + sum(done.others.values()) + done.norm
    assert total == pytest.approx(done.after, abs=1e-6)
    assert "L1H0" not in done.others and "L1H2" in done.others
    early = [done.others[name] for name in ("embed", "L0H0", "L0 MLP")]
    assert early == pytest.approx([0, 0, 0], abs=1e-9)  # what came before has not changed
    nothing = circuits.repair(task, set())
    assert nothing.before == nothing.after and nothing.repaired != nothing.repaired


def test_the_repaired_share_by_hand():
    done = circuits.Repair(before=3.0, after=2.2, own=-2.0, others={"x": 1.2}, norm=0.0)
    assert done.repaired == pytest.approx(0.6)


def test_paths_of_all_kinds(task):
    assert circuits.path_shares(task).shape == (task.model.n_layers, task.model.n_heads)
    assert circuits.path_shares(task, senders="mlp").shape == (task.model.n_layers,)
    found = circuits.inputs(task, [(2, 0)])
    assert list(found) == ["q", "k", "v"] and set(found["v"]) == {
        "embedding",
        "best head",
        "best MLP",
    }


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, p: Task(m, p, "loss"), "no metric 'loss'"),
        (lambda m, p: Task(m, p, ablation="odd"), "'odd' is no ablation"),
        (lambda m, p: p.at("elsewhere"), "no role 'elsewhere'"),
        (lambda m, p: ioi.make_prompts(m, 100_000), "ask for fewer"),
    ],
)
def test_bad_input_gets_one_sentence(task, call, message, monkeypatch):
    few = documents("ioi", 60, 0, ("entities",), order="ABB")
    if "fewer" in message:
        monkeypatch.setattr(ioi, "documents", lambda *_, **__: few)
    with pytest.raises(ModelError, match=message) as caught:
        call(task.model, task.prompts)
    assert "\n" not in str(caught.value)


# -- the shipped model -----------------------------------------------------------------------------


def test_it_knows_who_receives_on_unseen_pairs_in_both_orders(shipped):
    found = ioi.behaviour(shipped, ioi.make_prompts(shipped, 12, seed=5))
    assert all(row["IO first"] > 0.9 and row["logit difference"] > 3 for row in found.values())


def test_its_circuit_is_small_faithful_and_better_than_chance():
    circuit, task = claims.found_circuit(), claims.fresh_task(0)
    assert 0 < len(circuit) < 0.15 * len(task.nodes())
    assert 0.8 < task.faithfulness(circuit) < 1.2 and task.first_choice(circuit) > 0.9
    drawn = circuits.random_circuits(task, circuit, 4)
    assert max(map(task.faithfulness, drawn)) < task.faithfulness(circuit) - 0.2


def test_the_circuit_can_be_drawn(shipped):
    circuit = claims.found_circuit()
    looks = {pair: torch.rand(shipped.n_layers, shipped.n_heads) for pair in circuits.LOOKS}
    given = dict.fromkeys(circuit, "candidates")
    figure = heads_figures.circuit_drawing(circuit, given, looks, shipped.n_layers)
    assert plots.render(figure).startswith(b"\x89PNG")
    assert plots.render(heads_figures.circuit_drawing([], {}, looks, 6)).startswith(b"\x89PNG")
    pairs = {"random 0": (0.4, 0.3), "candidates": (0.2, 0.0)}
    assert plots.render(heads_figures.agreement_plot(pairs)).startswith(b"\x89PNG")
