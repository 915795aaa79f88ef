"""Small language models of transformers, and what tests ask of them: losses and gradients, also with another attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import lighthouse_fx

transformers = pytest.importorskip("transformers")

LAYERS, TOKENS, VOCABULARY = 3, 72, 96
EXACT = {"rtol": 1e-8, "atol": 1e-10}
FUSED = {"rtol": 1e-4, "atol": 1e-7}  # Llama's norm computes in float32 even in a float64 model; Inductor fuses it


def llama():
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=128, n_embd=32, n_layer=LAYERS, n_head=4, use_cache=False,
        attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


MODELS = {"llama": llama, "gpt2": gpt2}


def layers(model):
    return model.model.layers if hasattr(model, "model") else model.transformer.h


def tokens():
    return torch.randint(0, VOCABULARY, (2, TOKENS))


def loss_and_gradients(model, run, ids):
    logits = run(input_ids=ids).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    names, parameters = zip(*model.named_parameters(), strict=True)
    return loss.detach(), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def by_functional_form(model, ids, config, scored=lambda module: (None, None)):
    """The model with its attention replaced by the functional form, by transformers' own registry of attentions.

    Compiled whole, transformers repeats keys and values before the attention, which the passes undo.

    Args:
        scored: from an attention module to what is scored in place of its queries and keys.
    """

    def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        score_query, score_key = scored(module)
        out = lighthouse_fx.lighthouse_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True, config=config,
            score_query=score_query, score_key=score_key,
        )  # fmt: skip
        return out.transpose(1, 2), None

    transformers.AttentionInterface.register("lighthouse_oracle", attention)
    own = model.config._attn_implementation
    model.set_attn_implementation("lighthouse_oracle")
    try:
        return loss_and_gradients(model, model, ids)
    finally:
        model.set_attn_implementation(own)


def assert_same(found, expected, tolerance=EXACT):
    torch.testing.assert_close(found[0], expected[0], **tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)
