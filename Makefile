# One line each, no logic: set-up is .ci/setup, everything else the `wdlib` command.
.PHONY: figures test fuzz lab notebooks experiments workflow test-cluster bench bench-gpu setup fetch lint
figures: fetch; @.venv/bin/wdlib figures
test: lint fetch; .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --nbval-lax notebooks tests
fuzz: setup; @OMP_NUM_THREADS=1 PYTHONPATH=tests .venv/bin/python -m fuzz
lab: fetch; .venv/bin/jupyter lab notebooks
notebooks: fetch; @.venv/bin/wdlib refresh
experiments: setup; @.venv/bin/wdlib experiments $(OPTIONS)
workflow: setup .venv-workflow/bin/snakemake; @PATH="$(CURDIR)/.venv/bin:$(CURDIR)/.venv-workflow/bin:$$PATH" .venv-workflow/bin/snakemake $(OPTIONS)
test-cluster: setup .venv-workflow/bin/snakemake; @PATH="$(CURDIR)/.venv/bin:$(CURDIR)/.venv-workflow/bin:$$PATH" .venv/bin/python tests/cluster/run.py
.venv-workflow/bin/snakemake: requirements-workflow.lock | setup; .venv/bin/python -m venv --clear .venv-workflow && .venv-workflow/bin/python -m pip install -qq -r requirements-workflow.lock
bench: setup; .venv/bin/python -m venv .venv-bench && .venv-bench/bin/python -m pip install -qq -r requirements-bench.lock && .venv/bin/python docs/bench.py
bench-gpu: fetch; .venv/bin/python docs/gpu.py $(OPTIONS)
lint: setup; .venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy
fetch: setup; @.venv/bin/wdlib fetch
setup: ; @.ci/setup
