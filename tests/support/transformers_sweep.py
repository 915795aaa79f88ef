"""Sweep every causal language model of the installed transformers: what is rewritten, what stays dense and why, is it right.

    python tests/support/transformers_sweep.py --out out/models_sweep.md
    python tests/support/transformers_sweep.py --only LlamaForCausalLM Gemma3ForCausalLM

Each class is built small with random weights and takes one training step whole and one block by block, without Inductor.
What is rewritten in the whole model is compared with `lighthouse_fx.verify`. It takes some ten seconds a class, so neither
`make test` nor `make sweep` runs it.
"""

from __future__ import annotations

import argparse
import collections
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from small_models import CONFIG, FIELDS, TOKENS, passes_only
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import lighthouse_fx
from lighthouse_fx.frontend.blocks import repeated_blocks
from lighthouse_fx.report.report import AttentionRecord
from lighthouse_fx.runtime import journal

LARGEST = 20_000_000  # parameters: a model whose configuration ignores the fields below is skipped
SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "ffn_dim": 48, "ffn_hidden_size": 48, "n_inner": 48,
    "num_hidden_layers": 2, "decoder_layers": 2, "encoder_layers": 2, "num_attention_heads": 4, "decoder_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "use_cache": False,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_topk": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "attention_dropout": 0.0, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0, "resid_pdrop": 0.0,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0, "dropout": 0.0,
}  # fmt: skip
OWN = {  # kinds of which the fields above make no model with attention
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
}
# Tried in this order where a class cannot be built.
VARIANTS = ({}, {"num_key_value_heads": 4}, {"head_dim": None}, {"head_dim": None, "num_key_value_heads": 4})


@dataclass(frozen=True)
class Row:
    """One class: its attention calls in a step, those that were rewritten, whole and by block, and the rest in words."""

    name: str
    calls: int | None = None
    whole: int | None = None
    by_block: int | None = None
    dense: str = ""
    compared: str = ""

    def __str__(self) -> str:
        cells = (self.name, self.calls, self.whole, self.by_block, self.dense, self.compared)
        return f"| {' | '.join('-' if cell is None else str(cell).replace('|', '/') for cell in cells)} |"


def configuration(kind: str, variant: Mapping[str, object]) -> transformers.PretrainedConfig:
    """A small configuration of a kind of model, of the fields that it has."""
    made = getattr(transformers, CONFIG_MAPPING_NAMES[kind])
    known = made()
    wanted = {name: value for name, value in (SMALL | variant).items() if hasattr(known, name) and value is not None}
    return made(**wanted | OWN.get(kind, {}))


def build(kind: str, name: str) -> nn.Module:
    """A small model of a class.

    Raises:
        RuntimeError: no configuration builds, with the reason of each.
    """
    problems = []
    for variant in VARIANTS:
        try:
            config = configuration(kind, variant)
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in getattr(transformers, name)(config).parameters())
            if size > LARGEST:
                raise ValueError(f"has {size:,} parameters, however small its configuration")
            torch.manual_seed(0)
            model = getattr(transformers, name)(config).train()
            with torch.no_grad():
                model(input_ids=token_ids())
        except Exception as problem:  # whatever is wrong with a class is its row
            problems.append(one_line(problem))
        else:
            return model
    raise RuntimeError(f"not built: {problems[0]}")


def token_ids() -> Tensor:
    return torch.randint(0, 96, (2, TOKENS), generator=torch.Generator().manual_seed(0))


def step(model: nn.Module, run: nn.Module) -> Sequence[AttentionRecord]:
    """The attention calls of one training step."""
    model.zero_grad(set_to_none=True)
    with journal.watch() as calls:
        run(input_ids=token_ids()).logits.square().mean().backward()
    return tuple(calls)


def whole(model: nn.Module) -> Sequence[AttentionRecord]:
    torch._dynamo.reset()
    return step(model, torch.compile(model, backend=passes_only, options=dict(FIELDS)))


def by_block(model: nn.Module) -> Sequence[AttentionRecord]:
    torch._dynamo.reset()
    for block in repeated_blocks(model).children():
        block.compile(backend=passes_only, options=dict(FIELDS))
    return step(model, model)


def compare(model: nn.Module) -> str:
    torch._dynamo.reset()
    return "passed" if lighthouse_fx.verify(model, input_ids=token_ids(), config=CONFIG).passed else "FAILED"


def reasons(calls: Sequence[AttentionRecord]) -> str:
    counted = collections.Counter(call.reason for call in calls if not call.rewritten)
    return "; ".join(f"{count} x {reason}" for reason, count in counted.items())


def look_at(kind: str, name: str) -> Row:
    found = [attempt(look, kind, name) for look in (whole, by_block)]
    said = dict.fromkeys(filter(None, (calls if isinstance(calls, str) else reasons(calls) for calls in found)))
    entire, blocks = (None if isinstance(calls, str) else sum(call.rewritten for call in calls) for calls in found)
    compared = attempt(compare, kind, name) if entire else "nothing to compare"
    count = None if isinstance(found[0], str) else len(found[0])
    return Row(name, count, entire, blocks, "; by block: ".join(said) or "nothing", compared)


def attempt(look: Callable[[nn.Module], Any], kind: str, name: str) -> Any:
    """What a look at a new model gives, or what went wrong: a crash is a finding, and other classes are still to come."""
    try:
        return look(build(kind, name))
    except Exception as problem:
        return one_line(problem)


def one_line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"


HEAD = """# Causal language models of transformers {version}

One training step each of small configurations with random weights, without `attention_mask`, as written by
`tests/support/transformers_sweep.py`. *Compared*: `lighthouse_fx.verify` of the whole model.

| class | attention calls | rewritten, whole | rewritten, by block | what stays dense, and why | compared |
|---|---|---|---|---|---|
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/models_sweep.md"))
    parser.add_argument("--only", nargs="*", help="names of classes; by default all")
    options = parser.parse_args(arguments)
    classes = {name: kind for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if isinstance(name, str)}
    if unknown := set(options.only or ()) - set(classes):
        parser.error(f"--only {' '.join(sorted(unknown))}: no causal language model of transformers {transformers.__version__}")
    warnings.simplefilter("ignore")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    failed = False
    with options.out.open("w", encoding="utf-8") as page:
        page.write(HEAD.format(version=transformers.__version__))
        for name in options.only or sorted(classes):
            row = look_at(classes[name], name)
            failed |= row.compared == "FAILED"
            print(row, flush=True)
            page.write(f"{row}\n")
            page.flush()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
