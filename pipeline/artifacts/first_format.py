"""The settings that were there in format 1, which hashed every one of them, defaults too.

Nothing is added here: what comes later counts only where it is not at its default, see `counted`.
"""

_MODEL = """backbone backbone_weights image_size num_slots slot_size initial_slots initialisation corrector_mlp
    predictor decoder decoder_hidden_sizes decoder_blocks
    mean std"""
_TRAINING = (
    """steps batch_size learning_rate warmup_steps gradient_clip alpha temperature seed workers precision"""
)
_KEYS = {
    "Dataset": "kind name path split resolution masks seed synthetic",
    "Clips": "clip_frames short_side fps max_seconds codec quality videos_per_shard row_group_mb",
    "ViT": "patch_size embed_dim depth num_heads",
    "Teacher": f"{_MODEL} name checkpoint num_heads train",
    "Student": _MODEL,
    "Targets": "views crop min_scale flip rollout student_features teacher_features feature_dtype",
    "TeacherTraining": f"""{_TRAINING} reconstruction similarity similarity_temperature similarity_threshold""",
    "Distill": f"""{_TRAINING} name method beta reconstruction_kd_weight feature_kd_weight matching slot_map
        initial_slots_from_teacher live_teacher fresh_views fast_decoder""",
    "Evaluate": """split model protocol clip_frames mask_size crop background ignore_overlaps rollout masks score
        teacher baselines validation_videos""",
    "SyntheticSettings": "videos frames size min_objects max_objects fps seed",
    "Protocol": "clip_frames mask_size crop background ignore_overlaps rollout masks",
}

# By the name of a section's class.
FIRST_KEYS = {section: frozenset(keys.split()) for section, keys in _KEYS.items()}
