"""Evaluation: how many tokens a call yields, how fast that is, and whether the text is the base model's own."""

from ptp_lightning.evaluation.benchmarks import BENCHMARKS, Question, read_questions

__all__ = ["BENCHMARKS", "Question", "read_questions"]
