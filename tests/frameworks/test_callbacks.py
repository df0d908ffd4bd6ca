"""The callbacks inside the real frameworks: the same numbers as by plain autograd. ``make frameworks``."""

import numpy as np
import pytest
import torch
from torch import nn

import torchbp
from torchbp.tensorboard import read

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
F = nn.functional


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def batches():
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(48, 8, generator=g), torch.randint(0, 4, (48,), generator=g)
    return torch.utils.data.TensorDataset(x, y)


def by_hand(micro=1, clip=None, lr=0.1):
    """Gradient norms and clip coefficients of an epoch in batches of 8."""
    model, norms, coefficients = mlp(), [], []
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    loader = list(torch.utils.data.DataLoader(batches(), batch_size=8))
    for start in range(0, len(loader), micro):
        optimizer.zero_grad()
        for x, y in loader[start : start + micro]:
            (F.cross_entropy(model(x), y) / micro).backward()
        norms.append([p.grad.norm().item() for p in model.parameters()])
        if clip:
            total = nn.utils.clip_grad_norm_(model.parameters(), clip).item()
            coefficients.append(min(1.0, clip / total))
        optimizer.step()
    return norms, coefficients


@pytest.mark.parametrize(("micro", "clip"), [(1, None), (1, 0.1), (3, None)])
def test_lightning(tmp_path, micro, clip):
    lightning = pytest.importorskip("lightning.pytorch")
    from torchbp.monitor.callbacks.lightning import Watch

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def training_step(self, batch, _):
            x, y = batch
            return F.cross_entropy(self.net(x), y)

        def validation_step(self, batch, _):
            x, y = batch
            self.log("val_loss", F.cross_entropy(self.net(x), y))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    watch = Watch(tmp_path / "run")
    loader = torch.utils.data.DataLoader(batches(), batch_size=8)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=micro,
        gradient_clip_val=clip,
        default_root_dir=tmp_path,
    )
    trainer.fit(Module(), loader, loader)
    run = read(tmp_path / "run")
    want, coefficients = by_hand(micro, clip)
    np.testing.assert_allclose(run.vectors["gradient_norm"].values, want, rtol=1e-5)
    assert len(run.scalars["loss/train"].values) == len(want)
    assert len(run.scalars["loss/val"].values) == 1
    if clip:
        got = run.scalars["run/clip_coefficient"].values
        np.testing.assert_allclose(got, coefficients[: len(got)], rtol=1e-4)
    assert not any(p._post_accumulate_grad_hooks for p in trainer.model.parameters())
    assert watch.monitor.verdicts == []


@pytest.mark.parametrize(("micro", "clip"), [(1, None), (1, 0.1), (3, None)])
def test_transformers(tmp_path, micro, clip):
    transformers = pytest.importorskip("transformers")
    from torchbp.monitor.callbacks.transformers import Watch

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x, labels):
            logits = self.net(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    watch = Watch(tmp_path / "run")
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=micro,
        max_grad_norm=clip or 0.0,
        num_train_epochs=1,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        learning_rate=0.1,
        lr_scheduler_type="constant",
    )
    model = Model()
    data = [{"x": x, "labels": y} for x, y in batches()]

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(data)

    trainer = InOrder(
        model=model,
        args=arguments,
        train_dataset=data,
        callbacks=[watch],
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None),
    )
    trainer.train()
    run = read(tmp_path / "run")
    want, coefficients = by_hand(micro, clip)
    np.testing.assert_allclose(run.vectors["gradient_norm"].values, want, rtol=1e-4)
    assert len(run.scalars["loss/train"].values) == len(want)
    if clip:
        got = run.scalars["run/clip_coefficient"].values
        np.testing.assert_allclose(got, coefficients[: len(got)], rtol=1e-4)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize("micro", [1, 3])
def test_accelerate_in_a_plain_loop(tmp_path, micro):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=micro)
    model = mlp()
    model, optimizer, loader = accelerator.prepare(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        torch.utils.data.DataLoader(batches(), batch_size=8),
    )
    with torchbp.watch(model, optimizer, log_dir=tmp_path) as monitor:
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
            monitor.log_loss(train=loss)
    run = read(tmp_path)
    want, coefficients = by_hand(micro, 0.1)
    np.testing.assert_allclose(run.vectors["gradient_norm"].values, want, rtol=1e-5)
    got = run.scalars["run/clip_coefficient"].values
    np.testing.assert_allclose(got, coefficients[: len(got)], rtol=1e-4)
