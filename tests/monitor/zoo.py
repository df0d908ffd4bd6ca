"""Small real runs, sick with a known cause or healthy. ``make zoo`` holds the diagnoses against them."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from sklearn.datasets import load_digits
from torch import nn

import torchbp

F = nn.functional


@dataclass
class Run:
    """A run.

    Attributes:
        model: Makes the model.
        kind: What it suffers from; empty for a healthy one.
        also: What else may be said about it.
        optimizer: Makes the optimizer of the parameters.
        loss: Loss of model and batch.
        batch: Makes a batch from a generator: inputs and targets.
        steps: Number of steps.
        clip: Norm that gradients are clipped to.
        schedule: Learning rate factor by step.
        validate: Validation loss of the model, every 20 steps.
        micro: Number of micro-batches.
    """

    model: Callable[[], nn.Module]
    kind: str = ""
    also: tuple[str, ...] = ()
    optimizer: Callable[..., torch.optim.Optimizer] = lambda p: torch.optim.Adam(p, lr=1e-3)
    loss: Callable[..., torch.Tensor] = lambda m, x, y: F.cross_entropy(m(x), y)
    batch: Callable[..., tuple] = field(default_factory=lambda: digits)
    steps: int = 200
    clip: float | None = None
    schedule: Callable[[int], float] | None = None
    validate: Callable[..., torch.Tensor] | None = None
    micro: int = 1


def train(run: Run, seed: int = 0, share: float | None = None, device: str = "cpu"):
    """Train; watched as often as can be, so that a run is the same every time."""
    torch.manual_seed(seed)
    model = run.model().to(device)
    optimizer = run.optimizer([p for p in model.parameters() if p.requires_grad])
    scheduler = run.schedule and torch.optim.lr_scheduler.LambdaLR(optimizer, run.schedule)
    g = torch.Generator().manual_seed(seed)
    with torchbp.watch(model, optimizer, share=share) as monitor:
        for step in range(run.steps):
            optimizer.zero_grad()
            for _ in range(run.micro):
                loss = run.loss(model, *(t.to(device) for t in run.batch(g))) / run.micro
                loss.backward()
            if run.clip:
                nn.utils.clip_grad_norm_(model.parameters(), run.clip)
            optimizer.step()
            if scheduler:
                scheduler.step()
            monitor.log_loss(train=loss.detach() * run.micro)
            if run.validate and step % 20 == 19:
                with torch.no_grad():
                    monitor.log_loss(val=run.validate(model))
    return model, monitor


# ---------------------------------------------------------------------------------------- data
_X, _Y = (torch.tensor(a) for a in load_digits(return_X_y=True))
_X = (_X.float() / 16 - 0.3) / 0.38


def digits(g, size=64):
    index = torch.randint(0, 1500, (size,), generator=g)
    return _X[index], _Y[index]


def images(g):
    x, y = digits(g)
    return x.view(-1, 1, 8, 8), y


def rows(g):
    x, y = digits(g)
    return x.view(-1, 8, 8), y


def few(g):
    index = torch.randint(0, 40, (20,), generator=g)
    return _X[index] + 0, (_Y[index] + (index % 3 == 0) * 3) % 10


def regression(g):
    x = torch.randn(64, 16, generator=g)
    return x, (x[:, :1] * x[:, 1:2]).tanh()


def tokens(g):
    x = torch.randint(0, 32, (16, 24), generator=g)
    x[:, 1::2] = (x[:, ::2] * 3 + 1) % 32  # every second token follows from the one before
    return x[:, :-1], x[:, 1:]


def pixels(g, steps=40):
    """A sequence whose class is told by its first four steps."""
    x = torch.randn(32, steps, 4, generator=g)
    return x, (x[:, :4].mean((1, 2)) > 0).long()


def quiet_pixels(g):
    """The same, so small that tanh stays where it is linear."""
    x, y = pixels(g)
    return x * 1e-9, y


def lm_loss(model, x, y):
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def mse(model, x, y):
    return F.mse_loss(model(x), y)


def val_digits(model, *shape):
    device = next(model.parameters()).device
    return F.cross_entropy(
        model(_X[1500:].view(-1, *(shape or (64,))).to(device)), _Y[1500:].to(device)
    )


# -------------------------------------------------------------------------------------- models
def mlp(depth=3, width=64, act=nn.ReLU, norm=None, gain=None, first=64, last=10):
    layers: list[nn.Module] = []
    sizes = [first] + [width] * depth
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), *([norm(b)] if norm else []), act()]
    model = nn.Sequential(*layers, nn.Linear(width, last))
    if gain:
        for layer in model:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)
                layer.weight.data *= gain
    return model


def xavier(model):
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return model


class Residual(nn.Module):
    def __init__(self, width, norm=True, zero=False, scale=False):
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        self.scale = nn.Parameter(torch.zeros(1)) if scale else 1.0
        if zero:
            nn.init.zeros_(self.down.weight)

    def forward(self, x):
        return x + self.scale * self.down(F.relu(self.up(self.norm(x))))


def residual(depth=15, width=64, **options):
    blocks = [Residual(width, **options) for _ in range(depth)]
    return nn.Sequential(nn.Linear(64, width), *blocks, nn.LayerNorm(width), nn.Linear(width, 10))


class ConvBlock(nn.Module):
    def __init__(self, a, b, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(a, b, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(b), nn.BatchNorm2d(b)
        self.conv2 = nn.Conv2d(b, b, 3, 1, 1, bias=False)
        self.short = nn.Conv2d(a, b, 1, stride, bias=False) if a != b else nn.Identity()

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        return F.relu(out + self.short(x))


def resnet():
    blocks = [ConvBlock(8, 8), ConvBlock(8, 16, 2), ConvBlock(16, 16), ConvBlock(16, 32, 2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    return nn.Sequential(nn.Conv2d(1, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), *blocks, *head)


def convnet():
    parts = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    parts += [nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*parts, nn.Linear(512, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 10))


class Block(nn.Module):
    def __init__(self, width=32, heads=4):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x):
        b, t, c = x.shape
        parts = self.qkv(self.n1(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, c))
        return x + self.down(F.gelu(self.up(self.n2(x))))


class GPT(nn.Module):
    def __init__(self, depth=6, width=32, vocabulary=32, tied=True, init=True):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(32, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        if init:
            for module in self.modules():
                if isinstance(module, (nn.Linear, nn.Embedding)):
                    nn.init.normal_(module.weight, std=0.02)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, x):
        h = self.tokens(x) + self.places(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


class Recurrent(nn.Module):
    def __init__(self, cell=nn.LSTM, size=8, width=32, classes=10):
        super().__init__()
        self.enter = nn.Linear(size, width)
        self.rnn, self.head = cell(width, width, batch_first=True), nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.rnn(self.enter(x))[0][:, -1])


class Unrolled(nn.Module):
    def __init__(self, gain=1.0, size=4, width=24, classes=2, bias=True):
        super().__init__()
        self.cell, self.head = nn.RNNCell(size, width, bias), nn.Linear(width, classes)
        nn.init.orthogonal_(self.cell.weight_hh)
        self.cell.weight_hh.data *= gain

    def forward(self, x):
        h = x.new_zeros(len(x), self.cell.hidden_size)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return self.head(h)


class Towers(nn.Module):
    """Two towers of unlike depth, joined."""

    def __init__(self):
        super().__init__()
        self.a, self.b = mlp(1, 32, last=16), mlp(4, 32, last=16)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(torch.cat([self.a(x), self.b(x)], 1))


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = mlp(2, 32, last=4), mlp(2, 32, first=4, last=64)

    def forward(self, x):
        return self.decoder(self.encoder(x))


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = mlp(2, 32, last=32), mlp(1, 32, first=32)

    def forward(self, x):
        return self.head(self.body(x).detach())


class Experts(nn.Module):
    """A mixture of eight, routed by chance too; the last ones get no sample for 50 steps at times."""

    def __init__(self):
        super().__init__()
        self.stem, self.router, self.head = nn.Linear(64, 32), nn.Linear(32, 8), nn.Linear(32, 10)
        self.experts = nn.ModuleList(mlp(1, 32, first=32, last=32) for _ in range(8))

    def forward(self, x):
        x = self.stem(x).relu()
        scores = self.router(x) - torch.linspace(0, 3.5, 8, device=x.device)
        chosen = (scores - torch.empty_like(scores).exponential_().log()).argmax(1)  # Gumbel noise
        weights = scores.softmax(1).gather(1, chosen[:, None])[:, 0]
        out = x
        for k, expert in enumerate(self.experts):
            mine = (chosen == k).nonzero()[:, 0]
            if len(mine):
                out = out.index_add(0, mine, expert(x[mine]) * weights[mine, None])
        return self.head(out)


class Staged(nn.Module):
    """Does something else every 30 steps: ``stage`` takes the model and which time it is."""

    def __init__(self, stage, *parts):
        super().__init__()
        self.parts, self.stage, self.calls = nn.ModuleList(parts), stage, 0

    def forward(self, x):
        which, self.calls = self.calls // 30, self.calls + 1
        return self.stage(self.parts, which, x)


def heads_in_turns(parts, which, x):
    return parts[1 + which % 3](parts[0](x).relu())


def freezing(parts, which, x):
    """One layer more each time, from the first on."""
    for k, part in enumerate(parts):
        part.requires_grad_(k >= which % len(parts))
        x = part(x)
    return x


def unfreezing(parts, which, x):
    """One layer more each time, from the last on."""
    for k, part in enumerate(parts):
        part.requires_grad_(k >= len(parts) - 1 - which)
        x = part(x)
    return x


def cut_later(parts, which, x):
    x = parts[0](x)
    return parts[1](x.detach() if which > 2 else x)


def without_grad(parts, _, x):
    with torch.no_grad():
        x = parts[0](x)
    return parts[1](x)


def staged(stage):
    return Staged(stage, *(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(4)), mlp(1))


def frozen():
    model = mlp(6, norm=nn.LayerNorm)
    for layer in model[:9]:
        layer.requires_grad_(False)
    return model


def zero_head(model):
    nn.init.zeros_(model[-1].weight)
    nn.init.zeros_(model[-1].bias)
    return model


def with_dead(model, share):
    for layer in model:
        if isinstance(layer, nn.Linear) and layer.out_features > 10:
            layer.bias.data[: int(share * layer.out_features)] = -50.0
    return model


def sgd(lr, momentum=0.9, **options):
    return lambda p: torch.optim.SGD(p, lr=lr, momentum=momentum, **options)


def adam(lr, **options):
    return lambda p: torch.optim.AdamW(p, lr=lr, **options)


def warmup(step):
    return min(1.0, (step + 1) / 100)


def cosine(steps):
    return lambda step: 0.5 * (1 + torch.cos(torch.tensor(step / steps * 3.14159)).item())


class Nan(nn.Module):
    """Takes a root of what falls to 0."""

    def forward(self, x):
        return (x * (x > 0)).sqrt()


def _large(model, factor):
    for layer in model[:-1]:
        if isinstance(layer, nn.Linear):
            layer.weight.data *= factor
    return model


class _WithUnused(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.spare = mlp(3), nn.Linear(64, 64)

    def forward(self, x):
        return self.body(x)


def _spiky(g):
    x, y = digits(g)
    if torch.rand((), generator=g) < 0.015:
        x = x * 60
    return x, y


SICK = {
    "sigmoid-12": Run(lambda: mlp(12, act=nn.Sigmoid), "vanishing"),
    "sigmoid-20-sgd": Run(lambda: mlp(20, act=nn.Sigmoid), "vanishing", optimizer=sgd(0.05)),
    "tanh-40-small": Run(lambda: mlp(40, act=nn.Tanh), "vanishing", optimizer=sgd(0.01)),
    "relu-30-default": Run(lambda: mlp(30), "vanishing", ("dead",), optimizer=sgd(0.01)),
    "relu-20-too-small": Run(lambda: mlp(20, gain=0.5), "vanishing", ("dead",), sgd(0.01)),
    "sigmoid-wide-16": Run(lambda: mlp(16, 128, nn.Sigmoid), "vanishing"),
    "sigmoid-clipped": Run(lambda: mlp(16, act=nn.Sigmoid), "vanishing", ("clipping",), clip=0.01),
    "relu-20-gain-1.6": Run(
        lambda: mlp(20, gain=1.6),
        "exploding",
        ("nonfinite", "dead", "spike", "disconnected"),
        sgd(1e-9),
    ),
    "relu-20-gain-1.6-clipped": Run(
        lambda: mlp(20, gain=1.6),
        "exploding",
        ("clipping", "dead", "update_too_small"),
        sgd(1e-4),
        clip=1.0,
    ),
    "linear-30-gain-2": Run(
        lambda: mlp(30, act=nn.Identity, gain=2.0),
        "exploding",
        ("nonfinite", "update_too_large"),
        sgd(1e-12),
    ),
    "relu-12-gain-3-nan": Run(
        lambda: mlp(12, gain=3.0),
        "exploding",
        ("nonfinite", "update_too_large", "dead", "disconnected"),
    ),
    "diverges": Run(
        lambda: mlp(3),
        "nonfinite",
        ("update_too_large", "exploding", "spike", "dead", "disconnected"),
        sgd(50.0),
        lambda m, x, y: F.mse_loss(m(x), F.one_hot(y, 10).float() * 100),
    ),
    "root-of-zero": Run(
        lambda: nn.Sequential(nn.Linear(64, 32), Nan(), nn.Linear(32, 10)), "nonfinite"
    ),
    "log-of-zero": Run(
        lambda: mlp(2), "nonfinite", loss=lambda m, x, y: -(F.relu(m(x)).log()).mean()
    ),
    "dead-bias": Run(lambda: with_dead(mlp(3), 0.6), "dead"),
    "rate-far-too-large": Run(
        lambda: mlp(3),
        "update_too_large",
        ("dead", "vanishing", "exploding", "disconnected", "spike"),
        adam(1.0),
    ),
    "dead-all": Run(lambda: with_dead(mlp(3), 1.0), "dead", ("disconnected", "vanishing")),
    "tanh-large-weights": Run(lambda: _large(mlp(3, act=nn.Tanh), 8), "saturated", ("exploding",)),
    "sigmoid-large-inputs": Run(
        lambda: mlp(2, act=nn.Sigmoid),
        "saturated",
        ("vanishing",),
        batch=lambda g: (lambda x, y: (x * 100, y))(*digits(g)),
    ),
    "tanh-large-clipped": Run(
        lambda: _large(mlp(4, act=nn.Tanh), 10), "saturated", ("exploding", "clipping"), clip=0.1
    ),
    "rate-too-small": Run(lambda: mlp(3), "update_too_small", optimizer=sgd(1e-7)),
    "rate-too-small-adam": Run(lambda: residual(6), "update_too_small", optimizer=adam(1e-7)),
    "rate-too-small-conv": Run(convnet, "update_too_small", optimizer=sgd(1e-7), batch=images),
    "rate-too-large-adam": Run(
        lambda: mlp(3, norm=nn.LayerNorm),
        "update_too_large",
        ("dead", "spike", "disconnected"),
        adam(0.3),
        steps=60,
    ),
    "rate-too-large-residual": Run(
        lambda: residual(6),
        "update_too_large",
        ("dead", "spike", "exploding", "nonfinite", "vanishing", "disconnected"),
        adam(0.3),
        steps=60,
    ),
    "detached": Run(Detached, "disconnected"),
    "unused": Run(_WithUnused, "disconnected"),
    "cut-later": Run(lambda: Staged(cut_later, mlp(2, last=64), mlp(1)), "disconnected"),
    "without-grad": Run(lambda: Staged(without_grad, mlp(2, last=64), mlp(1)), "disconnected"),
    "overfits": Run(lambda: mlp(2, 256), "overfitting", batch=few, validate=val_digits, steps=300),
    "overfits-deep": Run(
        lambda: residual(4, 128), "overfitting", batch=few, validate=val_digits, steps=300
    ),
    "unrolled-40": Run(lambda: Unrolled(0.7), "vanishing", batch=pixels),
    "rnn-40": Run(lambda: Recurrent(nn.RNN, 4, classes=2), "vanishing", batch=pixels),
    "lstm-100": Run(
        lambda: Recurrent(nn.LSTM, 4, classes=2), "vanishing", batch=lambda g: pixels(g, 100)
    ),
    "unrolled-explodes": Run(
        lambda: Unrolled(1.5, bias=False),
        "exploding",
        ("update_too_small",),
        sgd(1e-9),
        batch=quiet_pixels,
    ),
    "always-clipped": Run(lambda: mlp(3), "clipping", clip=0.01, optimizer=sgd(0.1), steps=400),
    "always-clipped-gpt": Run(GPT, "clipping", loss=lm_loss, batch=tokens, clip=0.01, steps=400),
    "spiky-batch": Run(
        lambda: mlp(3),
        "spike",
        ("update_too_large",),
        batch=_spiky,
        optimizer=sgd(1e-3),
        steps=500,
    ),
}

HEALTHY = {
    "mlp": Run(mlp),
    "mlp-sgd": Run(mlp, optimizer=sgd(0.05)),
    "mlp-seeded": Run(lambda: mlp(4, 128), steps=400),
    "relu-he-20": Run(lambda: mlp(20, gain=1.0)),
    "relu-he-10-wide": Run(lambda: mlp(10, 128, gain=1.0), optimizer=sgd(0.01)),
    "tanh-xavier": Run(lambda: xavier(mlp(6, act=nn.Tanh))),
    "tanh-sure": Run(lambda: xavier(mlp(3, act=nn.Tanh)), optimizer=adam(1e-2), steps=400),
    "adam-always-clipped-at-1": Run(
        mlp, loss=lambda m, x, y: 5 * F.cross_entropy(m(x), y), clip=1.0, steps=400
    ),
    "sigmoid-sure": Run(lambda: xavier(mlp(2, act=nn.Sigmoid)), optimizer=adam(1e-2), steps=600),
    "gelu": Run(lambda: mlp(6, act=nn.GELU)),
    "selu-20": Run(lambda: mlp(20, act=nn.SELU, norm=nn.LayerNorm)),
    "batch-norm-20": Run(lambda: mlp(20, norm=nn.BatchNorm1d)),
    "layer-norm-20": Run(lambda: mlp(20, norm=nn.LayerNorm)),
    "residual-15": Run(residual, optimizer=sgd(0.05)),
    "residual-30": Run(lambda: residual(30)),
    "residual-zero-initialised": Run(lambda: residual(zero=True)),
    "rezero-30": Run(lambda: residual(30, norm=False, scale=True)),
    "zero-head": Run(lambda: zero_head(mlp(4))),
    "zero-head-warm-up": Run(lambda: zero_head(residual(8)), schedule=warmup, optimizer=sgd(0.01)),
    "warm-up-cosine": Run(
        lambda: residual(8), schedule=lambda s: warmup(s) * cosine(400)(s), steps=400
    ),
    "converged": Run(mlp, optimizer=adam(1e-2), steps=800),
    "converged-sgd": Run(mlp, optimizer=sgd(0.1), steps=800),
    "converged-residual": Run(lambda: residual(8), optimizer=adam(3e-3), steps=600),
    "frozen": Run(frozen),
    "freezing": Run(lambda: staged(freezing)),
    "unfreezing": Run(lambda: staged(unfreezing)),
    "experts": Run(Experts, batch=lambda g: digits(g, 12), steps=400),
    "heads-in-turns": Run(
        lambda: Staged(heads_in_turns, mlp(2, last=64), *(nn.Linear(64, 10) for _ in range(3)))
    ),
    "resnet": Run(resnet, batch=images, optimizer=sgd(0.05, weight_decay=5e-4)),
    "convnet": Run(convnet, batch=images),
    "convnet-dropout-val": Run(
        convnet,
        batch=images,
        validate=lambda m: val_digits(m, 1, 8, 8),
    ),
    "gpt": Run(GPT, loss=lm_loss, batch=tokens, clip=1.0, optimizer=adam(1e-3)),
    "gpt-untied": Run(lambda: GPT(tied=False), loss=lm_loss, batch=tokens, schedule=warmup),
    "gpt-default-init": Run(lambda: GPT(tied=False, init=False), loss=lm_loss, batch=tokens),
    "lstm": Run(Recurrent, batch=rows),
    "gru": Run(lambda: Recurrent(nn.GRU), batch=rows, clip=5.0),
    "rnn-short": Run(lambda: Recurrent(nn.RNN), batch=rows),
    "unrolled-orthogonal": Run(Unrolled, batch=lambda g: pixels(g, 12), steps=300),
    "regression": Run(lambda: mlp(2, 32, first=16, last=1), loss=mse, batch=regression),
    "autoencoder": Run(Autoencoder, loss=lambda m, x, y: F.mse_loss(m(x), x)),
    "towers": Run(Towers),
    "accumulated": Run(mlp, micro=4, steps=100),
    "embedding-bag": Run(
        lambda: nn.Sequential(nn.EmbeddingBag(32, 16), nn.ReLU(), nn.Linear(16, 2)),
        batch=lambda g: (
            torch.randint(0, 32, (64, 5), generator=g),
            torch.randint(0, 2, (64,), generator=g),
        ),
    ),
    "noise-only": Run(
        mlp,
        batch=lambda g: (
            torch.randn(64, 64, generator=g),
            torch.randint(0, 10, (64,), generator=g),
        ),
    ),
    "logistic": Run(lambda: nn.Linear(64, 10), optimizer=sgd(0.1)),
    "sigmoid-shallow": Run(lambda: mlp(2, act=nn.Sigmoid), steps=400),
    "hinge": Run(mlp, loss=lambda m, x, y: F.multi_margin_loss(m(x), y), steps=600),
    "label-smoothing": Run(
        lambda: mlp(5, norm=nn.LayerNorm),
        loss=lambda m, x, y: F.cross_entropy(m(x), y, label_smoothing=0.1),
    ),
    "occasionally-clipped": Run(mlp, clip=3.0, optimizer=sgd(0.05), steps=400),
}
