"""What users of the Space thought of its answers, as rows to train on and to measure by."""

from phi_mm.feedback.export import Summary, export

__all__ = ["Summary", "export"]
