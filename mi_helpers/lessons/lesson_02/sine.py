"""The toy of lesson 02: small networks that tell whether a point lies above a sine.

nets = SineNets(nets=5, seed=0).train()
nets.accuracies()            # of a linear probe on each layer, (nets, layers)
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mi_helpers.lessons.shared import on_one_core
from mi_helpers.probes import fit_probe


class SineNets:
    """Several small MLPs at once, trained to tell whether y > sin x: inputs (x / 6, y).

    `hidden(points)` gives [input, hidden layer 1, …], each (nets, n, width), after the ReLU.
    """

    WIDTH, DEPTH, REACH = 8, 5, 6.0

    def __init__(self, nets: int = 5, seed: int = 0):
        rng = torch.Generator().manual_seed(seed)
        sizes = [2, *[self.WIDTH] * self.DEPTH, 1]
        self.weights = [
            1.5 * torch.randn(nets, a, b, generator=rng) / a**0.5
            for a, b in itertools.pairwise(sizes)
        ]
        self.biases = [torch.zeros(nets, 1, b) for b in sizes[1:]]
        self.rng, self.nets = rng, nets

    def points(self, n: int) -> tuple[Tensor, Tensor]:
        """Fresh points (nets, n, 2) of the square (-1, 1)², and whether y > sin x, (nets, n)."""
        inputs = torch.rand(self.nets, n, 2, generator=self.rng) * 2 - 1
        return inputs, inputs[..., 1] > torch.sin(self.REACH * inputs[..., 0])

    def hidden(self, inputs: Tensor) -> list[Tensor]:
        """The inputs (nets, n, 2), then each hidden layer, (nets, n, WIDTH), after the ReLU."""
        layers = [inputs]
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            layers.append(torch.relu(layers[-1] @ weight + bias))
        return layers

    def logits(self, inputs: Tensor) -> Tensor:
        """(nets, n): above 0 means y > sin x."""
        return (self.hidden(inputs)[-1] @ self.weights[-1] + self.biases[-1])[..., 0]

    @on_one_core
    def train(self, steps: int = 1_000, rate: float = 1e-2, batch: int = 256) -> SineNets:
        """These nets, trained: Adam on the logistic loss of fresh points, the rate falling to 0."""
        parameters = [p.requires_grad_() for p in (*self.weights, *self.biases)]
        optimizer = torch.optim.Adam(parameters, lr=rate)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
            inputs, above = self.points(batch)
            loss = F.binary_cross_entropy_with_logits(
                self.logits(inputs), above.float(), reduction="none"
            )
            optimizer.zero_grad()
            loss.mean(1).sum().backward()
            optimizer.step()
        for parameter in parameters:
            parameter.requires_grad_(False)
        return self

    @torch.no_grad()
    def accuracies(self, n: int = 1_000) -> np.ndarray:
        """The accuracy of a linear probe on each layer, on fresh points, (nets, 1 + DEPTH)."""
        (inputs, above), (fresh, truth) = self.points(n), self.points(2 * n)
        layers = list(zip(self.hidden(inputs), self.hidden(fresh), strict=True))

        def accuracy(x: Tensor, z: Tensor, net: int) -> float:
            probe = fit_probe(x[net].numpy(), above[net].numpy(), C=100)
            return probe.score(z[net].numpy(), truth[net].numpy())

        return np.array([[accuracy(x, z, net) for x, z in layers] for net in range(self.nets)])
