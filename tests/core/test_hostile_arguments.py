"""Every public function of the core refuses what it cannot serve, in a sentence about the argument.

A row is a function, arguments that it serves, and changes to them that nobody can serve. Each has
to raise ValueError or TypeError from the package itself, in one sentence that names the argument:
no library's words, and no answer.
"""

import importlib
import inspect
import math
import re
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from families import TEXT, build, make_tokenizer

import mi_helpers
from mi_helpers import loading
from mi_helpers.ablation import Gaussian, Mean, Resample
from mi_helpers.models import LanguageModel

ROOT = Path(mi_helpers.__file__).parent
MODULES = """ablation architecture attribution heads hooks layouts lens models patching paths
prefix probes steering""".split()
NAN, INF = math.nan, math.inf
IDS = torch.tensor([[2, 5, 7, 9, 11, 13, 15], [2, 6, 8, 9, 12, 13, 16]])
OTHER = torch.tensor([[2, 5, 21, 9, 23, 13, 15], [2, 6, 4, 9, 12, 18, 22]])
META = torch.empty(2, 7, device="meta")


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def spoiled(x, value=NAN):
    x = x.clone()
    x.reshape(-1)[0] = value
    return x


def tensors(x, *, wider=True):
    """What is wrong with a tensor wherever one of this shape is expected."""
    changes = [None, "text", x[:0], x[None, None, None, None], spoiled(x), spoiled(x, INF)]
    changes += [x.to("meta"), x.to(torch.complex64), x > 0]
    return [*changes, torch.cat([x, x], -1)] if wider else changes


BAD_IDS = [
    None,
    3.5,
    {},
    object(),
    [],
    [[]],
    "",
    [""],
    IDS.float(),
    IDS.bool(),
    IDS[None],
    torch.tensor(3),
    IDS[:, :0],
    IDS - 100,
    IDS + 100,
    [[2, 5], [2]],
    torch.full((1, 17), 5),
    torch.empty(2, 7, dtype=torch.int64, device="meta"),
    ["cat", 3],
]
BAD_LAYERS = [None, 4, -5, 1.5, "one", True, [1], NAN]
BAD_COUNTS = [0, -1, 1.5, None, "three", NAN, True]
BAD_HEADS = [None, 3, (1,), (9, 0), (0, 9), ("a", 1), (1.5, 0), (1, 2, 3)]
BAD_POSITIONS = [7, -8, 1.5, "last", [9], [], [1.5], NAN, True]


@pytest.fixture(scope="session")
def model():
    return LanguageModel(build("gemma2"), make_tokenizer(), "tiny")


def uneven(ids):
    """Prompts of other lengths than IDS, which some functions serve; None for all else."""
    if isinstance(ids, torch.Tensor):
        return ids if ids.shape == (2, 5) else None
    return ids if ids == [[2, 5], [2]] else None


def metric(logits):
    return logits[..., 5].mean(-1)


def rows(model):  # noqa: PLR0915
    """{name: (function, arguments that are served, {argument: changes that are not})}."""
    lib = {name: importlib.import_module(f"mi_helpers.{name}") for name in MODULES}
    ab, at, he, le = (lib[name] for name in ("ablation", "attribution", "heads", "lens"))
    pa, pr, pf, mo = (lib[name] for name in ("patching", "probes", "prefix", "models"))
    stream, final = draw(5, 3, model.d_model), draw(3, model.d_model)
    x, y = draw(20, 6).numpy(), np.arange(20) % 2
    pattern = draw(2, 4, 7, 7).softmax(-1)
    answers = torch.tensor([5, 6])
    z = draw(2, 7, model.n_heads, model.d_head)
    where = (torch.tensor([0, 1, 1]), torch.tensor([1, 2, 3]))
    target = torch.tensor([5, 6, 7])
    lens = le.TunedLens(model.n_layers, model.d_model, "tiny")
    square = draw(6, 6)
    means = pr.class_means(x, np.arange(20) % 4, 4)
    probe = pr.fit_probe(x, y)
    run = pf.BaseRun(model, IDS)
    value = draw(2, 7, model.d_model)
    edit = pf.Edit("mlp_out", 1, (3,), None, value)
    bad_at = [None, 3, where[:1], (where[0], where[1][:2]), (where[0] + 5, where[1])]
    bad_at += [
        (where[0], where[1] + 50),
        (where[0][:0], where[1][:0]),
        (where[0].float(), where[1]),
    ]
    bad_answers = [None, [], 99, -1, 5.5, "two words here", [5, 6, 7], [5, 99], NAN, True]
    bad_texts = [None, 3, "", ["cat", ""], [], ["cat", "the cat sat"], 5.5, {}, "cat " * 20]
    bad_sites = ["resid", None, 3, ("z", 9), ("embed", 1), ("z", 1, 2), [("z", "a")]]
    bad_pair = {
        "clean": [*BAD_IDS, IDS[:1], OTHER[:, :5]],
        "corrupted": [*BAD_IDS, IDS, IDS[:1], IDS[:, :5]],
        "metric": [None, "logits", lambda logits: None, lambda logits: logits.mean() * NAN],
        "mode": ["noising", None, 1],
    }
    pair = {"model": model, "clean": IDS, "corrupted": OTHER, "metric": metric}
    bad_lens = ["lens", le.TunedLens(model.n_layers, 7), le.TunedLens(2, model.d_model)]
    bad_target = [target[:2], target + 99, target - 99, target.float(), target[None], 5]
    probes = {"x": [None, "text", x[:0], x[0], x * NAN, x * INF, x[:5], x[None], [[1], [2, 3]]]}
    labels = [None, 3, y[:5], y * 0, y[None], y * NAN]
    hook = lambda a: a  # noqa: E731
    m, found = model, {}

    def add(name, fn, given, /, **changes):
        found[name] = (fn, given, changes)

    # models and hooks
    add("encode", m.encode, {"text": "cat"}, text=[None, 3, "", ["cat"], 2.5])
    add("tokens", m.tokens, {"text": TEXT}, text=bad_texts)
    add(
        "pad",
        m.pad,
        {"rows": [[2, 5], [2]]},
        rows=[None, 3, [], "ab", [3], [[2.5]], [[99]], [[-1]]],
    )
    add("str_tokens", m.str_tokens, {"text": TEXT}, text=[*BAD_IDS, IDS])
    add("to_single_token", m.to_single_token, {"text": " Rome"}, text=[None, "", "a b c", 3, "zzz"])
    add("ids", m.ids, {"tokens": IDS}, tokens=BAD_IDS)
    add("forward", m.forward, {"tokens": IDS}, tokens=BAD_IDS)
    add("loss", m.loss, {"tokens": IDS}, tokens=[*BAD_IDS, IDS[:, :1]])
    add(
        "run_with_cache",
        m.run_with_cache,
        {"tokens": IDS, "sites": "z"},
        tokens=BAD_IDS,
        sites=[s for s in bad_sites if s is not None],
        stop_at_layer=[9, -1, 1.5, "two"],
        pos=[*BAD_POSITIONS, slice(9, 12), {}],
    )
    add(
        "run_from_layer",
        m.run_from_layer,
        {"resid": value, "layer": 1},
        resid=[*tensors(value), draw(2, 20, model.d_model), value.long()],
        layer=[9, -1, None, 1.5],
        stop_at_layer=[0, 9, 1.5],
    )
    add(
        "unembed",
        m.unembed,
        {"resid": final},
        resid=[t for t in tensors(final)[:3] + tensors(final)[4:]],
    )
    add(
        "generate",
        m.generate,
        {"text": "The cat", "n": 1},
        text=[None, 3, "", ["cat", "sat"]],
        n=[-1, 99, 1.5, None, "two"],
        temperature=[-1, NAN, INF, None, "hot"],
        seed=[1.5, "a"],
    )
    add("part", m.part, {"name": "o", "layer": 1}, name=["oo", None, 3], layer=BAD_LAYERS)
    add("weight", m.weight, {"name": "W_O", "layer": 1}, name=["W_X", None], layer=BAD_LAYERS)
    add("layer_index", m.layer_index, {"name": "z", "layer": 1}, layer=BAD_LAYERS)
    add("check_site", m.check_site, {"name": "z"}, name=["zz", None, 3, "pos_embed"])
    add("site_keys", m.site_keys, {"sites": ["z"]}, sites=[["zz"], [("z", 9)], [3], [("embed", 1)]])
    add("split_heads", m.split_heads, {"name": "z", "full": z.flatten(2)}, full=[final])
    entered = lambda fns: m.hooks(fns).__enter__()  # noqa: E731
    bad_fns = [None, [], {"zz": hook}, {("z", 9): hook}, {"z": None}, {3: hook}]
    add("hooks", entered, {"fns": {}}, fns=bad_fns)
    add(
        "site_width",
        mo.site_width,
        {"model": m, "site": ("z", 1)},
        site=[("z", 9), ("zz", 1), ("pattern", 1)],
    )
    add("checked_site", mo.checked_site, {"model": m, "site": ("z", 1)}, site=[("z", 9), ("zz", 1)])
    add(
        "read_sites",
        mo.read_sites,
        {"model": m, "ids": IDS, "sites": [("z", 1)]},
        ids=BAD_IDS,
        sites=[[("zz", 1)], [("z", 9)]],
    )
    add(
        "activations_at",
        mo.activations_at,
        {"model": m, "ids": IDS, "at": where, "sites": ["z"]},
        ids=BAD_IDS,
        at=bad_at,
        sites=[["zz"], [("z", 9)], 3],
        size=BAD_COUNTS,
    )
    # ablation
    steering = lib["steering"]
    bad_vectors = [None, "text", [], value, spoiled(draw(m.d_model)), draw(3), 0 * draw(m.d_model)]
    add_v = steering.Add(draw(m.d_model), 2.0)
    bad_steering = [None, "add", draw(m.d_model), *(steering.Add(v) for v in bad_vectors)]
    bad_steering += [steering.Add(draw(m.d_model), dose) for dose in (None, "two", NAN, INF)]
    bad_steering += [steering.Clamp(draw(m.d_model), value) for value in (None, [1.0], NAN)]
    bad_steering += [steering.Erase(draw(m.d_model), c) for c in (None, "text", draw(3), NAN)]

    def run_steered(**given):
        with steering.steered(**given):
            m.forward(IDS)

    add(
        "steered",
        run_steered,
        {"model": m, "site": ("resid_post", 1), "steering": add_v, "positions": 3},
        site=[
            *bad_sites,
            "resid_post",
            ("resid_post", None),
            ("pattern", 1),
            ("ln2_normalized", 1),
        ],
        steering=bad_steering,
        positions=[*BAD_POSITIONS, [[1]], [[1], [9]], [[1], []]],
    )
    add(
        "dose_response",
        steering.dose_response,
        {
            "model": m,
            "site": ("resid_post", 1),
            "steer": lambda dose: steering.Add(draw(m.d_model), dose),
            "doses": [1.0],
            "concept": lambda model: 1.0,
            "texts": IDS,
        },
        site=bad_sites,
        steer=[None, add_v, lambda dose: dose],
        doses=[None, [], ["one"], [NAN], 2.0],
        concept=[None, "cat", lambda model: None, lambda model: NAN, lambda model: []],
        texts=[*BAD_IDS[:-3], BAD_IDS[-1], IDS[:, :1], ["cat", ""]],
    )
    add(
        "text_losses",
        steering.text_losses,
        {"model": m, "texts": IDS},
        texts=[None, "", IDS[:, :1]],
    )
    add(
        "random_directions",
        steering.random_directions,
        {"direction": draw(6), "n": 3, "like": draw(9, 6)},
        direction=[None, "text", [], 0 * draw(6), spoiled(draw(6)), draw(2, 6)],
        n=BAD_COUNTS,
        seed=[None, 1.5, "one"],
        like=["text", draw(9, 5), draw(6), spoiled(draw(9, 6)), torch.ones(4, 6)],
    )
    add("record", ab.record, {"model": m, "texts": IDS}, texts=BAD_IDS, sites=["zz", ("z", 9)])
    add(
        "recorded",
        ab.recorded,
        {"model": m, "reference": IDS, "keys": [("z", 1)]},
        reference=[*BAD_IDS[:8], {}],
    )
    wrong_reference = {("z", 1): spoiled(z)}, {("z", 1): z[..., :2]}, {("z", 1): z[:0]}, {}
    add(
        "ablate",
        ab.ablate,
        {"model": m, "parts": [(1, 1)], "ablation": Mean(IDS)},
        parts=[[bad] for bad in [*BAD_HEADS, ("q", 1), ("mlp", 9), ("mlp", 1, 2), ("mlp",), ()]],
        ablation=[None, "zero", Mean(), Resample(), *map(Mean, wrong_reference), Mean(BAD_IDS[13])],
    )
    add(
        "checked_part",
        ab.checked_part,
        {"model": m, "given": (1, 1)},
        given=[*BAD_HEADS, (), ("q", 1)],
    )
    add(
        "part_name",
        ab.part_name,
        {"part": ("mlp", 1, None)},
        part=[None, (), ("x", 1, None), (1, 2)],
    )
    noise = lambda subject, scale, seeds: Gaussian(subject, scale, seeds).noise(m, IDS)  # noqa: E731
    given = {"subject": [2], "scale": 3.0, "seeds": 2}
    add(
        "Gaussian.noise",
        noise,
        given,
        subject=BAD_POSITIONS,
        scale=[NAN, -1, INF, "a"],
        seeds=BAD_COUNTS,
    )
    # prefix
    add("BaseRun", pf.BaseRun, {"model": m, "ids": IDS}, ids=BAD_IDS)
    bad_edits = [("zz", 1, (3,), None), ("mlp_out", 9, (3,), None), ("mlp_out", 1, (9,), None)]
    bad_edits += [("mlp_out", 1, (-1,), None), ("mlp_out", 1, (3,), (0,)), ("z", 1, (3,), (9,))]
    edits = [[[pf.Edit(*bad, value)]] for bad in bad_edits]
    add("run_edits", pf.run_edits, {"run": run, "patches": [[edit]]}, patches=edits)
    add(
        "write_heads",
        pf.write_heads,
        {"model": m, "layer": 1, "z": z},
        z=[b for b in tensors(z) if b is None or isinstance(b, str) or b.ndim < 6],
        layer=BAD_LAYERS,
    )
    # patching
    logits = draw(2, model.d_vocab)
    ids = [None, [], [99, 5], -1, 5.5, [5, 6, 7], "two", NAN, True]
    for name in ("logit_diff", "logit_diffs"):
        bad = [None, "text", logits[:0], logits[0], torch.tensor(3.0)]
        add(
            name,
            getattr(pa, name),
            {"logits": logits, "answer": answers, "wrong": 7},
            logits=bad,
            answer=ids,
            wrong=ids,
        )
    add(
        "answer_ids",
        pa.answer_ids,
        {"model": m, "answer": 5},
        answer=[b for b in bad_answers if b != [5, 6, 7]],
    )
    two = {"answer": bad_answers, "wrong": [*bad_answers, 5]}
    no = {k: [b for b in bad_pair[k] if uneven(b) is None] for k in ("clean", "corrupted")}
    given = {"model": m, "clean": IDS, "corrupted": OTHER, "answer": 5, "wrong": 7}
    add("normalised_logit_diff", pa.normalised_logit_diff, given, **no, **two)
    add(
        "activation_patch",
        pa.activation_patch,
        pair | {"site": "mlp_out"},
        **bad_pair,
        site=["zz", None, "post", 3],
        ablation=[None, "zero", Mean(), Mean(IDS[:, :3]), Resample(IDS)],
        over=["head", "heads", 3],
    )
    sites = {"sites": ["zz", None, [], ["z", "zz"], 3]}
    add(
        "attribution_patch",
        mi_helpers.attribution_patch,
        pair | {"sites": "z"},
        **bad_pair,
        **sites,
        over=["head", 3],
    )
    # paths
    senders = [None, [], "mlp", 3, [(9, 0)], [("mlp", 9)], [(1,)], [("q", 1)], [(1.5, 0)], [None]]
    receivers = [
        None,
        [],
        "logit",
        3,
        [("q", 9, 0)],
        [("k", 1, 2)],
        [(1, 2)],
        [("mlp", 1, 2)],
        [None],
    ]
    path = importlib.import_module("mi_helpers.paths")
    add(
        "path_patch",
        path.path_patch,
        pair | {"senders": [(0, 1)], "receivers": "logits"},
        **bad_pair,
        senders=senders,
        receivers=receivers,
    )
    add(
        "path_patch_map",
        path.path_patch_map,
        pair | {"receivers": "logits"},
        **bad_pair,
        receivers=receivers,
        senders=["head", None, 3],
    )
    # lens
    add(
        "read_stream",
        le.read_stream,
        {"model": m, "ids": IDS, "at": where},
        ids=BAD_IDS,
        at=bad_at,
        size=BAD_COUNTS,
    )
    add(
        "beginning",
        le.beginning,
        {"model": m, "text": TEXT},
        text=[None, 3, "", [TEXT]],
        longest=BAD_COUNTS,
    )
    add(
        "sample_stream",
        le.sample_stream,
        {"model": m, "texts": [TEXT], "n": 3},
        texts=[None, 3, [], [""], [3], TEXT],
        n=[*BAD_COUNTS, 99],
    )
    add(
        "logit_lens",
        le.logit_lens,
        {"model": m, "tokens": IDS},
        tokens=BAD_IDS,
        site=["z", None, 3],
        pos=BAD_POSITIONS,
        lens=bad_lens,
    )
    streams = [*tensors(stream), stream[:, :0]]
    add(
        "read_out",
        le.read_out,
        {"model": m, "stream": stream, "target": target},
        stream=streams,
        target=bad_target,
        lens=bad_lens,
    )
    add(
        "top_tokens",
        le.top_tokens,
        {"model": m, "stream": stream, "k": 2},
        stream=streams,
        k=[*BAD_COUNTS, 99],
        lens=bad_lens,
    )
    add(
        "ranks",
        le.ranks,
        {"model": m, "stream": stream, "target": target},
        stream=streams,
        target=[*bad_target, None],
        lens=bad_lens,
        among=[[], [99], torch.tensor([-1]), "all"],
    )
    rank = torch.ones(5, 3).long()
    ranks = [None, rank[0], rank.float(), rank[:0], rank[None]]
    add("first_depth", le.first_depth, {"rank": rank}, rank=ranks)
    add("settled_depth", le.settled_depth, {"rank": rank}, rank=ranks)
    add(
        "shares",
        le.shares,
        {"depth": rank[0], "depths": 5},
        depth=[None, rank, rank[0].float(), rank[0] + 9, rank[0] - 9],
        depths=BAD_COUNTS,
    )
    add(
        "TunedLens.forward",
        lens.forward,
        {"h": final, "depth": 1},
        h=[None, "text", final[:, :3]],
        depth=[9, -1, None, 1.5],
    )
    add(
        "train_tuned_lens",
        le.train_tuned_lens,
        {"model": m, "stream": stream, "steps": 1, "size": 2},
        stream=[*streams, stream[:2]],
        steps=BAD_COUNTS,
        size=BAD_COUNTS,
        lr=[0, -1, NAN, "fast"],
    )
    # attribution
    add(
        "direct_logit_attribution",
        at.direct_logit_attribution,
        {"model": m, "tokens": IDS, "answer": 5, "wrong": 7},
        tokens=[bad for bad in BAD_IDS if uneven(bad) is None],
        answer=bad_answers,
        wrong=[5, *(b for b in bad_answers if b is not None)],
        unit=["heads", None],
        pos=[*BAD_POSITIONS, [1, 2, 3], [1, 9]],
    )
    add(
        "written_parts",
        at.written_parts,
        {"model": m, "ids": IDS, "at": where},
        ids=BAD_IDS,
        at=bad_at,
        unit=["heads", None],
    )
    finals = tensors(final)
    wrong_ids = [target[:2], target + 99, -target, target.float(), "Rome"]
    add(
        "answer_direction",
        at.answer_direction,
        {"model": m, "final": final, "answer": target},
        final=finals,
        answer=[*wrong_ids, None],
    )
    add(
        "answer_logit",
        at.answer_logit,
        {"model": m, "final": final, "answer": target},
        final=finals,
        answer=[*wrong_ids, None],
    )
    add(
        "stream_direction",
        at.stream_direction,
        {"model": m, "final": final, "u": final},
        final=finals,
        u=[*finals, final[:2]],
    )
    add(
        "frozen_scale",
        at.frozen_scale,
        {"norm": m.ln_final, "x": final},
        x=[b for b in finals if b is None or isinstance(b, str) or b.ndim < 5],
    )
    add(
        "head_writes",
        at.head_writes,
        {"model": m, "z": z, "layer": 1},
        z=[b for b in tensors(z) if b is None or isinstance(b, str) or b.ndim < 6],
        layer=BAD_LAYERS,
    )
    # heads
    add(
        "targets",
        he.targets,
        {"ids": IDS},
        ids=[None, "text", IDS[0], IDS[:, :1], IDS.float(), IDS[:0]],
    )
    patterns = [
        None,
        "text",
        pattern[0, 0],
        pattern[..., :3],
        pattern[:1],
        spoiled(pattern),
        pattern[:0],
    ]
    add(
        "pattern_scores",
        he.pattern_scores,
        {"pattern": pattern, "ids": IDS},
        pattern=patterns,
        ids=[None, IDS[0], IDS[:, :3], IDS[:1], IDS.float()],
    )
    add(
        "head_scores",
        he.head_scores,
        {"model": m, "ids": IDS},
        ids=BAD_IDS,
        score_as=[IDS[:, :3], IDS[:1], IDS.float(), "x", []],
    )
    add(
        "by_distance",
        he.by_distance,
        {"pattern": pattern},
        pattern=[None, "text", pattern[0, 0], spoiled(pattern), pattern[:0]],
    )
    scores = draw(4, 4)
    add(
        "strongest",
        he.strongest,
        {"scores": scores},
        scores=[None, scores[0], "text"],
        above=[NAN, None, "x"],
        most=[-1, 1.5, "x"],
    )
    add("head_name", he.head_name, {"head": (1, 2)}, head=[None, 3, (1,)])
    add(
        "random_sets",
        he.random_sets,
        {"heads": [(0, 1), (0, 2)], "size": 1, "count": 2},
        size=[0, -1, 3, 1.5, None],
        count=[-1, 1.5, None],
    )
    add(
        "reading",
        he.reading,
        {"model": m, "name": "W_Q", "layer": 1},
        name=["W_O", "W_X", None],
        layer=BAD_LAYERS,
    )
    add("writing", he.writing, {"model": m, "layer": 1}, layer=BAD_LAYERS)
    add("composition", he.composition, {"model": m, "kind": "K"}, kind=["k", None, 3])
    bad_ids = [None, [], torch.tensor([5.5]), torch.tensor([99]), torch.tensor([-1]), "cat", 99]
    few = torch.tensor([5, 6, 7])
    add(
        "effective_embedding",
        he.effective_embedding,
        {"model": m, "ids": few},
        ids=bad_ids,
        depth=[9, -1, 1.5, None],
    )
    add(
        "ov_circuit",
        he.ov_circuit,
        {"model": m, "head": (1, 1), "ids": few},
        head=BAD_HEADS,
        ids=bad_ids,
        through=[[(9, 0)], [(3, 0)], [3]],
    )
    add(
        "qk_circuit",
        he.qk_circuit,
        {"model": m, "reader": (1, 1), "ids": few, "writer": (0, 1)},
        reader=BAD_HEADS,
        ids=bad_ids,
        writer=[*BAD_HEADS[1:], (2, 0)],
    )
    add(
        "copying_map",
        he.copying_map,
        {"model": m, "ids": few},
        ids=bad_ids,
        through=[[(9, 0)], [3]],
    )
    add(
        "copying",
        he.copying,
        {"logits": square},
        logits=[None, "text", square[0], square[:3], spoiled(square), square[:0]],
    )
    add(
        "matching",
        he.matching,
        {"scores": square},
        scores=[None, "text", square[0], square[:3], spoiled(square), square[:0]],
    )
    add(
        "receivers_of",
        lib["paths"].receivers_of,
        {"model": m, "heads": [(1, 1)]},
        heads=[[bad] for bad in BAD_HEADS],
        site=["z", None],
    )
    add(
        "answer_log_prob",
        lambda answer: lib["paths"].answer_log_prob(answer)(logits),
        {"answer": answers},
        answer=ids,
    )
    prompts = IDS, OTHER, answers
    add(
        "composition_effect",
        lib["paths"].composition_effect,
        {"model": m, "readers": [(1, 1)], "prompts": prompts},
        readers=[[bad] for bad in BAD_HEADS],
        prompts=[
            None,
            prompts[:2],
            (IDS, OTHER[:1], answers),
            (IDS, IDS, answers),
            (IDS, OTHER, ids[2]),
            (IDS.float(), OTHER, answers),
        ],
        site=["z", None],
    )
    # probes
    add("some_layers", pr.some_layers, {"model": m, "count": 2}, count=BAD_COUNTS)
    add(
        "fit_probe",
        pr.fit_probe,
        {"x": x, "y": y},
        **probes,
        y=labels,
        C=[0, -1, NAN, "x"],
        max_iter=BAD_COUNTS,
    )
    add(
        "split_by_group",
        pr.split_by_group,
        {"groups": "aabbcc"},
        groups=["", "a", []],
        share=[0, 1, 2, NAN, None],
    )
    p = np.full((4, 2), 0.5)
    add(
        "surprise",
        pr.surprise,
        {"p": p, "y": [0, 1, 0, 1], "classes": [0, 1]},
        p=[None, p[0], p[:2], p * NAN, p * 4, -p, p[:, :1]],
        y=[None, [0], [0, 1, 2, 3], 3],
    )
    add(
        "bootstrap",
        pr.bootstrap,
        {"values": [1.0, 2.0]},
        values=[None, [], "text", [NAN, 1], [[1.0, 2.0]]],
        draws=BAD_COUNTS,
    )
    add(
        "control_task",
        pr.control_task,
        {"words": ["a"], "labels": [0, 1]},
        labels=[[]],
        words=["text"],
    )
    pairs = np.array([[2, 5], [2, 6]])
    add(
        "token_features",
        pr.token_features,
        {"model": m, "tokens": pairs},
        tokens=[None, pairs[0], pairs[:0], pairs + 99, pairs - 9, pairs * 1.5],
    )
    add("mean_difference", pr.mean_difference, {"x": x, "y": y}, **probes, y=[*labels, y * 2])
    add("midpoint", pr.midpoint, {"x": x, "y": y}, **probes, y=[*labels, y * 2])
    add(
        "probe_direction",
        pr.probe_direction,
        {"probe": probe},
        probe=[None, 3, pr.fit_probe(x, np.arange(20) % 4)],
    )
    add(
        "find_direction",
        pr.find_direction,
        {"x": x, "y": y},
        **probes,
        y=labels,
        method=["best", None],
    )
    v = x[0]
    add(
        "project_out",
        pr.project_out,
        {"x": x, "direction": v},
        x=[x * NAN, x[:, :3]],
        direction=[v * 0, v * NAN, v[:3], v[None]],
        centre=[v[:3], v * NAN],
    )
    four = np.arange(20) % 4
    add(
        "class_means",
        pr.class_means,
        {"x": x, "y": four, "n": 4},
        **probes,
        y=[None, four[:5], four + 9, four * 0],
        n=[*BAD_COUNTS, 9],
    )
    add(
        "held_out_weights",
        pr.held_out_weights,
        {"means": means},
        means=[None, "text", means[:0], means[:1], means * NAN, means[0]],
        alpha=[0, -1, NAN, "x"],
    )
    add(
        "on_circle",
        pr.on_circle,
        {"index": [0, 1], "n": 4},
        n=BAD_COUNTS,
        index=[None, "text", [NAN]],
    )
    add(
        "angle_between",
        pr.angle_between,
        {"a": v[:2], "b": v[2:4]},
        a=[v[:3], v[:2] * NAN, None, "text"],
        b=[v[:3], v[:2] * NAN],
    )
    weights = np.eye(4)
    add(
        "circle_error",
        pr.circle_error,
        {"weights": weights, "order": [0, 1, 2, 3]},
        weights=[weights[:3], weights * NAN, weights[0]],
        order=[[0, 1], [0, 1, 2, 9], [0, 0, 1, 2]],
    )
    add("all_orders", pr.all_orders, {"n": 4}, n=[*BAD_COUNTS, 2], most=BAD_COUNTS)
    # layouts and loading
    add(
        "layout_of",
        lib["layouts"].layout_of,
        {"family": "llama", "name": "x"},
        family=["bert", None, 3],
    )
    add(
        "load_model",
        loading.load_model,
        {},
        name_or_path=["./nowhere"],
        dtype=["bf16", 3, "int8"],
        device=["gpu", "cuda:99", 3, "tpu"],
    )
    return found


EXEMPT = {
    "architecture": "takes a model alone",
    "chance_of_composition": "takes a model alone",
    "all_heads": "takes a model alone",
    "depth_names": "takes a model alone",
    "depth_keys": "takes a model alone",
    "in_out": "takes a module",
    "norm_gain": "takes a module",
    "normalize": "runs inside the model",
    "nearest": "any two things are compared",
    "hook_name": "None for whatever has no name",
    "post_norm": "runs inside the model",
    "run_mlp": "runs inside the model",
    "site_reader": "what `checked_site` has checked",
    "metric_of_streams": "what `run_edits` has made",
    "head_names": "any number of heads, by head_name",
    "check_metric": "a check itself",
    "check_stream": "a check itself",
    "check_lens": "a check itself",
    "checked_head": "a check itself",
    "last_logits": "by prompt_rows, as activation_patch",
    "places": "a check itself",
    "token_text": "a token that `ids` has checked",
}


def test_every_public_function_is_in_the_table(model):
    missing = set()
    for name in MODULES:
        module = importlib.import_module(f"mi_helpers.{name}")
        for key, value in vars(module).items():
            if inspect.isfunction(value) and value.__module__ == module.__name__ and key[0] != "_":
                missing.add(key)
    assert missing - set(rows(model)) - set(EXEMPT) == set()


def test_what_is_right_is_served(model):
    for name, (fn, given, _) in rows(model).items():
        if name != "load_model":
            fn(**given)


def fault(fn, given, argument):
    """What is wrong with how a call was answered, or ""."""
    try:
        fn(**given)
    except (ValueError, TypeError) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        said = str(error)
        if ROOT not in Path(frame.filename).parents:
            return f"{type(error).__name__} of {Path(frame.filename).name}: {said[:80]}"
        if not said.endswith((".", "?")) or "\n" in said or len(said) < 20:
            return f"no sentence: {said[:80]}"
        return "" if names(argument, said) else f"does not name it: {said[:80]}"
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {str(error)[:80]}"
    return "an answer"


WORDS = {  # how an argument is called in a sentence, beside its own name
    "tokens": "token text resid padding",
    "ids": "token text row",
    "text": "text token vocabulary",
    "rows": "row token",
    "texts": "text token",
    "text_or_ids": "text token",
    "clean": "clean token text prompt",
    "corrupted": "corrupted token text prompt",
    "reference": "reference token text",
    "prompts": "prompt token clean answer",
    "sites": "site layer embed",
    "site": "site heads layer token",
    "layer": "layer",
    "stop_at_layer": "layer",
    "depth": "depth layer",
    "pos": "pos",
    "subject": "position",
    "at": "`at`",
    "name": "part weight site pos_embed",
    "name_or_path": "nowhere",
    "fns": "site hook layer",
    "steering": "steering direction dose value centre",
    "steer": "steer",
    "positions": "position",
    "doses": "doses",
    "concept": "concept",
    "seed": "seed",
    "like": "like",
    "parts": "part layer head",
    "part": "part",
    "given": "part layer head",
    "ablation": "ablation reference token",
    "patches": "site layer position head",
    "answer": "answer token text word",
    "wrong": "wrong token answer text word",
    "senders": "sender layer head mlp",
    "receivers": "receiver layer head",
    "readers": "head layer",
    "reader": "reader head layer",
    "writer": "writer head layer L",
    "head": "head layer",
    "heads": "head layer",
    "through": "through head layer L",
    "kind": "kind",
    "x": "features examples",
    "y": "label examples y",
    "groups": "groups",
    "share": "share",
    "p": "p label examples",
    "values": "values",
    "words": "words",
    "h": "lens stream tensor",
    "family": "family",
    "lens": "lens",
    "target": "target",
    "n": "n label tokens",
    "method": "method",
    "size": "set size",
    "probe": "probe",
    "metric": "metric",
    "direction": "direction",
    "dtype": "dtype",
    "device": "device",
    "layers": "layer",
    "score_as": "score_as token text",
    "logits": "logits",
    "over": "over heads",
    "full": "full",
    "order": "order",
}


def names(argument, said):
    known = [argument, *WORDS.get(argument, "").split()]
    return any(re.search(rf"(?<!\w){re.escape(word)}", said, re.IGNORECASE) for word in known)


def faults(model):
    """How many calls there are, and {function(argument=change): what is wrong with the answer}."""
    count, found = 0, {}
    for name, (fn, given, changes) in rows(model).items():
        for argument, values in changes.items():
            for i, value in enumerate(values):
                count += 1
                if wrong := fault(fn, given | {argument: value}, argument):
                    found[f"{name}({argument}: {i} {shown(value)})"] = wrong
    return count, found


def shown(value):
    if isinstance(value, torch.Tensor | np.ndarray):
        return f"{value.dtype} {tuple(value.shape)}"
    return repr(value)[:50]


def test_what_cannot_be_served_is_refused_in_a_sentence(model):
    count, found = faults(model)
    lines = [f"{call}: {wrong}" for call, wrong in found.items()]
    assert not found, f"{len(found)} of {count} are not refused:\n" + "\n".join(lines)
    assert count > 1500
