"""`prunekit plan`: what recipes will cut, cost and take, before anything runs; no weights, no network."""

from prunekit.jobs.plan.plans import Devices, plan, plan_all

__all__ = ["Devices", "plan", "plan_all"]
