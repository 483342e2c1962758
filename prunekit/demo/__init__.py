"""A page to try a run in: one prompt, the dense model's picture beside its expert's, and why that expert."""

from prunekit.demo.answering import Answer, Demo

__all__ = ["Answer", "Demo"]
