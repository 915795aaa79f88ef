"""A model's Lighthouse forward without gradients, for validation.

The backend is dense under `no_grad` by design, so this goes another way: the model is traced as for training, the same
passes rewrite its graphs, and the graphs run as they stand, without Inductor. What would be dense in training is dense
here, for the same reason, except that eval mode, missing gradients (frozen layers, too) and the stage do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from lighthouse_fx.passes import CALLS, CONTEXT, PIPELINE, PassContext, Refusal
from lighthouse_fx.passes.config import LighthouseConfig
from lighthouse_fx.passes.rewrite.shared_subgraphs import separate_callers
from lighthouse_fx.report.report import AttentionRecord, record
from lighthouse_fx.runtime import document_inputs
from lighthouse_fx.runtime.guards import guard_on_documents
from lighthouse_fx.runtime.modules import Modules

from .existing_compilation import setting_of
from .explain import compile_anew
from .preserve_modules import as_written

_WITHOUT_GRADIENTS = Refusal(reason="gradients are off")


@contextmanager
def _as_with_gradients() -> Iterator[None]:
    """PyTorch's own Transformer layers have a fast path without gradients, which is another function."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class AsTrained:
    """Calls a model under Lighthouse attention, whatever the stage, without gradients. `calls` are those of the last call.

    Args:
        config: by default as the model is compiled, otherwise `LighthouseConfig()`.
        observe: may add to a rewritten graph, once it is there, what looks on when it runs.
        inside_documents: keep attention inside the documents that are on, as training does.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LighthouseConfig | None = None,
        *,
        observe: Callable[[fx.GraphModule, Sequence[AttentionRecord]], None] | None = None,
        inside_documents: bool = False,
    ) -> None:
        self.config = config or setting_of(model).config
        self.calls: list[AttentionRecord] = []
        self._look, self._inside_documents = observe, inside_documents
        self._model, self._call = model, compile_anew(model, self._rewrite)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls = []
        with _as_with_gradients(), as_written(self._model):
            return self._call(*args, **kwargs)

    def _rewrite(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """The backend: the passes of training, over a graph that is traced without gradients."""
        modules = Modules(gm)
        separate_callers(gm)
        modules.name_nodes(gm)
        packed = None
        if self._inside_documents:
            guard_on_documents()
            gm, packed = document_inputs.allow_document_input(gm), document_inputs.shape_of_documents()
        gm.meta[CONTEXT] = PassContext(no_gradients=_WITHOUT_GRADIENTS, packed=packed, layer=modules.layer)
        for step in PIPELINE:
            gm = step(gm, example_inputs, config=self.config)
            # The check refuses for missing gradients only what it would rewrite with them.
            gm.meta[CALLS] = tuple(
                replace(call, refusal=None, kept_inside=False) if call.refusal is _WITHOUT_GRADIENTS else call
                for call in gm.meta[CALLS]
            )
        del gm.meta[CONTEXT]  # it holds the user's modules
        document_inputs.drop_unused_inputs(gm)
        calls = [record(call) for call in gm.meta[CALLS]]
        if self._look is not None:
            self._look(gm, calls)
        rewritten = document_inputs.bind_documents(gm, gm, self.config)

        def run(*args: Any) -> Any:
            self.calls += calls
            return rewritten(*args)

        return run
