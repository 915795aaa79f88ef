"""The ops: select, gather, scatter. Schema, fake and autograd in `ops`, the plain twin in `reference`.

Importing this package registers the ops under `torch.ops.lighthouse_fx` and does nothing else.
"""

from .geometry import Pyramid
from .ops import attend, gather, scatter, select
from .revision import REVISION

__all__ = ["REVISION", "Pyramid", "attend", "gather", "scatter", "select"]
