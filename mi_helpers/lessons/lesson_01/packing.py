"""Almost orthogonal directions: how many fit into m dimensions with every |cos| ≤ ε.

At most m directions are orthogonal. With a small error in the angle there are many more: how many
is bounded from above (Welch) and from below (a counting argument), and shown by a construction
(polynomial phases).
"""

import math

import torch
from scipy.special import betainc
from torch import Tensor


def cosines(V: Tensor) -> Tensor:
    """The |cos| of all pairs of rows of V (n, m), (n, n), 0 on the diagonal and for rows of 0."""
    V = V / V.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return (V @ V.T).abs().fill_diagonal_(0)


def welch_bound(m: int, epsilon: float) -> float:
    """The most directions that can fit: m (1 - ε²) / (1 - m ε²) for m < 1/ε², else infinity.

    The Gram matrix of n unit vectors has trace n and rank ≤ m, so the sum of its squares is at
    least n²/m. It is at most n + n (n - 1) ε². Solve for n.

    Source: Welch 1974.
    """
    room = 1 - m * epsilon**2
    return m * (1 - epsilon**2) / room if room > 0 else math.inf


def chance_too_close(m: int, epsilon: float) -> float:
    """P(|cos| > ε) of a random direction with a given one: I_{1-ε²}((m - 1)/2, 1/2).

    I is the regularised incomplete beta function: cos² of random directions is Beta(1/2, (m - 1)/2)
    distributed.
    """
    return float(betainc((m - 1) / 2, 0.5, 1 - epsilon**2)) if m > 1 else 1.0


def greedy_bound(m: int, epsilon: float) -> float:
    """A number of directions that fit for certain: max(m, 1/P) with P = `chance_too_close`.

    Add directions one by one, each anywhere not too close to those before. While n P < 1, the
    forbidden regions, of share P each, cannot cover the sphere, so there is room for another: this
    stops at n ≥ 1/P at the earliest (Gilbert's and Varshamov's argument for codes). An orthonormal
    basis gives m.
    """
    return max(float(m), 1 / max(chance_too_close(m, epsilon), 1e-300))


def polynomial_phases(p: int, degree: int = 2) -> Tensor:
    """Unit vectors (2 p^degree, 2p) with all |cos| ≤ (degree - 1)/√p, for a prime p > degree.

    Vector a has, at place t = 0 … p - 1, the complex number exp(2πi f(t) / p) / √p with
    f(t) = a_1 t + … + a_d t^d modulo p; real and imaginary parts make 2p real numbers. Two vectors
    meet in the mean of exp(2πi g(t) / p) over t, where g is the difference of their polynomials,
    and by Weil's bound its modulus is at most (d - 1)/√p. Each vector times i is one more.

    Raises:
        ValueError: p is no prime larger than the degree.
    """
    if p <= degree or any(p % k == 0 for k in range(2, math.isqrt(p) + 1)):
        raise ValueError(f"p = {p} was given: take a prime larger than the degree, {degree}.")
    t = torch.arange(p)
    powers = torch.stack([t**k % p for k in range(1, degree + 1)])  # (degree, p)
    choices = torch.cartesian_prod(*[t] * degree).reshape(-1, degree)  # all polynomials
    angle = 2 * math.pi / p * ((choices @ powers) % p)
    real, imaginary = angle.cos(), angle.sin()
    V = torch.cat([torch.cat([real, imaginary], 1), torch.cat([-imaginary, real], 1)])
    return V / math.sqrt(p)


def constructed(m: int, epsilon: float) -> float:
    """How many directions `polynomial_phases` has in at most m dimensions; m where that is more."""
    best, p = float(m), m // 2
    while p > 2 and any(p % k == 0 for k in range(2, math.isqrt(p) + 1)):
        p -= 1
    degree = min(math.floor(epsilon * math.sqrt(max(p, 0)) + 1 + 1e-9), p - 1)
    return max(best, 2.0 * float(p) ** degree) if p > 2 and degree >= 2 else best
