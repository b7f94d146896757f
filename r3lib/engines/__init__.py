"""Engines sample completions from a policy; `base` says what each of them promises."""

from .base import Completion, Engine, SamplingParams

__all__ = ["Completion", "Engine", "SamplingParams"]
