"""Lesson 08's attention: which head looks where, and the products behind it, in words.

layer, head, here, there = where_it_looks(model, "… words, one of them again")
print(top_products(model, coders, namer, prompt, (layer, head, here, there)))
"""

from __future__ import annotations

import torch

from mi_helpers.circuits.graphs import EMBEDDING, FEATURE, Node
from mi_helpers.circuits.names import Namer
from mi_helpers.circuits.queries import qk_attribution
from mi_helpers.circuits.replacement import Coders, LocalReplacement
from mi_helpers.lessons.lesson_08.prompts import Question, name_ends
from mi_helpers.models import LanguageModel

Look = tuple[int, int, int, int]  # layer, head, the token that looks, the one that is looked at


def where_it_looks(model: LanguageModel, prompt: str) -> Look:
    """In a text whose last word came before: the head that looks most from the end at the token
    after the earlier copy."""
    ids = model.tokens(prompt)[0]
    here = len(ids) - 1
    earlier = (ids[:-1] == ids[-1]).nonzero()[:, 0]
    if not len(earlier):
        raise ValueError(f"The last word of {prompt!r} does not come earlier in it.")
    there = int(earlier[-1]) + 1
    return _most(model, prompt, here, [there])


def who_looks_at(model: LanguageModel, question: Question) -> Look:
    """The head that looks most from the end at a token of what a question names."""
    end = name_ends(model, question.one)
    text = question.prompt[: question.prompt.index(question.one.subject)]
    begin = model.tokens(text.rstrip()).shape[1]
    here = model.tokens(question.prompt).shape[1] - 1
    return _most(model, question.prompt, here, list(range(begin, end + 1)))


def parts_of(model: LanguageModel, prompt: str, layer: int, position: int) -> torch.Tensor:
    """The summands of the stream that enters a layer: the embedding, then each block's attention
    and MLP, (1 + 2 · layer, d_model)."""
    _, cache = model.run_with_cache(prompt, ["embed", "attn_out", "mlp_out"])
    rows = [cache["embed"][0, position]]
    for i in range(layer):
        rows += [cache["attn_out", i][0, position], cache["mlp_out", i][0, position]]
    return torch.stack(rows)


def _most(model: LanguageModel, prompt: str, here: int, keys: list[int]) -> Look:
    """The layer, head and key with the most attention from `here`; a layer after the first, where
    features can have written something."""
    _, cache = model.run_with_cache(prompt, "pattern")
    given = cache["pattern"][1:, 0, :, here][..., keys].float()
    layer, head, key = torch.unravel_index(given.argmax(), given.shape)
    return int(layer) + 1, int(head), here, keys[int(key)]


def top_products(
    model: LanguageModel, coders: Coders, namer: Namer, prompt: str, look: Look, k: int = 5
) -> str:
    """The k largest products of a head's score above its mean over the other tokens, a line each:
    what the query read, and what the key read. `<bos>` and biases are left out."""
    layer, head, here, there = look
    local = LocalReplacement(model, coders, prompt)
    others = [place for place in range(1, here + 1) if place != there]
    found = qk_attribution(local, layer, head, here, there, against=others)
    texts = model.str_tokens(local.ids)

    def said(node: Node) -> str:
        token = texts[node.position].strip()
        if node.kind == EMBEDDING:
            return f"the word {token}"
        name = namer.name(node.layer, node.index) if node.kind == FEATURE else "error"
        return f"L{node.layer} [{name}] at {token}"

    every = found.top(found.products.numel())
    kept = [(a, b, x) for a, b, x in every if a and b and a.position and b.position][:k]
    lines = [f"  {x:+.2f}  {said(a)}  ×  {said(b)}" for a, b, x in kept]
    looks = f"L{layer}H{head}: {texts[here].strip()} looks at {texts[there].strip()}"
    return "\n".join([looks, *lines])
