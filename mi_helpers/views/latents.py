"""A dictionary to browse: every latent of a coder, searched by token, topic, density and score.

latents("runs/tiny/latents.jsonl")                    # what `python -m mi_helpers features` wrote
latents_page("latents.html", "runs/tiny/latents.jsonl")   # one HTML file, opened from disk
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import matplotlib
from matplotlib.colors import to_hex

from mi_helpers.plots import AMOUNT
from mi_helpers.views.base import View, escape, module, plain, read, shown
from mi_helpers.views.tokens import ink

NEEDED = {"latent", "fires", "frequency", "mean", "top"}
CONTEXTS, WEAK, TOKENS, NEAR = 8, 5, 8, 6  # shown of each latent
STANDING = 12  # latents in the HTML that stands without a kernel
Rows = str | Path | Iterable[Mapping]


def latents(rows: Rows, **look) -> View:
    """A view in which the latents of a dictionary are searched, sorted and read.

    Args and errors are those of `latents_json`.
    """
    data = latents_json(rows, **look)
    return View("latents", data, latents_html(data), latents_text(data))


def latents_json(
    rows: Rows,
    *,
    label: str = "latents",
    names: Mapping[int, tuple[str, float]] | None = None,
    link: str = "",
    start: int | None = None,
) -> dict:
    """What the view draws, as JSON.

    Args:
        rows: a run's latents.jsonl, or its lines as dictionaries: "latent", "fires", "frequency",
            "mean", "top" [[value, text with the firing token in [[brackets]]], …], and where there
            are any "quantiles", "nearest", "raises", "lowers".
        label: what the latents are of.
        names: {latent: (name or topic, score from 0 to 1)}.
        link: an address in which {latent} stands for the number, such as Neuronpedia's.
        start: the latent that is shown first; None takes the first of the list.

    Returns:
        {"label", "start", "latents": [{"latent", "density", "mean", "highest", "name", "score",
        "link", "top", "weak", "raises", "lowers", "nearest"}]}; a context is {"value", "before",
        "token", "after", "colour", "ink"}, colour from 0 to the latent's highest value.

    Raises:
        ValueError: a line that is none of a latent, the same latent twice, no latent at all, no
            latent `start`, or an address without {latent}.
    """
    if link and "{latent}" not in link:
        raise ValueError(f"The link {link!r} has no {{latent}} in it, for the latent's number.")
    names, found = names or {}, {}
    for number, row in enumerate(lines(rows), start=1):
        if not isinstance(row, Mapping) or (missing := NEEDED - set(row)):
            lacks = ", ".join(sorted(missing)) if isinstance(row, Mapping) else "all of it"
            raise ValueError(f"Line {number} is no latent: {lacks} is missing.")
        if row["latent"] in found:
            raise ValueError(f"Latent {row['latent']} stands there twice: give one dictionary.")
        found[row["latent"]] = one(row, names.get(row["latent"]), link)
    if not found:
        raise ValueError("There are no latents to browse: give at least one line.")
    if start is not None and start not in found:
        raise ValueError(f"There is no latent {start} to start with.")
    first = next(iter(found)) if start is None else start
    return {"label": label, "start": first, "latents": list(found.values())}


def lines(rows: Rows) -> Iterator:
    """The lines of a JSON Lines file, or rows as they are.

    Raises:
        ValueError: the file is missing, or a line of it is no JSON.
    """
    if not isinstance(rows, (str, Path)):
        yield from rows
        return
    if not Path(rows).is_file():
        raise ValueError(
            f"{rows} is not there: python -m mi_helpers features writes latents.jsonl."
        )
    with open(rows, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"Line {number} of {rows} is no JSON: {error}.") from None


def one(row: Mapping, name: tuple[str, float] | None, link: str) -> dict:
    """One latent, with what is shown of it."""
    highest = max((float(value) for value, _ in row["top"]), default=0.0)
    said = {
        "latent": int(row["latent"]),
        "density": float(row["frequency"]),
        "mean": float(row["mean"]),
        "highest": highest,
        "name": name[0] if name else "",
        "score": round(float(name[1]), 3) if name else None,
        "link": link.replace("{latent}", str(row["latent"])) if link else "",
        "top": [bracketed(text, float(value), highest) for value, text in row["top"][:CONTEXTS]],
        "weak": [bracketed(text, None, highest) for text in row.get("quantiles", [])[-WEAK:]],
        "nearest": [[int(i), round(float(v), 3)] for i, v in row.get("nearest", [])[:NEAR]],
    }
    for key in ("raises", "lowers"):
        pairs = row.get(key, [])[:TOKENS]
        said[key] = [[shown(token), round(float(v), 3)] for token, v in pairs]
    return said


def bracketed(text: str, value: float | None, highest: float) -> dict:
    """A context with its firing token apart, and the colour of that token's value."""
    before, _, rest = text.partition("[[")
    token, _, after = rest.partition("]]")
    share = 0.0 if value is None or not highest else min(max(value / highest, 0.0), 1.0)
    colour = "#ffffff" if value is None else to_hex(matplotlib.colormaps[AMOUNT](share))
    return {
        "value": value,
        "before": "".join(map(shown_text, before)),
        "token": shown(token),
        "after": "".join(map(shown_text, after)),
        "colour": colour,
        "ink": ink(colour),
    }


def shown_text(character: str) -> str:
    """A character of a context as it can be seen."""
    return character if character.isprintable() else shown(character)


# ------------------------------------------------------------------------- without a kernel


def latents_html(data: dict) -> str:
    """A few latents as HTML that needs no script: the first one shown, then others by density."""
    rows = sorted(
        data["latents"], key=lambda row: (row["latent"] != data["start"], -row["density"])
    )
    cells = []
    for row in rows[:STANDING]:
        top = row["top"][0] if row["top"] else None
        context = (
            f"{escape(top['before'])}<b>[[{escape(top['token'])}]]</b>{escape(top['after'])}"
            if top
            else "it never fires"
        )
        raises = ", ".join(escape(token) for token, _ in row["raises"][:4])
        cells.append(
            f"<tr><td>{row['latent']}</td><td>{row['density']:.2%}</td>"
            f"<td>{escape(row['name'])}</td><td>{context}</td><td>{raises}</td></tr>"
        )
    more = len(rows) - len(cells)
    return plain(
        f"<p><b>{escape(data['label'])}</b>: {len(rows):,} to browse where a kernel runs</p>"
        "<table><tr><th>latent</th><th>fires at</th><th>name</th><th>strongest context</th>"
        f"<th>raises</th></tr>{''.join(cells)}</table>" + (f"<p>and {more:,} more</p>" * (more > 0))
    )


def latents_text(data: dict) -> str:
    """A few latents as plain text."""
    rows = data["latents"][:STANDING]
    lines = [
        f"{row['latent']}: fires at {row['density']:.2%} {row['name']}".rstrip() for row in rows
    ]
    return "\n".join([f"{data['label']}, {len(data['latents']):,} of them", *lines])


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'unsafe-inline' blob:">
<style>body {{ font-family: sans-serif; margin: 16px; }}
{css}</style></head><body><main id="view"></main>
<script type="application/json" id="data">{data}</script>
<script type="module">
{code}
const data = JSON.parse(document.getElementById("data").textContent);
view.render({{ model: {{ get: () => data, set() {{}}, save_changes() {{}}, on() {{}}, off() {{}} }},
  el: document.getElementById("view") }});
</script></body></html>
"""


def latents_page(path: Path | str, rows: Rows, **look) -> Path:
    """Write a whole dictionary as one HTML file that is opened from disk and asks for nothing.

    Args:
        path: of the file. The others, and errors, are those of `latents_json`.

    Returns:
        the path.
    """
    data = latents_json(rows, **look)
    code = module("latents").replace("export default", "const view =")
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")  # no end of a script in it
    path = Path(path)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(
        PAGE.format(title=escape(data["label"]), css=read("views.css"), data=text, code=code),
        encoding="utf-8",
    )
    temporary.replace(path)
    return path
