"""Architectures of transformers, tiny and with random weights: converted they learn the same, lean to the same bits."""

import copy

import pytest
import torch

import torchbp
from torchbp.recompute import _graph, _scope
from torchbp.recompute._kept import Share

transformers = pytest.importorskip("transformers", reason="run by `make frameworks`")

WORDS, WIDTH = 500, 64
LLAMA = {
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
GROUPED = LLAMA | {"num_key_value_heads": 2}
GPT2 = {"vocab_size": WORDS, "n_embd": WIDTH, "n_layer": 2, "n_head": 4}
SEQ2SEQ = {
    "vocab_size": WORDS,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
}
OPT = {
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 128,
    "word_embed_proj_dim": WIDTH,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def words(count=4, length=32):
    rows = torch.randint(5, WORDS, (count, length))
    return {"input_ids": rows, "labels": rows}


def pictures():
    return {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.randint(0, 2, (4,))}


def sounds():
    return {"input_values": torch.randn(2, 2000), "labels": torch.tensor([0, 1])}


def spectra():
    return {"input_features": torch.randn(2, 20, 100), "labels": torch.randint(5, WORDS, (2, 16))}


# Model, its configuration, the arguments of that, a batch
ARCHITECTURES = [
    ("GPT2LMHeadModel", "GPT2Config", GPT2, words),
    ("LlamaForCausalLM", "LlamaConfig", LLAMA, words),
    ("MistralForCausalLM", "MistralConfig", GROUPED, words),
    ("Qwen2ForCausalLM", "Qwen2Config", GROUPED, words),
    ("Qwen3ForCausalLM", "Qwen3Config", GROUPED | {"head_dim": 16}, words),
    ("Gemma2ForCausalLM", "Gemma2Config", GROUPED | {"head_dim": 16}, words),
    ("Phi3ForCausalLM", "Phi3Config", LLAMA | {"pad_token_id": 0}, words),
    ("MixtralForCausalLM", "MixtralConfig", GROUPED | {"num_local_experts": 4}, words),
    ("OPTForCausalLM", "OPTConfig", OPT, words),
    (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": WORDS, "hidden_size": WIDTH, "n_layer": 2, "n_head": 4},
        words,
    ),
    ("GPTNeoXForCausalLM", "GPTNeoXConfig", LLAMA, words),
    (
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": WORDS, "hidden_size": WIDTH, "num_hidden_layers": 2},
        words,
    ),
    ("BertForMaskedLM", "BertConfig", LLAMA, words),
    ("RobertaForMaskedLM", "RobertaConfig", LLAMA, words),
    ("DebertaV2ForMaskedLM", "DebertaV2Config", LLAMA, words),
    (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": WORDS,
            "d_model": WIDTH,
            "d_kv": 16,
            "d_ff": 128,
            "num_layers": 2,
            "num_heads": 4,
        }
        | {"decoder_start_token_id": 0},
        words,
    ),
    ("BartForConditionalGeneration", "BartConfig", SEQ2SEQ, words),
    (
        "ViTForImageClassification",
        "ViTConfig",
        {k: v for k, v in LLAMA.items() if k != "vocab_size"} | {"image_size": 32, "patch_size": 4},
        pictures,
    ),
    (
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]}
        | {"window_size": 4},
        pictures,
    ),
    (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 1, 1]},
        pictures,
    ),
    (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2]},
        pictures,
    ),
    (
        "Wav2Vec2ForSequenceClassification",
        "Wav2Vec2Config",
        LLAMA
        | {"conv_dim": (32, 32), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
        | {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16, "mask_time_prob": 0.0}
        | {"num_conv_pos_embedding_groups": 4},
        sounds,
    ),
    (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        SEQ2SEQ
        | SPECIAL
        | {"num_mel_bins": 20, "max_source_positions": 50}
        | {"suppress_tokens": None, "begin_suppress_tokens": None},
        spectra,
    ),
]


def without_dropout(model):
    """torch and torchbp draw other masks from the same seed."""
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout", "dropout_prob", "drop_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def step(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss.detach()} | {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.filterwarnings("ignore")  # of transformers' own
@pytest.mark.parametrize(
    ("model", "config", "arguments", "data"), ARCHITECTURES, ids=[a[0] for a in ARCHITECTURES]
)
def test_converted_and_lean(model, config, arguments, data, monkeypatch):
    monkeypatch.setattr(_graph, "small", 0)  # or nothing is large enough to be let go
    let_go = []

    def counted(tensor, plan=None):
        item = _graph.kept_or_share(tensor, plan)
        let_go.append(isinstance(item, Share))
        return item

    monkeypatch.setattr(_scope, "kept_or_share", counted)
    torch.manual_seed(0)
    made = getattr(transformers, config)(**arguments)
    plain = without_dropout(getattr(transformers, model)(made).train())
    batch = data()
    expected = step(plain, batch)
    largest = max(value.norm() for value in expected.values())

    converted = torchbp.convert(copy.deepcopy(plain))
    assert list(converted.state_dict()) == list(plain.state_dict())
    got = step(converted, batch)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert (got[name] - value).norm() <= 1e-5 * value.norm() + 1e-10 * largest, name

    for budget in (None, 0.3):
        lean = torchbp.lean(copy.deepcopy(plain), budget=budget)
        step(lean, batch)  # with a budget the first measures
        let_go.clear()
        again = step(lean, batch)
        assert any(let_go)
        assert all(torch.equal(again[name], value) for name, value in got.items())
