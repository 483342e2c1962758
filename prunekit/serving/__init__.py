"""Using what a run made: prompts go to the expert that serves them."""

from prunekit.serving.routed import RoutedModel

__all__ = ["RoutedModel"]
