"""convert, lean, fuse_loss and watch on transformers' own models, with random weights. ``make frameworks``."""

import copy
import pickle

import pytest
import torch

import torchbp
from torchbp.swap import fuse_loss, report

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SMALL, "intermediate_size": 64, "max_position_embeddings": 64}
GPT2 = {
    "vocab_size": 101,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
BERT = {**LLAMA, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GEMMA = {**LLAMA, "head_dim": 8, "num_key_value_heads": 2, "pad_token_id": 0}


def model(name):
    torch.manual_seed(0)
    if name == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))
    if name == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(**BERT))
    if name == "gemma":
        return transformers.GemmaForCausalLM(transformers.GemmaConfig(**GEMMA))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))


def gradients(model, **extra):
    model.train()
    model.zero_grad()
    tokens = torch.arange(48).view(3, 16) * 7 % 101
    labels = tokens.clone()
    labels[0, :5] = -100
    loss = model(input_ids=tokens, labels=labels, **extra).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters()}


def assert_close(actual, expected, rtol=2e-4):
    assert actual.keys() == expected.keys()
    for name, e in expected.items():
        torch.testing.assert_close(
            actual[name], e, rtol=rtol, atol=rtol * float(e.abs().max()), msg=name
        )


OWN = {
    "gpt2": "NewGELUActivation",
    "llama": "LlamaRMSNorm",
    "bert": "GELUActivation",
    "gemma": "GemmaRMSNorm",
}


@pytest.mark.parametrize("name", sorted(OWN))
def test_gradients_are_those_of_the_model(name):
    own = model(name)
    expected = gradients(own)
    ours = torchbp.convert(own)
    assert OWN[name] in {kind for _, kind in report(ours).hand_written}
    assert_close(gradients(ours), expected)
    assert_close(gradients(torchbp.lean(ours)), expected)
    assert_close(gradients(torchbp.revert(ours)), expected, rtol=1e-6)
    assert {type(m) for m in ours.modules()} == {type(m) for m in model(name).modules()}


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma"])
@pytest.mark.parametrize("count", [None, 37, torch.tensor(37)], ids=["mean", "int", "tensor"])
def test_fused_loss(name, count):
    extra = {} if count is None else {"num_items_in_batch": count}
    expected = gradients(model(name), **extra)
    ours = fuse_loss(torchbp.convert(model(name)))
    assert_close(gradients(ours, **extra), expected)
    assert (
        ours(
            input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long)
        ).logits
        is None
    )


def test_fused_loss_is_for_training_with_labels():
    plain, ours = model("llama"), fuse_loss(model("llama"))
    tokens = torch.ones(2, 5, dtype=torch.long)
    torch.testing.assert_close(ours(input_ids=tokens).logits, plain(input_ids=tokens).logits)
    ours.eval(), plain.eval()
    a, b = (m(input_ids=tokens, labels=tokens) for m in (ours, plain))
    torch.testing.assert_close(a.logits, b.logits)
    torch.testing.assert_close(a.loss, b.loss)


def test_fused_loss_holds_no_logits():
    ours = fuse_loss(model("llama"))
    largest = 0

    def note(t):
        nonlocal largest
        largest = max(largest, t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        gradients(ours)
    assert largest < 48 * 101


def test_fused_loss_is_copied_pickled_and_undone():
    ours = fuse_loss(model("llama"))
    expected = gradients(ours)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert_close(gradients(again), expected, rtol=1e-6)
        assert again.loss_function.head is again.get_output_embeddings()
    assert ours.state_dict().keys() == model("llama").state_dict().keys()
    torchbp.revert(ours)
    assert (
        ours(
            input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long)
        ).logits
        is not None
    )
    assert not ours._forward_hooks
    assert not ours._forward_pre_hooks


def test_fused_loss_refuses():
    with pytest.raises(TypeError, match="fuse_loss: expected a causal language model"):
        fuse_loss(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="BertForMaskedLM"):
        fuse_loss(model("bert"))
    config = transformers.Gemma2Config(**GEMMA, final_logit_softcapping=30.0)
    capped = fuse_loss(transformers.Gemma2ForCausalLM(config))
    with pytest.raises(RuntimeError, match="caps, scales or casts them"):
        gradients(capped)
