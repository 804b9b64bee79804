"""Measures a run: tasks with metrics, baselines and controls; reports with pictures and sound."""

from phi_mm.evaluation.report import table, write_report
from phi_mm.evaluation.tasks import evaluate_run, metrics_rows

__all__ = ["evaluate_run", "metrics_rows", "table", "write_report"]
