# The only three commands one needs: `make quickstart`, `make test`, `make check`. `make examples` shows what else there is.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart examples test check docs clean

.venv/run: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/dev: .venv/run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

quickstart: .venv/run
	$(BIN)/python examples/emoji/quickstart.py

# Each draws one picture into runs/, beside the numbers that it stands for; minutes in all on two cores.
EXAMPLES := $(addprefix examples/emoji/,embedding.py controlnet.py slider.py prior.py validation.py)

examples: .venv/run
	set -e; for example in $(EXAMPLES); do $(BIN)/python $$example; done

test: .venv/dev
	$(BIN)/python -m pytest -n 2

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -p no:cacheprovider tests/test_house.py

docs: .venv/dev
	$(BIN)/python -m sfumato.cli.reference > docs/options.md
	$(BIN)/python -m sfumato.cli.loads_in > docs/loads-in.md
	$(BIN)/python -m sfumato.cli.adapter_reference > docs/adapters.md
	PYTHONPATH=tests/cli $(BIN)/python tests/cli/test_kohya_flags.py > docs/kohya-flags.md

clean:
	rm -rf .venv runs
