"""The keys a file of `ds_configs/` may hold, as DeepSpeed 0.19.8 reads them.

DeepSpeed ignores a misspelt top-level key, and importing it takes seconds, so the names stand here as a table.
Sources: `deepspeed.runtime.zero.config.DeepSpeedZeroConfig` and `zero.offload_config` (a test compares these with
the installed DeepSpeed field by field), `runtime/config.py`, `runtime/constants.py`, `profiling/config.py`,
`swap_tensor/aio_config.py`, `model_checkpointing/config.py`.
"""

Keys = dict[str, "Keys | None"]  # None: a value; a table: a section


def _values(names: str) -> Keys:
    return dict.fromkeys(names.split())


ALLOWED: Keys = {
    "zero_optimization": {
        **_values(
            "stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce "
            "allgather_partitions allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights "
            "elastic_checkpoint sub_group_size stage3_prefetch_bucket_size stage3_param_persistence_threshold "
            "stage3_model_persistence_threshold stage3_max_live_parameters stage3_max_reuse_distance "
            "stage3_gather_16bit_weights_on_model_save stage3_module_granularity_threshold "
            "stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential ignore_unused_parameters "
            "legacy_stage1 round_robin_gradients parameter_alignment zero_hpz_partition_size zero_quantized_weights "
            "zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear "
            "pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings enable_sanity_checks "
            "save_muon_momentum_buffer_in_memory"
        ),
        "offload_param": _values("device nvme_path buffer_count buffer_size max_in_cpu pin_memory"),
        "offload_optimizer": _values(
            "device nvme_path buffer_count pin_memory pipeline_read pipeline_write fast_init ratio super_offload "
            "cpuadam_cores_perc"
        ),
        "zenflow": _values(
            "topk_ratio select_strategy select_interval update_interval overlap_step offload auto_ratio "
            "full_warm_up_rounds pt_reserved_cores_perc steps_per_epoch"
        ),
        "leaf_module": _values("classes names name_suffixes"),
    },
    "data_types": _values("grad_accum_dtype param_dtype buffer_dtype keep_in_fp32_modules"),
    "checkpoint": {
        **_values("tag_validation use_node_local_storage checkpoint_serialization"),
        "parallel_write": _values("pipeline_stage"),
        "writer": _values(
            "type decoupled data_parallel io_buffer_size io_buffer_double show_statistics io_multiplier"
        ),
    },
    "pipeline": _values("pipe_partitioned grad_partitioned use_reentrant"),
    "aio": _values("block_size queue_depth intra_op_parallelism single_submit overlap_events use_gds"),
    "flops_profiler": _values(
        "enabled recompute_fwd_factor profile_step module_depth top_modules detailed output_file"
    ),
    "comms_logger": _values("enabled prof_all prof_ops verbose debug"),
    "timers": {"throughput": _values("enabled synchronized")},
    **_values(
        "communication_data_type prescale_gradients gradient_predivide_factor disable_allgather dump_state "
        "disable_python_gc wall_clock_breakdown memory_breakdown log_level"
    ),
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
