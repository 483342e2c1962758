"""A web page to try a run: one prompt, the pictures of the dense model and of the chosen expert, and the scores."""

from prunekit.demo.answering import Answer, Demo

__all__ = ["Answer", "Demo"]
