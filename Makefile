# One line each, no logic: set-up is .ci/setup, everything else the `wdlib` command.
.PHONY: help figures test fuzz lab notebooks experiments workflow test-cluster site test-site bench bench-gpu setup fetch lint
help: ; @sed -n 's/^## /  make /p' Makefile
## figures       every figure that is out of date, after set-up and downloads
figures: fetch; @.venv/bin/wdlib figures
## test          lint, then all tests and notebook checks, as CI does
test: lint fetch; .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --nbval-lax notebooks tests
## fuzz          ten minutes of attacks on every reader; writes the table of docs/reliability.md
fuzz: setup; @OMP_NUM_THREADS=1 PYTHONPATH=tests .venv/bin/python -m fuzz
## lab           the notebooks in JupyterLab
lab: fetch; .venv/bin/jupyter lab --config=notebooks/jupyter_server_config.py --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb
## notebooks     the stored outputs of the notebooks, anew
notebooks: fetch; @.venv/bin/wdlib refresh
## experiments   what is left of the LoRA grid, days of work; OPTIONS="--dry-run" lists it
experiments: setup; @.venv/bin/wdlib experiments $(OPTIONS)
## workflow      everything through Snakemake (docs/scale.md); OPTIONS=--dry-run says what there is to do
workflow: setup .venv-workflow/bin/snakemake; @PATH="$(CURDIR)/.venv/bin:$(CURDIR)/.venv-workflow/bin:$$PATH" .venv-workflow/bin/snakemake $(OPTIONS)
## test-cluster  the same results on a SLURM cluster of this machine, as root
test-cluster: setup .venv-workflow/bin/snakemake; @PATH="$(CURDIR)/.venv/bin:$(CURDIR)/.venv-workflow/bin:$$PATH" .venv/bin/python tests/cluster/run.py
.venv-workflow/bin/snakemake: requirements-workflow.lock | setup; .venv/bin/python -m venv --clear .venv-workflow && .venv-workflow/bin/python -m pip install -qq -r requirements-workflow.lock
## site          the site, in build/site
site: .venv-site/bin/sphinx-build; .venv-site/bin/sphinx-build -qEaW --keep-going -c docs -d build/doctrees . build/site
## test-site     every page of it in Chromium, the system's, at two widths
test-site: site; .venv-site/bin/python tests/website/browse.py build/site
.venv-site/bin/sphinx-build: requirements-site.lock | setup; .venv/bin/python -m venv --clear .venv-site && .venv-site/bin/python -m pip install -qq -r requirements-site.lock
## bench         docs/bench.md, anew
bench: setup; .venv/bin/python -m venv .venv-bench && .venv-bench/bin/python -m pip install -qq -r requirements-bench.lock && .venv/bin/python docs/bench.py
## bench-gpu     docs/gpu.md, anew, on a machine with a GPU
bench-gpu: fetch; .venv/bin/python docs/gpu.py $(OPTIONS)
## lint          ruff and mypy
lint: setup; .venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy
## fetch         the default model, to data/cache
fetch: setup; @.venv/bin/wdlib fetch
## setup         .venv with the versions of requirements.lock, or the active environment that has them
setup: ; @.ci/setup
