"""Moved: see files and artifacts."""

from .files import *  # noqa: F403
