"""`prunekit check`: one batch of every stage of a recipe, for real, before the whole of it is started."""

from prunekit.jobs.check.checking import Checked, CheckError, check

__all__ = ["CheckError", "Checked", "check"]
