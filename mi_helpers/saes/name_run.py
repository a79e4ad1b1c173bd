"""`python -m mi_helpers name RUN`: every latent of a finished run named, scored and put on a map.

    python -m mi_helpers name runs/demo                           # by counting, on this machine
    python -m mi_helpers name runs/demo --explainer endpoint --dry-run          # what it would cost
    python -m mi_helpers name runs/demo --explainer local --by Qwen/Qwen2.5-1.5B-Instruct

RUN/names gets a line for each latent as soon as it is done (names.jsonl), and in the end map.html.
Killed at any moment, the same command goes on with what is not done; answers that were paid for are
kept, and not asked for again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from mi_helpers.arguments import indices, number, whole
from mi_helpers.errors import checked, reading
from mi_helpers.files import RunError, alone_in, read_sealed, sweep, write_sealed, write_text
from mi_helpers.loading import load_model, load_tokenizer
from mi_helpers.models import token_text
from mi_helpers.saes.activations import Activations
from mi_helpers.saes.endpoint import Endpoint, EndpointError
from mi_helpers.saes.examples import Examples, Texts, examples_of
from mi_helpers.saes.explainers import Explainer, Explanation, Offline
from mi_helpers.saes.features import check_coder, chunks, fires, words
from mi_helpers.saes.local import Local
from mi_helpers.saes.name_map import name_map
from mi_helpers.saes.naming import RELIABLE, NameScores, Score, score
from mi_helpers.saes.pipeline import HARVEST
from mi_helpers.saes.progress import progress_bar
from mi_helpers.saes.prompts import NoAnswer
from mi_helpers.saes.run_files import CODER, RECIPE, SUMS, check_recipe, identity, trained_coder
from mi_helpers.saes.scores import Fired, Firings
from mi_helpers.views.name_map import name_map_page

PLAN, NAMES, ANSWERS, MAP = "plan.json", "names.jsonl", "answers.jsonl", "map.html"
SAMPLE = 50  # units whose prompts an estimate is made from
SCORES = ("detection", "fuzzing", "simulation")
HOPELESS = 5  # latents without an answer, if they are the first: then nothing more is asked
AGAIN = "Move the folder away to name them anew."

# ------------------------------------------------------------------------------ what a run holds


def run_texts(held: Activations, spell: Callable[[int], str], seed: int = 0):
    """(the texts of a harvest, the number of each row's token in them (rows,)).

    All pieces of a document are in one half, and so are documents that are equal word for word.
    Tokens that the harvest left out are in the texts, and no latent fires there.

    Args:
        spell: a token id as text.
        seed: of the draw of the half that is held out.
    """
    ids, starts, places, documents, begins, n = [], [np.zeros(1, np.int64)], [], [], [], 0
    for index in range(len(held.sizes)):
        shard = words(held, index)
        start = shard.start.numpy().astype(np.int64)
        places.append(n + start[shard.piece.numpy()] + shard.at.numpy())
        ids.append(shard.ids.numpy())
        starts.append(n + start[1:])
        documents.append(shard.document.numpy())
        begins.append(shard.offset.numpy())
        n += len(ids[-1])
    every, start, document = map(np.concatenate, (ids, starts, documents))
    used, number = np.unique(every, return_inverse=True)
    spelt = [spell(int(i)) for i in used]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(spelt))}
    flat = np.array([vocabulary[word] for word in spelt], dtype=np.int32)[number]
    content: dict[int, bytes] = {}
    for piece, (low, high) in enumerate(zip(start, start[1:], strict=False)):
        whose = int(document[piece])
        content[whose] = content.get(whose, b"") + flat[low:high].tobytes()
    same = [content[int(whose)] for whose in document]
    texts = Texts(tuple(vocabulary), flat, start, Texts.draw(same, seed), np.concatenate(begins))
    return texts, np.concatenate(places)


def run_firings(
    held: Activations, coder, place: np.ndarray, n: int, units: Sequence[int], progress: bool
) -> Fired:
    """Where these latents of a coder fire, at the tokens of `run_texts`.

    Args:
        place: the token of each row; n: how many tokens there are.
    """
    check_coder(held, coder)
    wanted = np.zeros(coder.d_latent, dtype=bool)
    wanted[list(units)] = True
    parts = []
    with progress_bar("firings", held.rows, "rows", shown=progress) as bar:
        for first, x, _ in chunks(held):
            row, latent, value = fires(coder, x)
            mine = wanted[latent]
            parts.append((place[row[mine] + first], latent[mine].astype(np.int32), value[mine]))
            bar.update(len(x))
    token, latent, value = (np.concatenate(each) for each in zip(*parts, strict=True))
    return Fired.of(Firings(token, latent, value, n, coder.d_latent))


# ------------------------------------------------------------------------------ names in a file


@dataclass(frozen=True)
class Named:
    """A latent with its name and the name's scores, or with the reason why it has none."""

    latent: int
    explanation: Explanation | None = None
    scores: NameScores | None = None
    why: str = ""

    def line(self) -> dict:
        """As JSON: a score is [value, low, high, contexts], null for what cannot be said."""
        if self.explanation is None or self.scores is None:
            return {"latent": self.latent, "why": self.why}
        said = {"latent": self.latent, "name": self.explanation.text}
        said["table"] = dict(self.explanation.table)
        for kind in SCORES:
            found = getattr(self.scores, kind)
            values = [found.value, found.low, found.high]
            said[kind] = [*(None if math.isnan(v) else round(v, 4) for v in values), found.n]
        return said | {"reliable": self.scores.reliable}

    @classmethod
    def of(cls, said: dict) -> Named:
        """From what `line` gave."""
        if "why" in said:
            return cls(said["latent"], why=said["why"])
        scores = {}
        for kind in SCORES:
            *values, n = said[kind]
            value, low, high = (float("nan") if v is None else float(v) for v in values)
            scores[kind] = Score(value, low, high, n)
        explanation = Explanation(said["latent"], said["name"], said["table"])
        return cls(said["latent"], explanation, NameScores(**scores))


def read_names(folder: Path | str) -> dict[int, Named]:
    """{latent: its name} of RUN/names, or as many as are done; {} where there are none.

    Raises:
        RunError: the file is damaged.
    """
    path = Path(folder) / NAMES
    if not path.exists():
        return {}
    found = {}
    with reading(path, RunError, AGAIN):
        data = path.read_bytes()
        for line in data[: data.rfind(b"\n") + 1].splitlines():  # in bytes: at ASCII ends alone
            kinds = {"latent": int, "name": str, "why": str, "table": dict}
            said = checked(json.loads(line.decode()), path, RunError, **kinds)
            found[said["latent"]] = Named.of(said)
    return found


def coder_of(run: Path) -> str | None:
    """What tells a run's coder from others; None where it is not there."""
    path = run / CODER / SUMS
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def names_of(run: Path, to: str = "names") -> dict[int, Named]:
    """{latent: its name} of a run, as `read_names`, once they are found to be of its coder.

    Raises:
        RunError: they are of another coder, or damaged.
    """
    folder, coder = run / to, coder_of(run)
    found = read_names(folder)
    if found and coder and plan_of(folder).get("coder") != coder:
        raise RunError(f"{folder} names the latents of another coder: name those of {run} anew.")
    return found


def plan_of(folder: Path) -> dict:
    """What the names in a folder are of."""
    if not (folder / PLAN).exists():
        raise RunError(f"{folder} has names without {PLAN}, which says whose they are. {AGAIN}")
    return read_sealed(folder / PLAN, AGAIN)


def cut_torn(path: Path) -> None:
    """Cut off the line that a kill has torn."""
    if path.exists():
        data = path.read_bytes()
        if not data.endswith(b"\n"):
            os.truncate(path, data.rfind(b"\n") + 1)


def check_plan(folder: Path, plan: dict) -> None:
    """Write what the names in a folder are of; refuse those of anything else.

    Raises:
        RunError: the folder has other names; what differs is said.
    """
    if read_names(folder):
        before = plan_of(folder)
        for key, value in plan.items():
            if before.get(key) != value:
                was = "another one" if key in ("harvest", "coder") else repr(before.get(key))
                raise RunError(
                    f"{folder} has names by another plan: its {key} is {was}, not {value!r}. "
                    "Choose another folder with --to, or the same settings to go on."
                )
        return
    write_sealed(folder / PLAN, plan)


# --------------------------------------------------------------------------------------- naming


def named(explainer, examples: Examples, seed: int = 0) -> Named:
    """One latent's name with its scores, or why it has none."""
    if not examples.enough:
        seen, held = examples.strong
        why = f"it fires strongly in {seen} texts that are seen and {held} that are held out"
        return Named(examples.unit, why=why)
    explanation = explainer.explain(examples)
    return Named(examples.unit, explanation, score(explainer, explanation, examples, seed))


def each_named(
    explainer, every: Iterable[Examples], seed: int = 0, threads: int = 1
) -> Iterator[Named | NoAnswer]:
    """Latents one after another as they are done; NoAnswer in the place of one without an answer.

    Args:
        threads: how many are named at once; what is named does not depend on it.
    """
    work = partial(_or_no_answer, explainer, seed)
    if threads == 1:
        yield from map(work, every)
        return
    source = iter(every)
    with ThreadPoolExecutor(threads) as pool:
        waiting = {pool.submit(work, examples) for examples in islice(source, 2 * threads)}
        try:
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                waiting |= {pool.submit(work, examples) for examples in islice(source, len(done))}
                for each in done:
                    yield each.result()
        except BaseException:  # a refusal, Ctrl-C, or nobody asks for more
            if hasattr(explainer, "stop"):
                explainer.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _or_no_answer(explainer, seed: int, examples: Examples) -> Named | NoAnswer:
    try:
        return named(explainer, examples, seed)
    except NoAnswer as error:
        return NoAnswer(f"latent {examples.unit}: {error}")


class Naming:
    """The naming of a run's latents.

    Args:
        run: its folder; to: the folder in it that the names are put into.
        model: whose tokenizer is read; "" means the one that was harvested.
        n: contexts of each kind; seed: of all draws.
    """

    def __init__(self, run: Path, to: str, model: str = "", n: int = 10, seed: int = 0):
        self.run, self.folder, self.n, self.seed = run, run / to, n, seed
        self.held = Activations.open(run / HARVEST)
        self.coder = trained_coder(run)
        check_recipe(run, {"harvest": identity(self.held)})
        tokenizer = load_tokenizer(model or self.held.manifest["model"]["name"])
        self.spell = cache(partial(token_text, tokenizer))

    def plan(self, explainer: str) -> dict:
        """What the names depend on."""
        harvest = hashlib.sha256(json.dumps(identity(self.held)).encode()).hexdigest()
        made = {"explainer": explainer, "contexts": self.n, "seed": self.seed}
        return {"harvest": harvest, "coder": coder_of(self.run)} | made

    def examples(self, units: Sequence[int], progress: bool = True) -> Iterator[Examples]:
        """The examples of these latents, one after another."""
        texts, place = run_texts(self.held, self.spell, self.seed)
        fired = run_firings(self.held, self.coder, place, texts.n, units, progress)
        return (examples_of(u, texts, *fired.at(u), self.n, self.seed) for u in units)

    def chosen(self, latents: int | None, only: Sequence[int] | None) -> list[int]:
        """Which latents are named: those asked for, or so many, evenly spread over all."""
        count = self.coder.d_latent
        if only is not None:
            return sorted(set(indices(list(only), count, "latent")))
        n = count if latents is None else min(whole("latents", latents, 1), count)
        return np.unique(np.linspace(0, count - 1, n).round().astype(int)).tolist()

    def name(self, explainer, units: Sequence[int], threads: int = 1) -> list[str]:
        """Name these latents, but for those that have a name; who got no answer, in sentences.

        Raises:
            EndpointError: the first few all got none.
        """
        cut_torn(self.folder / NAMES)
        done = read_names(self.folder)
        left = [unit for unit in units if unit not in done]
        failed: list[str] = []
        if not left:
            return failed
        found = each_named(explainer, self.examples(left), self.seed, threads)
        path = self.folder / NAMES
        bar = progress_bar("names", len(units), "latents", len(units) - len(left))
        with bar, open(path, "a", encoding="utf-8", newline="\n") as file:
            for number, each in enumerate(found, start=1):
                if isinstance(each, NoAnswer):
                    failed.append(str(each))
                    if number == len(failed) == HOPELESS:
                        raise EndpointError(f"None of {number} latents got a name: {failed[0]}.")
                else:
                    file.write(json.dumps(each.line(), ensure_ascii=False) + "\n")
                    file.flush()
                bar.update()
        return failed

    def finish(self) -> dict[int, Named]:
        """Put all names in order, each with its place on the map, and write the map."""
        done = dict(sorted(read_names(self.folder).items()))
        with_name = [each for each in done.values() if each.explanation is not None]
        lines = {latent: each.line() for latent, each in done.items()}
        if with_name:
            found = name_map([each.explanation for each in with_name], seed=self.seed)
            rows = []
            for i, each in enumerate(with_name):
                line = lines[each.latent]
                line["cluster"] = found.titles[found.cluster[i]]
                line["xy"] = found.xy[i].round(2).tolist()
                rows.append(line)
            label = f"{self.run.resolve().name}: names of latents"
            write_text(self.folder / MAP, name_map_page(rows, label, RELIABLE))
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines.values())
        write_text(self.folder / NAMES, text)
        return done


# ------------------------------------------------------------------------------------- command


@dataclass(frozen=True)
class Options:
    """What the command may be told.

    Args:
        explainer: offline counts; endpoint and local ask a language model
        by: the model that is asked: the endpoint's, or one to load here
        latents: how many, evenly spread over all; default: all
        only: these latents alone
        model: the one that was harvested, if it has moved: its tokenizer is read
        to: the folder for names within RUN
        contexts: of each kind that a latent is named from, and scored on
        seed: of all draws
        threads: questions that wait for the endpoint's answer at once
        per_minute: requests to the endpoint, at most
        timeout: seconds without a word from the endpoint
        room: tokens more of each answer, for a model that thinks before it answers
        budget: tokens that the endpoint may be asked for, in and out
        price_in: of a million tokens that it reads, for the estimate
        price_out: of a million that it writes
        dry_run: say what it would take, and stop
    """

    explainer: Literal["offline", "endpoint", "local"] = "offline"
    by: str = ""
    latents: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    only: Annotated[tuple[int, ...] | None, tyro.conf.arg(metavar="INT …")] = None
    model: str = ""
    to: str = "names"
    contexts: int = 10
    seed: int = 0
    threads: int = 4
    per_minute: float = 60.0
    timeout: float = 120.0
    room: int = 0
    budget: int = 5_000_000
    price_in: float = 0.0
    price_out: float = 0.0
    dry_run: bool = False


def main(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    options: Options = Options(),  # noqa: B008
) -> int:
    """Name the latents of a finished run, score the names on text held out, put them on a map.

    An endpoint speaks OpenAI's protocol: OPENAI_BASE_URL, OPENAI_MODEL and OPENAI_API_KEY name it.

    Args:
        run: the run's folder
    """
    o = options
    check_options(run, o)
    threads = whole("threads", o.threads, 1) if o.explainer == "endpoint" else 1
    naming = Naming(run, o.to, o.model, o.contexts, o.seed)
    units = naming.chosen(o.latents, o.only)
    with alone_in(run):
        sweep(run, RECIPE)
        label, who = made(naming, o)
        if isinstance(who, Endpoint):
            print(estimated(naming, who, units, o), flush=True)
        if o.dry_run:
            print(f"{len(units):,} latents of {run} would be named by {label}.")
            return 0
        check_plan(naming.folder, naming.plan(label))
        failed = naming.name(who, units, threads)
        done = naming.finish()
    print(summary(naming.folder, [done[unit] for unit in units if unit in done], failed))
    return 1 if failed else 0


def check_options(run: Path, o: Options) -> None:
    """Refuse what would be ignored, or would be written among a run's own files."""
    whole("contexts", o.contexts, 2)
    whole("seed", o.seed, 0, 2**32 - 1)
    number("price_in", o.price_in, least=0)
    number("price_out", o.price_out, least=0)
    plain = o.to.isprintable() and not set(o.to) & set("/\\:")
    if not (plain and o.to and o.to.strip().lstrip(".") == o.to):
        raise RunError(f"--to is {o.to!r}: give a plain name for a folder in {run}.")
    if o.to in (HARVEST, CODER) or o.to.startswith(f"{CODER}-") or (run / o.to).is_file():
        raise RunError(f"{run / o.to} is a part of the run itself: give another name by --to.")
    if o.only is not None and o.latents is not None:
        raise RunError("--only and --latents both say which latents are named: give one of them.")
    if o.by and o.explainer == "offline":
        raise RunError(f"--by is {o.by!r}, and counting asks no model: choose it by --explainer.")


def made(naming: Naming, o: Options) -> tuple[str, Explainer]:
    """(what the explainer is called in a plan, the explainer)."""
    if o.explainer == "endpoint":
        more = {"per_minute": o.per_minute, "timeout": o.timeout, "room": o.room}
        who = Endpoint(naming.folder / ANSWERS, o.by or None, budget=o.budget, **more)
        return f"endpoint {who.model}", who
    if o.explainer == "local":
        if not o.by:
            raise RunError("Which model is to name them? Give --by a chat model's name or folder.")
        who = Local(load_model(o.by))
        return f"local {who.model.name}", who
    return "offline", Offline()


def estimated(naming: Naming, who: Endpoint, units: Sequence[int], o: Options) -> str:
    """What an endpoint will be asked for, before anything is sent.

    Raises:
        EndpointError: it is more than the budget.
    """
    done = read_names(naming.folder)
    left = [unit for unit in units if unit not in done]
    if not left:
        return "All of them have names: nothing is asked."
    some = [left[i] for i in np.unique(np.linspace(0, len(left) - 1, SAMPLE).astype(int))]
    found = who.estimate(list(naming.examples(some)), len(left))
    prices = o.price_in, o.price_out
    cost = f", or {found.cost(*prices):,.2f} at the prices given" if any(prices) else ""
    said = f"{who.model} at {who.url} for {len(left):,} latents: {found}{cost}."
    if found.tokens > o.budget:
        raise EndpointError(
            f"{said} That is more than the budget of {o.budget:,} tokens: raise --budget, or ask "
            "for fewer with --latents."
        )
    return said


def summary(folder: Path, done: Sequence[Named], failed: Sequence[str]) -> str:
    """What came of it, in a few sentences."""
    with_name = [each for each in done if each.scores is not None]
    reliable = sum(each.scores.reliable for each in with_name)
    said = (
        f"{len(with_name):,} latents have a name, {reliable:,} of them a reliable one (simulation "
        f"{RELIABLE} or more); {len(done) - len(with_name):,} fire in too few texts. They are in "
        f"{folder / NAMES}" + (f", the map in {folder / MAP}." if with_name else ".")
    )
    if failed:
        more = f", and {len(failed) - 3:,} more" if len(failed) > 3 else ""
        said += f"\nWithout a name, to be asked again: {'; '.join(failed[:3])}{more}."
    return said
