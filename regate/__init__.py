"""ReGATE: train a multimodal LLM on the tokens that need the image.

    import regate
    gate = regate.apply(model)        # then train exactly as before

An implementation of Reference-Guided Adaptive Token Elision (arXiv 2507.21420).
"""

from model_adapters import Layout, ModelAdapter, Padding, register_adapter
from regate.api import apply, remove
from regate.config import Config
from regate.errors import RegateError
from regate.gate import Gate
from regate.insight.estimate import Estimate, count_tokens, estimate
from regate.insight.report import Report
from regate.memory.store import Store
from regate.scoring.decision import Decision
from regate.teaching.translated import CrossTokenizerTeacher
from regate.trainer import GateCallback, register
from regate.version import __version__

register()

__all__ = [
    "Config",
    "CrossTokenizerTeacher",
    "Decision",
    "Estimate",
    "Gate",
    "GateCallback",
    "Layout",
    "ModelAdapter",
    "Padding",
    "RegateError",
    "Report",
    "Store",
    "__version__",
    "apply",
    "count_tokens",
    "estimate",
    "register_adapter",
    "remove",
]
