"""transformers' Trainer with a rate for every module and checkpoints of what was trained."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from huggingface_hub import CommitInfo, HfApi
from peft import PeftModel
from transformers import ProgressCallback, Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from modeling_phi_mm.media_phi_mm import is_trained
from phi_mm.datasets.augmentation import AugmentationSection
from phi_mm.hub.destination import told
from phi_mm.hub.export import register_code
from phi_mm.hub.push import MAIN, commit_folder
from phi_mm.recipes import DistillationSection
from phi_mm.training.augmentation import AugmentingCollator
from phi_mm.training.checkpoints import seal
from phi_mm.training.console import ConsoleTable
from phi_mm.training.distillation import (
    STUDENTS,
    TEACHER,
    TeachingCollator,
    as_pretrained,
    check_transcripts,
    divergence,
    teach,
)
from phi_mm.training.guard import IDS, GradientGuard, NamingCollator
from phi_mm.training.release import write_release
from phi_mm.training.sampler import (
    LengthGroupedSampler,
    PackingSampler,
    SeededSampler,
    SharedRows,
    row_kinds,
    row_lengths,
)
from phi_mm.weights import learning_towers, load_parts, save_parts

logger = logging.getLogger(__name__)

RELEASE = "hub"  # folder inside the run folder: what was pushed last


class PhiMMTrainer(Trainer):
    """Trainer for an assembled model.

    The loss is a mean over supervised tokens of the whole accumulated batch: the base class counts
    them (`num_items_in_batch`) and the model divides by that count. With a collator of a
    `packed_length`, a training batch is `args.train_batch_size` rows of that length, which several
    conversations share.

    Args:
        learning_rates: of the modules (by their name inside the model) that do not learn at
            `args.learning_rate`.
        gradient_norm_limit: a longer gradient stops the run; None lets any finite one pass.
        distillation: how much is learnt from what the text model says to the words of a recording.
        group_by_modality: where `args` group by length, by what a row shows as well.
        augmentation: what is done to recordings in training; evaluation hears them as they are.
    """

    def __init__(
        self,
        *args: Any,
        learning_rates: Mapping[str, float] | None = None,
        gradient_norm_limit: float | None = None,
        distillation: DistillationSection | None = None,
        group_by_modality: bool = False,
        augmentation: AugmentationSection | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self._check_best_metric()
        if self.is_fsdp_enabled:
            self._prepare_to_shard()
        self.learning_rates = dict(learning_rates or {})
        self.guard = GradientGuard(gradient_norm_limit, Path(self.args.output_dir))
        self.distillation = distillation
        if distillation is not None:
            check_transcripts(self.train_dataset)
        self.group_by_modality = group_by_modality
        self._seeded: SeededSampler | None = None
        self._augmenting: AugmentingCollator | None = None
        if augmentation is not None:
            self._augmenting = AugmentingCollator(
                self.data_collator, self.processing_class, augmentation, self.data_seed
            )
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ConsoleTable)
        if self.args.push_to_hub:
            adapted = isinstance(self.model, PeftModel)
            base = self.model.get_base_model() if adapted else self.model
            register_code(base, self.processing_class)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """The base class's, with batches that say which rows they hold, and what is said there."""
        loader = self._rows_loader()
        inner = loader.base_dataloader  # accelerate's own only puts batches where they belong
        if self._augmenting is not None:
            inner.collate_fn = self._augmenting
        if self.distillation is not None:
            inner.collate_fn = TeachingCollator(inner.collate_fn)
        inner.collate_fn = NamingCollator(inner.collate_fn)
        return loader

    @property
    def data_seed(self) -> int:
        """Of the order of the rows, and of what is drawn for them."""
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """The base class's; the rows' names stay here."""
        ids = inputs.pop(IDS)
        inputs = self._prepare_inputs(inputs)
        self.guard.keep(ids, {name: value for name, value in inputs.items() if name != TEACHER})
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The base class's, with the divergence from the text model where a batch has spoken rows:
        a mean over the same number of tokens as the loss.
        """
        teacher = inputs.pop(TEACHER, None)
        taught = teach(self.model, teacher) if teacher else None
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if taught is not None:
            chosen = self.distillation
            apart = divergence(
                outputs.logits, inputs, taught, teacher[STUDENTS], chosen.temperature
            )
            # The count is over all processes, whose gradients are averaged.
            share = self.accelerator.num_processes / num_items_in_batch
            loss = loss + chosen.weight * apart * share
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(
        self, model: torch.nn.Module, grad_norm: torch.Tensor | float | None = None
    ) -> torch.Tensor | float | None:
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None:  # DeepSpeed knows none in some steps
            scaled = self.accelerator.scaler is not None
            self.guard.check(float(norm), self.state.global_step + 1, self.model, scaled)
        return norm

    def _rows_loader(self) -> torch.utils.data.DataLoader:
        """The base class's; where rows are shared, its items are lists of those that share one."""
        if self.data_collator.packed_length is None:
            return super().get_train_dataloader()
        return self._get_dataloader(
            SharedRows(self.train_dataset),
            description="Training",
            batch_size=self._train_batch_size,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_train_sampler(
        self, train_dataset: torch.utils.data.Dataset | None = None
    ) -> torch.utils.data.Sampler | None:
        arguments, collator = self.args, self.data_collator
        grouped = arguments.train_sampling_strategy == "group_by_length"
        if collator.packed_length is None and not grouped:
            return super()._get_train_sampler(train_dataset)
        seed = self.data_seed
        with arguments.main_process_first(desc="row lengths"):
            lengths = row_lengths(self.train_dataset, collator.processor, collator.max_length)
        if collator.packed_length is not None:
            self._seeded = PackingSampler(lengths, collator.packed_length, seed)
        else:
            together = arguments.train_batch_size * arguments.gradient_accumulation_steps
            together *= arguments.world_size
            kinds = row_kinds(self.train_dataset) if self.group_by_modality else None
            self._seeded = LengthGroupedSampler(lengths, together, seed, kinds)
        return self._seeded

    def _run_epoch(self, *, epoch: int, **kwargs: Any) -> None:
        # The loader of a resumed run with several processes hides the sampler from `set_epoch`.
        if self._seeded is not None:
            self._seeded.set_epoch(epoch)
        if self._augmenting is not None:
            self._augmenting.set_epoch(epoch)
        super()._run_epoch(epoch=epoch, **kwargs)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The base class's optimiser, with modules moved to groups at rates of their own."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if not fresh:
            return optimizer
        named = list((self.model if model is None else model).named_parameters())
        for module, rate in self.learning_rates.items():
            own = {id(p) for name, p in named if f".{module}." in f".{name}"}
            for group in list(optimizer.param_groups):
                moved = [p for p in group["params"] if id(p) in own]
                group["params"] = [p for p in group["params"] if id(p) not in own]
                settings = {key: value for key, value in group.items() if key != "params"}
                optimizer.add_param_group({**settings, "lr": rate, "params": moved})
        optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The base class's. Of several sets the mean loss over all their rows is given too, by
        which the best checkpoint is chosen unless the recipe names another.
        """
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        sets = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(sets, dict):
            total = sum(
                len(rows) * metrics[f"{metric_key_prefix}_{name}_loss"]
                for name, rows in sets.items()
            )
            mean = {f"{metric_key_prefix}_loss": total / sum(map(len, sets.values()))}
            self.log(dict(mean))
            metrics |= mean
        return metrics

    def pretrained_text_loss(self) -> float:
        """The validation loss of rows in text alone without LoRA: what the language model knew."""
        with as_pretrained(self.model):
            metrics = self.evaluate(self.eval_dataset["text"], metric_key_prefix="pretrained_text")
        return metrics["pretrained_text_loss"]

    def _check_best_metric(self) -> None:
        """Raises ValueError where the best checkpoint would be chosen by what is never measured."""
        chosen = self.args.metric_for_best_model
        if chosen is None:
            return
        kinds = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
        known = ["loss", *(f"{kind}_loss" for kind in kinds)]
        if chosen.removeprefix("eval_") not in known:
            raise ValueError(
                f"got training.metric_for_best_model={chosen}, expected one of {', '.join(known)}: "
                "these are measured while a run trains"
            )

    def _prepare_to_shard(self) -> None:
        """Has FSDP divide the language model layer by layer, and the rest as one.

        A tower's layers must not be divided one by one: a process whose batch shows nothing would
        not gather them, and the others would wait for it.

        Raises:
            ValueError: adapters by modality, which would be saved in pieces.
        """
        if self.model.config.modality_adapters is not None:
            raise ValueError(
                "got adapters: by_modality under FSDP, expected shared: adapters of one modality "
                "are not gathered when they are saved; take recipes/accelerate/ddp.yaml"
            )
        adapted = isinstance(self.model, PeftModel)
        base = self.model.get_base_model() if adapted else self.model
        layer = type(base.model.language_model.layers[0]).__name__
        self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = [layer]

    def _saves_parts(self) -> bool:
        """Whether a checkpoint holds parts of the model in files of their own: neither all of it,
        nor what PEFT saves.
        """
        if self.model.config.modality_adapters is not None:
            return True
        return not isinstance(self.model, PeftModel) and not is_trained(
            self.model.model.language_model
        )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """A checkpoint holds what was trained (parts, adapter), not what never changed."""
        adapted, parts = isinstance(self.model, PeftModel), self._saves_parts()
        if not adapted and not parts:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            if adapted:
                # "auto" would ask the Hub whether the vocabulary grew, at every checkpoint.
                self.model.save_pretrained(
                    folder, state_dict=state_dict, save_embedding_layers=False
                )
            else:
                save_parts(self.model, folder, state_dict)
            if self.model.config.modality_adapters is not None:
                self.model.save_modality_adapters(folder)
            self.processing_class.save_pretrained(folder)

    def _save_rng_state(self, output_dir: str) -> None:
        """The base class's; after it only the Trainer's own state is written, which closes the
        checkpoint.
        """
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # every process has written its share
        if self.args.should_save:
            seal(Path(output_dir))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        # FSDP's checkpoints are of a form of their own.
        if self._saves_parts() and not self.is_fsdp_enabled:
            self._load_own(Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._saves_parts():
            self._load_own(Path(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def _load_own(self, folder: Path) -> None:
        """Loads a checkpoint of a form that the base class does not know."""
        if self.model.config.modality_adapters is not None:
            self.model.load_modality_adapters(folder)
        load_parts(self.model, folder, learning_towers(self.model))

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
    for index, kind in enumerate(row_kinds(rows)):
        kinds.setdefault(kind, []).append(index)
    return {kind: rows.select(indices) for kind, indices in kinds.items()}
