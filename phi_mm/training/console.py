"""The training log as a narrow table under the progress bar."""

from typing import Any

from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

COLUMNS = (("loss", "{:9.4f}"), ("grad_norm", "{:9.3f}"), ("learning_rate", "{:10.2e}"))


class ConsoleTable(ProgressCallback):
    """transformers' progress bar; every log becomes one row, every validation one line."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.write("     step     loss  gradient      rate")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is None or not logs:
            return
        if "loss" in logs:
            cells = [form.format(float(logs[name])) for name, form in COLUMNS if name in logs]
            self.training_bar.write(f"{state.global_step:9d}{''.join(cells)}")
        for name, value in logs.items():
            if name.startswith("eval_") and name.endswith("loss"):
                subset = name.removeprefix("eval_").removesuffix("loss").strip("_") or "all"
                self.training_bar.write(f"{state.global_step:9d}  validation {subset}: {value:.4f}")
