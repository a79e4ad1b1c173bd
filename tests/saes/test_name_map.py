"""Names on a map: like names together under their words, whatever names there are; and the page."""

import numpy as np
import pytest

from mi_helpers.errors import Refused
from mi_helpers.saes.explainers import Explanation
from mi_helpers.saes.name_map import name_map
from mi_helpers.views.name_map import name_map_page

TOPICS = {
    "chess": "openings of chess games, checkmate, rooks and pawns of chess",
    "weather": "storms and rain in weather reports, clouds of the weather",
    "money": "banks that lend money, loans and interest on money",
    "ships": "sailors of ships, harbours and anchors where ships lie",
    "music": "violins in music, orchestras that play music",
}


def names(each=12, seed=0):
    rng = np.random.default_rng(seed)
    found = []
    for topic, text in TOPICS.items():
        words = [w.strip(",") for w in text.split()]
        for _ in range(each):
            found.append(f"{topic} {' '.join(rng.choice(words, 4, replace=False))}")
    return [Explanation(10 + i, name) for i, name in enumerate(found)]


def test_names_of_one_topic_stand_together_under_its_words():
    found = name_map(names(), clusters=5)
    truth = np.repeat(np.arange(5), 12)
    for topic, word in enumerate(TOPICS):
        cluster = set(found.cluster[truth == topic].tolist())
        assert len(cluster) == 1 and word in found.titles[cluster.pop()]
    assert found.unit.tolist() == list(range(10, 70)) and len(set(found.titles)) == 5
    middles = np.stack([found.xy[truth == t].mean(0) for t in range(5)])
    own = np.linalg.norm(found.xy - middles[truth], axis=1)
    others = np.linalg.norm(found.xy[:, None] - middles[None], axis=2)
    assert (others.argmin(1) == truth).all() and own.max() < others.max() / 2


def test_no_two_names_stand_at_one_place():
    found = name_map(names(40), clusters=7)
    gaps = np.linalg.norm(found.xy[:, None] - found.xy[None], axis=2) + np.eye(200) * 9
    assert gaps.min() > 0.5


def test_the_same_names_give_the_same_map():
    one, two = name_map(names()), name_map(names())
    assert (one.xy == two.xy).all() and one.titles == two.titles
    assert len(one.titles) == 8 == len(set(one.cluster.tolist()))  # about √60


@pytest.mark.parametrize(
    "texts",
    [
        ["at: cat"],
        ["at: cat", "at: cat"],
        ["at: cat"] * 30,
        ["at: cat", "after: dog", "near: mat"],
        [",", '"\\n"', "&", "()"],
        ["日本 語", "ends: ه", "<b>x</b>"],
        ["a", "b", "c", "d", "e", "f"] * 3,
    ],
)
@pytest.mark.filterwarnings("error")
def test_few_equal_and_odd_names_have_a_map_too(texts):
    found = name_map([Explanation(i, text) for i, text in enumerate(texts)])
    assert found.xy.shape == (len(texts), 2) and np.isfinite(found.xy).all()
    assert all(found.titles) and max(found.cluster) < len(found.titles)


def test_no_names_have_no_map():
    with pytest.raises(Refused, match="no names"):
        name_map([])


def row(latent=3, name="at: cat", **more):
    score = {kind: [0.9, 0.8, 1.0, 20] for kind in ("detection", "fuzzing", "simulation")}
    return {
        "latent": latent,
        "name": name,
        "cluster": "cat",
        "xy": [1.0, -2.0],
        "reliable": True,
    } | (score | more)


def test_the_page_has_every_name_once_on_the_map_and_once_in_its_group():
    rows = [row(), row(4, "at: dog", reliable=False, cluster="dog"), row(5, xy=[3.0, 3.0])]
    page = name_map_page(rows, "a run", 0.7)
    assert page.count("<circle") == 3 and page.count('class="sure"') == 2
    assert page.count("<details") == 2 and "<b>cat</b>: 2, 2 reliable" in page
    for latent in (3, 4, 5):
        assert page.count(f'href="#latent-{latent}"') == page.count(f'id="latent-{latent}"') == 1
    assert "0.90 [0.80, 1.00]" in page and "<script" not in page and "src=" not in page
    with pytest.raises(ValueError, match="no names"):
        name_map_page([], "a run", 0.7)


def test_nothing_of_a_name_becomes_markup():
    bad = '</title></svg><script>alert(1)</script>"\n\x1b[31m'
    page = name_map_page([row(name=bad, cluster=bad, detection=[None] * 3)], bad, 0.7)
    assert "<script" not in page and "&lt;script&gt;" in page and "\x1b" not in page
    assert "–" in page
