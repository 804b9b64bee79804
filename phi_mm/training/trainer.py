"""transformers' Trainer with a learning rate for projectors and checkpoints of what was trained."""

import logging
from pathlib import Path
from typing import Any

import datasets
import torch
from huggingface_hub import CommitInfo, HfApi
from peft import PeftModel
from safetensors.torch import save_file
from transformers import ProgressCallback, Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from phi_mm.assembly import PROJECTOR_FILE, PROJECTORS, load_projectors, projector_state
from phi_mm.hub.destination import told
from phi_mm.hub.export import register_code
from phi_mm.hub.push import MAIN, commit_folder
from phi_mm.training.console import ConsoleTable
from phi_mm.training.release import write_release
from phi_mm.training.sampler import LengthGroupedSampler, row_lengths

logger = logging.getLogger(__name__)

RELEASE = "hub"  # folder inside the run folder: what was pushed last


class PhiMMTrainer(Trainer):
    """Trainer for an assembled model.

    The loss is a mean over supervised tokens of the whole accumulated batch: the base class counts
    them (`num_items_in_batch`) and the model divides by that count.

    Args:
        projector_learning_rate: rate of the projectors where LoRA or the language model learns at
            `args.learning_rate` (LLaVA's `mm_projector_lr`); None for one rate.
    """

    def __init__(self, *args: Any, projector_learning_rate: float | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.projector_learning_rate = projector_learning_rate
        self._grouping: LengthGroupedSampler | None = None
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ConsoleTable)
        if self.args.push_to_hub:
            adapted = isinstance(self.model, PeftModel)
            base = self.model.get_base_model() if adapted else self.model
            register_code(base, self.processing_class)

    def _get_train_sampler(
        self, train_dataset: datasets.Dataset | None = None
    ) -> torch.utils.data.Sampler | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        arguments = self.args
        if arguments.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        together = arguments.train_batch_size * arguments.gradient_accumulation_steps
        seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
        lengths = row_lengths(rows, self.data_collator)
        self._grouping = LengthGroupedSampler(lengths, together * arguments.world_size, seed)
        return self._grouping

    def _run_epoch(self, *, epoch: int, **kwargs: Any) -> None:
        # The loader of a resumed run with several processes hides the sampler from `set_epoch`.
        if self._grouping is not None:
            self._grouping.set_epoch(epoch)
        super()._run_epoch(epoch=epoch, **kwargs)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The base class's optimiser, with the projectors moved to groups at their own rate."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if not fresh or self.projector_learning_rate is None:
            return optimizer
        named = (self.model if model is None else model).named_parameters()
        own = {id(p) for name, p in named if any(part in name for part in PROJECTORS)}
        for group in list(optimizer.param_groups):
            moved = [p for p in group["params"] if id(p) in own]
            group["params"] = [p for p in group["params"] if id(p) not in own]
            settings = {key: value for key, value in group.items() if key != "params"}
            rate = {"lr": self.projector_learning_rate}
            optimizer.add_param_group({**settings, **rate, "params": moved})
        optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def _only_projectors_learn(self) -> bool:
        learning = (name for name, p in self.model.named_parameters() if p.requires_grad)
        bare = not isinstance(self.model, PeftModel)
        return bare and all(any(part in name for part in PROJECTORS) for name in learning)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """A checkpoint holds what was trained (projectors, adapter), not what never changed."""
        adapted = isinstance(self.model, PeftModel)
        apart = self.model.config.modality_adapters is not None
        if not adapted and not apart and not self._only_projectors_learn():
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            if adapted:
                # "auto" would ask the Hub whether the vocabulary grew, at every checkpoint.
                self.model.save_pretrained(folder, save_embedding_layers=False)
            else:
                save_file(projector_state(self.model), folder / PROJECTOR_FILE)
            if apart:
                self.model.save_modality_adapters(folder)
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        if not self._load_own(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._load_own(Path(self.state.best_model_checkpoint)):
            super()._load_best_model()

    def _load_own(self, folder: Path) -> bool:
        """Loads a checkpoint that is of no form the base class knows; False for the others."""
        apart = self.model.config.modality_adapters is not None
        if apart:
            self.model.load_modality_adapters(folder)
        if apart or self._only_projectors_learn():
            load_projectors(self.model, folder)
            return True
        return False

    def push_to_hub(
        self, commit_message: str = "End of training", revision: str | None = None
    ) -> CommitInfo | None:
        """Saves, and pushes what was trained: weights, processor, code, card, and nothing else.

        The base class would push the whole run folder: recipe, logs, cached features and a pickle.

        Raises:
            ValueError: the Hub refuses, or something would be published that must not be.
        """
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        release = self._release(Path(self.args.output_dir), commit_message, revision)
        with told(f"cannot push to {self.hub_model_id}"):
            return commit_folder(*release)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self._finish_current_push()
        message = f"Training in progress, step {self.state.global_step}"
        release = self._release(Path(checkpoint_folder), message, self.args.hub_revision)
        self.push_in_progress = PushInProgress([HfApi().run_as_future(commit_folder, *release)])

    def _finish_current_push(self) -> None:
        if not self.args.push_to_hub or not self.is_world_process_zero():
            return
        super()._finish_current_push()
        for job in self.push_in_progress.jobs if self.push_in_progress is not None else []:
            if job.exception() is not None:  # training goes on: the next push sends what is missing
                logger.warning("a push to %s failed: %s", self.hub_model_id, job.exception())
        self.push_in_progress = None

    def _release(
        self, checkpoint: Path, message: str, revision: str | None
    ) -> tuple[Path, list[str], str, str, str]:
        """What `commit_folder` takes, for the state in `checkpoint`."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        run_dir = Path(self.args.output_dir)
        names = write_release(checkpoint, run_dir / RELEASE, self.model, run_dir)
        return run_dir / RELEASE, names, self.hub_model_id, revision or MAIN, message


def by_modality(rows: datasets.Dataset) -> dict[str, datasets.Dataset]:
    """Rows split by what they show: keys among text, image, audio, image_audio; none is empty.

    The Trainer evaluates each on its own and logs `eval_image_loss` and so on.
    """
    kinds: dict[str, list[int]] = {}
    for index, row in enumerate(rows.with_format(None)):
        types = {part["type"] for message in row["messages"] for part in message["content"]}
        kind = "_".join(t for t in ("image", "audio") if t in types) or "text"
        kinds.setdefault(kind, []).append(index)
    return {kind: rows.select(indices) for kind, indices in kinds.items()}
