"""What the learner of lesson 03 writes, written: the answers to its exercises."""

import torch


def scale(last, answer, wrong, at_clean, at_corrupted):
    """Each prompt has answers of its own, so rows and ids are paired."""
    rows = torch.arange(len(last))
    difference = (last[rows, answer] - last[rows, wrong]).mean()
    return (difference - at_corrupted) / (at_clean - at_corrupted)


def patch_vector(model, base, other, layer, position):
    """Keep the other run's stream, and put one position of it into the base run."""
    key = ("resid_pre", layer)
    _, kept = model.run_with_cache(other, key)

    def put_in(stream):
        stream[:, position] = kept[key][:, position]
        return stream

    with model.hooks({key: put_in}):
        return model(base)[:, -1]


def sweep(model, clean, corrupted, answer, wrong):
    """One patch for each layer and position."""
    ends = [scale(model(ids)[:, -1], answer, wrong, 1, 0) for ids in (clean, corrupted)]
    effect = torch.zeros(model.n_layers, clean.shape[1])
    for layer in range(model.n_layers):
        for position in range(clean.shape[1]):
            last = patch_vector(model, corrupted, clean, layer, position)
            effect[layer, position] = scale(last, answer, wrong, *ends)
    return effect


def patch_heads(model, base, other, heads):
    """One hook for each layer, which replaces all of its chosen heads."""
    _, kept = model.run_with_cache(other, "z")
    hooks = {}
    for layer in {layer for layer, _ in heads}:
        chosen = [head for each, head in heads if each == layer]

        def put_in(z, layer=layer, chosen=chosen):
            z[:, -1, chosen] = kept["z", layer][:, -1, chosen]
            return z

        hooks["z", layer] = put_in
    with model.hooks(hooks):
        return model(base)[:, -1]


def both_ways(run, clean, corrupted):
    """One wire at a time, each from a fresh copy."""
    low, gap = run(corrupted), run(clean) - run(corrupted)
    enough, needed = torch.zeros(len(clean)), torch.zeros(len(clean))
    for i in range(len(clean)):
        one, rest = corrupted.clone(), clean.clone()
        one[i], rest[i] = clean[i], corrupted[i]
        enough[i], needed[i] = (run(one) - low) / gap, 1 - (run(rest) - low) / gap
    return enough, needed


def restored(model, ids, noise, layer, position):
    """The clean stream is kept first; then one run has the noise, and one clean vector."""
    key = ("resid_pre", layer)
    _, clean = model.run_with_cache(ids, key)

    def put_in(stream):
        stream[:, position] = clean[key][:, position]
        return stream

    with model.hooks({"embed": lambda x: x + noise, key: put_in}):
        return model(ids)[:, -1]


def patch_each(model, base, other, layer, at, taken):
    """Each prompt by itself, so that nothing is padded."""
    key, found = ("resid_pre", layer), []
    for text, source, to, of in zip(base, other, at, taken, strict=True):
        _, kept = model.run_with_cache(source, key)

        def put_in(stream, to=to, vector=kept[key][0, of]):
            stream[0, to] = vector
            return stream

        with model.hooks({key: put_in}):
            found.append(model(text)[0, -1])
    return torch.stack(found)


def attribution(model, base, other, layer, answer, wrong):
    """(other - base) · ∂ difference / ∂ base, for each position."""
    key, held = ("resid_pre", layer), {}
    _, there = model.run_with_cache(other, key)

    def keep(stream):
        held["here"] = stream.requires_grad_()
        return stream

    with model.hooks({key: keep}):
        difference = scale(model(base)[:, -1], answer, wrong, 1, 0)
    (gradient,) = torch.autograd.grad(difference, held["here"])
    return ((there[key] - held["here"]) * gradient).sum((0, 2)).detach()


def bias_slope(model, sentences, p_she):
    """cov(model, world) / var(world), both as log-odds."""
    she, he = (model.to_single_token(word) for word in (" she", " he"))
    last = torch.stack([model(each)[0, -1] for each in sentences])
    said = last[:, she] - last[:, he]  # log p(she) - log p(he): the softmax cancels
    world = torch.logit(torch.tensor(p_she))
    world = world - world.mean()
    return float((said * world).sum() / (world * world).sum())
