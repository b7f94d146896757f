"""Which of TRL's settings R3 honours: what is refused, and what may change at a resume."""

from dataclasses import MISSING, fields
from typing import Any

from .errors import R3Error

REFUSED_FOR = {  # why, or what to do instead: settings that must have their defaults
    "R3 samples from the whole distribution": """
        top_p top_k min_p repetition_penalty generation_kwargs""",
    "R3 samples with an engine of its own: pass engine=..., or leave it unset": """
        use_transformers_continuous_batching use_transformers_paged
        transformers_continuous_batching_config cache_implementation ds3_gather_for_generation
        max_tool_calling_iterations vllm_mode vllm_model_impl vllm_enable_sleep_mode
        vllm_structured_outputs_regex vllm_server_base_url vllm_server_host vllm_server_port
        vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length
        vllm_tensor_parallel_size""",
    "it would merge the adapter into the weights: pass engine=... instead": "use_vllm",
    "evaluate with run_episodes, after training or from a callback": """
        eval_strategy eval_on_start num_generations_eval do_eval bf16_full_eval fp16_full_eval
        load_best_model_at_end metric_for_best_model""",
    "R3 has one reward, the verdict on the retry": "reward_weights multi_objective_aggregation",
    "R3 takes one step a rollout: raise the learning rate or max_steps instead": "num_iterations",
    "a step of R3 is one rollout: leave it unset": "steps_per_generation generation_batch_size",
    "R3 takes one step a rollout, so that the ratio is 1 and nothing is clipped": """
        epsilon epsilon_high delta""",
    "it belongs to a loss that R3 does not take": """
        sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg
        vespo_lambda_neg""",
    "R3 counts steps, not epochs: use max_steps and failures_per_step": "num_train_epochs",
    "the order is drawn from the seed already: use seed": "shuffle_dataset train_sampling_strategy",
    "use seed, which draws the order and the samples": "data_seed",
    "a resumed run would train on the first failures again": "ignore_data_skip",
    "call resume_or_train(), or train(resume_from_checkpoint=...)": "resume_from_checkpoint",
    "a run could not resume: use save_strategy='no' and save_model()": "save_only_model",
    "a resumed run would lose the reference: leave it off": """
        sync_ref_model ref_model_mixup_alpha ref_model_sync_steps""",
    "a step holds whole groups: lower per_device_train_batch_size": "auto_find_batch_size",
    "a group is one packed row, without padding: leave it unset": "pad_to_multiple_of",
    "it is of no use in GRPO's loss": "label_smoothing_factor",
    "metrics.jsonl counts the tokens": "include_num_input_tokens_seen",
    "metrics.jsonl has a line for every step: leave it unset": "logging_steps logging_strategy",
    "it does not go with the sampling of R3's engine": """
        torch_compile torch_compile_backend torch_compile_mode""",
}
REFUSED = {name: why for why, names in REFUSED_FOR.items() for name in names.split()}
FREE = set(  # decides no weight but by rounding, so that a resumed run may change it
    """
    output_dir sample_batch trust_remote_code
    per_device_train_batch_size gradient_accumulation_steps
    gradient_checkpointing gradient_checkpointing_kwargs use_cache use_cpu
    torch_empty_cache_steps parallelism_config accelerator_config fsdp fsdp_config deepspeed debug
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend
    ddp_timeout local_rank skip_memory_metrics do_train do_predict
    dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
    remove_unused_columns label_names length_column_name
    log_completions log_multimodal num_completions_to_print log_unique_prompts
    log_completions_hub_repo logging_first_step log_on_each_node
    logging_nan_inf_filter log_level log_level_replica disable_tqdm report_to run_name project
    trackio_space_id trackio_bucket_id trackio_static_space_id
    eval_steps eval_delay per_device_eval_batch_size prediction_loss_only eval_do_concat_batches
    eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics
    greater_is_better
    save_strategy save_steps save_on_each_node save_total_limit enable_jit_checkpoint
    restore_callback_states_from_checkpoint push_to_hub hub_token hub_private_repo hub_model_id
    hub_strategy hub_always_push hub_revision
    """.split()
)
HONOURED = set(  # TRL's other settings: a resumed run must have the same
    """
    model_init_kwargs router_aux_loss_coef disable_dropout cast_lm_head_to_fp32 num_generations
    max_completion_length temperature chat_template_kwargs beta
    importance_sampling_level scale_rewards loss_type
    mask_truncated_completions top_entropy_quantile
    entropy_coef use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta
    entropy_target vllm_importance_sampling_correction vllm_importance_sampling_mode
    vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min
    vllm_importance_sampling_cap off_policy_mask_threshold use_bias_correction_kl
    max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs
    warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    optim_target_modules average_tokens_across_devices max_grad_norm bf16 fp16 tf32
    use_liger_kernel liger_kernel_config neftune_noise_alpha full_determinism seed
    """.split()
)
OF_LOADING = set(  # keys of model_init_kwargs that decide no weight, or are secret
    """
    token use_auth_token device_map max_memory offload_folder offload_state_dict low_cpu_mem_usage
    cache_dir force_download local_files_only proxies trust_remote_code
    """.split()
)
CONSTANT = ("constant", "constant_with_warmup")  # schedules that do not look at max_steps


def refuse_ignored(config) -> None:
    """R3Error for a setting that R3 could not honour; `config`: before TRL has filled it in."""
    for field in fields(config):
        value = getattr(config, field.name)
        unset = [None, {}, default_of(field)] + [False] * (default_of(field) == "no")
        if field.name in REFUSED and value not in unset:
            raise R3Error(f"{field.name}={value!r} is not supported: {REFUSED[field.name]}")


def default_of(field) -> Any:
    """The default value of a dataclass's field."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def settings_facts(config) -> dict:
    """The settings that decide what is learned; `max_steps` if the schedule looks at it."""
    decisive = [f.name for f in fields(config) if f.name not in FREE and f.name not in REFUSED]
    facts = {name: getattr(config, name) for name in decisive}
    given = facts["model_init_kwargs"] or {}
    facts["model_init_kwargs"] = {k: v for k, v in given.items() if k not in OF_LOADING} or None
    kind = getattr(config.lr_scheduler_type, "value", config.lr_scheduler_type)
    if kind in CONSTANT and (kind == "constant" or not 0 < config.warmup_steps < 1):
        del facts["max_steps"]
    return facts
