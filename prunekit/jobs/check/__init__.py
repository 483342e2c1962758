"""`prunekit check`: run one batch of every stage of a recipe, before the whole recipe is started."""

from prunekit.jobs.check.checking import Checked, CheckError, check

__all__ = ["CheckError", "Checked", "check"]
