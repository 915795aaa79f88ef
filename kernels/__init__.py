"""The ops: select, gather, scatter, in `ops`, with plain twins in `reference`; checks of masks in `causal_mask`, `block_lists`.

Importing this package as `lighthouse_fx.kernels` registers the ops under `torch.ops.lighthouse_fx` and does nothing else.
"""

# With a checkout's root on sys.path this folder is also `kernels`, the name of a Hugging Face library, and transformers
# imports that to ask for its version. It finds nothing here: registering the ops again would free the first ones in use.
if __name__ == "lighthouse_fx.kernels":
    from .geometry import Pyramid
    from .ops.block_lists import check_blocks
    from .ops.causal_mask import check_causal
    from .ops.pyramid_ops import attend, gather, scatter, select
    from .revision import REVISION

    __all__ = ["REVISION", "Pyramid", "attend", "check_blocks", "check_causal", "gather", "scatter", "select"]
