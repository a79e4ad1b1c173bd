"""Finding a text among a run's latents: by hand, by the command on a whole run, and damaged."""

import json

import pytest
from test_pipeline import options, place, run  # noqa: F401

from mi_helpers.__main__ import main
from mi_helpers.files import RunError
from mi_helpers.saes.find import find
from mi_helpers.saes.pipeline import HARVEST


def write(folder, *latents):
    """latents.jsonl of latents, each (frequency, contexts)."""
    lines = [
        {"latent": i, "frequency": f, "top": [[1.0, c] for c in contexts], "raises": [[" of", 2.0]]}
        for i, (f, contexts) in enumerate(latents)
    ]
    (folder / "latents.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_best_fire_at_the_text_most_often(tmp_path):
    write(
        tmp_path,
        (0.1, ["the [[virus]] capsid", "no such word"]),  # has it, fires elsewhere
        (0.2, ["the [[Capsid]] of", "a [[capsid]] is", "its caps[[id]] and"]),
        (0.1, ["one [[capsid]]", "the capsid [[was]]", "a [[dog]]"]),
        (0.5, ["nothing [[here]]"]),
        (0.3, ["the [[capsid]]", "cat [[capsid]]", "a [[capsid]] x"]),
        (0.1, []),
    )
    found = find(tmp_path, "capsid")
    assert [(f.latent, f.at, f.among, f.of) for f in found] == [
        (1, 3, 3, 3),
        (4, 3, 3, 3),
        (2, 1, 2, 3),
        (0, 0, 1, 2),
    ]
    assert found[2].contexts == ["one [[capsid]]", "the capsid [[was]]"]
    assert find(tmp_path, "CAPSID", 1) == found[:1] and found[0].raises == (" of",)
    assert str(found[2]) == (
        "latent 2: fires at it in 1 of its 3 contexts, has it in 2; fires at 10.000% of all "
        "tokens; raises ' of'"
    )


@pytest.mark.parametrize(
    ("text", "context", "at"),
    [
        (" cat", "the [[cat]] sat", 1),  # the space stands outside the brackets
        (" cat", "con[[cat]]enate", None),
        ("cat", "con[[cat]]enate", 1),
        ("the cat", "the [[cat]] sat", 1),
        ("the cat", "[[the]] cat sat", 1),
        ("the cat", "the cat [[sat]]", 0),
        ("aa", "a[[aa]]", 1),
        ("a.t", "the [[cat]] sat", None),  # text, and no pattern
        ("straße", "die [[STRASSE]] da", 1),
        ("x\ny", "x[[\n]]y", 1),
    ],
)
def test_what_counts_as_firing_at_it(tmp_path, text, context, at):
    found = find(write(tmp_path, (0.1, [context])), text)
    assert [f.at for f in found] == ([] if at is None else [at])


def test_the_command_finds_a_word_of_a_finished_run(run, capsys):  # noqa: F811
    """It needs neither the model nor the harvest, and says what latents.jsonl says."""
    away = run / HARVEST
    away.rename(run / "elsewhere")
    try:
        assert main(["find", str(run), " cat", "--n", "3", "--contexts", "2"]) == 0
    finally:
        (run / "elsewhere").rename(away)
    said = capsys.readouterr().out.splitlines()
    found = find(run, " cat")
    assert len(found) > 3 and found[0].at > 0
    assert said[0] == str(found[0]) and " [[cat]]" in said[1]
    assert said[-1].startswith(f"{len(found)} latents of {run} have ' cat' in their highest")
    assert len([line for line in said if line.startswith("latent")]) == 3
    lines = [json.loads(line) for line in (run / "latents.jsonl").read_text().splitlines()]
    best = lines[found[0].latent]
    assert found[0].of == len(best["top"]) and found[0].frequency == best["frequency"]
    assert main(["find", str(run), "zebra"]) == 0
    assert capsys.readouterr().out.startswith("0 latents of")


def test_what_cannot_be_found_is_said(tmp_path, capsys):
    with pytest.raises(
        RunError, match="There is no latents.jsonl in .*features` finish there first"
    ):
        find(tmp_path, "cat")
    write(tmp_path, (0.1, ["a [[cat]]"]))
    for empty in ("", "  ", None):
        with pytest.raises(RunError, match="give a token or a text to look for"):
            find(tmp_path, empty)
    path = tmp_path / "latents.jsonl"
    for damaged in ("", '{"latent": 1', "[1]\n", '{"latent": "a"}\n', '{"latent": 1}\n', "\xff\n"):
        path.write_bytes(damaged.encode("latin-1"))
        assert main(["find", str(tmp_path), "cat"]) != 0
        said = capsys.readouterr()
        assert "latents.jsonl" in said.err and "Traceback" not in said.err, damaged
