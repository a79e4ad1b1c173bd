"""A local model as the explainer: what it is asked, and what is read off its probabilities."""

import numpy as np
import pytest
import torch
from test_naming import made, unit
from tiny_models import SPECIAL, tiny_model
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from mi_helpers.errors import Refused
from mi_helpers.saes.examples import Context, collect
from mi_helpers.saes.explainers import Explanation
from mi_helpers.saes.local import WRITTEN, Local
from mi_helpers.saes.naming import score
from mi_helpers.saes.prompts import explain_prompt

LETTERS = [chr(i) for i in range(32, 127)] + ["\n", "\t", "…"]


def letters(template=None):
    """One token per character."""
    pieces = SPECIAL + LETTERS
    made = Tokenizer(WordLevel({c: i for i, c in enumerate(pieces)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    special = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), SPECIAL, strict=True))
    found = PreTrainedTokenizerFast(tokenizer_object=made, **special)
    found.chat_template = template
    return found


def model(template=None, length=8_192):
    return tiny_model(tokenizer=letters(template), vocab_size=128, max_position_embeddings=length)


@pytest.fixture(scope="module")
def examples():
    texts, flat = made(200)
    return collect(unit(np.isin(flat, ["cat"]))[:, None], texts, n=4)[0]


class Scripted:
    """A model whose next token is a function of the text so far."""

    def __init__(self, says, n_ctx=10**6):
        self.real, self.says, self.n_ctx, self.name = model(), says, n_ctx, "scripted"
        self.tokenizer, self.tokens, self.encode = (
            self.real.tokenizer,
            self.real.tokens,
            self.real.encode,
        )

    def forward(self, tokens):
        ids = self.real.ids(tokens)[0].tolist()
        text = [self.tokenizer.decode([i]) if i > 3 else "" for i in ids]
        logits = torch.zeros(1, len(ids), 128)
        for at in range(len(ids)) if len(ids) and self.says.every else [len(ids) - 1]:
            logits[0, at, self.encode(self.says("".join(text[: at + 1])))[0]] = 30.0
        return logits


def cat_yes_or_no(text):
    """Yes where the context, or what is marked in it, has a cat."""
    about = text.split("context: ")[-1].split("? Answer")[0]
    return "y" if ("[[cat]]" if "[[" in about else "cat") in about else "N"


cat_yes_or_no.every = False


def nine_at_cats(text):
    return "9" if text.endswith('" cat"\t') else "0"


nine_at_cats.every = True


def test_yes_and_no_are_read_off_the_next_token():
    local = Local(Scripted(cat_yes_or_no))
    about = Explanation(0, "the word c-a-t")
    contexts = [Context((" the", " cat"), ()), Context((" a", " dog"), ())]
    assert local.detect(about, contexts) == pytest.approx([1, 0], abs=1e-6)
    marked = [Context((" the", " cat"), (0.0, 1.0)), Context((" the", " cat"), (1.0, 0.0))]
    assert local.fuzz(about, marked) == pytest.approx([1, 0], abs=1e-6)


def test_a_simulation_is_the_expected_digit_after_each_token():
    local = Local(Scripted(nine_at_cats))
    contexts = [Context((" the", " cat", " sat"), ()), Context((" cat",), ())]
    found = local.simulate(Explanation(0, "cats"), contexts)
    assert found[0] == pytest.approx([0, 9, 0], abs=1e-6) and found[1] == pytest.approx([9])


def test_a_real_models_digits_are_those_of_each_prefix_run_alone():
    real, context = model(), Context((" the", "\n", '"a"'), ())
    (found,) = Local(real).simulate(Explanation(0, "x"), [context])
    digits = [real.encode(str(d))[0] for d in range(10)]
    text = Local(real).chat(
        'A unit is described as "x". Each line has a token and how strongly the unit fires at it, '
        "from 0 to 9."
    )
    for strength, word in zip(found, ('" the"', '"\\n"', '"\\"a\\""'), strict=True):
        text += f"{word}\t"
        p = real.forward(text)[0, -1, digits].softmax(-1)
        assert strength == pytest.approx(float(p @ torch.arange(10.0)), abs=1e-4)
        text += "?\n"


def test_a_units_name_is_what_is_written_after_the_question(examples, monkeypatch):
    real = model("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<model>")
    asked = []

    def write(prompt, n):
        asked.append(prompt)
        return real.tokenizer.decode(real.tokens(prompt)[0], skip_special_tokens=True) + "the cat\n"

    monkeypatch.setattr(real, "generate", write)
    local = Local(real)
    assert local.explain(examples) == Explanation(0, "the cat")
    assert asked[0].startswith("<user>You study") and asked[0].endswith("<model>")
    assert "[[cat]]" in asked[0] and repr(local) == "Local(tiny gemma2 0)"
    scores = score(local, Explanation(0, "the cat"), examples)  # a model that has learnt nothing
    assert not scores.reliable and abs(scores.simulation.value) < 0.7


def test_as_many_contexts_are_given_as_fit(examples, monkeypatch):
    asked, roomy = [], model()
    monkeypatch.setattr(
        "mi_helpers.models.LanguageModel.generate", lambda self, p, n: (asked.append(p), p)[1] + "a"
    )
    lengths = {}
    for n in (10, 3, 1):
        prompt = Local(roomy).chat(explain_prompt(examples, n))
        lengths[n] = len(roomy.encode(prompt)) + 1
        Local(model(length=lengths[n] + WRITTEN)).explain(examples)
        assert asked[-1] == prompt
    Local(model(length=lengths[3] + WRITTEN - 1)).explain(examples)
    assert asked[-1] == prompt  # with one of each kind
    with pytest.raises(Refused, match=f"reads 300 tokens at once, and a question has {lengths[1]}"):
        Local(model(length=300)).explain(examples)


def test_a_tokenizer_without_digits_of_their_own_is_refused():
    with pytest.raises(Refused, match="each digit as a token of its own"):
        Local(tiny_model()).simulate(Explanation(0, "x"), [Context((" cat",), ())])
