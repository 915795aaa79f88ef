"""lighthouse-fx: a torch.compile backend that makes long-context pre-training fast.

    model = torch.compile(model, backend="lighthouse")

rewrites the attention of a model that trains into Lighthouse attention, and leaves inference dense.
"""

from .blocks import compile
from .config import LighthouseConfig
from .documents import documents
from .functional import lighthouse_attention
from .journal import reports
from .profiling import profile
from .report import AttentionRecord, GraphReport, Report
from .stage import dense, pretraining
from .tracing import explain
from .tuning import tune

__all__ = [
    "AttentionRecord",
    "GraphReport",
    "LighthouseConfig",
    "Report",
    "compile",
    "dense",
    "documents",
    "explain",
    "lighthouse_attention",
    "pretraining",
    "profile",
    "reports",
    "tune",
]
__version__ = "0.1.0"
