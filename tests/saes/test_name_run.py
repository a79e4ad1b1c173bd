"""`name RUN` and `browse RUN` on a run made by hand: names, kills, and what is refused."""

import json
import multiprocessing
import os
import re
import signal
import sys
from pathlib import Path

import naming_server as serve
import numpy as np
import pytest
import torch
from made_harvest import made_harvest
from pipeline_worker import PRELOAD
from tiny_models import WORDS, word_tokenizer

from mi_helpers.__main__ import main
from mi_helpers.files import RunError, read_json, read_sealed, write_sealed
from mi_helpers.saes.activations import MANIFEST, Activations
from mi_helpers.saes.browse import browse
from mi_helpers.saes.coder import SparseCoder
from mi_helpers.saes.explainers import Offline
from mi_helpers.saes.files import save_coder
from mi_helpers.saes.name_run import SCORES, Naming, read_names, run_texts
from mi_helpers.saes.run_files import CODER, LOG, RECIPE, identity, write_sums

ROOT = Path(__file__).resolve().parents[2]
N = len(WORDS)
KEY = "the-key-that-nobody-may-see-42"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of which latent i fires at word i; latents N and N + 1 never."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    word = rng.integers(0, N, 3_000)
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(" " + WORDS[w]) for w in word])
    x = torch.zeros(len(word), N + 2)
    x[torch.arange(len(word)), torch.from_numpy(word)] = torch.from_numpy(
        rng.uniform(2, 4, len(word))
    ).float()
    held = made_harvest(folder / "harvest", x, piece=15, ids=ids)
    manifest = read_json(folder / "harvest" / MANIFEST)
    manifest["model"]["name"] = str(folder / "model")
    del manifest["sha256"]
    write_sealed(folder / "harvest" / MANIFEST, manifest)
    coder = SparseCoder(N + 2, N + 2, activation="relu")
    with torch.no_grad():
        coder.W_enc.copy_(torch.eye(N + 2)), coder.W_dec.copy_(torch.eye(N + 2))
        coder.b_enc.fill_(-1)
    save_coder(coder, folder / CODER)
    write_sealed(folder / RECIPE, {"harvest": identity(held)})
    (folder / LOG).write_text("step\n1\n")
    write_sums(folder / CODER, folder)
    lines = [
        {
            "latent": i,
            "fires": 5,
            "frequency": 0.1,
            "mean": 1.0,
            "top": [[3.0, f"[[{w}]] </script>"]],
        }
        for i, w in enumerate([*WORDS, "?", "?"])
    ]
    (folder / "latents.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def server(monkeypatch):
    made = serve.Server()
    for name, value in environment(made).items():
        monkeypatch.setenv(name, value)
    yield made
    made.close()


def environment(server):
    names = {"OPENAI_BASE_URL": server.url, "OPENAI_MODEL": "m", "OPENAI_API_KEY": KEY}
    return names | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


def lines(folder):
    return [json.loads(line) for line in (folder / "names.jsonl").read_text().splitlines()]


# -- what is named ------------------------------------------------------------------------------


def test_a_runs_latents_are_named_and_put_on_a_map(run, capsys):
    assert main(["name", str(run)]) == 0
    found = lines(run / "names")
    assert [each["latent"] for each in found] == list(range(N + 2))
    for each, word in zip(found, WORDS, strict=False):
        assert each["name"] == f"at: {word}" and each["reliable"] and each["detection"][0] > 0.9
        assert 1 < each["table"][word] < 3 and len(each["xy"]) == 2 and each["cluster"]
    assert all("fires strongly in 0 texts" in each["why"] for each in found[N:])
    said = capsys.readouterr().out
    assert (
        f"{N} latents have a name, {N} of them a reliable one" in said and "2 fire in too" in said
    )
    page = (run / "names" / "map.html").read_text()
    assert page.count("<circle") == N and "at: cat" in page and "src=" not in page
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    read = read_names(run / "names")
    assert read[2].line() == {k: v for k, v in found[2].items() if k not in ("cluster", "xy")}


def test_it_goes_on_with_what_has_no_name_and_does_not_name_again(run, monkeypatch, capsys):
    asked = []
    explain = Offline.explain
    monkeypatch.setattr(
        Offline, "explain", lambda self, e: (asked.append(e.unit), explain(self, e))[1]
    )
    to = ["--to", "some"]
    assert main(["name", str(run), "--only", "5", "-1", "2", *to]) == 0
    assert main(["name", str(run), "--latents", "3", *to]) == 0  # 0, 11 or so, the last
    assert main(["name", str(run), *to]) == 0
    assert sorted(asked) == list(range(N)) and asked[:2] == [2, 5]
    assert main(["name", str(run), *to]) == 0 and len(asked) == N
    assert main(["name", str(run), "--to", "every"]) == 0
    every, some = ((run / folder / "names.jsonl").read_bytes() for folder in ("every", "some"))
    assert every == some  # whatever the order in which they were named


def test_names_by_another_plan_are_refused(run, capsys):
    main(["name", str(run), "--only", "2", "--to", "plan"])
    for more, what in (
        (["--contexts", "9"], "contexts is 10, not 9"),
        (["--seed", "1"], "seed is"),
    ):
        assert main(["name", str(run), "--to", "plan", *more]) == 2
        assert what in capsys.readouterr().err


def test_the_texts_of_a_run_keep_a_document_in_one_half(run):
    held = Activations.open(run / "harvest")
    texts, place = run_texts(held, str)
    assert texts.n == 3_000 and place.tolist() == list(range(3_000))
    assert [texts.vocabulary[i] for i in texts.ids] == [str(i) for i in held.tokens.tolist()]
    assert len(texts.held) == len(texts.start) - 1 == 200 and texts.held.sum() == 100


def test_pieces_of_one_document_and_equal_documents_are_in_one_half(tmp_path):
    ids = torch.arange(4_000) % 50
    held = made_harvest(tmp_path / "h", torch.ones(4_000, 4), ids=ids, piece=10, shard_rows=400)
    texts, _ = run_texts(held, str)  # 400 pieces, of which only 5 are different
    kinds = {}
    for low, high, out in zip(texts.start, texts.start[1:], texts.held, strict=False):
        kinds.setdefault(tuple(texts.ids[low:high]), set()).add(bool(out))
    assert len(kinds) == 5 and all(len(each) == 1 for each in kinds.values())


# -- an endpoint, and kills ---------------------------------------------------------------------


def test_an_endpoint_names_a_run_and_says_before_what_it_costs(run, server, capsys):
    more = ["--explainer", "endpoint", "--to", "asked", "--per-minute", "60000"]
    assert main(["name", str(run), *more, "--dry-run", "--price-in", "2", "--price-out", "8"]) == 0
    said = capsys.readouterr().out
    assert (
        server.asked == [] and f"about {4 * N} requests" in said and "at the prices given" in said
    )
    assert main(["name", str(run), *more, "--budget", "1000"]) == 1
    assert "more than the budget of 1,000 tokens" in capsys.readouterr().err and not server.asked
    assert main(["name", str(run), *more]) == 0
    assert len(server.paid) == len(set(server.paid)) == 4 * N
    assert [each.get("name") for each in lines(run / "asked")][:2] == ["the word the", "the word a"]
    assert main(["name", str(run), *more]) == 0
    assert "nothing is asked" in capsys.readouterr().out and len(server.paid) == 4 * N


def test_who_gets_no_answer_is_told_and_asked_again_the_next_time(run, server, capsys):
    more = ["--explainer", "endpoint", "--to", "twice", "--per-minute", "60000", "--only", "2", "3"]
    server.always = refuse_cats
    assert main(["name", str(run), *more]) == 1
    said = capsys.readouterr().out
    assert "to be asked again: latent 2: m answered 3 times in another form" in said
    assert [each["latent"] for each in lines(run / "twice")] == [3]
    server.always, paid = None, len(server.paid)
    assert main(["name", str(run), *more]) == 0 and len(server.paid) == paid + 4
    assert [each["latent"] for each in lines(run / "twice")] == [2, 3]


def test_where_nobody_gets_an_answer_it_stops_soon(run, server, capsys):
    server.always = serve.thinks(10**6)
    more = ["--explainer", "endpoint", "--to", "stops", "--per-minute", "60000", "--threads", "1"]
    assert main(["name", str(run), *more]) == 1
    assert "None of 5 latents got a name: latent 0: m was cut off" in capsys.readouterr().err
    assert len(server.asked) == 5


def refuse_cats(handler, prompt):
    naming_cat = "described" not in prompt and "[[cat]]" in prompt.split("look alike")[0]
    handler.reply(prompt, "{}" if naming_cat else serve.answer(prompt))


def start(run, to, server, *more):
    """The command in a process of its own, what it says in a file."""
    argv = ["name", str(run), "--to", to, "--explainer", "endpoint", "--per-minute", "60000", *more]
    said = run / f"{to}.txt"
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload([*PRELOAD, "naming_server", "mi_helpers.saes.name_run", "openai"])
    process = made.Process(target=serve.command, args=(argv, environment(server), said))
    process.start()
    return process, said


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize("threads", [1, 3])
def test_a_killed_process_loses_no_name_and_pays_for_nothing_again(run, server, threads):
    """The server kills it when a question comes, and does not answer that one; other threads'
    questions may be on their way then: what was sent to one that is dead is paid for again."""
    to, more = f"killed-{threads}", ["--threads", str(threads)]

    def kill(handler, prompt):
        os.kill(process.pid, signal.SIGKILL)
        handler.close_connection = True

    server.faults = {18: kill}
    process, said = start(run, to, server, *more)
    process.join(100)
    assert process.exitcode == -signal.SIGKILL, said.read_text()
    before, paid = lines(run / to), len(server.paid)
    assert len(before) >= 2 and paid >= 17 - threads
    process, said = start(run, to, server, *more)
    process.join(100)
    assert process.exitcode == 0, said.read_text()
    after = {each["latent"]: each for each in lines(run / to)}
    for each in before:
        assert after[each["latent"]].items() >= each.items()
    assert len(after) == N + 2
    again = len(server.paid) - len(set(server.paid))
    assert again <= threads - 1 and len(set(server.paid)) == 4 * N
    files = [path.read_bytes() for path in (run / to).rglob("*") if path.is_file()]
    assert len(files) == 4 and "latents have a name" in said.read_text()
    assert not any(KEY.encode() in data for data in (*files, said.read_bytes()))


def test_a_torn_line_of_names_is_named_again(run):
    naming = Naming(run, "torn")
    naming.folder.mkdir()
    naming.name(Offline(), [0, 1, 2])
    path = naming.folder / "names.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    assert sorted(read_names(naming.folder)) == [0, 1]
    naming.name(Offline(), [0, 1, 2])
    assert path.read_bytes() == whole
    for bad in (b"{\n", b"[]\n", b'{"latent": "x"}\n', b'{"latent": 1}\n', b"\xff\n"):
        path.write_bytes(bad)
        with pytest.raises(RunError, match="names.jsonl"):
            read_names(naming.folder)


def test_every_command_of_the_page_runs(run, server, capsys):
    text = (ROOT / "docs" / "pipeline.md").read_text("utf-8")
    lines = re.findall(r"python -m mi_helpers ((?:name|browse) [^`#\n]+)", text)
    assert len(lines) == 4
    for line in lines:
        name, place, *rest = line.split()
        assert place == "runs/demo"
        more = ["--to", f"page-{'endpoint' in rest}", "--per-minute", "60000"]
        assert main([name, str(run), *rest, *(more if name == "name" else [])]) == 0, line
        if "--dry-run" in rest:
            assert not server.asked and not (run / "page-True").exists()
    assert len(server.paid) == 4 * N


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--only", "99"], "from 0 to"),
        (["--latents", "0"], "latents is 0"),
        (["--contexts", "1"], "contexts is 1"),
        (["--explainer", "oracle"], "oracle"),
        (["--explainer", "endpoint", "--threads", "0"], "threads is 0"),
        (["--explainer", "local", "--by", "no-such-folder/x"], "no-such-folder"),
        (["--explainer", "local"], "Give --by a chat model's name"),
        (["--model", "no-such-folder/y"], "no-such-folder/y"),
        (["--to", "../away"], "a plain name"),
        (["--to", " "], "a plain name"),
        (["--to", "a\nb"], "a plain name"),
        (["--to", "coder"], "a part of the run itself"),
        (["--to", "latents.jsonl"], "a part of the run itself"),
        (["--seed", "-1"], "seed is -1"),
        (["--seed", str(2**70)], "seed is"),
        (["--only"], "at least one"),
        (["--only", "1", "--latents", "2"], "give one of them"),
        (["--by", "m"], "choose it by --explainer"),
        (["--price-in", "nan"], "price_in is nan"),
    ],
)
def test_what_cannot_be_done_is_said(run, server, more, said, capsys):
    try:
        code = main(["name", str(run), *more])
    except SystemExit as stop:
        code = stop.code
    out = capsys.readouterr()
    assert code == 2 and said in out.err and "Traceback" not in out.err and server.asked == []
    assert not (run / CODER / "plan.json").exists() and not (run / "names" / "names.jsonl").is_dir()


def test_a_refusal_leaves_no_plan_that_bars_the_next_try(run, server, capsys):
    server.always = serve.tells(401)
    more = ["name", str(run), "--only", "1", "--to", "again"]
    assert main([*more, "--explainer", "endpoint"]) == 1
    assert main(more) == 0  # nothing was named: another explainer may
    assert main([*more, "--seed", "3"]) == 2  # now there are names
    assert "its seed is 0, not 3" in capsys.readouterr().err


def test_names_without_their_plan_are_nobodys(run, capsys):
    assert main(["name", str(run), "--only", "1", "--to", "lone"]) == 0
    (run / "lone" / "plan.json").unlink()
    for command in (["name", "--only", "2", "--to"], ["browse", "--names"]):
        assert main([command[0], str(run), *command[1:], "lone"]) == 2
        assert "without plan.json" in capsys.readouterr().err


def test_a_name_may_hold_any_character(tmp_path):
    text = "at: \u2028 or \x85 or \u2029"
    line = {"latent": 1, "name": text, "table": {}} | dict.fromkeys(SCORES, [0, 0, 0, 1])
    (tmp_path / "names.jsonl").write_text(json.dumps(line, ensure_ascii=False) + "\n", "utf-8")
    assert read_names(tmp_path)[1].explanation.text == text


def test_a_run_that_is_not_finished_is_said(tmp_path, capsys):
    assert main(["name", str(tmp_path)]) == 2
    assert "run the harvest first" in capsys.readouterr().err


# -- the dictionary as a page -------------------------------------------------------------------


def test_a_run_is_browsed_as_one_page_with_its_names(run, capsys):
    main(["name", str(run), "--only", "2", "--to", "one"])
    assert main(["browse", str(run), "--names", "one"]) == 0
    assert "latents.html: open it" in capsys.readouterr().out
    page = (run / "latents.html").read_text()
    assert "at: cat" in page and "at: dog" not in page
    assert page.count("</script>") == 2  # those of the page: none out of a context
    with pytest.raises(RunError, match="no names in .*nowhere"):
        browse(run, "nowhere")
    with pytest.raises(RunError, match="--link is 'x': put {latent}"):
        browse(run, "one", link="x")


def test_a_page_is_called_by_its_folder_wherever_one_stands(run, monkeypatch):
    monkeypatch.chdir(run)
    assert f"<title>{run.name}: latents" in browse(Path()).read_text("utf-8")


def test_names_of_another_coder_are_not_shown(run):
    main(["name", str(run), "--only", "2", "--to", "other"])
    plan = read_sealed(run / "other" / "plan.json")
    write_sealed(run / "other" / "plan.json", plan | {"coder": "0" * 64})
    with pytest.raises(RunError, match="names the latents of another coder"):
        browse(run, "other")


def test_a_run_that_cannot_be_browsed_is_said(tmp_path, capsys):
    assert main(["browse", str(tmp_path)]) == 2
    assert "There is no latents.jsonl" in capsys.readouterr().err
    for bad in ("{\n", '{"latent": 1}\n', "[]\n", "", "[" * 100_000):
        (tmp_path / "latents.jsonl").write_text(bad)
        assert main(["browse", str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert "latents.jsonl is damaged" in said and "features" in said, bad
