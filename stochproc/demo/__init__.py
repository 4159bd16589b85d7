"""The demo: every family of models on real data, one table, and figures on one page.

``python -m stochproc demo`` runs it; ``stochproc.demo._runner`` says how a family adds its part.
"""

from stochproc.demo._report import Row
from stochproc.demo._runner import Context, discover, run_demo

__all__ = ["Context", "Row", "discover", "run_demo"]
