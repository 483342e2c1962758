"""`prunekit plan`: the units, costs, memory, disk and time of recipes before they run, without weights or network."""

from prunekit.jobs.plan.plans import Devices, plan, plan_all

__all__ = ["Devices", "plan", "plan_all"]
