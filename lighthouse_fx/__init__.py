"""lighthouse-fx: a torch.compile backend that makes long-context pre-training fast.

    model = torch.compile(model, backend="lighthouse")

rewrites the attention of a model that trains into Lighthouse attention, and leaves inference dense.
"""

from .evaluation.future_leak import future_leak
from .evaluation.future_leak_result import FutureLeak
from .evaluation.passkey import Passkey
from .evaluation.validate import validate
from .evaluation.validation_result import Validation
from .evaluation.verification_result import Verification
from .evaluation.verify import verify
from .frontend.explain import explain
from .frontend.regional import compile
from .functional import lighthouse_attention
from .measure.profile import profile
from .measure.tune import tune
from .passes.config import LighthouseConfig
from .report.report import AttentionRecord, GraphReport, Report
from .runtime.documents import documents
from .runtime.journal import reports
from .runtime.stage import dense, pretraining
from .training.budget import BudgetControl
from .training.loss_monitor import Divergence
from .training.recovery import StageEvent
from .training.run_log import RunLog
from .training.two_stage import TwoStage
from .version import __version__ as __version__

__all__ = [
    "AttentionRecord",
    "BudgetControl",
    "Divergence",
    "FutureLeak",
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
    "future_leak",
    "lighthouse_attention",
    "pretraining",
    "profile",
    "reports",
    "tune",
    "validate",
    "verify",
]
