# make demo    set up, then walk from data to pictures and captions on this machine (runs/demo)
# make test    set up, then run all tests
# make setup   only the virtual environment in .venv; PYTHON=/path/to/python3.12 chooses its Python

# The first Python of at least 3.10; if there is none, the check below says so.
PYTHON ?= $(or $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done),python3)
VENV := .venv
STAMP := $(VENV)/.installed
STARTED := $(VENV)/.installing

.PHONY: demo test setup clean

demo: setup
	$(VENV)/bin/vilg demo --out runs/demo

# Two test processes of one thread each: the distributed tests start processes of their own.
test: setup
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --durations 10

setup: $(STAMP)

# The stamp is written last, so an interrupted installation is noticed and starts from an empty environment
# (pip keeps what it has downloaded in its cache).
$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) vilg/tools/setup_checks.py
	@if [ -e $(STARTED) ]; then echo "the last installation was interrupted: starting again"; rm -rf $(VENV); fi
	$(PYTHON) -m venv $(VENV)
	@touch $(STARTED)
	@$(VENV)/bin/python -m pip install -r requirements.txt && $(VENV)/bin/python -m pip install --no-deps -e . || \
		{ echo; echo "setup: the installation did not finish (pip's message is above)."; \
		echo "setup: check the network, the package index and the free space, then run the same command again."; exit 1; }
	@rm -f $(STARTED)
	@touch $(STAMP)

clean:
	rm -rf $(VENV) build *.egg-info
