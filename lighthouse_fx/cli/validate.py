"""`lighthouse validate MODEL --text FILE`: dense and Lighthouse loss, loss by position, passkeys, dense inference."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lighthouse_fx.evaluation.future_leak import CUTS
from lighthouse_fx.evaluation.passkey import Passkey, utf8
from lighthouse_fx.evaluation.validate import validate
from lighthouse_fx.extras import transformers

from .options import (
    MODEL_HELP,
    add_command,
    add_config,
    add_device,
    at_least_one,
    call_function,
    config_from,
    console,
    is_function,
)

Encode = Callable[[str], Sequence[int]]

_WIDTH = 150  # where there is no terminal, whose width is known


def add_parser(commands: Any) -> None:
    """The options of `lighthouse validate`."""
    parser = add_command(
        commands,
        "validate",
        summary="check a trained model: dense loss, passkeys, dense inference",
        description=(
            "Asks five questions of a language model: is its inference dense; is dense attention trained (its loss beside "
            "that under Lighthouse attention); does a longer context help; does the loss of a token depend on what follows it "
            "(--leak); is a digit found again in a long text (--passkey). The exit status is 1 if inference is not dense, "
            "dense attention leaks or the loss is no number, and otherwise 0, whatever the other answers."
        ),
        examples="""
lighthouse validate path/to/model --text held_out.txt --length 8192 --passkey
lighthouse validate my_module:model --text held_out.txt --leak --out found
""",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP.format(returns="the model"))
    parser.add_argument("--text", type=Path, metavar="FILE", required=True, help="held-out text, UTF-8")
    parser.add_argument("--length", type=at_least_one, default=2048, metavar="N", help="tokens of a window; default: 2048")
    parser.add_argument("--windows", type=int, default=8, metavar="W", help="of these, spread over the text; default: 8")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="windows in a batch; default: 1")
    parser.add_argument(
        "--tokenizer", metavar="NAME", help="of transformers, or 'bytes'; default: the model's, for a function 'bytes'"
    )
    parser.add_argument(
        "--passkey", type=int, nargs="*", metavar="N", help="look for passkeys in prompts of N tokens; without N: 1/4, 1/2, all"
    )
    parser.add_argument(
        "--leak", type=at_least_one, nargs="?", const=CUTS, default=0, metavar="CUTS",
        help=f"measure how much the loss owes to later tokens, at so many places; without CUTS: {CUTS}",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="to load a transformers model in; default: its own")
    add_device(parser)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write figures and pictures (extra 'plot')")
    add_config(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """`lighthouse validate`: print the verdict, write what was asked for."""
    model = _model(options).to(options.device)
    encode, start = _tokenizer(options)
    data = windows(encode(options.text.read_text(encoding="utf-8")), length=options.length, count=options.windows)
    passkey = None
    if options.passkey is not None:
        lengths = options.passkey or [options.length // 4, options.length // 2, options.length]
        passkey = Passkey(lengths=tuple(lengths), encode=encode, start=start, batch=options.batch)
    found = validate(
        model,
        data,
        config=config_from(options, model),
        passkey=passkey,
        batch=options.batch,
        leak_cuts=options.leak,
        progress=sys.stderr.isatty(),
    )
    found.print(console(_WIDTH))
    if options.out:
        print(f"written: {', '.join(map(str, found.save(options.out)))}")
    return 0 if found.passed else 1


def windows(tokens: Sequence[int], *, length: int, count: int) -> Tensor:
    """Windows spread evenly over a text, `[count, length + 1]`; fewer where they would overlap by more than half.

    Raises:
        ValueError: the text is shorter than one.
    """
    if length < 1 or count < 1:
        raise ValueError(f"length={length}, windows={count}: give at least 1 of each")
    if len(tokens) < length + 1:
        raise ValueError(f"the text has {len(tokens):,} tokens, a window {length + 1:,}: give more text, or a smaller length")
    count = min(count, 1 + 2 * (len(tokens) - length - 1) // (length + 1))
    starts = torch.linspace(0, len(tokens) - length - 1, count).long()
    stream = torch.tensor(tokens)
    return torch.stack([stream[start : start + length + 1] for start in starts])


def _model(options: argparse.Namespace) -> nn.Module:
    if is_function(options.model):
        model = call_function(options.model)
        if not isinstance(model, nn.Module):
            raise TypeError(f"{options.model!r} returned a {type(model).__name__}: it has to return a Module")
        return model
    dtype = getattr(torch, options.dtype) if options.dtype else "auto"
    loaded: nn.Module = transformers().AutoModelForCausalLM.from_pretrained(
        options.model, attn_implementation="sdpa", dtype=dtype
    )
    return loaded


def _tokenizer(options: argparse.Namespace) -> tuple[Encode, tuple[int, ...]]:
    """What makes tokens of a text, and the tokens that a prompt starts with."""
    name = options.tokenizer or ("bytes" if is_function(options.model) else options.model)
    if name == "bytes":
        return utf8, ()
    tokenizer = transformers().AutoTokenizer.from_pretrained(name)
    start = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    return lambda text: tokenizer.encode(text, add_special_tokens=False), start
