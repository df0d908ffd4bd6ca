"""Language: is a mail spam? Bags of hashed words, an embedding and a linear layer, on SpamAssassin's corpus."""

import re
import sys
import zlib

import torch
from _data import mails
from _program import batches, finish, parser, track
from torch import Tensor

import torchbp
from torchbp import nn

_WORD = re.compile(r"[a-z']+|[0-9]+|[$!?%<>]")
_LENGTH = 256


def numbers(text: str, buckets: int) -> list[int]:
    """Return the number of each of the first words; 0 fills up."""
    words = _WORD.findall(text.lower())[:_LENGTH]
    hashed = [1 + zlib.crc32(word.encode()) % (buckets - 1) for word in words]
    return hashed + [0] * (_LENGTH - len(hashed))


class Filter(nn.Module):
    """The mean of the words' embeddings, normalized, then two linear layers: the logit of spam."""

    def __init__(self, buckets: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(buckets, width, padding_idx=0)
        self.judge = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Dropout(0.3),
            nn.Linear(width, 1),
        )

    def forward(self, words: Tensor) -> Tensor:
        """Return logits ``(N,)`` for word numbers ``(N, L)``."""
        count = (words != 0).sum(1, keepdim=True).clamp(min=1)
        return self.judge(self.embedding(words).sum(1) / count)[:, 0]


def main() -> int:
    """Train on four fifths of the mails, test on the rest."""
    options = parser(__doc__, "spam")
    options.add_argument("--epochs", type=int, default=4)
    options.add_argument("--buckets", type=int, default=2**14)
    options.add_argument("--lr", type=float, default=3e-3)
    args = options.parse_args()
    torch.manual_seed(args.seed)
    name, texts, labels = mails()
    if args.small:
        texts, labels = texts[:200], labels[:200]
    x = torch.tensor([numbers(text, args.buckets) for text in texts])
    y = torch.tensor(labels, dtype=torch.float32)
    order = torch.randperm(len(x))
    test, rest = order[: len(x) // 5], order[len(x) // 5 :]
    steps = args.epochs * (len(rest) // 64)

    model = Filter(args.buckets, 32)
    criterion = nn.BCEWithLogitsLoss()
    optimizer = torch.optim.Adam(model.parameters(), args.lr)
    with torchbp.watch(model, optimizer, log_dir=args.log_dir) as monitor:
        for rows in track(batches(len(rest), 64, steps), steps, f"training on {name}"):
            loss = criterion(model(x[rest[rows]]), y[rest[rows]])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.log_loss(train=loss)
        model.eval()
        with torch.no_grad():
            logits = model(x[test])
            monitor.log_loss(val=criterion(logits, y[test]))
    guesses, spam = logits > 0, y[test] > 0
    accuracy = (guesses == spam).float().mean().item()
    lost = (guesses & ~spam).sum().item() / max((~spam).sum().item(), 1)
    return finish(
        args,
        {"accuracy": accuracy, "good mails taken for spam": lost, "mails": float(len(texts))},
        promised={"accuracy is at least 97 %": accuracy >= 0.97},
        monitor=monitor,
    )


if __name__ == "__main__":
    sys.exit(main())
