"""Verifiers: pure functions from the text of a model to a `Verdict`, one module a task."""
