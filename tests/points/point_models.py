"""Models written with hook points, on any library's classes, and the slow obvious way to see what passes them."""

import torch
from torch import nn

from tdcache.points import HookedRootModule, HookPoint


def small_transformer(root=HookedRootModule, point=HookPoint, width=8, heads=2, layers=2, vocabulary=11):
    """A transformer whose classes are made of ``root`` and ``point``: one body for two libraries."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(width, 3 * width)
            self.out = nn.Linear(width, width)
            self.hook_q, self.hook_k, self.hook_v, self.hook_z = point(), point(), point(), point()
            self.hook_attn_scores, self.hook_pattern = point(), point()

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, heads, width // heads)).unbind(-3)
            q, k, v = self.hook_q(q), self.hook_k(k), self.hook_v(v)
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / (width // heads) ** 0.5
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            pattern = self.hook_pattern(self.hook_attn_scores(scores.masked_fill(~mask, -1e4)).softmax(-1))
            return self.out(self.hook_z(torch.einsum("bhqk,bkhd->bqhd", pattern, v)).flatten(-2))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = Attention()
            self.mlp_in, self.mlp_out = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
            self.hook_resid_pre, self.hook_resid_mid, self.hook_resid_post = point(), point(), point()
            self.hook_mlp_pre, self.hook_mlp_post = point(), point()

        def forward(self, x):
            x = self.hook_resid_pre(x)
            x = self.hook_resid_mid(x + self.attn(x))
            hidden = self.hook_mlp_post(torch.nn.functional.gelu(self.hook_mlp_pre(self.mlp_in(x))))
            return self.hook_resid_post(x + self.mlp_out(hidden))

    class Transformer(root):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(vocabulary, width)
            self.hook_embed = point()
            self.blocks = nn.ModuleList(Block() for _ in range(layers))
            self.unembed = nn.Linear(width, vocabulary)
            self.setup()

        def forward(self, tokens, return_type="logits"):
            x = self.hook_embed(self.embed(tokens))
            for block in self.blocks:
                x = block(x)
            logits = self.unembed(x)
            return logits if return_type == "logits" else logits.square().mean()

    torch.manual_seed(0)
    return Transformer()


def some_tokens(batch=2, length=5, vocabulary=11):
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


class Branches(HookedRootModule):
    """One tensor through two points and past them: ``2 a(x) + 3 b(x) + 5 x``, then a third point."""

    def __init__(self, width=3):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.a, self.b, self.sum = HookPoint(), HookPoint(), HookPoint()
        self.setup()

    def forward(self, x):
        x = self.linear(x)
        return self.sum(2 * self.a(x) + 3 * self.b(x) + 5 * x)


class Twice(HookedRootModule):
    """One point that fires twice in a forward."""

    def __init__(self):
        super().__init__()
        self.step = HookPoint()
        self.setup()

    def forward(self, x):
        return self.step(self.step(x + 1) * 10)


class InPlace(HookedRootModule):
    """An in-place operation right behind a point."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.before, self.after = HookPoint(), HookPoint()
        self.setup()

    def forward(self, x):
        return self.after(self.before(self.linear(x)).relu_())


def by_hand(model, call):
    """A copy of what each hook point of ours passes on in ``call()``, by plain hooks: ``{name: [one per firing]}``."""
    seen = {name: [] for name in model.hook_dict}
    handles = [
        point.register_forward_hook(lambda module, args, output, name=name: seen[name].append(output.detach().clone()))
        for name, point in model.hook_dict.items()
    ]
    call()
    for handle in handles:
        handle.remove()
    return seen


def gradients_by_hand(model, names, call):
    """The gradient of ``call()`` (a scalar) at each point, by ``torch.autograd.grad`` on outputs plus zero."""
    outputs = {}

    def keep(name):
        def hook(module, args, output):
            outputs[name] = output * 1
            return outputs[name] * 1

        return hook

    handles = [model.hook_dict[name].register_forward_hook(keep(name)) for name in names]
    scalar = call()
    for handle in handles:
        handle.remove()
    return dict(zip(outputs, torch.autograd.grad(scalar, list(outputs.values())), strict=True))
