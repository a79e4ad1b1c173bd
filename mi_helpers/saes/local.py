"""An explainer that is a language model of one's own: a chat model that `load_model` loads.

    local = Local(load_model("Qwen/Qwen2.5-1.5B-Instruct"))
    local.explain(examples)

Only the name is written. What is asked with yes or no is read off the probabilities of the two, and
a simulation off those of the digits: all tokens of a context at once, each with the expected value
of its digit, which is how Bills et al. 2023 score (their "all at once").
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mi_helpers.errors import Refused
from mi_helpers.models import LanguageModel
from mi_helpers.saes.examples import Context, Examples
from mi_helpers.saes.explainers import Explanation
from mi_helpers.saes.prompts import SYSTEM, explain_prompt, quoted, read_name

WRITTEN = 60  # tokens that a name may take
FEWER = (10, 6, 3, 1)  # contexts of each kind, as many as fit
HIDDEN = "?"  # stands where an activation would be


class Local:
    """An explainer on this machine.

    Args:
        model: of a tokenizer with a chat template, or else without: then it is asked plainly.
    """

    def __init__(self, model: LanguageModel):
        self.model = model

    def __repr__(self) -> str:
        return f"Local({self.model.name})"

    def explain(self, examples: Examples) -> Explanation:
        """A name, from as many contexts of the half that is seen as the model can read.

        Raises:
            NoAnswer: it writes none.
            Refused: not even one context of each kind fits.
        """
        for n in FEWER:
            prompt = self.chat(explain_prompt(examples, n))
            length = len(self.model.encode(prompt)) + 1
            if length + WRITTEN <= self.model.n_ctx:
                break
        else:
            raise Refused(
                f"{self.model.name} reads {self.model.n_ctx} tokens at once, and a question has "
                f"{length}: choose a model with a longer context."
            )
        written = self.model.generate(prompt, WRITTEN)
        read = self.model.tokens(prompt)[0]
        before = self.model.tokenizer.decode(read, skip_special_tokens=True)
        return Explanation(examples.unit, read_name(written[len(before) :]))

    def detect(self, explanation: Explanation, contexts: Sequence[Context]) -> list[float]:
        """p(yes) / (p(yes) + p(no)) for each context."""
        return [
            self.yes(
                f"A unit is described as {quoted(explanation.text)}. Does it fire at some token of "
                f"this context: {quoted(str(context))}? Answer yes or no."
            )
            for context in contexts
        ]

    def fuzz(self, explanation: Explanation, contexts: Sequence[Context]) -> list[float]:
        """p(yes) / (p(yes) + p(no)) for the marks of each context."""
        return [
            self.yes(
                f"A unit is described as {quoted(explanation.text)}. Does it fire at the tokens in "
                f"[[brackets]] of this context: {quoted(context.marked(1.0))}? Answer yes or no."
            )
            for context in contexts
        ]

    def simulate(self, explanation: Explanation, contexts: Sequence[Context]) -> list[list[float]]:
        """Σ digit · p(digit) / Σ p(digit) at each token, from 0 to 9, from one run per context."""
        return [self.strengths(explanation, context) for context in contexts]

    # ---- what is read off the logits

    def chat(self, prompt: str) -> str:
        """A prompt as the model wants to be asked."""
        messages = [{"role": "user", "content": f"{SYSTEM}\n\n{prompt}"}]
        if getattr(self.model.tokenizer, "chat_template", None):
            return self.model.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        return f"{messages[0]['content']}\n\nAnswer: "

    @torch.no_grad()
    def yes(self, prompt: str) -> float:
        """p(yes) / (p(yes) + p(no)) of the first token of the answer, in any way to write them."""
        p = self.model.forward(self.chat(prompt))[0, -1].float().softmax(-1)
        yes, no = (
            p[
                sorted(
                    {
                        self.model.encode(f"{blank}{form}")[0]
                        for blank in ("", " ")
                        for form in (word, word.capitalize())
                    }
                )
            ].sum()
            for word in ("yes", "no")
        )
        return float(yes / (yes + no))

    @torch.no_grad()
    def strengths(self, explanation: Explanation, context: Context) -> list[float]:
        """The expected digit at each token of a context."""
        model, digits = self.model, [self.model.encode(str(d))[-1] for d in range(10)]
        if len(set(digits)) < 10:
            raise Refused(f"{model.name} does not write each digit as a token of its own.")
        ask = (
            f"A unit is described as {quoted(explanation.text)}. Each line has a token and how "
            "strongly the unit fires at it, from 0 to 9."
        )
        ids, places = model.tokens(self.chat(ask))[0].tolist(), []
        for word in context.words:
            ids += model.encode(f"{quoted(word)}\t")
            places.append(len(ids) - 1)
            ids += model.encode(f"{HIDDEN}\n")
        p = model.forward([ids])[0, places][:, digits].float().softmax(-1)
        return (p @ torch.arange(10.0, device=p.device)).tolist()
