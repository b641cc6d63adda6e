"""`vilg plan`: memory, time and cost of a recipe on GPUs that need not be there."""

from vilg.tools.plan.command import main
from vilg.tools.plan.hardware import DEFAULT_GPU, GPUS, Gpu, gpu_named
from vilg.tools.plan.planner import Plan, StagePlan, plan
from vilg.tools.plan.report import format_plan
from vilg.tools.plan.search import require_fit, search

__all__ = [
    "DEFAULT_GPU", "GPUS", "Gpu", "Plan", "StagePlan", "format_plan", "gpu_named", "main", "plan", "require_fit", "search"
]  # fmt: skip
