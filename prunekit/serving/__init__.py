"""Using what a run made: prompts go to the expert that serves them."""

from prunekit.serving.bulk import read_metadata
from prunekit.serving.pipeline import PromptRoutedPipeline, RoutedOutput

__all__ = ["PromptRoutedPipeline", "RoutedOutput", "read_metadata"]
