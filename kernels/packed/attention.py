"""Packed documents: attention that stays inside them. SPEC.md's four stages, and what changes where a row holds several.

A row is cut into documents, runs of tokens; `starts` int32 `[B, N]` says for each token where its document begins. A window
is *divided* where it holds tokens of more than one document.

1. *Select.* Windows are ranked as without documents. Then, expanded before all others, at every level: each window that holds
   the first token of a document, and the window after one that such a token divides, so that no token is left without output.
   (Whether a row's first is, says `keep_first`.)
   Where a tile has more of these than its quota, those that come first are expanded, and the rest is *crowded out*.
2. *Gather.* A divided window that is an entry comes after all others, out of the order: nobody attends to it, and its output
   goes nowhere. The others lie document by document, the longest first, each in causal order.
3. *Attend.* Causal attention inside each document's entries.
4. *Scatter.* An entry's output is added to tokens of its own document only. That a window is expanded for a border in it would
   tell tokens before the border that their document ends. Under a causal selection they therefore receive, of such a window,
   what tokens of a window that is not expanded do: nothing of its finer entries (`reference.own_document`).

So nothing that anyone attends to mixes documents, and no token receives anything of another document, whatever the budget. (But
for what is not finite: NaN times a weight of zero is NaN, where a kernel gets rows of another document behind the longest.)
Tokens under a divided window that is crowded out are not attended to, and may be left without output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import Pyramid
from ..revision import REVISION
from ..sdpa import resolved
from ..torch_private import assert_async, flash_attention_forward
from .plan import first_of_longest
from .varlen import WIDEST, attend_in_sequences, bounds_of, longest_of

_ALIGNED = 8  # the kernels take head dimensions that are multiples of it


def starts_of(numbers: Tensor) -> Tensor:
    """Where each token's document begins, int32 `[B, N]`, from the documents' numbers: a new number is a new document."""
    place = torch.arange(numbers.shape[-1], dtype=torch.int32, device=numbers.device).expand_as(numbers)
    begins = F.pad(numbers[..., 1:] != numbers[..., :-1], (1, 0), value=True)
    return torch.where(begins, place, 0).cummax(-1).values.int()


def must_expand(starts: Tensor, pyramid: Pyramid) -> Tensor:
    """The windows above level 0 that are expanded before all others: bool `[B, P - N]`, numbered as windows are, less N."""
    place = torch.arange(starts.shape[-1], device=starts.device)
    first = (starts == place)[..., : pyramid.covered]
    if not pyramid.keep_first:  # a row that is one document is as it would be without documents
        first = first & (place > 0)[: pyramid.covered]
    wanted = [first[..., :0]]
    for level in range(1, pyramid.levels):
        tokens = first.unflatten(-1, (pyramid.windows(level), pyramid.pooling**level))
        after_divided = F.pad(tokens[..., 1:].any(-1)[..., :-1], (1, 0))
        wanted.append(tokens.any(-1) | after_divided)
    return torch.cat(wanted, -1)


def crowded_out(starts: Tensor, pyramid: Pyramid) -> Tensor:
    """How many windows had to be expanded, and could not be: `[B]`, over all levels and tiles."""
    wanted, missing = must_expand(starts, pyramid), starts.new_zeros(starts.shape[0])
    bounds = [tile * pyramid.coarse // pyramid.tiles_with_windows for tile in range(pyramid.tiles_with_windows + 1)]
    for level in range(1, pyramid.levels):
        first = pyramid.offset(level) - pyramid.length
        share = pyramid.windows(level) // max(1, pyramid.coarse)
        before = F.pad(wanted[..., first : first + pyramid.windows(level)].int().cumsum(-1), (1, 0))
        per_tile = before[..., [share * bound for bound in bounds]].diff(dim=-1)
        missing = missing + (per_tile - pyramid.quota_).clamp(min=0).sum(-1)
    return missing


def arrange(entries: Tensor, slots: Tensor, starts: Tensor, pyramid: Pyramid) -> tuple[Tensor, Tensor]:
    """Put the longest document of a selection first, its divided windows last and out of `slots`. Shapes as `select`'s."""
    segments = segments_of(entries, starts, pyramid)
    first, last = segments == first_of_longest(starts)[:, None, None], segments == pyramid.length
    before, behind = (x.cumsum(-1, dtype=torch.int32) for x in (first, last))
    place = torch.arange(entries.shape[2], dtype=torch.int32, device=entries.device) - before - behind + before[..., -1:]
    place = torch.where(first, before - 1, torch.where(last, entries.shape[2] - behind[..., -1:] + behind - 1, place))
    moved = torch.empty_like(entries).scatter(-1, place.long(), entries)
    kept_place = torch.where(last, -1, place)
    return moved, torch.where(slots >= 0, kept_place.gather(-1, slots.clamp(min=0).long()), -1)


def segments_of(entries: Tensor, starts: Tensor, pyramid: Pyramid) -> Tensor:
    """Where the document of each entry begins, N for a divided window: int32 `[B, G, S]`."""
    begin = last = entries
    for level in range(1, pyramid.levels):
        width = pyramid.pooling**level
        here = entries >= pyramid.offset(level)
        begin = torch.where(here, (entries - pyramid.offset(level)) * width, begin)
        last = torch.where(here, begin + width - 1, last)
    document = starts[:, None].expand(-1, entries.shape[1], -1).gather(-1, last.long())
    return torch.where(document > begin, pyramid.length, document)


# --- the attention ----------------------------------------------------------------------------------------------------

_library = torch.library.Library("lighthouse_fx", "FRAGMENT")
_library.define(
    "attention_in_documents(Tensor query, Tensor key, Tensor value, Tensor entries, Tensor starts, int levels, "
    "int pooling, SymInt topk, int quota, float dropout_p, float? scale, bool enable_gqa, int most, str kernel, "
    "Tensor? known=None) -> Tensor"
)
_library.define("document_starts(Tensor numbers) -> Tensor")
_library.define("document_numbers(Tensor query, Tensor[] tables, str holds) -> Tensor")
_library.define(
    "packed_starts(Tensor query, Tensor borders_q, Tensor borders_k, SymInt longest_q, SymInt longest_k) -> Tensor"
)


def _rising_starts(numbers: Tensor) -> Tensor:
    """`starts_of`, for numbers that a mask compares: where one came back later, the mask would join what lies apart."""
    message = "the numbers of documents fall along a row, so a document may lie in several pieces: number them in order"
    assert_async((numbers[..., 1:] >= numbers[..., :-1]).all(), message)
    return starts_of(numbers)


_library.impl("document_starts", _rising_starts, "CompositeImplicitAutograd")

_BORDERS = (
    "what a mask_mod reads as the {} token of each token's document is not that, so its mask is not that of documents: let "
    "all tokens of a document hold its {} token, or keep the attention dense (dense_layers)"
)


def _numbers(query: Tensor, tables: list[Tensor], holds: str) -> Tensor:
    """Numbers of documents, int `[B, N]`, as a mask reads them from tables, one after the other, from the token on.

    Args:
        query: `[B, H, N, D]`, for its shape; tables: int `[B, *]` or `[*]`.
        holds: "numbers", or "first" or "last" where a mask compares positions with the first or last token of a document.
            Then these are its number, once they are seen to be right.
    """
    batch, _, length, _ = query.shape
    row, read = (torch.arange(n, device=tables[0].device) for n in (batch, length))
    for table in tables:
        read = table[row[:, None], read] if table.dim() == 2 else table[read]
    numbers = read.expand(batch, length)
    if holds != "numbers":
        first = numbers if holds == "first" else length - 1 - numbers.flip(-1)
        assert_async((starts_of(first) == first).all(), _BORDERS.format(holds, holds))
    return numbers


_library.impl("document_numbers", _numbers, "CompositeImplicitAutograd")


def _packed_starts(query: Tensor, borders_q: Tensor, borders_k: Tensor, longest_q: int, longest_k: int) -> Tensor:
    """Where each token's document begins, int32 `[1, N]`, from what flash-attn's variable-length functions are given.

    They trust their borders, and leave undefined what lies outside; here borders that are wrong are an error.

    Args:
        query: `[1, H, N, D]`; borders_q, borders_k: int32 `[documents + 1]`, `[0, ..., N]`; longest_q, longest_k: at least the
            length of the longest document.
    """
    tokens, lengths = query.shape[2], borders_q.diff()
    assert_async(
        (borders_q == borders_k).all(),
        "cu_seqlens_q and cu_seqlens_k of flash_attn_varlen_func differ, so queries of one sequence attend to keys of another: "
        "keep that layer dense (dense_layers), or give both the same borders",
    )
    assert_async(
        (borders_q[0] == 0) & (borders_q[-1] == tokens) & (lengths >= 0).all(),
        "cu_seqlens of flash_attn_varlen_func does not rise from 0 to the number of tokens: give [0, ..., N]",
    )
    assert_async(
        ((lengths <= longest_q) & (lengths <= longest_k)).all(),
        "max_seqlen of flash_attn_varlen_func is shorter than the longest document, whose end flash-attn leaves undefined: "
        "give at least the length of the longest",
    )
    place = torch.arange(tokens, dtype=borders_q.dtype, device=borders_q.device)
    document = torch.searchsorted(borders_q[1:], place, right=True)  # of several that begin at one token, the last
    return borders_q[document.clamp(max=borders_q.shape[0] - 2)].int()[None]


_library.impl("packed_starts", _packed_starts, "CompositeImplicitAutograd")


def document_problem(query: Tensor, value: Tensor, kernel: str) -> str | None:
    """Why attention cannot be kept inside documents on this device, with the remedy, or None."""
    if not in_sequences(query.device):
        return None
    if query.dtype not in (torch.bfloat16, torch.float16):
        return (
            f"attention inside documents takes bfloat16 or float16 on a GPU, and query has dtype {query.dtype}: use "
            "torch.autocast, or a model of such a type"
        )
    if (width := max(query.shape[-1], value.shape[-1])) > WIDEST["flash"]:
        return f"attention inside documents takes head dimensions up to {WIDEST['flash']}"
    if not _able(kernel, query.device, width):
        return (
            f"kernel={kernel!r} cannot keep attention inside documents: use kernel='auto' or 'flash', and leave "
            "FlashAttention switched on (torch.backends.cuda.enable_flash_sdp)"
        )
    return None


def in_sequences(device: torch.device) -> bool:
    """Whether attention goes sequence by sequence on a device; elsewhere by a mask."""
    return device.type == "cuda"


def _able(kernel: str, device: torch.device, width: int) -> list[str]:
    """Kernels that `kernel` allows and attention inside documents can use: "flash", and "cudnn" where that is faster."""
    names = resolved(device, kernel).split(",")
    if "flash" not in names or width > WIDEST["flash"]:
        return []
    return [name for name in names[: names.index("flash") + 1] if name in WIDEST and width <= WIDEST[name]]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    entries: Tensor,
    starts: Tensor,
    levels: int,
    pooling: int,
    topk: int,
    quota: int,
    dropout_p: float,
    scale: float | None,
    enable_gqa: bool,
    most: int,
    kernel: str,
    known: Tensor | None = None,
) -> Tensor:
    """Causal attention on the entries of each document: `[B, H, S, D]`, `[B, G, S, D]`, `[B, G, S, Dv]` -> `[B, H, S, Dv]`.

    Args:
        quota: 0 for the default; known: what the CPU knows of the documents, see `known_documents.plan`.
    """
    if (problem := document_problem(query, value, kernel)) is not None:
        raise ValueError(problem)
    pyramid = Pyramid(length=starts.shape[-1], levels=levels, pooling=pooling, topk=1)
    segments = segments_of(entries, starts, pyramid)
    if not in_sequences(query.device):
        mask = (segments[..., :, None] == segments[..., None, :]).tril()  # [B, G, S, S]
        mask = mask.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout_p, scale=scale, enable_gqa=enable_gqa
        )
    batch, groups, gathered = segments.shape
    heads, dim, wanted = query.shape[1], query.shape[3], value.shape[3]
    scale = dim**-0.5 if scale is None else scale
    width = -(-max(dim, wanted) // _ALIGNED) * _ALIGNED
    rows = [x.unflatten(1, (groups, -1)).transpose(2, 3).flatten(0, 2).contiguous() for x in (query, key, value)]
    if dim != width or wanted != width:
        rows = [F.pad(x, (0, width - x.shape[2])) for x in rows]  # [B * G * S, H / G, width] and [B * G * S, 1, width]
    bounds = bounds_of(segments, batch * groups * (most + 1), most)
    if dropout_p:  # the op knows no dropout
        out = flash_attention_forward(
            *rows, bounds, bounds, gathered, gathered, dropout_p, True, False, scale=scale
        )[0]
    else:
        longest = []
        if "cudnn" in _able(kernel, query.device, width):
            found = longest_of(segments, starts, most, in_front=levels > 1)  # `arrange` has put it there
            longest = [x for x in found if x is not None]
        out, _ = attend_in_sequences(
            *rows, bounds, longest, known, batch, groups, pyramid.length, levels, pooling, topk, quota, most, scale, REVISION
        )
    out = out.unflatten(0, (batch, groups, gathered)).transpose(2, 3)
    result: Tensor = out.reshape(batch, heads, gathered, width)[..., :wanted]
    return result


_library.impl("attention_in_documents", _attention, "CompositeImplicitAutograd")
attention_in_documents = torch.ops.lighthouse_fx.attention_in_documents.default
