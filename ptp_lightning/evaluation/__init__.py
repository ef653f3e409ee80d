"""Evaluation: tokens per call, speed, and whether texts are identical to those of the base model."""

from ptp_lightning.evaluation.questions import BENCHMARKS, Question, read_questions

__all__ = ["BENCHMARKS", "Question", "read_questions"]
