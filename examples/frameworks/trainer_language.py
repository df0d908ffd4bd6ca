"""Hugging Face's Trainer: a GPT-2, Llama or BERT with random weights reads Shakespeare, lean, watched, without logits.

``convert`` takes transformers' own activations and norms too; ``fuse_loss`` makes output layer and cross entropy one.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))
from _data import Text, shakespeare
from _program import finish, parser

import torchbp
from torchbp.monitor.callbacks.transformers import Watch
from torchbp.swap import fuse_loss

CONTEXT = 64


def model(kind: str, symbols: int, width: int) -> Any:
    """Return a small model from its config; BERT learns to fill in masked characters."""
    shape = {
        "vocab_size": symbols + 1,
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": width // 32,
    }
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=symbols + 1, n_embd=width, n_layer=2, n_head=width // 32, n_positions=CONTEXT
        )
        return transformers.GPT2LMHeadModel(config)
    if kind == "llama":
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**shape, intermediate_size=2 * width)
        )
    config = transformers.BertConfig(
        **shape, intermediate_size=2 * width, max_position_embeddings=CONTEXT
    )
    return transformers.BertForMaskedLM(config)


class Pieces(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The text in pieces of one context; for BERT with one character in seven masked."""

    def __init__(self, numbers: torch.Tensor, text: Text, *, masked: bool) -> None:
        self.rows = numbers[: len(numbers) // CONTEXT * CONTEXT].view(-1, CONTEXT)
        self.mask, self.masked = len(text.symbols), masked

    def __len__(self) -> int:
        """Return the number of pieces."""
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        """Return a piece and its labels."""
        row = self.rows[i]
        if not self.masked:
            return {"input_ids": row, "labels": row}
        hidden = torch.rand(CONTEXT, generator=torch.Generator().manual_seed(i)) < 1 / 7
        hidden[0] = True
        return {
            "input_ids": row.masked_fill(hidden, self.mask),
            "labels": row.masked_fill(~hidden, -100),
        }


def main() -> int:
    """Train and evaluate by the Trainer."""
    options = parser(__doc__, "trainer_language")
    options.add_argument("--model", choices=("gpt2", "llama", "bert"), default="llama")
    options.add_argument("--steps", type=int, default=400)
    options.add_argument("--width", type=int, default=128)
    args = options.parse_args()
    transformers.set_seed(args.seed)
    text = shakespeare(limit=40_000 if args.small else 1_000_000)
    steps, width = (10, 32) if args.small else (args.steps, args.width)

    net = torchbp.lean(model(args.model, len(text.symbols), width))
    if args.model != "bert":
        fuse_loss(net)
    watch = Watch(args.log_dir)
    trainer = transformers.Trainer(
        model=net,
        args=transformers.TrainingArguments(
            output_dir=str(args.log_dir / "trainer"), max_steps=steps, per_device_train_batch_size=16,
            per_device_eval_batch_size=32, learning_rate=3e-3, warmup_steps=steps // 10, logging_steps=10,
            save_strategy="no", report_to=[], use_cpu=not torch.cuda.is_available(), seed=args.seed,
        ),
        train_dataset=Pieces(text.train, text, masked=args.model == "bert"),
        eval_dataset=Pieces(text.test[: 256 * CONTEXT], text, masked=args.model == "bert"),
        callbacks=[watch],
    )  # fmt: skip
    trainer.train()
    nats = trainer.evaluate()["eval_loss"]
    return finish(
        args,
        {"nats per character, held out": nats},
        promised={"below 2.4 nats per character": nats < 2.4},
        monitor=watch.monitor,
    )


if __name__ == "__main__":
    sys.exit(main())
