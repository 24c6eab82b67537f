"""The LoRA layers of a peft model, and the adapter as a file."""

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from wdlib import TYPES, WdlibError, first_line, paths
from wdlib.checkpoints.architectures import tensor_role

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel


EDIT_BASE = ("pissa", "olora")
"""Initialisations of peft that subtract the first B A from the base weights."""

ADAPTER = "default"
START = "start"

_FLOATS = ("torch.float32", "torch.float16", "torch.bfloat16")


@dataclass(frozen=True)
class LoraSettings:
    """Shape of the adapter (docs/method.md, section 8): rank, alpha and dropout as peft has them.

    targets: last parts of the names of the modules to adapt.
    """

    rank: int = 16
    alpha: float = 16
    dropout: float = 0.0
    targets: tuple[str, ...] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip


@dataclass(frozen=True)
class Site:
    """A linear layer that is or will be adapted: module is the base layer, with its weight."""

    name: str
    layer: int
    type: str
    expert: int | None
    module: Any


@contextmanager
def expected_peft_warnings() -> Iterator[None]:
    """Silences what peft 0.21 is bound to say: it asks transformers 5 for a renamed attribute."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def load(model: "torch.nn.Module", folder: str | Path) -> "PeftModel":
    """The model with the adapter that `export` wrote to a folder.

    Raises: WdlibError for a folder without one, and for one that is damaged or of another model.
    """
    from peft import PeftModel

    folder = Path(folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():  # peft would ask the hub
            raise WdlibError(f"{folder} lacks {name}: give the folder of an adapter")
    try:
        with expected_peft_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            loaded = PeftModel.from_pretrained(model, folder)
    except Exception as error:  # whatever damage makes peft raise
        raise WdlibError(
            f"peft cannot load the adapter in {folder} ({first_line(error)}): export it again"
        ) from error
    return loaded


def export(peft_model: "PeftModel", folder: str | Path) -> Path:
    """Write an ordinary LoRA adapter that stock peft loads onto the untouched base model.

    With a frozen start, the adapter has twice the rank: [A; A0] and scaling [B, -B0], scaling 1.
    The live model is not changed.

    Arguments: peft_model, as `attach` or `reshape_` left it, trained or not; folder, made if
    missing, for adapter_model.safetensors and adapter_config.json.
    Returns: folder.
    Raises: WdlibError for what is no PeftModel with a plain LoRA adapter named "default".
    """
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import save_file

    if not isinstance(peft_model, PeftModel):
        raise WdlibError(f"a {type(peft_model).__name__} is no PeftModel: nothing to export")
    config = copy.deepcopy(plain_config(peft_model))

    def state_of(adapter: str) -> dict[str, torch.Tensor]:
        return get_peft_model_state_dict(
            peft_model, adapter_name=adapter, save_embedding_layers=False
        )

    state = state_of(ADAPTER)
    if START in peft_model.peft_config:
        start = state_of(START)
        scaling = config.lora_alpha / config.r
        for key in start:
            a = ".lora_A." in key
            joined = torch.cat([state[key], start[key]], dim=0 if a else 1)
            state[key] = joined if a else joined * scaling
        config.r *= 2
        config.lora_alpha = config.r
    config.init_lora_weights, config.inference_mode = True, True
    targets: Any = config.target_modules
    if isinstance(targets, set):  # whose order is another in every process
        config.target_modules = sorted(targets)
    base = peft_model.get_base_model().config
    config.base_model_name_or_path = getattr(base, "_name_or_path", None) or None
    folder = Path(folder)
    with TemporaryDirectory() as scratch:
        config.save_pretrained(scratch)
        text = (Path(scratch) / "adapter_config.json").read_text(encoding="utf-8")
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    with paths.atomic_write(folder / "adapter_model.safetensors") as part:
        save_file(tensors, part, metadata={"format": "pt"})
    paths.write_text(folder / "adapter_config.json", text)
    return folder


def target_sites(model: "torch.nn.Module", settings: LoraSettings) -> list[Site]:
    """The linear layers that peft will adapt, in the model's order."""
    if settings.rank < 1 or not settings.targets:
        raise WdlibError(f"nothing to adapt with rank {settings.rank}, targets {settings.targets}")
    ends = {name.rpartition(".")[2] for name, module in model.named_modules() if name}
    architectures = _architectures(model)
    sites: list[Site] = []
    found: set[str] = set()
    for name, module in model.named_modules():
        hit = {t for t in settings.targets if name == t or name.endswith(f".{t}")}
        if hit:
            found |= hit
            sites.append(_projection_site(name, module, architectures))
    for target in settings.targets:
        if target not in found:
            raise WdlibError(
                f"the model has no module {target!r}{_hint(target, ends)}: give the ends of the "
                "names of its linear layers as targets"
            )
    places = {place_key(site): site for site in sites}
    for site in sites:
        if (other := places[place_key(site)]) is not site:
            raise WdlibError(
                f"{site.name} and {other.name} are both {site.type} of layer {site.layer}, in two "
                "stacks of layers: give targets that are in one of them"
            )
        smallest = min(site.module.weight.shape)
        if settings.rank > smallest:
            raise WdlibError(
                f"rank {settings.rank} exceeds the smaller dimension of {site.name}: {smallest} "
                "is the largest possible"
            )
    return sites


def _architectures(model: "torch.nn.Module") -> tuple[str, ...]:
    """The `model_type` of a model, and of the language model in it."""
    config: Any = model.config
    both = (config, config.get_text_config()) if hasattr(config, "get_text_config") else (config,)
    return tuple(str(getattr(c, "model_type", "")) for c in both)


def _projection_site(name: str, module: "torch.nn.Module", architectures: tuple[str, ...]) -> Site:
    """A linear layer as a projection, or a WdlibError that says why it is none."""
    known = tensor_role(f"{name}.weight", architectures)
    if known is None or known.types[0] not in TYPES:
        raise WdlibError(
            f"{name} is not known as a projection ({', '.join(TYPES)}): leave it out of the "
            "targets, or add a row for its architecture to wdlib/checkpoints/lexicon.py"
        )
    if len(known.types) > 1:
        raise WdlibError(
            f"{name} joins {', '.join(known.types)} in one matrix, which has no single type: leave "
            "it out"
        )
    weight = getattr(module, "weight", None)
    if weight is None or str(weight.dtype) not in _FLOATS or weight.ndim != 2:
        stored = "no weight" if weight is None else f"weights of {weight.dtype}"
        raise WdlibError(
            f"{name} holds {stored} and is quantised, or no linear layer: load the model "
            "unquantised in float32, float16 or bfloat16"
        )
    return Site(name, known.layer, known.types[0], known.expert, module)


def lora_layers(peft_model: "PeftModel") -> list[tuple[str, Any]]:
    """Name in the base model and LoraLayer of peft of all that the adapter "default" adapts."""
    from peft.tuners.lora import LoraLayer

    return [
        (name.removeprefix("base_model.model."), module)
        for name, module in peft_model.named_modules()
        if isinstance(module, LoraLayer) and ADAPTER in module.r
    ]


def adapted_sites(peft_model: "PeftModel") -> list[tuple[Site, Any]]:
    """What the adapter "default" adapts, as projections, each with peft's LoraLayer.

    Raises: WdlibError for a layer that is no projection.
    """
    architectures = _architectures(peft_model.get_base_model())
    return [
        (_projection_site(name, layer.get_base_layer(), architectures), layer)
        for name, layer in lora_layers(peft_model)
    ]


def plain_config(peft_model: "PeftModel") -> "LoraConfig":
    """The configuration of the adapter "default", if it is an ordinary LoRA adapter."""
    from peft import LoraConfig

    config = peft_model.peft_config.get(ADAPTER)
    if not isinstance(config, LoraConfig) or config.peft_type != "LORA":
        raise WdlibError("the model has no LoRA adapter of peft's default name, 'default': add one")
    special = [
        key
        for key in ("use_dora", "use_rslora", "lora_bias", "alpha_pattern", "rank_pattern")
        if getattr(config, key)
    ]
    if config.bias != "none":
        special.append("bias")
    if special:
        raise WdlibError(f"the adapter uses {', '.join(special)}: a plain LoRA adapter is needed")
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith((*EDIT_BASE, "corda", "loftq")):
        raise WdlibError(
            f"peft's initialisation {init!r} has edited the base weights: start from a newly "
            "loaded model, with wdlib.lora.attach"
        )
    return config


def check_choice(what: str, given: str, known: tuple[str, ...]) -> None:
    """Raise WdlibError, with a suggestion, unless `given` is one of the known names."""
    if given not in known:
        raise WdlibError(
            f"there is no {what} {given!r}{_hint(given, known)}: choose one of {', '.join(known)}"
        )


def _hint(given: str, known: Iterable[str]) -> str:
    close = get_close_matches(str(given), sorted(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def place_key(site: Site) -> tuple[int, int, int]:
    """Type, layer and expert as numbers: what sets the draws of a projection apart."""
    return TYPES.index(site.type), site.layer, 0 if site.expert is None else site.expert + 1
