"""lighthouse-fx: a torch.compile backend that makes long-context pre-training fast.

    model = torch.compile(model, backend="lighthouse")

rewrites the attention of a model that trains into Lighthouse attention, and leaves inference dense.
"""

from .audit import RunLog
from .blocks import compile
from .budget import BudgetControl
from .config import LighthouseConfig
from .documents import documents
from .functional import lighthouse_attention
from .journal import reports
from .loss_monitor import Divergence
from .passkey import Passkey
from .profiling import profile
from .recovery import StageEvent
from .report import AttentionRecord, GraphReport, Report
from .schedule import TwoStage
from .stage import dense, pretraining
from .tracing import explain
from .tuning import tune
from .validation import validate
from .verdict import Validation
from .verification import verify
from .verified import Verification

__all__ = [
    "AttentionRecord",
    "BudgetControl",
    "Divergence",
    "GraphReport",
    "LighthouseConfig",
    "Passkey",
    "Report",
    "RunLog",
    "StageEvent",
    "TwoStage",
    "Validation",
    "Verification",
    "compile",
    "dense",
    "documents",
    "explain",
    "lighthouse_attention",
    "pretraining",
    "profile",
    "reports",
    "tune",
    "validate",
    "verify",
]
__version__ = "0.1.0"
