"""Names on a map: one HTML page that is opened from disk, needs no script and asks for nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mi_helpers.views.base import escape, shown

SIZE, EDGE = 720, 4  # pixels of the longer side; room around, in the map's units
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
body {{ font-family: sans-serif; margin: 16px; line-height: 1.4; color: #1a1a1a; }}
svg {{ max-width: 100%; height: auto; border: 1px solid #bbb; }}
svg text {{ font-size: 11px; text-anchor: middle; paint-order: stroke; stroke: #fff;
  stroke-width: 3px; }}
.sure {{ fill: #1f5fa8; stroke: #1f5fa8; }}
.not {{ fill: #fff; stroke: #8a5a00; }}
a:focus circle, a:hover circle {{ stroke: #000; stroke-width: 3; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: 2px 10px 2px 0; text-align: left; vertical-align: top; }}
tr:target {{ background: #ffe9a8; }}
summary {{ cursor: pointer; padding: 4px 0; }}
</style></head><body><h1>{title}</h1>
<p>{n} names in {k} groups of like words. A full disc is a reliable name: a simulation from it
correlates at {least} or more with the latent on text held out ({sure} of them). An open one is less
so. Point at a disc for its name; follow it to its line.</p>
<svg viewBox="{view}" width="{width}" height="{height}" role="img" aria-label="{title}">
{drawing}</svg>
{groups}
</body></html>
"""


def name_map_page(rows: Sequence[Mapping], title: str, least: float) -> str:
    """The page.

    Args:
        rows: {"latent", "name", "cluster", "xy": (x, y), "reliable", and "detection", "fuzzing",
            "simulation": (value, low, high, …), with None for what cannot be said}.
        title: of the page.
        least: the simulation's score from which on a name is reliable.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("There are no names to put on a map: give at least one row.")
    groups: dict[str, list[Mapping]] = {}
    for row in rows:
        groups.setdefault(row["cluster"], []).append(row)
    groups = dict(sorted(groups.items(), key=lambda pair: -len(pair[1])))
    x, y = zip(*(row["xy"] for row in rows), strict=True)
    low_x, low_y = min(x) - EDGE, min(y) - EDGE
    wide, high = max(x) + EDGE - low_x, max(y) + EDGE - low_y
    scale = SIZE / max(wide, high)
    drawing = [_disc(row, scale) for row in rows]
    drawing += [_title(name, group, scale) for name, group in groups.items()]
    return PAGE.format(
        title=_said(title),
        n=f"{len(rows):,}",
        k=len(groups),
        least=least,
        sure=f"{sum(bool(row['reliable']) for row in rows):,}",
        view=" ".join(f"{scale * v:.1f}" for v in (low_x, low_y, wide, high)),
        width=round(scale * wide),
        height=round(scale * high),
        drawing="".join(drawing),
        groups="\n".join(_group(name, group) for name, group in groups.items()),
    )


def _disc(row: Mapping, scale: float) -> str:
    """A name on the map."""
    x, y = (scale * v for v in row["xy"])
    kind, radius = ("sure" if row["reliable"] else "not"), max(1.5, min(6.0, 0.32 * scale))
    return (
        f'<a href="#latent-{int(row["latent"])}"><circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" '
        f'r="{radius:.1f}"><title>{int(row["latent"])}: {_said(row["name"])}</title></circle></a>'
    )


def _title(name: str, group: Sequence[Mapping], scale: float) -> str:
    """A group's title, above it."""
    x = scale * sum(row["xy"][0] for row in group) / len(group)
    y = scale * (min(row["xy"][1] for row in group) - 0.8)
    return f'<text x="{x:.1f}" y="{y:.1f}">{_said(name)}</text>'


def _group(name: str, group: Sequence[Mapping]) -> str:
    """A group's names as a table that opens."""
    rows = "".join(
        f'<tr id="latent-{int(row["latent"])}"><td>{int(row["latent"])}</td>'
        f"<td>{_said(row['name'])}</td><td>{_number(row['simulation'])}</td>"
        f"<td>{_number(row['detection'])}</td><td>{_number(row['fuzzing'])}</td></tr>"
        for row in sorted(group, key=lambda row: -(row["simulation"][0] or 0))
    )
    sure = sum(bool(row["reliable"]) for row in group)
    return (
        f"<details open><summary><b>{_said(name)}</b>: {len(group):,}, {sure:,} reliable</summary>"
        "<table><tr><th>latent</th><th>name</th><th>simulation</th><th>detection</th>"
        f"<th>fuzzing</th></tr>{rows}</table></details>"
    )


def _said(text: str) -> str:
    """A text of anybody's, as it can be seen."""
    return escape("".join(c if c.isprintable() else shown(c) for c in text))


def _number(score: Sequence) -> str:
    """A score with its interval."""
    value, low, high = score[:3]
    return "–" if value is None else f"{value:.2f} [{low:.2f}, {high:.2f}]"
