"""Is the model worth opening? A quick sparse autoencoder on its middle layer, scored by topic.

`quick_sae` trains a small TopK autoencoder; `best_f1` finds, for every topic, the unit whose
activation tells the topic best. The same score for neurons and for random directions is the
control.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from mi_helpers.tinyworld.tokenizer import token_posterior

KNOWN = 0.9  # a token counts where a perfect reader is this sure of the topic


@dataclass
class Harvest:
    """Activations of tokens from which the topic can be known.

    resid (n, d_model) after the middle block · neurons (n, d_mlp) inside it · topic (n,)
    """

    resid: torch.Tensor
    neurons: torch.Tensor
    topic: torch.Tensor


@torch.no_grad()
def harvest(model, encoded, world, tokenizer) -> Harvest:
    """Residual and neurons at the middle layer of a Gemma2ForCausalLM, with each token's topic.

    encoded  prose documents (`skills.Encoded`); `<bos>`, `<eos>` and padding are left out
    """
    layer = model.config.num_hidden_layers // 2
    block, caught = model.model.layers[layer], {}
    handle = block.mlp.down_proj.register_forward_pre_hook(
        lambda _module, args: caught.__setitem__("post", args[0])
    )
    resid, neurons, topics = [], [], []
    try:
        for start in range(0, len(encoded.ids), 64):
            ids = encoded.ids[start : start + 64].to(model.device)
            states = model.model(input_ids=ids, output_hidden_states=True, use_cache=False)
            after = states.hidden_states[layer + 1].float().cpu()
            post = caught["post"].float().cpu()
            for i in range(len(ids)):
                sure = token_posterior(tokenizer, world, encoded.documents[start + i])
                positions = [t for t in range(1, len(sure)) if sure[t].max() >= KNOWN]
                resid.append(after[i, positions])
                neurons.append(post[i, positions])
                topics.extend(int(sure[t].argmax()) for t in positions)
    finally:
        handle.remove()
    return Harvest(torch.cat(resid), torch.cat(neurons), torch.tensor(topics))


def quick_sae(x: torch.Tensor, width: int, k: int, steps: int, seed: int = 0):
    """A TopK autoencoder of x (n, d), trained with Adam; returns `encode`, (n, d) → (n, width).

    f = TopK(ReLU((x - b) W_enc + b_enc)), x̂ = f W_dec + b, rows of W_dec of unit norm
    (Gao et al. 2024, equation 4, without the auxiliary loss).
    """
    generator = torch.Generator().manual_seed(seed)
    b = x.mean(0)
    scale = (x - b).pow(2).sum(-1).mean().sqrt()
    x = (x - b) / scale
    W_dec = F.normalize(torch.randn(width, x.shape[1], generator=generator), dim=-1)
    W_enc, b_enc = W_dec.T.clone(), torch.zeros(width)
    parameters = [p.requires_grad_() for p in (W_dec, W_enc, b_enc)]
    optimizer = torch.optim.Adam(parameters, lr=4e-3, betas=(0.9, 0.99))

    def sparse(batch):
        value, index = torch.relu(batch @ W_enc + b_enc).topk(k, dim=-1)
        return torch.zeros(len(batch), width).scatter(-1, index, value)

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1.0, 5 * (1 - step / steps), (step + 1) / 50)
        batch = x[torch.randint(len(x), (2_048,), generator=generator)]
        loss = (sparse(batch) @ W_dec - batch).pow(2).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            W_dec.copy_(F.normalize(W_dec, dim=-1))

    @torch.no_grad()
    def encode(y):
        return torch.cat([sparse((part - b) / scale) for part in y.split(4_096)])

    encode.loss = loss.item()
    return encode


def f1_table(units: torch.Tensor, topic: torch.Tensor, cuts: torch.Tensor, n: int) -> torch.Tensor:
    """F1 of 'unit above its cut' as a test for each topic: (n_topics, n_units)."""
    fires = (units > cuts).float()  # (tokens, units)
    truth = F.one_hot(topic, n).float()  # (tokens, topics)
    both = truth.T @ fires
    return 2 * both / (truth.sum(0)[:, None] + fires.sum(0)[None]).clamp(min=1)


def best_f1(units: torch.Tensor, topic: torch.Tensor, n: int, cuts: int = 12) -> np.ndarray:
    """For each topic, the best unit's F1 on the second half of the tokens, (n,).

    Unit and threshold (a quantile of the unit's activation) are chosen on the first half.
    """
    half = len(units) // 2
    best, test = torch.full((n,), -1.0), torch.zeros(n)
    for q in 1 - torch.logspace(-2.3, -0.3, cuts):
        cut = units[:half].kthvalue(max(1, int(q * half)), dim=0).values.clamp(min=0)
        chosen = f1_table(units[:half], topic[:half], cut, n)
        scored = f1_table(units[half:], topic[half:], cut, n)
        value, unit = chosen.max(1)
        better = value > best
        best = torch.where(better, value, best)
        test = torch.where(better, scored.gather(1, unit[:, None]).squeeze(1), test)
    return test.numpy()


def topic_scores(
    train: Harvest, test: Harvest, n: int, steps: int = 1_500, seed: int = 0
) -> dict[str, np.ndarray]:
    """Best F1 per topic of SAE latents, neurons (either sign) and 1,024 random directions."""
    d_model = train.resid.shape[1]
    encode = quick_sae(train.resid, 8 * d_model, 32, steps, seed)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(d_model, 1_024, generator=generator)
    centred = test.resid - train.resid.mean(0)
    signed = torch.cat([test.neurons, -test.neurons], 1)
    return {
        "latents": best_f1(encode(test.resid), test.topic, n),
        "neurons": best_f1(signed, test.topic, n),
        "random": best_f1(centred @ directions, test.topic, n),
    }
