"""Who receives: prompts by hand, ablation and accounts against brute force, the shipped model's own
circuit, and a circuit that cannot know who comes twice."""

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
from mi_helpers.picture import alt_text
from mi_helpers.tinyworld import lexicon
from mi_helpers.tinyworld.tokenizer import SPLIT
from mi_helpers.widgets import corners

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
    size = {"vocab_size": len(tokenizer), "max_position_embeddings": 48}
    return LanguageModel(build(request.param, **size), tokenizer, request.param)


@pytest.fixture(scope="module")
def task(model):
    return Task(model, ioi.make_prompts(model, 3, seed=1, others=3))


@pytest.fixture(scope="module")
def shipped():
    return load_model("tiny-gemma")


# -- prompts -------------------------------------------------------------------------------------


def test_prompts_are_aligned_and_named_by_role(shipped):
    prompts = ioi.make_prompts(shipped, 9, seed=2, others=4)
    assert prompts.orders == ("IBB",) * 3 + ("BIB",) * 3 + ("BBI",) * 3
    assert prompts.others.shape == (9, 4, prompts.ids.shape[1])
    rows = torch.arange(9)
    for role, want in (("IO", prompts.io), ("S1", prompts.s), ("S2", prompts.s)):
        assert torch.equal(prompts.ids[rows, prompts.at(role)], want)
    for role in ioi.NAMED:
        assert (prompts.at(f"{role}+1") == prompts.at(role) + 1).all()
    for back, role in enumerate(("END", "END-1", "END-2")):
        assert (prompts.at(role) == prompts.ids.shape[1] - 1 - back).all()
    for i, order in enumerate(prompts.orders):
        places = sorted((int(prompts.at(role)[i]), role[0]) for role in ioi.NAMED)
        assert "".join(letter for _, letter in places).replace("S", "B") == order
        decoded = shipped.tokenizer.decode(prompts.ids[i, 1:])
        answer = shipped.tokenizer.decode(prompts.io[i])
        assert prompts.texts[i] == f"{decoded}{answer}."


def test_the_pairs_of_names_were_never_trained_on(shipped):
    from mi_helpers.tinyworld.held import is_held

    prompts = ioi.make_prompts(shipped, 9, seed=3)
    for io, s in zip(prompts.io.tolist(), prompts.s.tolist(), strict=True):
        assert is_held(*sorted(shipped.tokenizer.decode(i).strip() for i in (io, s)))


def test_other_names_change_names_and_nothing_else(shipped):
    prompts = ioi.make_prompts(shipped, 6, seed=0, others=5)
    named = prompts.role < len(ioi.NAMED)
    same = prompts.others == prompts.ids[:, None]
    assert same[~named[:, None].expand_as(same)].all()
    assert not same[named[:, None].expand_as(same)].any()
    for row, others in enumerate(prompts.others.tolist()):
        for ids in others:
            three = {ids[int(prompts.at(role)[row])] for role in ioi.NAMED}
            assert len(three) == 3 and three <= set(prompts.names.tolist())
            assert not three & {int(prompts.io[row]), int(prompts.s[row])}


def test_a_swap_changes_one_token_and_who_comes_once(shipped):
    prompts = ioi.make_prompts(shipped, 6, seed=0)
    assert ((prompts.swapped != prompts.ids).sum(1) == 1).all()
    for row, io, s in zip(prompts.swapped, prompts.io, prompts.s, strict=True):
        assert (row == io).sum() == 2 and (row == s).sum() == 1


def test_seeds_give_other_prompts(shipped):
    a, b = (ioi.make_prompts(shipped, 3, seed=seed) for seed in (0, 1))
    assert a.texts != b.texts and a.texts == ioi.make_prompts(shipped, 3, seed=0).texts


def test_roles_of_three_people():
    found = ioi.roles(14, [1, 3, 5, 7, 9], [10, 20, 10, 30, 20])
    names = [ROLES[i] for i in found]
    assert [names[i] for i in (1, 3, 5, 7, 9)] == ["S1", "S1", "S2", "IO", "S2"]
    assert names[2] == "S1+1" and names[8] == "IO+1" and names[-3:] == ["END-2", "END-1", "END"]


def test_a_text_of_ones_own(shipped):
    text = "Then Roger met Anna. Roger saw Rebecca. Anna left. The clerk gave a ring to"
    own = ioi.own_prompt(shipped, text)
    assert shipped.tokenizer.decode(own.io).strip() == "Rebecca" and len(own) == 1
    assert (own.role == ROLES.index("S1")).sum() == 2 and (own.role == ROLES.index("S2")).sum() == 2
    assert torch.isfinite(Task(shipped, own).F(set())).all()


# -- metrics, and circuits by brute force --------------------------------------------------------


def test_metrics_by_hand(task):
    prompts, n = task.prompts, len(task.prompts.names)
    logits = torch.randn(len(prompts), task.model.d_vocab)
    names, rows = logits[:, prompts.names], torch.arange(len(prompts))
    io, s = logits[rows, prompts.io], logits[rows, prompts.s]
    rest = (names.sum(1) - io - s) / (n - 2)
    want = [float((io - s).mean()), float((io - rest).mean())]
    assert task.metric(logits).tolist() == pytest.approx(want, abs=1e-4)


def test_the_whole_model_is_faithful_and_its_F_is_its_own(task):
    logits = task.model(task.prompts.ids)[:, -1]
    assert torch.allclose(task.full, task.metric(logits), atol=1e-4)
    assert task.faithfulness(task.nodes()).tolist() == [1, 1] and task.error(task.nodes()) == 0
    assert len(task.nodes()) == task.model.n_layers * task.model.n_heads * len(ROLES)


def test_closeness_is_of_the_worse_metric_and_errors_do_not_cancel(task):
    assert ioi.closeness(torch.tensor([1.3, 0.95])) == pytest.approx(0.7)
    circuit = {(0, 0, "END"), (1, 1, "S2")}
    assert task.error(circuit) >= 1 - task.closeness(circuit) - 1e-5


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
    other = Task(model, prompts, ablation)
    circuit = {(0, 1, "END"), (1, 2, "S2"), (2, 0, "IO"), (3, 3, "END"), (1, 0, "elsewhere")}
    found = []
    for i in range(len(prompts)):
        mean = record(model, prompts.others[i], "z")
        if ablation == Resample():
            mean = {key: z[:1] for key, z in mean.items()}
        if ablation == Zero():
            mean = {key: torch.zeros_like(z) for key, z in mean.items()}
        with model.hooks(brute_hooks(mean, prompts.role[i], circuit)):
            logits = model(prompts.ids[i : i + 1])[0, -1, prompts.names]
        found.append((other.weights[:, i] * logits).sum(-1))
    want = torch.stack(found, 1)
    assert torch.allclose(other.each(circuit), want, rtol=1e-3, atol=1e-3)
    assert torch.allclose(other.F(circuit), want.mean(1), rtol=1e-3, atol=1e-3)


def test_masks_and_nodes_are_the_same_thing(task):
    nodes = {(0, 1, "END"), (3, 0, "S1+1")}
    assert ioi.to_nodes(task.mask(nodes)) == nodes and task.mask(nodes).sum() == 2


def test_estimates_are_the_slope_of_a_gate(shipped):
    task = Task(shipped, ioi.make_prompts(shipped, 3, seed=1, others=3))
    keep = task.mask(task.nodes())
    found, node = circuits.estimates(task, keep), (3, 0, ROLES.index("END"))
    gate = keep.float()
    gate[node] -= 0.002
    change = (task.F(keep) - task.F(gate)) / task.full / 0.002
    assert float(change.abs().max()) == pytest.approx(float(found[node]), rel=0.05, abs=1e-3)


# -- search, completeness, minimality: on a toy F --------------------------------------------------


class Toy(Task):
    """A task whose F is known: what each node is worth on both metrics, and a spare for one."""

    def __init__(self):
        self.shape = (2, 2, len(ROLES))
        self.model = type("Model", (), {"n_layers": 2, "device": torch.device("cpu")})()

    def each(self, circuit):
        nodes = ioi.to_nodes(self.mask(circuit))
        worth = {(0, 0, "END"): (6.0, 1.0), (1, 1, "S2"): (4.0, 9.0), (1, 0, "IO"): (0.004, 0.004)}
        total = [sum(x[i] for node, x in worth.items() if node in nodes) for i in range(2)]
        spare = (0, 1, "END") in nodes and (0, 0, "END") not in nodes
        return torch.tensor([[total[0] + (3.0 if spare else 0.0)], [total[1]]])


@pytest.fixture
def toy(monkeypatch):
    each = Toy()
    full = each.nodes()

    def by_removal(task, keep):
        nodes = ioi.to_nodes(keep)
        found = torch.zeros(task.shape)
        for layer, head, role in full & nodes:
            change = task.faithfulness(nodes) - task.faithfulness(nodes - {(layer, head, role)})
            found[layer, head, ROLES.index(role)] = change.abs().max()
        return found

    monkeypatch.setattr(circuits, "estimates", by_removal)
    return each


def test_the_search_finds_what_counts(toy):
    assert circuits.find_circuit(toy) == {(0, 0, "END"), (1, 1, "S2")}


def test_minimality_and_completeness_by_hand(toy):
    circuit = {(0, 0, "END"), (1, 1, "S2")}
    needed = circuits.minimality(toy, circuit)
    assert needed[0, 0, "END"].tolist() == pytest.approx([6 / 10.004, 1 / 10.004])
    assert needed[1, 1, "S2"].tolist() == pytest.approx([4 / 10.004, 9 / 10.004])
    pairs = circuits.completeness(toy, circuit, {"first": {(0, 0, "END")}})
    assert pairs["IO - S"]["first"] == pytest.approx((7.004 / 10.004, 4 / 10.004))
    assert pairs["IO - others"]["first"] == pytest.approx((9.004 / 10.004, 9 / 10.004))


def test_random_circuits_have_the_circuits_roles(toy):
    circuit = {(0, 0, "END"), (1, 1, "S2"), (0, 1, "END")}
    for each in circuits.random_circuits(toy, circuit, 20):
        assert sorted(role for *_, role in each) == ["END", "END", "S2"] and each <= toy.nodes()


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


def test_jobs_by_where_a_head_looks_and_whether_it_copies():
    looks = {(q, k): torch.zeros(3, 3) for q, each in circuits.LOOKS.items() for k in each}
    own = torch.ones(3, 3)
    own[0, 1] = -1
    for head in (0, 1):
        looks["END", "IO"][0, head] = looks["END", "S1"][0, head] = 0.2
    looks["END", "S2"][1, 0], looks["END", "IO"][1, 0] = 0.5, 0.3
    looks["END", "END-1"][1, 1] = looks["END", "END-1"][0, 2] = looks["END-1", "S2"][0, 2] = 0.5
    looks["S2", "S1"][1, 2] = looks["S2", "S1+1"][2, 0] = looks["S1+1", "S1"][2, 1] = 0.5
    looks["IO", "S1"][2, 2] = 0.5
    want = {
        (0, 0, "END"): "name mover",
        (0, 1, "END"): "negative name mover",
        (0, 2, "END"): "other",  # nobody has written there before the first layer
        (0, 2, "END-1"): "relay",
        (1, 0, "END"): "S-inhibition",
        (1, 1, "END"): "relay reader",
        (1, 2, "S2"): "duplicate token",
        (2, 0, "S2"): "induction",
        (2, 1, "S1+1"): "previous token",
        (2, 2, "IO"): "other name",
        (2, 2, "END"): "other",
        (2, 2, "elsewhere"): "other",
    }
    assert circuits.jobs(want, looks, own) == want
    assert set(want.values()) == set(circuits.JOBS)
    assert list(circuits.by_job(want)) == list(circuits.JOBS)


def test_the_parts_of_a_head_copy_as_the_library_says(shipped):
    from mi_helpers.heads import copying, ov_circuit

    names = ioi.make_prompts(shipped, 3).names
    E, W_V, W_O, U = circuits.name_circuit(shipped, (4, 1), names)
    logits = E @ W_V @ W_O @ U
    theirs = copying(ov_circuit(shipped, (4, 1), names))["own"]
    assert copying(logits - logits.mean(1, keepdim=True))["own"] == pytest.approx(theirs, rel=1e-3)


def test_parts_add_up_to_the_stream(task):
    parts = task.parts()
    whole = parts.pop("stream")
    assert torch.allclose(sum(parts.values()), whole, atol=1e-4)


@pytest.mark.parametrize("metric", ioi.METRICS)
def test_the_accounts_of_a_repair_balance(task, metric):
    done = circuits.repair(task, {(1, 0, "END"), (1, 1, "END")}, metric)
    total = done.before + done.own + sum(done.others.values()) + done.norm
    assert total == pytest.approx(done.after, abs=1e-6)
    assert "L1H0" not in done.others and "L1H2" in done.others
    early = [done.others[name] for name in ("embed", "L0H0", "L0 MLP")]
    assert early == pytest.approx([0, 0, 0], abs=1e-9)  # what came before has not changed


def test_paths_of_all_kinds(task):
    by_head, words = circuits.senders(task, "logits")
    assert by_head.shape == (task.model.n_layers, task.model.n_heads) and words == words
    table = heads_figures.paths_table(task, {"a": [(1, 0)], "b": [(1, 1)], "c": []}).splitlines()
    shared = task.model.n_kv_heads < task.model.n_heads  # then a and b have the same keys
    assert len(table) == 2 + 9 + 1 and ("| – |" in table[6]) == shared and "| – |" in table[9]
    assert not any("| – |" in row for row in table[:6])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, p: Task(m, p, "odd"), "'odd' is no ablation"),
        (lambda m, p: p.at("elsewhere"), "no role 'elsewhere'"),
        (lambda m, p: ioi.make_prompts(m, 100_000), "at most"),
        (lambda m, p: ioi.own_prompt(m, "There was a dog near the door, and so on"), "Nobody of"),
    ],
)
def test_bad_input_gets_one_sentence(task, call, message, monkeypatch):
    few = documents("ioi", 60, 0, ("entities",), form="crowd", order="IBB", opening=1)
    if "most" in message:
        monkeypatch.setattr(ioi, "documents", lambda *_, **__: few)
    with pytest.raises(ModelError, match=message) as caught:
        call(task.model, task.prompts)
    assert "\n" not in str(caught.value)


# -- the shipped model -----------------------------------------------------------------------------


def test_it_knows_who_receives_on_unseen_pairs(shipped):
    task = Task(shipped, ioi.make_prompts(shipped, 12, seed=5))
    assert task.first_choice(task.nodes()) > 0.9 and (task.full > 3).all()


def test_its_circuit_is_small_faithful_and_better_than_chance():
    circuit, task = claims.found_circuit(), claims.fresh_task(0)
    assert 0 < len(circuit) < 0.15 * len(task.nodes())
    assert task.closeness(circuit) > 0.88 and task.first_choice(circuit) > 0.9
    drawn = circuits.random_circuits(task, circuit, 4)
    assert max(map(task.closeness, drawn)) < task.closeness(circuit) - 0.2


def test_a_circuit_that_cannot_tell_who_comes_twice_is_near_chance():
    """One that brings both names and has no head that reads S2: half of the answers are right, one
    metric is high, and what the lesson calls success is near 0."""
    circuit, task = claims.found_circuit(), claims.fresh_task(0)
    blind = {node for node in circuit if node not in claims.job_groups()["S-inhibition"]}
    _, others = task.faithfulness(blind).tolist()
    assert others > 0.5  # this metric alone would have been content
    assert task.closeness(blind) < 0.35
    assert 0.2 < task.first_choice(blind) < 0.8


def test_the_circuit_can_be_drawn_and_built():
    task, groups = claims.fresh_task(0), claims.job_groups()
    given = {node: job for job, nodes in groups.items() for node in nodes}
    for nodes in (given, {}):
        picture = heads_figures.circuit_drawing(task, nodes, 1)
        assert plots.render(picture).startswith(b"\x89PNG")
    assert heads_figures.jobs_table(task, given, torch.zeros(6, 4)).count("\n") == 1 + len(given)
    table = heads_figures.faithfulness_table({"it": [task.faithfulness(given)]})
    assert "it (1)" in table
    pairs = {"x": {"random 0": (0.4, 0.3), "name mover": (0.2, 0.0)}}
    assert plots.render(heads_figures.agreement_plot(pairs)).startswith(b"\x89PNG")


def test_the_builder_draws_every_corner():
    task, groups = claims.fresh_task(0), claims.job_groups()
    some = {job: groups[job] for job in list(groups)[:2]}
    builder = heads_figures.CircuitBuilder(task, some)
    text = "There was Roger. Then Rebecca laughed. Nobody knew Roger. The clerk gave a ring to"
    heard = set()  # who cannot see the bars hears them
    for values in corners(**builder.controls(text)):
        drawn = builder.figure(**values)
        assert plots.render(drawn).startswith(b"\x89PNG")
        heard.add(alt_text(drawn))
    assert len(heard) > 2
    with pytest.raises(ValueError, match="Nobody of TinyWorld"):
        builder.figure("no names at all in this text", all_other_heads=True)
