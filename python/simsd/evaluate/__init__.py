"""Evaluation: lm-eval's tasks, and question/answer files of one's own. See docs/evaluation.md."""
