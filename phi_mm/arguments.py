"""What of transformers' training arguments this project sets, and what it refuses."""

from typing import Any

# What transformers' defaults get wrong for us; a recipe may still say otherwise.
TRAINING_DEFAULTS: dict[str, Any] = {
    "remove_unused_columns": False,  # the collator reads `messages`, which no forward() names
    "label_names": ["labels"],  # found by signature otherwise, which PEFT's wrapper hides
    "prediction_loss_only": True,  # validation logits are vocabulary-wide: they would fill memory
    "include_num_input_tokens_seen": "no",
    "ddp_find_unused_parameters": False,  # the model puts idle projectors into the graph itself
    "logging_steps": 10,
    "logging_nan_inf_filter": False,  # a NaN must be seen, not averaged away
    "save_total_limit": 2,
    "resume_from_checkpoint": "auto",  # a killed run goes on where its last whole checkpoint was
    "report_to": "none",
}

# What makes the Trainer compute in half precision.
HALF = {"bfloat16": {"bf16": True}, "float16": {"fp16": True}}


def check_arguments(training: dict[str, Any]) -> None:
    """Refuses arguments that mean something else, or nothing, for this model.

    Raises:
        ValueError: naming the argument and what to do.
    """
    if training.get("label_smoothing_factor"):
        raise ValueError("training.label_smoothing_factor: the Trainer would not shift the labels")
    if training.get("use_liger_kernel"):
        raise ValueError(
            "training.use_liger_kernel: transformers looks kernels up by the type of the whole "
            "model, finds none for phi_mm and trains without; what they save most of, logits, the "
            "head computes for supervised positions alone: remove it"
        )
    if not training["prediction_loss_only"]:
        raise ValueError(
            "training.prediction_loss_only=false would gather logits of the whole vocabulary: "
            "remove it, phi-mm evaluate measures answers"
        )
    _check_hub(training)


def _check_hub(training: dict[str, Any]) -> None:
    given = [key for key in training if key.startswith("hub_") and training[key] is not None]
    if "hub_token" in given:
        raise ValueError(
            "training.hub_token would be written to recipe.yaml: run `hf auth login`, or set "
            "HF_TOKEN"
        )
    if not training.get("push_to_hub"):
        if given:
            raise ValueError(f"training.{given[0]} is given without push_to_hub: add it")
        return
    if not training.get("hub_model_id"):
        raise ValueError("training.push_to_hub is given without hub_model_id: name the repository")
    strategy = training.get("hub_strategy", "every_save")
    if strategy not in ("end", "every_save"):
        raise ValueError(
            f"got training.hub_strategy={strategy}, expected end or every_save: whole checkpoints "
            "hold optimizer state, which is nothing to publish"
        )
