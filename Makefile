export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
export OMP_NUM_THREADS ?= 1
PY := .venv/bin/python
PYTEST := $(PY) -m pytest -n 2

.PHONY: demo test shapes lint docs bench clean

demo: .venv/.stamp
	$(PY) -m stochproc demo

test: .venv/.stamp
	$(PYTEST)

shapes: .venv/.stamp
	$(PYTEST) tests --jaxtyping-packages=stochproc,beartype.beartype -m "not (bad_input or slow or keops)"

lint: .venv/.stamp
	$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

docs: .venv/.stamp
	$(PY) -m sphinx -W --keep-going -n -q -b html docs docs/_build/html
	$(PY) -m sphinx -W --keep-going -q -D plot_gallery=0 -b doctest docs docs/_build/doctest
	$(PY) -m doctest -o NORMALIZE_WHITESPACE -o ELLIPSIS README.md

bench: .venv/.stamp
	for script in benchmarks/bench_*.py; do $(PY) $$script || exit 1; done

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache docs/_build docs/auto_tutorials docs/api/generated demo_output

.venv/.stamp: pyproject.toml constraints.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install -q uv && .venv/bin/uv pip install -q -p .venv/bin/python -c constraints.txt -e '.[dev]' \
	|| .venv/bin/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@
