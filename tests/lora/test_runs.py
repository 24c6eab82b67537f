"""One run as a configuration: its key and variant, and what cannot be."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_lora import LITERAL, REFERENCE

from wdlib import WdlibError, characterise, paths
from wdlib.lora.runs import Hyperparameters, Run


def test_a_run_survives_json():
    run = Run(init="literal", reference=REFERENCE, hyperparameters=Hyperparameters(rank=4))
    assert Run.from_dict(json.loads(run.to_json())) == run
    assert Run.from_dict({}) == Run()
    with pytest.raises(WdlibError, match="hyperparameters.leraning_rate: Unexpected"):
        Run.from_dict({"hyperparameters": {"leraning_rate": 1.0}})


def test_keys_tell_runs_apart_and_last():
    run = Run(init="literal", reference=REFERENCE)
    others = [
        replace(run, seed=1),
        replace(run, init="preserved"),
        replace(run, b_scale=0.1),
        replace(run, hyperparameters=Hyperparameters(weight_decay=0.0)),
        replace(run, hyperparameters=Hyperparameters(learning_rate=1e-3)),
    ]
    assert len({run.key, *(other.key for other in others)}) == 6
    assert "-lr0.001-" in others[-1].key
    # Stored results are found by these names.
    assert Run().key == "smollm2-135m-instruct-default-alpaca-s3407-44136fa3"
    assert run.key == f"smollm2-135m-instruct-literal-{REFERENCE}-alpaca-s3407-77643535"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init": "best"}, "no initialisation 'best'"),
        ({"data": "poems"}, "no data set 'poems'"),
        ({"init": "literal"}, "'literal' needs reference"),
        ({"reference": REFERENCE}, "'default' takes no reference"),
        ({"hyperparameters": Hyperparameters(dtype="int8")}, "no dtype 'int8'"),
    ],
)
def test_a_run_that_cannot_be_is_refused(settings, message):
    with pytest.raises(WdlibError, match=message):
        Run(**settings)


def test_the_characterisations_of_the_grid_are_there():
    run = Run(init="literal", reference=REFERENCE)
    assert characterise.load(run.characterisation()).rank == 16
    assert run.characterisation().is_relative_to(paths.RESULTS)
    assert Run().characterisation() is None
    assert Path(run.characterisation()).is_file()


def test_a_variant_is_what_differs_beside_seed_model_and_data():
    assert Run().variant == Run(seed=1, data="math", model="other").variant == "default"
    assert Run(**LITERAL).variant == "literal qwen2.5-coder-0.5b-instruct"
    h = Hyperparameters(learning_rate=6e-4, rank=64)
    varied = Run(**LITERAL, b_scale=0.3, hyperparameters=h)
    assert varied.variant == "literal qwen2.5-coder-0.5b-instruct lr0.0006 r64 b0.3"
    assert Run(hyperparameters=Hyperparameters(steps=240)).variant == "default steps240"
