"""The keys a file of `ds_configs/` may hold and what their values may be, as DeepSpeed 0.19.8 reads them.

DeepSpeed ignores a misspelt top-level key, tells of a wrong value only on the ranks, and importing it takes seconds, so
both stand here as a table. Sources: `deepspeed.runtime.zero.config.DeepSpeedZeroConfig` and `zero.offload_config` (a test
compares these with the installed DeepSpeed field by field), `runtime/config.py`, `runtime/constants.py`,
`profiling/config.py`, `swap_tensor/aio_config.py`, `model_checkpointing/config.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """What a value must be: `words` say it after "should be", `accepts` checks it. null stands for DeepSpeed's default
    where `optional`."""

    words: str
    accepts: Callable[[Any], bool]
    optional: bool = False


def _whole(value: Any) -> bool:
    """5e8 is one, as DeepSpeed's own examples write sizes; true is none."""
    return type(value) is int or (type(value) is float and value.is_integer())


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _one_of(*values: str, why: str = "", optional: bool = False) -> Kind:
    *first, last = (f'"{value}"' for value in values)
    return Kind(f"{', '.join(first)} or {last}{why}", lambda value: value in values, optional)


FLAG = Kind("true or false", lambda value: type(value) is bool)
INTEGER = Kind("a whole number", _whole)
COUNT = Kind("a whole number of 0 or more", lambda value: _whole(value) and value >= 0)
SIZE = Kind("a whole number of 1 or more", lambda value: _whole(value) and value >= 1)
NUMBER = Kind("a number", _number)
SHARE = Kind("a number from 0 to 1", lambda value: _number(value) and 0 <= value <= 1)
TEXT = Kind("text", lambda value: type(value) is str, optional=True)
TEXTS = Kind("a list of names", lambda value: type(value) is list and all(type(item) is str for item in value))
STAGE = Kind("0, 1, 2 or 3", lambda value: type(value) is int and value in (0, 1, 2, 3))
DTYPE = _one_of("fp32", "bf16", "fp16", optional=True)
# The disk would need DeepSpeed's AIO library, compiled on the spot, and an optimizer of DeepSpeed's own.
DEVICE = _one_of("cpu", "none", why=" (nvme is not used by this trainer)")
INTERVAL = Kind(f'{SIZE.words}, or "auto"', lambda value: SIZE.accepts(value) or value == "auto")

Keys = dict[str, "Keys | Kind"]  # a kind: a value; a table: a section


def _values(kind: Kind, names: str) -> Keys:
    return dict.fromkeys(names.split(), kind)


ALLOWED: Keys = {
    "zero_optimization": {
        "stage": STAGE,
        "reduce_bucket_size": SIZE,
        "overlap_comm": Kind(FLAG.words, FLAG.accepts, optional=True),
        **_values(
            FLAG,
            "contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions "
            "compute_grad_norm load_from_fp32_weights elastic_checkpoint stage3_gather_16bit_weights_on_model_save "
            "stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential ignore_unused_parameters "
            "legacy_stage1 round_robin_gradients parameter_alignment zero_quantized_weights "
            "zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear "
            "pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings enable_sanity_checks "
            "save_muon_momentum_buffer_in_memory",
        ),
        **_values(
            COUNT,
            "allgather_bucket_size sub_group_size stage3_prefetch_bucket_size stage3_param_persistence_threshold "
            "stage3_model_persistence_threshold stage3_max_live_parameters stage3_max_reuse_distance "
            "zero_hpz_partition_size",
        ),
        "stage3_module_granularity_threshold": INTEGER,
        "offload_param": {
            "device": DEVICE,
            "nvme_path": TEXT,
            **_values(COUNT, "buffer_count buffer_size max_in_cpu"),
            "pin_memory": FLAG,
        },
        "offload_optimizer": {
            "device": DEVICE,
            "nvme_path": TEXT,
            "buffer_count": COUNT,
            **_values(FLAG, "pin_memory pipeline_read pipeline_write fast_init super_offload"),
            **_values(SHARE, "ratio cpuadam_cores_perc"),
        },
        "zenflow": {
            "topk_ratio": Kind("a number between 0 and 1", lambda value: _number(value) and 0 < value < 1),
            "select_strategy": _one_of("auto", "step", "epoch"),
            **_values(INTERVAL, "select_interval update_interval"),
            **_values(FLAG, "overlap_step offload"),
            **_values(SHARE, "auto_ratio pt_reserved_cores_perc"),
            "full_warm_up_rounds": COUNT,
            "steps_per_epoch": Kind(SIZE.words, SIZE.accepts, optional=True),
        },
        "leaf_module": _values(TEXTS, "classes names name_suffixes"),
    },
    "data_types": {**_values(DTYPE, "grad_accum_dtype param_dtype buffer_dtype"), "keep_in_fp32_modules": TEXTS},
    "checkpoint": {
        "tag_validation": _one_of("Warn", "Ignore", "Fail"),
        **_values(FLAG, "use_node_local_storage checkpoint_serialization"),
        "parallel_write": _values(FLAG, "pipeline_stage"),
        "writer": {
            "type": _one_of("mock", "python", "fast"),
            "data_parallel": _one_of("replica", "socket", "machine", optional=True),
            **_values(FLAG, "decoupled io_buffer_double show_statistics"),
            **_values(SIZE, "io_buffer_size io_multiplier"),
        },
    },
    "pipeline": _values(FLAG, "pipe_partitioned grad_partitioned use_reentrant"),
    "aio": {
        **_values(SIZE, "block_size queue_depth intra_op_parallelism"),
        **_values(FLAG, "single_submit overlap_events use_gds"),
    },
    "flops_profiler": {
        **_values(FLAG, "enabled detailed"),
        "recompute_fwd_factor": NUMBER,
        **_values(COUNT, "profile_step top_modules"),
        "module_depth": INTEGER,
        "output_file": TEXT,
    },
    "comms_logger": {**_values(FLAG, "enabled prof_all verbose debug"), "prof_ops": TEXTS},
    "timers": {"throughput": _values(FLAG, "enabled synchronized")},
    "communication_data_type": DTYPE,
    **_values(
        FLAG,
        "prescale_gradients disable_allgather dump_state disable_python_gc wall_clock_breakdown memory_breakdown",
    ),
    "gradient_predivide_factor": NUMBER,
    "log_level": _one_of("debug", "info", "warning", "error", "critical", optional=True),
}

# Keys of DeepSpeed whose value the recipe owns: a value lives in one place.
OWNED_BY_RECIPE: dict[str, str] = {
    "train_batch_size": "batch.global_size",
    "train_micro_batch_size_per_gpu": "batch.micro_size",
    "gradient_accumulation_steps": "batch.global_size and batch.micro_size",
    "managed_gradient_accumulation": "batch.global_size and batch.micro_size",
    "gradient_allreduce_op": "loss.reduction",
    "gradient_clipping": "optimizer.grad_clip",
    "optimizer": "the section 'optimizer'",
    "zero_allow_untested_optimizer": "the section 'optimizer'",
    "zero_force_ds_cpu_optimizer": "the section 'optimizer'",
    "scheduler": "the section 'schedule'",
    "bf16": "precision",
    "bfloat16": "precision",
    "fp16": "precision",
    "torch_autocast": "precision",
    "steps_per_print": "logging.every_steps",
    "tensorboard": "logging.tensorboard",
    "tensor_parallel": "parallel.tensor",
    "dataloader_drop_last": "the section 'data'",
    "checkpoint.load_universal": "the trainer, by what lies in the run directory",
}

# What DeepSpeed knows and this trainer does not use; named, so that the message is not "unknown".
NOT_USED: frozenset[str] = frozenset(
    "activation_checkpointing autotuning comet compile csv_monitor data_efficiency datastates_ckpt expert_parallel "
    "hybrid_engine seq_parallel_communication_data_type sequence_parallel_size "
    "use_data_before_expert_parallelism wandb weight_quantization".split()
)

# Left-overs of older DeepSpeed versions, which 0.19.8 refuses as well.
REMOVED: frozenset[str] = frozenset(
    "amp compression_training curriculum_learning eigenvalue elasticity graph_harvesting nebula "
    "progressive_layer_drop quantize_training sparse_attention sparse_gradients".split()
)
