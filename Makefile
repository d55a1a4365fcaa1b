# The same steps as .ci/run, one verb each. `make` alone lists them.
.DEFAULT_GOAL := help
.PHONY: help lint format types architecture test test-core test-slow coverage lowest faults verify accuracy notebooks kernel-free responses plans cost bench figures experiments sensitivity docs pages package pins clean

help:  ## List the verbs
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-14s %s\n", $$1, $$2}'

lint:  ## Linter, formatting and spelling, nothing changed
	uv run ruff check .
	uv run ruff format --check .
	uv run codespell

format:  ## Fix what the linter and the formatter can
	uv run ruff check --fix .
	uv run ruff format .

types:  ## Type check
	uv run mypy

architecture:  ## Imports point to lower floors only
	uv run lint-imports
	uv run pytest -n 0 -q tests/test_architecture.py

test:  ## The test suite
	uv run pytest

test-core:  ## The core of the test suite with the compiler flags that users have (four minutes)
	XLA_FLAGS=--xla_force_host_platform_device_count=8 .ci/core uv run pytest

test-slow:  ## The larger checks that `make test` leaves out
	XLA_FLAGS=--xla_force_host_platform_device_count=8 uv run pytest -m slow
	uv run pytest --hypothesis-profile thorough $$(grep -rl '^@examples' tests)

coverage:  ## The share of lines that the test suite runs, and the least that it may be
	uv run pytest --cov=ntkdp --cov-report=term:skip-covered

lowest:  ## The core of the test suite with the lowest versions that pyproject.toml allows
	.ci/lowest

faults:  ## Kill fifty runs and sweeps at random moments, and resume them (about twenty minutes)
	NTKDP_KILLS=50 uv run pytest -n 0 -q -m 'slow or not slow' tests/test_faults.py

sensitivity:  ## Search for samples that add more to a clipped sum than they may (about half an hour)
	uv run python tests/test_sensitivity.py

verify:  ## Every claim of the theory, and Table 1 from computed evidence (about five minutes)
	uv run ntkdp verify

notebooks:  ## Run the theory notebooks, two at a time, into runs/notebooks; the committed ones stay (about five minutes)
	ls theory_notebooks/*.ipynb | xargs -P 2 -n 1 uv run --group notebooks \
		jupyter nbconvert --log-level WARN --to notebook --execute --output-dir runs/notebooks

accuracy:  ## The accuracy figures of the README, on real data (about ten minutes on two cores)
	uv run ntkdp compare benchmarks/digits_accuracy.toml

kernel-free:  ## Flows without a kernel on 5,000 digits, into docs/kernel_free.md (about seven minutes)
	uv run --extra data python benchmarks/kernel_free.py

responses:  ## Responses of twelve networks to noise held against runs, into docs/responses.md (an hour)
	uv run python benchmarks/responses.py
	uv run python benchmarks/response_narrow.py
	uv run python benchmarks/response_cost.py --observed-steps 50

plans:  ## Plans of private runs on four data sets held against runs (hours); DATA is the folder of two of them
	uv run --extra data python benchmarks/plan.py --wine $(DATA)/winequality-red.csv.gz --housing $(DATA)/california_housing.csv.gz

cost:  ## Predicted memory and time held against measured, into docs/cost.md (about five minutes)
	uv run python benchmarks/cost.py

bench:  ## Times next to other libraries, on this machine, into docs/benchmarks.md (about ten minutes)
	uv run python benchmarks/bench.py

figures:  ## Draw the figures of the pages in docs/ and print their tables (an hour and a half)
	uv run python docs/figures/high_dimensional_sgd.py
	uv run python docs/figures/two_times.py
	uv run python docs/figures/responses.py
	uv run python docs/figures/individual_privacy.py
	uv run python docs/figures/step_terms.py
	uv run --extra data python docs/figures/correlated_noise.py
	uv run --extra data python docs/figures/fine_tuning.py

experiments:  ## The sweeps and figures of docs/choosing.md (two hours); DATA is a folder with the two .csv.gz
	for name in mnist_mlp mnist_cnn digits; do \
		uv run --extra data ntkdp sweep docs/experiments/$$name.toml --out runs/$$name --overwrite || exit 1; done
	uv run ntkdp sweep docs/experiments/wine.toml --data $(DATA)/winequality-red.csv.gz --out runs/wine --overwrite
	uv run ntkdp sweep docs/experiments/housing.toml --data $(DATA)/california_housing.csv.gz --out runs/housing --overwrite
	uv run --extra data python docs/figures/calibration.py

docs:  ## Build the documentation into docs/_build/html, warnings being errors (two minutes)
	uv run --group docs sphinx-build -W -E -q --keep-going -b html docs docs/_build/html

pages: docs  ## Check in a browser that code and tables stay inside their columns, on every page, at two widths
	uv run --group docs python docs/check_widths.py docs/_build/html

package:  ## Build the wheel and the source archive into dist/
	uv build

pins:  ## Write the versions of this environment to pyproject.toml
	uv run python benchmarks/pin_versions.py

clean:  ## Remove caches and the environment
	rm -rf .venv .venv-lowest .mypy_cache .pytest_cache .ruff_cache .hypothesis dist uv.lock
