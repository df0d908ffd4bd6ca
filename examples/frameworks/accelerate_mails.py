"""accelerate: an ordinary loop under accelerate, watched: is a mail spam?"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parent.parent))
from _data import mails
from _program import finish, parser
from spam import Filter, numbers

import torchbp
import torchbp.functional as F


def main() -> int:
    """Train on four fifths of the mails, test on the rest."""
    options = parser(__doc__, "accelerate_mails")
    options.add_argument("--epochs", type=int, default=4)
    args = options.parse_args()
    torch.manual_seed(args.seed)
    _, texts, labels = mails()
    if args.small:
        texts, labels = texts[:200], labels[:200]
    x = torch.tensor([numbers(text, 2**14) for text in texts])
    y = torch.tensor(labels, dtype=torch.float32)
    test = torch.arange(len(x)) % 5 == 0
    rest = torch.utils.data.TensorDataset(x[~test], y[~test])

    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=not torch.cuda.is_available())
    model = Filter(2**14, 32)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    loader = torch.utils.data.DataLoader(rest, batch_size=32, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    with torchbp.watch(model, optimizer, log_dir=args.log_dir) as monitor:
        for _ in range(args.epochs):
            for words, spam in loader:
                with accelerator.accumulate(model):
                    loss = F.binary_cross_entropy_with_logits(model(words), spam)
                    accelerator.backward(loss)
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                    monitor.log_loss(train=loss)
        model.eval()
        with torch.no_grad():
            guesses = model(x[test].to(accelerator.device)).cpu() > 0
    accuracy = (guesses == (y[test] > 0)).float().mean().item()
    return finish(
        args,
        {"accuracy": accuracy},
        promised={"accuracy is at least 97 %": accuracy >= 0.97},
        monitor=monitor,
    )


if __name__ == "__main__":
    sys.exit(main())
