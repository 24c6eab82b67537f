"""One LoRA run as a configuration: the names of the starts, all settings, and its key."""

import hashlib
import json
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from math import isfinite
from pathlib import Path
from typing import Any

from wdlib import WdlibError, paths
from wdlib.characterise import stored_file
from wdlib.checkpoints import catalogue
from wdlib.lora.adapters import LoraSettings
from wdlib.lora.data import DATA

UNTRAINED = "untrained"
"""The "initialisation" of a run that has no adapter and takes no step: it measures the model."""

PEFT_INITIALISATIONS = ("default", "gaussian", "orthogonal", "pissa", "olora", "eva")

RESHAPED = {
    "literal": ("literal", "groups"),
    "preserved": ("preserved", "groups"),
    "a_only": ("a_only", "groups"),
    "one_template": ("literal", "one"),
    "independent": ("literal", "none"),
}
"""Name of a reshaped initialisation -> its mode and sharing, as `reshape_` takes them."""

ADAPTER_INITIALISATIONS = (*PEFT_INITIALISATIONS, *RESHAPED)

INITIALISATIONS = (UNTRAINED, *ADAPTER_INITIALISATIONS)


@dataclass(frozen=True)
class Hyperparameters:
    """How to train; the defaults are those of docs/method.md, section 8.

    batch, accumulation: sequences of a micro-batch, and micro-batches of a step on all devices
    together; a GPU divides a step otherwise (see `training`). weight_decay, max_grad_norm: not in
    the papers; of the unsloth template and Trainer. max_length: tokens of an example, more than any
    of the default data set has. answers_only: the loss counts the answers' tokens alone. dtype of
    the frozen base weights: "auto" is bfloat16 where the processor or GPU computes with it
    natively, float32 elsewhere; the adapter is always float32.
    Differs from the template: AdamW keeps its state in float32 instead of 8 bits.
    """

    rank: int = 16
    alpha: float = 16
    dropout: float = 0.0
    targets: tuple[str, ...] = LoraSettings.targets
    learning_rate: float = 2e-4
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    warmup_steps: int = 5
    steps: int = 60
    batch: int = 2
    accumulation: int = 4
    max_length: int = 1024
    answers_only: bool = False
    dtype: str = "auto"


@dataclass(frozen=True)
class Run:
    """One configuration, complete: equal runs give equal adapters on equal machines.

    model: as for `checkpoints.resolve`; init: one of INITIALISATIONS; reference: model whose stored
    characterisation at the adapter's rank shapes it, for the reshaped initialisations alone; data:
    one of DATA; seed: of the initialisation and of the data order; b_scale: as for `lora.attach`.
    Raises: WdlibError for what is none of these.
    """

    model: str = catalogue.DEFAULT
    init: str = "default"
    reference: str | None = None
    data: str = "alpaca"
    seed: int = 3407
    b_scale: float = 1.0
    hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)

    def __post_init__(self) -> None:
        if self.init not in INITIALISATIONS:
            raise WdlibError(
                f"there is no initialisation {self.init!r}: choose from "
                f"{', '.join(INITIALISATIONS)}"
            )
        if self.data not in DATA:
            raise WdlibError(f"there is no data set {self.data!r}: choose from {', '.join(DATA)}")
        reshaped = self.init not in (UNTRAINED, *PEFT_INITIALISATIONS)
        if reshaped != (self.reference is not None):
            raise WdlibError(
                f"the initialisation {self.init!r} {'needs' if reshaped else 'takes no'} reference"
            )
        if self.reference is not None and Path(self.reference).name != self.reference:
            raise WdlibError(f"the reference {self.reference!r} is no name of a stored model")
        numbers = [v for v in asdict(self.hyperparameters).values() if isinstance(v, float)]
        if not all(map(isfinite, (self.b_scale, *numbers))):
            raise WdlibError("a run has no settings that are NaN or infinite: give numbers")
        if self.hyperparameters.dtype not in ("auto", "float32", "bfloat16"):
            raise WdlibError(
                f"there is no dtype {self.hyperparameters.dtype!r}: give auto, float32 or bfloat16"
            )

    @property
    def variant(self) -> str:
        """What is compared, whatever the seed, model and data: "literal qwen lr0.0006", say."""
        steps = self.hyperparameters.steps
        longer = f"steps{steps}" if steps != Hyperparameters.steps else None  # keys go without it
        named = [self.init, self.reference, *self._changed_settings(), longer]
        return " ".join(filter(None, named))

    @property
    def key(self) -> str:
        """A short name, readable and unique: what differs from the defaults makes its hash."""
        named = [Path(self.model).name, self.init, self.reference, self.data]
        seed = None if self.init == UNTRAINED else f"s{self.seed}"
        digest = hashlib.sha256(json.dumps(_changed(self), sort_keys=True).encode()).hexdigest()
        return "-".join(filter(None, [*named, *self._changed_settings(), seed, digest[:8]]))

    @property
    def is_plain(self) -> bool:
        """Whether nothing but start, reference, seed, model and data is other than by default."""
        return self.b_scale == 1 and self.hyperparameters == Hyperparameters()

    def at_default_rate(self) -> "Run":
        """The same at the default's learning rate."""
        usual = replace(self.hyperparameters, learning_rate=Hyperparameters.learning_rate)
        return replace(self, hyperparameters=usual)

    def _changed_settings(self) -> list[str]:
        """The settings that have a short name, where they are not as by default."""
        changed = _changed(self)
        inner = changed.get("hyperparameters", {})
        named = {"lr": inner.get("learning_rate"), "r": inner.get("rank")}
        named["b"] = changed.get("b_scale")
        return [f"{short}{value:g}" for short, value in named.items() if value is not None]

    def to_json(self) -> str:
        """As text, whose content `from_dict` takes back."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Run":
        """From the fields' names and values; missing ones have their defaults.

        Raises: WdlibError for names that are no fields, for values of other types, and as the
        constructor does.
        """
        what = "these are no settings of a run"
        remedy = "correct them (a number like 2e-4 needs a point in YAML: 2.0e-4)"
        return paths.parse_json(json.dumps(content), cls, what=what, remedy=remedy)

    def characterisation(self) -> Path | None:
        """The file of the reference's characterisation; None without a reference."""
        if self.reference is None:
            return None
        return stored_file(self.reference, self.hyperparameters.rank)


def _changed(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not as by default, nested ones too.

    A new field with a default leaves the keys of old runs as they were.
    """
    changed = {}
    for f in fields(value):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        here = getattr(value, f.name)
        if here != default:
            changed[f.name] = _changed(here) if hasattr(here, "__dataclass_fields__") else here
    return changed
