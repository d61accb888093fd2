"""Keys that people know from other tools, and features that are known elsewhere: what to write here instead."""

from __future__ import annotations

_NAMES = {
    "name": "run_name hub_model_id",
    "seed": "random_seed",
    "model": "model_name_or_path model_name teacher_model teacher_model_name_or_path pretrained_model_name_or_path",
    "source": "dataset dataset_name data_path",
    "train": "train_dataset train_files",
    "validation": "eval_dataset validation_file eval_file",
    "test": "test_file test_dataset",
    "max_length": "model_max_length max_seq_length max_seq_len",
    "keep": "num_hidden_layers num_layers",
    "temperature": "distill_temperature kd_temperature",
    "epochs": "num_epochs num_train_epochs max_epochs",
    "steps": "max_steps num_steps num_training_steps",
    "batch_size": "train_batch_size global_batch_size eval_batch_size per_device_eval_batch_size",
    "micro_batch_size": "per_device_train_batch_size per_gpu_train_batch_size train_micro_batch_size_per_gpu",
    "lr": "learning_rate peak_lr",
    "schedule": "lr_scheduler_type lr_scheduler scheduler",
    "warmup": "warmup_ratio warmup_steps num_warmup_steps",
    "optimizer": "optim",
    "max_grad_norm": "gradient_clipping clip_grad_norm",
    "ema": "ema_decay",
    "compile": "torch_compile",
    "loader_workers": "dataloader_num_workers num_workers",
    "save_every": "save_steps",
    "evaluate_every": "eval_steps",
    "log_every": "logging_steps",
    "keep_best": "metric_for_best_model",
    "trackers": "report_to",
    "mask_share": "mlm_probability mlm_prob masking_ratio",
}
RENAMED = {theirs: ours for ours, names in _NAMES.items() for theirs in names.split()}
"""Key of another tool -> key of a recipe, in whichever section has it."""
_WEIGHTS = "give each item of losses: a weight, e.g. {match: labels, weight: 0.3} and {match: logits, weight: 0.7}"
_LAUNCH = "give a file of recipes/accelerate to `accelerate launch --config_file`"
ADVICE = {
    **dict.fromkeys(("bf16", "fp16", "mixed_precision", "torch_dtype", "amp"), "write precision: bf16 under training:"),
    **dict.fromkeys(("output_dir", "out_dir", "save_dir", "logging_dir"), "give --out FOLDER on the command line"),
    **dict.fromkeys(("alpha", "alpha_ce", "alpha_kd", "kd_weight", "kd_ratio", "ce_weight"), _WEIGHTS),
    **dict.fromkeys(("deepspeed", "fsdp"), _LAUNCH),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), "write betas: [0.9, 0.999] under training:"),
    **dict.fromkeys(("text", "text_column", "dataset_text_field"), "write columns: {text: COLUMN} under data:"),
    **dict.fromkeys(("label", "label_column"), "write columns: {label: COLUMN} under data:"),
    **dict.fromkeys(
        ("assistant_only_loss", "completion_only_loss", "train_on_inputs", "train_on_prompt"),
        "write learn_from: assistant, or all, under data:, for task: chat",
    ),
    **dict.fromkeys(
        ("lora_r", "lora_alpha", "lora_dropout", "peft", "peft_config", "adapter", "adapters", "r", "target_modules"),
        "write lora: {rank: 16, alpha: 32, targets: all-linear} under training:",
    ),
    **dict.fromkeys(
        ("lmbda", "gkd", "generation", "rollout"), "write on_policy: {share: 0.5, max_new_tokens: 128} under training:"
    ),
    "gradient_accumulation_steps": "give batch_size for the whole step and micro_batch_size for one forward pass",
    "adam_epsilon": "write optimizer_params: {eps: 1.0e-8} under training:",
    "trust_remote_code": "give --trust-remote-code on the command line",
    "resume_from_checkpoint": "give the same command again; it continues from the last checkpoint",
    "student_model": "write from: ./FOLDER under student:, or layers: to cut the student from the teacher",
    "also": "write sets: {NAME: …} under evaluation:",
    "load_best_model_at_end": "write keep_best: METRIC under training:; the best checkpoint is kept, not loaded",
}
"""Key of another tool -> what to do here, where no key takes its place."""
UNSUPPORTED = (
    "qlora",
    *("quantization", "quantisation", "quantization_config", "quantize", "load_in_4bit", "load_in_8bit", "int4"),
    "seq_kd",
    *("vocabulary", "vocab", "vocab_size", "prune_vocabulary", "heads", "attention_heads", "prune_heads"),
    *("num_attention_heads", "hidden", "hidden_size", "embeddings", "experts", "early_stopping", "label_smoothing"),
    *("early_stopping_patience", "label_smoothing_factor", "gradient_noise", "curriculum", "push_to_hub"),
)
"""Features that do not exist; a neighbour in spelling would be wrong."""
