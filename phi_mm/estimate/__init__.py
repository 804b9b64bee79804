"""Memory and time of a training run, predicted from its recipe without a weight: `phi-mm estimate`.

The training step itself is taken on tensors that have shapes and no values, and what it keeps and
multiplies is counted. Of GPUs the libraries' workspaces and the gaps between tensors are not known.
"""

from phi_mm.estimate.memory import Estimate, Rehearsal
from phi_mm.estimate.report import Question, describe, largest_batch
from phi_mm.estimate.step import Row

__all__ = ["Estimate", "Question", "Rehearsal", "Row", "describe", "largest_batch"]
