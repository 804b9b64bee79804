"""LoRA by modality: one adapter for pictures, one for recordings, none for text.

Every row of a batch goes through the adapters of what it holds: rows with a picture through the
image adapter, rows with a recording through the audio adapter, rows with both through their sum,
and rows of text alone through the language model as it was before any training, bit by bit. Where
a row holds several conversations, each is such a row. The idea is Phi-4-multimodal's
(arXiv:2503.01743), which chooses for a whole batch at a time.

The layers are PEFT's, by transformers' own integration. Here is only what they lack: which rows
use which adapter, and saving and loading all of them with the model.

Shapes: B rows of a batch, L positions, D width.
"""

import copy
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import cached_file, is_peft_available

MODALITIES = ("image", "audio")  # the columns of every modality mask
FOLDER = "adapters"  # FOLDER/image and FOLDER/audio of a saved model


class ModalityRouter:
    """Which rows of the batch that is being computed hold which modality."""

    def __init__(self):
        self.mask: torch.BoolTensor | None = None  # (B, 2), or (B, L, 2) in packed rows


class OwnRowsOnly:
    """Forward hook on the last layer of an adapter: rows without its modality get nothing of it."""

    def __init__(self, router: ModalityRouter, modality: str):
        self.router = router
        self.column = MODALITIES.index(modality)

    def __call__(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """(B, L, D) to (B, L, D)."""
        without = ~self.router.mask[..., self.column]
        # Not a product with zero: that would keep a NaN or an infinity.
        return output.masked_fill(without.view(len(without), -1, 1).to(output.device), 0)


class ModalityAdaptersMixin:
    """What a model needs to carry adapters by modality; `config.modality_adapters` names them."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As transformers', with the adapters by modality that the config names."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.config.modality_adapters:
            hub = ("subfolder", "token", "cache_dir", "local_files_only", "force_download")
            given = {name: kwargs[name] for name in hub if name in kwargs}
            # The very commit that the weights came from, should the branch have moved since.
            given["revision"] = getattr(model.config, "_commit_hash", None) or kwargs.get(
                "revision"
            )
            model.load_modality_adapters(pretrained_model_name_or_path, **given)
        return loaded

    def save_pretrained(self, save_directory, **kwargs):
        """As transformers', with the adapters by modality in subfolders, unmerged."""
        if not self.config.modality_adapters:
            return super().save_pretrained(save_directory, **kwargs)
        self.save_modality_adapters(save_directory)
        # With adapters loaded, transformers would save one of them and nothing else.
        self._hf_peft_config_loaded = False
        try:
            kwargs.setdefault("state_dict", base_state_dict(self))
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self._hf_peft_config_loaded = True

    def add_modality_adapters(self, settings: dict) -> None:
        """Adds fresh adapters that are to be trained; everything else in the model is frozen.

        Args:
            settings: a `peft.LoraConfig` for each modality, `{"image": ..., "audio": ...}`.
        """
        for modality, config in settings.items():
            _check_lora(config)
            self._add(config, modality)
        self._route(list(settings))

    def load_modality_adapters(self, source: str, subfolder: str = "", **hub_kwargs) -> None:
        """Fills the adapters that `config.modality_adapters` names, as `save_pretrained` wrote
        them; those that are not there yet are added, frozen.

        Args:
            source: folder or Hub repository.
            subfolder: of the model in it.
            hub_kwargs: `revision`, `token`, `cache_dir` and the like.

        Raises:
            ImportError: PEFT, whose layers they are, is not installed.
            ValueError: an adapter is not plain LoRA, or not for this language model.
        """
        if not is_peft_available():
            raise ImportError(
                f"got a model with LoRA for {self.config.modality_adapters} and no peft to run it, "
                "expected both: pip install peft"
            )
        for modality in self.config.modality_adapters:
            where = "/".join(filter(None, (subfolder, FOLDER, modality)))
            self._load_one(modality, str(source), subfolder=where, **hub_kwargs)
        if self.base_model.modality_router is None:
            self._route(self.config.modality_adapters)
            self.requires_grad_(False)  # PEFT opens what it switches on
            self.eval()

    def _load_one(self, modality: str, source: str, **hub_kwargs) -> None:
        """By PEFT's functions: transformers' `load_adapter` reports the adapter that was loaded
        before as missing.
        """
        from peft import LoraConfig, set_peft_model_state_dict

        name, folder = adapter_name(modality), f"{source}/{hub_kwargs['subfolder']}"
        settings = cached_file(source, "adapter_config.json", **hub_kwargs)
        weights = cached_file(source, "adapter_model.safetensors", **hub_kwargs)
        if self.base_model.modality_router is None:
            config = LoraConfig.from_pretrained(str(Path(settings).parent))
            _check_lora(config)
            self._add(config, modality)
        state = {k.removeprefix("base_model.model."): v for k, v in load_file(weights).items()}
        expected = _adapter_state(self, name)
        if state.keys() != expected.keys():
            odd = sorted(state.keys() ^ expected.keys())
            raise ValueError(
                f"got {folder} with {len(state)} weights, expected the {len(expected)} of this "
                f"language model; {odd[0]} is among those that do not match"
            )
        set_peft_model_state_dict(self, state, adapter_name=name)

    def _add(self, config, modality: str) -> None:
        with warnings.catch_warnings():
            # PEFT warns of every adapter after the first.
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            self.add_adapter(config, adapter_name(modality))

    def save_modality_adapters(self, folder: str | Path) -> None:
        """Writes each adapter in PEFT's form to FOLDER/<modality> in `folder`."""
        for modality in self.config.modality_adapters:
            name, own = adapter_name(modality), Path(folder, FOLDER, modality)
            settings = copy.copy(self.peft_config[name])
            settings.inference_mode = True  # as PEFT saves its own
            settings.base_model_name_or_path = None  # the folder they are in
            settings.save_pretrained(own)
            state = _adapter_state(self, name)
            # PEFT looks for its weights under the names of its own wrapper.
            named = {f"base_model.model.{key}": value for key, value in state.items()}
            save_file(named, own / "adapter_model.safetensors", metadata={"format": "pt"})

    def _route(self, modalities: list[str]) -> None:
        """Switches all adapters on, each for its own rows."""
        self.config.modality_adapters = list(modalities)
        names = {adapter_name(modality): modality for modality in modalities}
        self.set_adapter(list(names))
        router = self.base_model.modality_router = ModalityRouter()
        for module in self.modules():
            for name, last in getattr(module, "lora_B", {}).items():
                if name in names:
                    last.register_forward_hook(OwnRowsOnly(router, names[name]))


def adapter_name(modality: str) -> str:
    """PEFT's name for the adapter of a modality.

    More than the bare word: transformers takes every weight with an adapter's name in it for one of
    that adapter, and "audio" is in "audio_tower".
    """
    return f"{modality}_adapter"


def refuse_mixed_projectors(projector: nn.Module) -> None:
    """Refuses a batch in which PEFT chooses another projector for each row.

    PEFT cuts the batch of a module in `modules_to_save` by the rows' adapters, but the batch of a
    projector is pictures or windows of sound, not rows: they would go through each other's
    projectors.

    Raises:
        ValueError: `adapter_names` were given and `projector` is one of several.
    """
    hooks = projector._forward_pre_hooks.values()
    if any("adapter_names" in getattr(hook, "keywords", {}) for hook in hooks):
        raise ValueError(
            "got adapter_names and adapters with projectors of their own, expected one adapter for "
            "the whole batch: call set_adapter for each request, or train LoRA without "
            "modules_to_save"
        )


def base_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict that `model` would have without its adapters."""
    state = model.state_dict()
    return {k.replace(".base_layer.", "."): v for k, v in state.items() if ".lora_" not in k}


def _adapter_state(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    # "auto" would ask the Hub whether the vocabulary grew.
    return get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)


def _check_lora(config) -> None:
    """DoRA does not end in `lora_B`, and saved modules would be used by every row."""
    if config.use_dora or config.modules_to_save:
        raise ValueError(
            f"got use_dora={config.use_dora} and modules_to_save={config.modules_to_save}, "
            "expected plain LoRA: adapters by modality are switched row by row"
        )
