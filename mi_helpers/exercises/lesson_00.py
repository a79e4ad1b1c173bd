"""Exercises of lesson 00."""

import torch

from mi_helpers.exercises.check import Exercise, expect_close

# -- 0.1 -------------------------------------------------------------------------------------

STUB_01 = '''\
def soft_cap(x, cap):
    """Squeeze x smoothly into (-cap, cap); x may have any shape."""
    ...
'''


def soft_cap(x, cap):
    """cap · tanh(x / cap), as in Gemma 2 (arXiv:2408.00118, section 2)."""
    return cap * torch.tanh(x / cap)


def check_01(answer) -> None:
    x, cap = torch.tensor([-60.0, -1.0, 0.0, 2.0, 60.0]), 30.0
    got, ratio = answer(x, cap), torch.tanh(x / cap)
    for mistake, message in (
        (ratio, "The result stays within (-1, 1): scale it back by the cap."),
        (cap * torch.tanh(x), "Values far below the cap are squeezed: divide by the cap first."),
        (x.clamp(-cap, cap), "This cuts hard at the cap: use tanh, which bends."),
    ):
        if torch.is_tensor(got) and got.shape == x.shape and torch.allclose(got, mistake):
            expect_close(got, soft_cap(x, cap), message)
    expect_close(got, soft_cap(x, cap), "Compare with cap · tanh(x / cap) for x = 2 and cap = 30.")


EXERCISES = [
    Exercise(
        id="0.1",
        title="The soft-cap",
        difficulty=1,
        importance=2,
        minutes=5,
        stub=STUB_01,
        reference=soft_cap,
        check=check_01,
        hints=[
            "`torch.tanh` squeezes any number into (-1, 1).",
            "Small numbers should pass almost unchanged, so divide by the cap, then scale back.",
        ],
        wrong=[
            (lambda x, cap: torch.tanh(x / cap), "scale it back"),
            (lambda x, cap: cap * torch.tanh(x), "divide by the cap first"),
            (lambda x, cap: x.clamp(-cap, cap), "cuts hard"),
        ],
    ),
]
