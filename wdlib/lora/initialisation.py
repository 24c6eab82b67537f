"""A reference model's characterisation -> the initial values of a stock peft LoRA adapter.

Each group of the reference (a referenced weight and its members) shares one template for A and one
for B; every matrix is a copy of its group's template with its own number of entries drawn again
(arXiv 2509.00046; docs/method.md, section 7). `attach` offers peft's initialisations through the
same door, for comparison.

No initialisation here touches the base weights. Those that begin with B A other than zero and must
leave the function as it was (`preserved`, and peft's PiSSA and OLoRA, which in peft edit the base)
hold the negative of the first B A in a second, frozen adapter, START. `export` joins both into one
ordinary adapter for the untouched base.
"""

import copy
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from wdlib import TYPES, WdlibError, generator
from wdlib.characterise import Characterisation, Group
from wdlib.lora import adapters
from wdlib.lora.adapters import ADAPTER, START, Site
from wdlib.lora.runs import ADAPTER_INITIALISATIONS, PEFT_INITIALISATIONS, RESHAPED

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


MODES = ("literal", "preserved", "a_only")
"""literal: A and B are set, as in the paper. preserved: the same, and the frozen negative start
keeps the function at step 0. a_only: A is set, B is 0."""

SHARINGS = ("groups", "one", "none")
"""Who shares a template: the types of a group, all types, or no two matrices."""

LONE_COUNTS = generator.GaussianCounts(mean=0.1, deviation=0.02)
"""Counts of a group whose distances are no power law: a lone type without a power-law pair. The
paper asks for a Gaussian law there and gives no parameters; with these, a tenth of the entries
differs from the template, and distances stay proportional to counts."""

EVA_RHO = 1.0
"""EVA keeps the rank of every matrix, where peft's default of 2 moves rank between them: all
initialisations then train equally many parameters."""


class NothingToTransfer(UserWarning):
    """The reference has one group that holds all types."""


@dataclass(frozen=True)
class Initialised:
    """How one adapted projection begins.

    shape: (d_out, d_in) of the projection; A is (rank, d_in) and B (d_out, rank). group: the
    referenced weight whose template it shares; role: "referenced" or "member"; count_a, count_b:
    entries that were drawn again. These four are None for peft's initialisations, and count_b
    where B is 0. sigma_a, sigma_b: standard deviations of the entries as they are.
    """

    name: str
    layer: int
    type: str
    shape: tuple[int, int]
    group: str | None
    role: str | None
    count_a: int | None
    count_b: int | None
    sigma_a: float
    sigma_b: float


@dataclass(frozen=True)
class Report:
    """What an initialisation did. reference: model of the characterisation, None for peft's."""

    init: str
    reference: str | None
    seed: int
    projections: tuple[Initialised, ...]


@dataclass(frozen=True)
class _Plan:
    """What `_fill` needs to know of a reshaped initialisation."""

    characterisation: Characterisation
    rank: int
    mode: str
    sharing: str
    b_scale: float
    seed: int


def attach(
    model: "PreTrainedModel",
    init: str,
    *,
    characterisation: Characterisation | None = None,
    settings: adapters.LoraSettings | None = None,
    b_scale: float = 1.0,
    seed: int = 3407,
    batches: Iterable[Mapping[str, "torch.Tensor"]] | None = None,
) -> "tuple[PeftModel, Report]":
    """A peft LoRA adapter on a transformers model, initialised in one of INITIALISATIONS.

    Arguments: model, changed in place as `get_peft_model` does (frozen, layers wrapped), its
    weights and its mode (training or not) untouched; characterisation and b_scale, for the reshaped
    initialisations alone; settings, `LoraSettings()` by default; seed, of peft's draws as well
    (torch's global state is left as it was); batches, model inputs on the model's device, for "eva"
    alone.
    Returns: the peft model, of which the adapter "default" alone is trainable, and the report.
    Raises: WdlibError, before the model is touched, for an unknown init, targets that are missing,
    no projections, joined or quantised, a rank above a matrix's dimension, a missing or unfitting
    characterisation, missing batches, and "olora" on Conv1D layers. Warns NothingToTransfer as
    `reshape_` does.
    Differs from peft: the base weights of "pissa" and "olora" stay as they are (see START), and
    "eva" keeps the rank of every matrix.
    """
    import torch
    from peft import EvaConfig, LoraConfig, get_peft_model

    settings = settings or adapters.LoraSettings()
    adapters.check_choice("initialisation", init, ADAPTER_INITIALISATIONS)
    if hasattr(model, "peft_config") or any(hasattr(m, "base_layer") for m in model.modules()):
        raise WdlibError("the model already has an adapter: attach to the plain base model")
    sites = adapters.target_sites(model, settings)
    plan = None
    if init in RESHAPED:
        if characterisation is None:
            raise WdlibError(f"the initialisation {init!r} needs the characterisation of a model")
        plan = _Plan(characterisation, settings.rank, *RESHAPED[init], b_scale, seed)
        _check_plan(plan, sites)
    if init == "eva" and batches is None:
        raise WdlibError("the initialisation 'eva' reads activations: give it batches of inputs")
    conv1d = type(sites[0].module).__name__ == "Conv1D"
    if init == "olora" and conv1d:
        raise WdlibError(
            f"peft 0.21 takes the transpose of Conv1D layers ({sites[0].name}) for 'olora': choose "
            "another initialisation for this model"
        )
    if init == "orthogonal" and settings.rank % 2:
        raise WdlibError(f"the initialisation 'orthogonal' needs an even rank, not {settings.rank}")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # any number works
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets),
        init_lora_weights=init if init in PEFT_INITIALISATIONS[1:] else True,  # type: ignore[arg-type]  # checked above
        fan_in_fan_out=conv1d,
        task_type="CAUSAL_LM" if model.can_generate() else None,
        eva_config=EvaConfig(rho=EVA_RHO) if init == "eva" else None,
    )
    originals = {
        site.name: site.module.weight.detach().clone()
        for site in sites
        if init in adapters.EDIT_BASE
    }
    training = model.training
    with torch.random.fork_rng(), adapters.expected_peft_warnings():
        torch.manual_seed(seed)
        peft_model = get_peft_model(model, config, low_cpu_mem_usage=init == "eva")
        if init == "eva" and batches is not None:
            _eva(peft_model, batches)
    for site in sites:
        if site.name in originals:
            site.module.weight.data = originals.pop(site.name)
    # Loading an adapter whose configuration says "pissa" edits the base weights once more.
    attached: Any = peft_model.peft_config[ADAPTER]
    attached.init_lora_weights, attached.eva_config = True, None
    if init in adapters.EDIT_BASE:
        _hold_start(peft_model)
    report = _fill(peft_model, plan, init) if plan else _report(peft_model, init, None, seed, {})
    peft_model.train(training)  # peft's new modules begin in training mode
    return peft_model, report


def reshape_(
    peft_model: "PeftModel",
    characterisation: Characterisation,
    *,
    mode: str = "literal",
    sharing: str = "groups",
    b_scale: float = 1.0,
    seed: int = 3407,
) -> Report:
    """Set A and B of a stock peft LoRA model from the templates of a reference's groups.

    A has standard deviation sqrt(1 / (3 d_in)), that of peft's default; B has `b_scale` times it.
    The draws of a matrix depend on the seed, its type and its layer alone, so that adapting
    another type or layer changes no others. With sharing="none" every matrix has a template of its
    own, and what is drawn again makes no difference: all entries are independent draws.

    Arguments: peft_model, changed in place, its adapter "default" holding plain LoRA layers of the
    characterisation's rank; mode, one of MODES; sharing, one of SHARINGS.
    Raises: WdlibError, before anything is touched, for what is no such model, for projections that
    the naming table does not know or the characterisation lacks, and for unknown arguments.
    Warns NothingToTransfer for a characterisation with one group.
    Source: arXiv 2509.00046 (docs/method.md, section 7).
    """
    from peft import PeftModel

    if not isinstance(peft_model, PeftModel):
        raise WdlibError(
            f"a {type(peft_model).__name__} is no PeftModel: make one with peft's get_peft_model, "
            "or use wdlib.lora.attach"
        )
    config = adapters.plain_config(peft_model)
    adapted = adapters.adapted_sites(peft_model)
    plan = _Plan(characterisation, config.r, mode, sharing, b_scale, seed)
    _check_plan(plan, [site for site, _ in adapted])
    for site, layer in adapted:
        if layer.r[ADAPTER] != config.r or layer.merged:
            merged = " and is merged" if layer.merged else ""
            raise WdlibError(
                f"the adapter of {site.name} has rank {layer.r[ADAPTER]}{merged}: give a model "
                f"whose adapters all have rank {config.r} and are not merged (`unmerge_adapter`)"
            )
    return _fill(peft_model, plan, mode)


def _check_plan(plan: _Plan, sites: list[Site]) -> None:
    """Refuse what does not fit; warn where the reference has nothing to say."""
    adapters.check_choice("mode", plan.mode, MODES)
    adapters.check_choice("sharing", plan.sharing, SHARINGS)
    reference = plan.characterisation
    if not isinstance(reference, Characterisation):
        raise WdlibError(
            f"a {type(reference).__name__} is no characterisation: make one with "
            "wdlib.characterise.characterise"
        )
    if not (math.isfinite(plan.b_scale) and plan.b_scale >= 0):
        raise WdlibError(f"b_scale is a number from 0 up, not {plan.b_scale}")
    if plan.seed < 0:
        raise WdlibError(f"a seed is a number from 0 up, not {plan.seed}")
    if plan.rank != reference.rank:
        raise WdlibError(
            f"the adapter has rank {plan.rank} and the characterisation of {reference.model} was "
            f"made at rank {reference.rank}: characterise it at {plan.rank}"
        )
    adapted = [t for t in TYPES if any(site.type == t for site in sites)]
    grouped = {t: group for t in adapted for group in reference.groups if t in group.types}
    if lacking := [t for t in adapted if t not in grouped]:
        raise WdlibError(
            f"the characterisation of {reference.model} has no {' and no '.join(lacking)}, which "
            "the adapter needs: take a reference with these types, or leave them out of the targets"
        )
    for group in grouped.values():  # refuses exponents and ranks that give no counts
        _counts(reference, group, (plan.rank, plan.rank + 1))
    if plan.sharing == "groups" and len(reference.groups) == 1 and len(adapted) > 1:
        warnings.warn(
            f"all types of {reference.model} are in one group, so it has nothing to transfer: the "
            "initialisation degenerates to one template shared by all types",
            NothingToTransfer,
            stacklevel=3,
        )


@dataclass(frozen=True)
class _Draw:
    """A and B of one projection, float32, and the numbers of entries that were drawn again."""

    group: Group
    a: np.ndarray
    b: np.ndarray
    count_a: int
    count_b: int


def _fill(peft_model: "PeftModel", plan: _Plan, init: str) -> Report:
    """Draw everything, then set it: a failure while drawing leaves the model as it was."""
    import torch

    adapted = adapters.adapted_sites(peft_model)
    sizes = [(layer.in_features, layer.out_features) for _, layer in adapted]
    drawn = list(_draws(plan, [site for site, _ in adapted], sizes))
    draws = {site.name: draw for (site, _), draw in zip(adapted, drawn, strict=True)}
    if START in peft_model.peft_config:
        peft_model.delete_adapter(START)
    with torch.no_grad():
        for (_, layer), draw in zip(adapted, drawn, strict=True):
            layer.lora_A[ADAPTER].weight.copy_(torch.from_numpy(draw.a))
            layer.lora_B[ADAPTER].weight.copy_(torch.from_numpy(draw.b))
    if plan.mode == "preserved":
        _hold_start(peft_model)
    return _report(peft_model, init, plan, plan.seed, draws)


def _draws(plan: _Plan, sites: list[Site], sizes: list[tuple[int, int]]) -> Iterator[_Draw]:
    """A and B of every site; sizes are its (d_in, d_out)."""
    longest_a, longest_b = (plan.rank * max(column) for column in zip(*sizes, strict=True))
    for site, (d_in, d_out) in zip(sites, sizes, strict=True):
        group = next(g for g in plan.characterisation.groups if site.type in g.types)
        sigma = math.sqrt(1 / (3 * d_in))
        a, count_a = _matrix(plan, site, group, 0, (plan.rank, d_in), longest_a)
        b, count_b = _matrix(plan, site, group, 1, (d_out, plan.rank), longest_b)
        scale = 0.0 if plan.mode == "a_only" else plan.b_scale
        yield _Draw(group, a * np.float32(sigma), b * np.float32(scale * sigma), count_a, count_b)


def _matrix(
    plan: _Plan, site: Site, group: Group, which: int, shape: tuple[int, int], longest: int
) -> tuple[np.ndarray, int]:
    """One matrix of unit standard deviation around its template, and its count of new entries.

    which: 0 for A, 1 for B. Every random stream has its own key, of one length.
    """
    own = adapters.place_key(site)
    shared = {
        "groups": (TYPES.index(group.referenced), 0, 0),
        "one": (len(TYPES), 0, 0),
        "none": own,
    }[plan.sharing]
    rng = np.random.default_rng([plan.seed, which, *own])
    counts = _counts(plan.characterisation, group, shape)
    count = counts.draw(1, math.prod(shape), rng)
    template = generator.template(
        longest, sigma=1.0, rng=np.random.default_rng([plan.seed, 2 + which, *shared])
    )
    return generator.redraw_entries(template, shape, count, sigma=1.0, rng=rng)[0], int(count[0])


def law(characterisation: Characterisation, group: Group) -> tuple[float, float] | None:
    """Medians of alpha and xmin over the power-law pairs inside a group; None if there are none."""
    inside = {*group.types}
    fitted = [p for p in characterisation.pairs if p.alpha is not None and {*p.types} <= inside]
    if not fitted:
        return None
    alphas, xmins = zip(*((pair.alpha, pair.xmin) for pair in fitted), strict=True)
    return float(np.median(alphas)), float(np.median(xmins))


def _counts(
    characterisation: Characterisation, group: Group, shape: tuple[int, int]
) -> generator.ParetoCounts | generator.GaussianCounts:
    """How many entries of a group's matrices are drawn again."""
    found = law(characterisation, group)
    return LONE_COUNTS if found is None else generator.counts_for(*found, shape)


def _hold_start(peft_model: "PeftModel") -> None:
    """Add the adapter START: the negative of B A as it is now, active and frozen for good."""
    import torch

    config: Any = copy.copy(peft_model.peft_config[ADAPTER])
    config.init_lora_weights, config.lora_dropout, config.modules_to_save = True, 0.0, None
    with torch.random.fork_rng():
        peft_model.add_adapter(START, config)
    for _, layer in adapters.lora_layers(peft_model):
        for factors, sign in ((layer.lora_A, 1), (layer.lora_B, -1)):
            factors[START].weight.data = sign * factors[ADAPTER].weight.detach().clone()
        # peft makes every active adapter trainable, also after `disable_adapter`; but not these.
        layer.frozen_peft_weight_names = {
            **layer.frozen_peft_weight_names,
            START: ("lora_A", "lora_B"),
        }
    tuner: Any = peft_model.base_model
    tuner.set_adapter([ADAPTER, START])


def _eva(peft_model: "PeftModel", batches: "Iterable[Mapping[str, torch.Tensor]]") -> None:
    from peft import initialize_lora_eva_weights

    peft_model.eval()
    initialize_lora_eva_weights(peft_model, list(batches), show_progress_bar=False)


def _report(
    peft_model: "PeftModel", init: str, plan: _Plan | None, seed: int, draws: dict[str, _Draw]
) -> Report:
    rows = []
    for site, layer in adapters.adapted_sites(peft_model):
        draw = draws.get(site.name)
        sigma_a, sigma_b = (
            float(factors[ADAPTER].weight.detach().cpu().double().std(correction=0))
            for factors in (layer.lora_A, layer.lora_B)
        )
        chosen: tuple[str | None, str | None, int | None, int | None] = (None, None, None, None)
        if draw is not None:
            role = "referenced" if site.type == draw.group.referenced else "member"
            count_b = draw.count_b if sigma_b > 0 else None
            chosen = (draw.group.referenced, role, draw.count_a, count_b)
        shape = (layer.out_features, layer.in_features)
        rows.append(Initialised(site.name, site.layer, site.type, shape, *chosen, sigma_a, sigma_b))
    return Report(init, plan.characterisation.model if plan else None, seed, tuple(rows))
